"""Writing the page of a command: checked before the work, written when its result is there."""

from collections.abc import Sequence
from pathlib import Path

from ckpt_ema.errors import Code, FailedError
from ckpt_ema.options import PathLike
from ckpt_ema.output.files import replace_file
from ckpt_ema.report.place import check_place

_KINDS = (".html",)


def check_report(path: PathLike, folders: Sequence[Path]) -> None:
    """Refuse a page that could not be written, or would be inside one of the folders.

    Raises `OptionError`.
    """
    check_place("--report", Path(path), _KINDS, folders, "Write it elsewhere.")


def write_report(path: PathLike, page: str, done: str, *, sync: bool = True) -> None:
    """Write a page, replacing any that exists; `done` says what is complete without it.

    Raises `FailedError`.
    """
    target = Path(path)
    try:
        replace_file(target, page.encode(), sync=sync)
    except OSError as error:
        message = f"The report {target} cannot be written: {error.strerror}; {done}."
        raise FailedError(message, code=Code.WRITE_FAILED, path=target) from error
