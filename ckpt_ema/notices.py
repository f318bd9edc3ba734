"""Warnings and notes: what a person should know although nothing stops the work.

A warning says that the result is right but may not be wanted; a note says what was decided.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from ckpt_ema.errors import Code, RefusedError, counted, printable


class Notice(NamedTuple):
    """One warning or note."""

    code: Code
    message: str  # one sentence

    def __str__(self) -> str:
        return printable(self.message)

    def described(self) -> dict[str, str]:
        """Return it as plain values, ready for JSON."""
        return {"code": self.code.value, "message": str(self)}


def refuse_warnings(warnings: Sequence[Notice]) -> None:
    """Raise `RefusedError` for the first warning, as --strict asks for; the others are counted."""
    if warnings:
        first, more = warnings[0], len(warnings) - 1
        rest = f" (and {counted(more, 'more warning')})" if more else ""
        hint = "Without --strict this is a warning."
        raise RefusedError(f"{first.message}{rest}", hint, code=first.code)


def notices_from(described: object) -> tuple[Notice, ...]:
    """Return the notices that JSON describes, without anything that is not one.

    >>> notices_from([{"code": "zeros", "message": "w has zeros."}, 5])
    (Notice(code=<Code.ZEROS: 'zeros'>, message='w has zeros.'),)
    """
    found = []
    for one in described if isinstance(described, list) else []:
        with suppress(TypeError, KeyError, ValueError):
            found.append(Notice(Code(one["code"]), str(one["message"])))
    return tuple(found)
