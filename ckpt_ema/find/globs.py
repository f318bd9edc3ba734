"""What --include and --exclude say of names: whole names, as a shell matches them."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ckpt_ema.errors import RefusedError, printable, some
from ckpt_ema.find.names import stem_of
from ckpt_ema.options import Selection

UNWANTED = ("left out by --exclude", "not matched by --include")


def why_unwanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why patterns keep an entry out, by its name with or without extension; None if they do not.

    >>> why_unwanted("checkpoint-1000", ["checkpoint-100"], [])
    'not matched by --include'
    """
    if any(matches(name, pattern) for pattern in exclude):
        return UNWANTED[0]
    if include and not any(matches(name, pattern) for pattern in include):
        return UNWANTED[1]
    return None


def matches(name: str, pattern: str) -> bool:
    """Whether a whole name, with or without its extension, is as a shell's pattern says.

    >>> matches("step_100.pt", "step_100"), matches("step_1000.pt", "step_100")
    (True, False)
    """
    pattern = pattern.rstrip("/")  # as a shell completes folders
    return fnmatchcase(name, pattern) or fnmatchcase(stem_of(name), pattern)


def unmatched(names: Iterable[str], selection: Selection) -> list[str]:
    """Warnings of patterns that leave nothing out; refuses one that takes nothing in."""
    known = sorted(names)
    for pattern in selection.include:
        if not any(matches(name, pattern) for name in known):
            raise RefusedError(
                f"--include {printable(pattern)} matches nothing; the names are {some(known)}.",
                "A pattern is matched with whole names: 'checkpoint-1*', not 'checkpoint-1'.",
            )
    return [
        f"--exclude {printable(pattern)} matches nothing."
        for pattern in selection.exclude
        if not any(matches(name, pattern) for name in known)
    ]


def all_unwanted(names: Iterable[str]) -> RefusedError:
    return RefusedError(f"--include and --exclude leave none of {some(sorted(names))}.")
