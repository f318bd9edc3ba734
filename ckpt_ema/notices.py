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
