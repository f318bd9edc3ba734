"""Reads a small file whole, such as a configuration or a log, from any storage."""

from ckpt_ema.errors import Code, FailedError, RefusedError
from ckpt_ema.storage.protocol import Kind, Location, Storage

_MOST_BYTES = 1 << 28  # trainers write megabytes


def read_small(storage: Storage, path: Location, most_bytes: int | None) -> bytes | None:
    """See `Storage.read`; raises `RefusedError` for a file that is too large to be small."""
    if storage.kind(path) is not Kind.FILE:
        return None
    try:
        with storage.open(path) as file:
            size_bytes = file.identity.size_bytes
            count = size_bytes if most_bytes is None else min(size_bytes, most_bytes)
            if count > _MOST_BYTES:
                why = f"{path} has {count} bytes, too many for a text file."
                raise RefusedError(why, code=Code.WRONG_FORMAT, path=path)
            return file.read(count, 0)
    except FailedError as error:
        raise RefusedError(error.message, code=error.code, path=path) from error
