"""The refusals that files of several containers share."""

import os

from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.storage.protocol import Location

AGAIN = "Download or save it again."
_LEAVE_OUT = "Was its save interrupted? Leave it out."


def refused(
    path: Location,
    why: str,
    hint: str = "",
    code: Code = Code.DAMAGED,
    *,
    tensor: str | None = None,
) -> RefusedError:
    """Return the refusal of a file, or of one tensor of it; `why` completes the sentence."""
    subject = path if tensor is None else f"{path}: tensor {tensor}"
    return RefusedError(f"{subject} {why}.", hint, code=code, path=path, tensor=tensor)


def cut_short(
    path: Location, why: str, tensor: str | None = None, *, or_damaged: bool = False
) -> IncompleteError:
    """Return the refusal of a file that ends too soon; `why` completes the sentence."""
    message = f"{path} is cut short{' or damaged' * or_damaged}: {why}."
    return IncompleteError(message, _LEAVE_OUT, code=Code.CUT_SHORT, path=path, tensor=tensor)


def missing(folder: Location, by: str, name: str) -> IncompleteError:
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
        message = f"{path} {'begins with zeros' if start else 'is empty'}."
        raise IncompleteError(message, _LEAVE_OUT, code=Code.CUT_SHORT, path=path)
    if start.startswith(b"version https://git-lfs"):
        raise refused(path, "is a Git LFS pointer", "Run `git lfs pull`.", Code.WRONG_FORMAT)


def is_plain_name(name: object) -> bool:
    """Return whether it names a file in the same folder, and nothing outside of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\0"} & {*name}
