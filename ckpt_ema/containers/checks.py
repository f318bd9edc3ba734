"""The checks of files, and the refusals, that several containers share."""

import os

from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.options import Reading
from ckpt_ema.storage.protocol import Identity, Kind, Location, Storage

AS_IT_IS = Reading()  # without any option
AGAIN = "Download or save it again."
HEAD_BYTES = 512  # in which every format shows itself
# How compressed files and archives begin, at which byte, what they are, and what unpacks them.
_PACKED = (
    (b"\x1f\x8b", 0, "a gzip file", "gunzip"),
    (b"BZh", 0, "a bzip2 file", "bunzip2"),
    (b"\xfd7zXZ", 0, "an xz file", "unxz"),
    (b"(\xb5/\xfd", 0, "a zstd file", "unzstd"),
    (b"ustar", 257, "a tar archive", "tar -xf"),
)
OF_ONE_RANK = ("ShardedTensor", "DTensor")  # classes of which each rank has a part
GATHER = "Save the full state dict, or use torch.distributed.checkpoint."
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


def read_listing(
    path: str, storage: Storage, most_bytes: int, what: str, listed: str
) -> tuple[Identity, bytes]:
    """Read the file that lists the others of its folder and is written last."""
    if storage.kind(path) is Kind.ABSENT:
        folder, name = os.path.split(path)
        message = f"{folder} has {listed} but no {name}, which is written last."
        raise IncompleteError(message, code=Code.INCOMPLETE, path=folder)
    with storage.open(path) as file:
        if file.identity.size_bytes > most_bytes:
            raise refused(path, f"is too large to be {what}")
        return file.identity, file.read(file.identity.size_bytes, 0)


def present(folder: str, by: str, name: str, storage: Storage) -> str:
    """Return the path of the file `name`; refuses a folder that lacks it, though `by` names it."""
    path = os.path.join(folder, name)
    if storage.kind(path) is Kind.ABSENT:
        message = f"{folder} lacks {name}, which {by} names."
        hint = "Was its save interrupted? Restore the file or leave the checkpoint out."
        raise IncompleteError(message, hint, code=Code.INCOMPLETE, path=path)
    return path


def check_start(path: str, start: bytes) -> None:
    """Refuse a file whose first bytes are those of an interrupted save or of a Git LFS pointer."""
    if not any(start):
        message = f"{path} {'begins with zeros' if start else 'is empty'}."
        raise IncompleteError(message, _LEAVE_OUT, code=Code.CUT_SHORT, path=path)
    if start.startswith(b"version https://git-lfs"):
        raise refused(path, "is a Git LFS pointer", "Run `git lfs pull`.", Code.WRONG_FORMAT)
    if packed := packed_as(start):
        what, command = packed
        raise refused(path, f"is {what}", f"Unpack it first: `{command}`.", Code.WRONG_FORMAT)


def packed_as(start: bytes) -> tuple[str, str] | None:
    """Return what a compressed file or an archive is, by its first bytes, and what unpacks it.

    >>> packed_as(bytes.fromhex("1f8b08"))
    ('a gzip file', 'gunzip')
    """
    kinds = (kind for magic, at, *kind in _PACKED if start[at:].startswith(magic))
    return next(((what, command) for what, command in kinds), None)


def is_plain_name(name: object) -> bool:
    """Return whether it names a file in the same folder, and nothing outside of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\0"} & {*name}
