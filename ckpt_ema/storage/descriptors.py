"""Descriptors of local files: opened without waiting for a writer, read at positions."""

import os
import resource

from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.storage.failures import unreadable
from ckpt_ema.storage.protocol import Identity, Location


def inaccessible(path: Location, error: OSError) -> RefusedError:
    """Return the refusal of a path to which the system denies access."""
    message = f"cannot access {os.fspath(path)}: {error.strerror}."
    return RefusedError(message, code=Code.INACCESSIBLE, path=path)


def open_fd(path: Location) -> int:
    """Open a file for reading, following links, without waiting for a FIFO."""
    try:
        # Without O_NONBLOCK, opening a FIFO that nobody writes to would hang.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise IncompleteError(f"{path} does not exist.", code=Code.NOT_FOUND, path=path) from error
    except OSError as error:
        raise inaccessible(path, error) from error


def identity_of(status: os.stat_result) -> Identity:
    """Return the identity of a file with this status."""
    return Identity(status.st_size, status.st_mtime_ns)


def read_into(path: str, fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` (bytes) from `offset` of an open file; raises `FailedError` if it ends before."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise unreadable(path, error.errno or 0, offset + done) from error
        if count == 0:
            raise unreadable(path, 0, offset + done)
        done += count


def descriptor_limit() -> int:
    """Return how many input files may be open: a third of what the system allows this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(1024, soft // 3 if soft != resource.RLIM_INFINITY else 1024))
