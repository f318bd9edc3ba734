"""--include and --exclude: whole names, matched as a shell matches them."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.verdict import Reason, Verdict, skipped
from ckpt_ema.notices import Notice
from ckpt_ema.options import Selection


def unselected(name: str, selection: Selection) -> Verdict | None:
    """Return that the globs leave a name out; None if they do not."""
    if any(matches(name, glob) for glob in selection.exclude):
        return skipped(Reason.EXCLUDED)
    if selection.include and not any(matches(name, glob) for glob in selection.include):
        return skipped(Reason.NOT_INCLUDED)
    return None


def matches(name: str, glob: str) -> bool:
    """Return whether a glob matches a whole name, with or without its extension.

    >>> matches("step_100.pt", "step_100"), matches("step_1000.pt", "step_100")
    (True, False)
    """
    glob = glob.rstrip("/")  # shells complete folders with it
    return fnmatchcase(name, glob) or fnmatchcase(stem_of(name), glob)


def unmatched(names: Iterable[str], selection: Selection) -> tuple[Notice, ...]:
    """Return warnings of globs that exclude nothing; raises for one that includes nothing."""
    known = sorted(names)
    for glob in selection.include:
        if not any(matches(name, glob) for name in known):
            raise RefusedError(
                f"--include {glob} matches nothing; the names are {some(known)}.",
                "A glob must match the whole name: 'checkpoint-1*', not 'checkpoint-1'.",
                code=Code.NO_MATCH,
            )
    return tuple(
        Notice(Code.NO_MATCH, f"--exclude {glob} matches nothing.")
        for glob in selection.exclude
        if not any(matches(name, glob) for name in known)
    )


def none_selected(names: Iterable[str]) -> RefusedError:
    """Return the error for globs that leave nothing."""
    return RefusedError(
        f"--include and --exclude leave none of {some(sorted(names))}.",
        code=Code.NOTHING_SELECTED,
    )
