"""Warnings and notes: what a person should know although nothing stops the work.

A warning says that the result is right but may not be what the user wants; a note says what was
decided. Both have a code, so that scripts need not parse the sentence.
"""

from typing import NamedTuple

from ckpt_ema.errors import Code, printable


class Notice(NamedTuple):
    """One warning or note."""

    code: Code
    message: str  # one sentence

    def __str__(self) -> str:
        return printable(self.message)

    def described(self) -> dict[str, str]:
        """Return it as plain values, ready for JSON."""
        return {"code": self.code.value, "message": str(self)}


def notices_from(described: object) -> tuple[Notice, ...]:
    """Return the notices that JSON describes, without anything that is not one.

    >>> notices_from([{"code": "zeros", "message": "w turns to zeros."}, 5])
    (Notice(code=<Code.ZEROS: 'zeros'>, message='w turns to zeros.'),)
    """
    codes = {code.value: code for code in Code}
    listed = described if isinstance(described, list) else []
    pairs = [(one.get("code"), one.get("message")) for one in listed if isinstance(one, dict)]
    return tuple(
        Notice(codes[code], message)
        for code, message in pairs
        if isinstance(code, str) and code in codes and isinstance(message, str)
    )
