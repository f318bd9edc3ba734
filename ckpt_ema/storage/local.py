"""Reading regular files at positions: opened without hanging, noticed when they change.

A file that is cut short while it is read gives an ordinary error here, where a memory map would
end the process with SIGBUS. Where the bytes have to come from a disk, the kernel is asked for the
next ones before they are wanted: many files are read in turn, which its own read-ahead, of 128 KiB
on most systems, is not made for.
"""

import errno
import os
import resource
import stat
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from ckpt_ema.errors import FailedError, IncompleteError, RefusedError, printable

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_MOST_BESIDE_BYTES = 1 << 28  # of a file of settings or of a log; those of trainers are megabytes
_CAN_ASK_AHEAD = hasattr(os, "RWF_NOWAIT") and hasattr(os, "posix_fadvise")  # Linux can
_AHEAD_BYTES = 1 << 22  # asked for before they are wanted, of each file that is not in the cache
_MOST_AHEAD_BYTES = 1 << 28  # of all files that are read in turn
_ASKED_BYTES = 1 << 19  # at a time: the kernel cuts larger wishes down to one request of the disk
_COLD_BYTES = 1 << 26  # beyond a place that was not in the cache, taken for not in it either


class OpenFile(NamedTuple):
    """A regular file open for reading, and what it was when it was opened."""

    fd: int
    size_bytes: int
    mtime_ns: int


def real_paths(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Each path without links; quick for many that share their folders."""
    folders: dict[str, str] = {}
    found = []
    for path in paths:
        folder, name = os.path.split(path)
        if name in ("", ".", "..") or os.path.islink(path):
            found.append(os.path.realpath(path))
            continue
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        found.append(os.path.join(folders[folder], name))
    return found


def mode_of(path: str | os.PathLike[str]) -> int:
    """The mode of what a path leads to; 0 where nothing is.

    Unlike `os.path.exists` it does not take for absent what cannot be looked at, for which it
    raises `RefusedError`: a disk that fails for a moment must not make another average.
    """
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno in _ABSENT:
            return 0
        raise RefusedError(f"{printable(path)} cannot be looked at: {error.strerror}.") from error
    except ValueError:  # a NUL in the name
        return 0


def leads_to_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to a folder; raises what `mode_of` raises."""
    return stat.S_ISDIR(mode_of(path))


@contextmanager
def open_regular(path: str) -> Iterator[OpenFile]:
    """Open a regular file, following links; a FIFO or a device is refused, not waited for."""
    fd = _open(path)
    try:
        yield _checked(path, fd)
    finally:
        os.close(fd)


def read_if_there(path: str | os.PathLike[str], most_bytes: int = sys.maxsize) -> bytes | None:
    """The content of a regular file, or its beginning; None if there is none at `path`.

    Raises `RefusedError` if there is one and it cannot be read, or is larger than any such file.
    """
    if not stat.S_ISREG(mode_of(path)):
        return None
    try:
        with open_regular(os.fspath(path)) as file:
            count = min(file.size_bytes, most_bytes)
            if count > _MOST_BESIDE_BYTES:
                raise RefusedError(f"{printable(path)} has {count} bytes, too many to be text.")
            return read_exactly(os.fspath(path), file.fd, count, 0)
    except FailedError as error:
        raise RefusedError(error.message) from error


def holes_in(path: str, file: OpenFile) -> dict[str, int]:
    """The path, and where the first part of it is that has no place on the disk, if there is one.

    It reads as zeros. A save leaves it that set the size first and was interrupted; and a sparse
    copy has them.
    """
    try:
        hole = os.lseek(file.fd, 0, os.SEEK_HOLE)
    except (OSError, AttributeError):  # a file system, or a system, that does not know
        return {}
    return {path: hole} if hole < file.size_bytes else {}


def read_exactly(path: str, fd: int, count: int, offset: int) -> bytes:
    """`count` bytes from `offset`; raises `FailedError` if the file ends before."""
    buffer = bytearray(count)
    read_into(path, fd, memoryview(buffer), offset)
    return bytes(buffer)


def read_into(path: str, fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` (bytes) from `offset` of an open file; raises `FailedError` if it ends before."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise FailedError(f"{printable(path)} cannot be read: {error.strerror}.") from error
        if count == 0:
            raise FailedError(
                f"{printable(path)} ended at byte {offset + done} while it was read.",
                "It was replaced or cut meanwhile; nothing was published.",
            )
        done += count


def _open(path: str) -> int:
    try:
        # Without O_NONBLOCK, opening a FIFO that nobody writes to would hang.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise IncompleteError(f"{printable(path)} does not exist.") from error
    except OSError as error:
        raise RefusedError(f"{printable(path)} cannot be opened: {error.strerror}.") from error
    except ValueError as error:  # a NUL in the name
        raise RefusedError(f"{printable(path)} cannot be a file name.") from error


def _checked(path: str, fd: int) -> OpenFile:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise RefusedError(f"{printable(path)} is not a regular file.")
    return OpenFile(fd, status.st_size, status.st_mtime_ns)


@dataclass(slots=True)
class _Pooled:
    """An open file of a pool, and what is known of it in the page cache."""

    path: str
    fd: int
    readers: int = 0
    tells_cached: bool = True  # whether the file system says what is in the page cache
    cold_until: int = 0
    asked_until: int = 0

    def read_into(self, view: memoryview, offset: int, ahead_bytes: int) -> None:
        """Fill `view`; if the file is cold there, the next `ahead_bytes` are asked for as well."""
        done = self._read_cached(view, offset)
        if done < len(view):
            self.cold_until = offset + _COLD_BYTES
        if _CAN_ASK_AHEAD and offset < self.cold_until:
            self._ask_ahead(offset + done, offset + len(view), ahead_bytes)
        if done < len(view):
            read_into(self.path, self.fd, view[done:], offset + done)

    def _read_cached(self, view: memoryview, offset: int) -> int:
        """Read what is in the page cache from `offset` on; how many bytes that were."""
        if _CAN_ASK_AHEAD and self.tells_cached:
            try:
                return os.preadv(self.fd, [view], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError:  # if it is anything else, it will show when the read may wait
                self.tells_cached = False
        return 0

    def _ask_ahead(self, start: int, end: int, ahead_bytes: int) -> None:
        """Have the kernel fetch from `start` to some way beyond `end`, without waiting for it."""
        # Threads read a little out of order; what is further away was asked for by another pass.
        asked_until = self.asked_until if self.asked_until <= end + 2 * ahead_bytes else 0
        if asked_until < end + ahead_bytes // 2:
            self.asked_until = end + ahead_bytes
            for offset in range(max(start, asked_until), end + ahead_bytes, _ASKED_BYTES):
                os.posix_fadvise(self.fd, offset, _ASKED_BYTES, os.POSIX_FADV_WILLNEED)


@dataclass(slots=True)
class FilePool:
    """Files read by many threads through a bounded number of descriptors.

    `expected` maps each path to the size in bytes and mtime in ns that the plan saw: a file that
    differs when it is opened, or at `verify`, raises `FailedError`. So many as `read_in_turn` share
    what is asked for ahead.
    """

    expected: dict[str, tuple[int, int]]
    read_in_turn: int = 1
    limit: int = field(default_factory=lambda: _descriptor_limit())
    _files: OrderedDict[str, _Pooled] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read_into(self, path: str, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` of the file at `path`."""
        file = self._acquire(path)
        try:
            ahead_bytes = min(_AHEAD_BYTES, _MOST_AHEAD_BYTES // self.read_in_turn)
            file.read_into(view, offset, ahead_bytes)
        finally:
            with self._lock:
                file.readers -= 1

    def verify(self) -> None:
        """Check that no file has changed since the plan was made."""
        for path, (size_bytes, mtime_ns) in self.expected.items():
            try:
                status = os.stat(path)
            except OSError as error:
                raise _changed(path) from error
            if (status.st_size, status.st_mtime_ns) != (size_bytes, mtime_ns):
                raise _changed(path)

    def close(self) -> None:
        """Close every descriptor; no reader may be active."""
        with self._lock:
            for file in self._files.values():
                os.close(file.fd)
            self._files.clear()

    def _acquire(self, path: str) -> _Pooled:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                self._make_room()
                file = self._files[path] = _Pooled(path, self._open_expected(path))
            self._files.move_to_end(path)
            file.readers += 1
            return file

    def _make_room(self) -> None:
        while len(self._files) >= self.limit:
            idle = next((path for path, file in self._files.items() if not file.readers), None)
            if idle is None:
                return  # more threads than descriptors: each holds one, none more
            os.close(self._files.pop(idle).fd)

    def _open_expected(self, path: str) -> int:
        try:
            fd = _open(path)
        except RefusedError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise _changed(path) from error
            raise FailedError(error.message) from error
        try:
            opened = _checked(path, fd)
            if opened[1:] != self.expected[path]:
                raise _changed(path)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _changed(path: str) -> FailedError:
    return FailedError(
        f"{printable(path)} changed or vanished since the plan was made.",
        "Is the run still being saved or rotated? Nothing was published; run it again.",
    )


def _descriptor_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(1024, soft // 2 if soft != resource.RLIM_INFINITY else 1024))
