"""The refusals that files of several containers share."""

import os

from ckpt_ema.errors import Code, IncompleteError, RefusedError

_LEAVE_OUT = "Was its save interrupted? Leave it out."


def cut_short(
    path: str, why: str, tensor: str | None = None, *, or_damaged: bool = False
) -> IncompleteError:
    """Return the refusal of a file that ends too soon; `why` completes the sentence."""
    what = "cut short or damaged" if or_damaged else "cut short"
    code = Code.CUT_SHORT
    return IncompleteError(
        f"{path} is {what}: {why}.", _LEAVE_OUT, code=code, path=path, tensor=tensor
    )


def damaged(path: str, why: str, hint: str = "") -> RefusedError:
    """Return the refusal of a file that contradicts itself; `why` completes the sentence."""
    return RefusedError(f"{path} {why}.", hint, code=Code.DAMAGED, path=path)


def broken_tensor(
    path: str, tensor: str, why: str, hint: str = "", code: Code = Code.DAMAGED
) -> RefusedError:
    """Return the refusal of one tensor of a file; `why` completes the sentence."""
    return RefusedError(
        f"{path}: tensor {tensor} {why}.", hint, code=code, path=path, tensor=tensor
    )


def missing(folder: str | os.PathLike[str], by: str, name: str) -> IncompleteError:
    """Return the refusal of a folder that lacks the file `name`, which its file `by` names."""
    return IncompleteError(
        f"{folder} is incomplete: {by} names {name}, and that file is missing.",
        "Was its save interrupted? Restore the file or leave the checkpoint out.",
        code=Code.INCOMPLETE,
        path=os.path.join(folder, name),
    )


def check_start(path: str, start: bytes) -> None:
    """Refuse a file whose first bytes are those of an interrupted save or of a Git LFS pointer."""
    if not any(start):
        what = "begins with zeros" if start else "is empty"
        raise IncompleteError(f"{path} {what}.", _LEAVE_OUT, code=Code.CUT_SHORT, path=path)
    if start.startswith(b"version https://git-lfs"):
        raise RefusedError(
            f"{path} is a Git LFS pointer.",
            "Run `git lfs pull`.",
            code=Code.WRONG_FORMAT,
            path=path,
        )


def is_plain_name(name: object) -> bool:
    """Return whether it names a file in the same folder, and nothing outside of it."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(separator in name for separator in ("/", "\0"))
    )
