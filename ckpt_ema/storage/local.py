"""Files on a local or network file system: opened without waiting for a writer, read at positions.

A file that is cut short meanwhile gives an ordinary error, where a memory map would give SIGBUS.
Bytes on a disk are requested before they are needed: many files are read in turn, for which the
kernel's own read-ahead, of 128 KiB on most systems, is not made.
"""

import errno
import os
import resource
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache

from ckpt_ema.errors import Code, FailedError, IncompleteError, RefusedError
from ckpt_ema.storage.protocol import FilePool, Identity, Kind, Location, Range

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_MOST_SMALL_BYTES = 1 << 28  # of a configuration or a log; trainers write megabytes
_MOST_LISTED = 1000  # files below a folder
_CAN_READ_AHEAD = hasattr(os, "RWF_NOWAIT") and hasattr(os, "posix_fadvise")  # Linux
_AHEAD_BYTES = 1 << 22  # requested ahead, of each file that is not in the cache
_MOST_AHEAD_BYTES = 1 << 28  # of all files that are read in turn
_ASKED_BYTES = 1 << 19  # at a time: the kernel cuts larger requests down to one of the disk
COLD_BYTES = 1 << 26  # beyond an uncached place, taken to be uncached too


class Local:
    """A `Storage` on a local or network file system."""

    most_requests = 1

    def kind(self, path: Location) -> Kind:
        """See `Storage.kind`."""
        mode = _mode(path, os.stat)
        if mode is None:
            return Kind.ABSENT
        if stat.S_ISDIR(mode):
            return Kind.FOLDER
        return Kind.FILE if stat.S_ISREG(mode) else Kind.OTHER

    def is_folder(self, path: Location) -> bool:
        """See `Storage.is_folder`."""
        return self.kind(path) is Kind.FOLDER

    def names(self, folder: Location) -> set[str]:
        """See `Storage.names`."""
        try:
            return set(os.listdir(folder))
        except OSError as error:
            raise inaccessible(folder, error) from error

    def can_list(self, folder: Location) -> bool:
        """See `Storage.can_list`."""
        return os.access(folder, os.R_OK | os.X_OK)

    def is_link(self, path: Location) -> bool:
        """See `Storage.is_link`."""
        return os.path.islink(path)

    def exists(self, path: Location) -> bool:
        """See `Storage.exists`."""
        return _mode(path, os.lstat) is not None

    def files_below(self, folder: Location, most_depth: int | None = None) -> Iterator[str]:
        """See `Storage.files_below`; with a depth it ends some way beyond a thousand files."""

        def fail(error: OSError) -> None:
            if most_depth is None:  # all are wanted, so none may be passed over
                raise inaccessible(error.filename or folder, error) from error

        count = 0
        for root, folders, files in os.walk(folder, onerror=fail):
            prefix = "" if root == os.fspath(folder) else os.path.relpath(root, folder) + "/"
            yield from (prefix + name for name in sorted(files))
            if most_depth is None:
                links = (name for name in folders if os.path.islink(os.path.join(root, name)))
                yield from (prefix + name for name in sorted(links))
                continue
            if prefix.count("/") >= most_depth:
                folders.clear()
            count += len(files)
            if count > _MOST_LISTED:
                return

    def file_id(self, path: Location) -> object:
        """See `Storage.file_id`."""
        status = _status(path)
        return status.st_dev, status.st_ino

    def real_paths(self, paths: Iterable[Location]) -> list[str]:
        """See `Storage.real_paths`; quick for many paths that share their folders."""
        real_folder = cache(os.path.realpath)
        found = []
        for path in paths:
            folder, name = os.path.split(os.fspath(path))
            is_plain = name not in ("", ".", "..") and not os.path.islink(path)
            real = os.path.join(real_folder(folder), name) if is_plain else os.path.realpath(path)
            found.append(real)
        return found

    def identity(self, path: Location) -> Identity:
        """See `Storage.identity`."""
        return identity_of(_status(path))

    def read(self, path: Location, most_bytes: int | None = None) -> bytes | None:
        """See `Storage.read`; raises `RefusedError` for a file too large to be small."""
        if self.kind(path) is not Kind.FILE:
            return None
        try:
            with self.open(path) as file:
                size_bytes = file.identity.size_bytes
                count = size_bytes if most_bytes is None else min(size_bytes, most_bytes)
                if count > _MOST_SMALL_BYTES:
                    why = f"{file.path} has {count} bytes, too many for a text file."
                    raise RefusedError(why, code=Code.WRONG_FORMAT, path=path)
                return file.read(count, 0)
        except FailedError as error:
            raise RefusedError(error.message, code=error.code, path=path) from error

    @contextmanager
    def open(self, path: Location) -> Iterator["LocalFile"]:
        """See `Storage.open`; a FIFO or a device is refused, not waited for."""
        fd = open_fd(path)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                message = f"{path} is not a regular file."
                raise RefusedError(message, code=Code.NOT_A_FILE, path=path)
            yield LocalFile(os.fspath(path), fd, identity_of(status))
        finally:
            os.close(fd)

    def pool(self, expected: Mapping[str, Identity], read_in_turn: int = 1) -> FilePool:
        """See `Storage.pool`."""
        return LocalPool(dict(expected), read_in_turn)


@dataclass(frozen=True, slots=True)
class LocalFile:
    """An `OpenFile` and its descriptor."""

    path: str
    fd: int
    identity: Identity

    def read(self, count: int, offset: int) -> bytes:
        """See `OpenFile.read`."""
        try:
            content = os.pread(self.fd, count, offset)  # a buffer would have to be copied
        except OSError as error:
            raise unreadable(self.path, error.errno or 0, offset) from error
        if len(content) < count:
            rest = bytearray(count - len(content))
            read_into(self.path, self.fd, memoryview(rest), offset + len(content))
            content += rest
        return content

    def first_hole(self) -> int | None:
        """See `OpenFile.first_hole`."""
        try:
            hole = os.lseek(self.fd, 0, os.SEEK_HOLE)
        except (OSError, AttributeError):  # a file system, or a system, without holes
            return None
        return hole if hole < self.identity.size_bytes else None


def _mode(path: Location, look: Callable[[Location], os.stat_result]) -> int | None:
    """Return the mode of what is at a path; None if nothing is."""
    try:
        return look(path).st_mode
    except ValueError:  # a NUL in the name
        return None
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise inaccessible(path, error) from error


def _status(path: Location) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise inaccessible(path, error) from error


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


def unreadable(path: str, code: int, offset: int) -> FailedError:
    """Return the error of a read at `offset`; `code` is its errno, 0 where the file ends."""
    if code:
        message = f"{path} cannot be read: {os.strerror(code)}."
        return FailedError(message, code=Code.READ_FAILED, path=path)
    message = f"{path} ended at byte {offset} while being read."
    hint = "It was replaced or truncated meanwhile; nothing was published."
    return FailedError(message, hint, code=Code.CHANGED, path=path)


@dataclass(slots=True)
class _Pooled:
    """An open file of a pool, and what is known about it in the page cache."""

    path: str
    fd: int
    tells_cached: bool  # whether the system can tell what is in the page cache
    readers: int = 0
    cold_until: int = 0
    asked_until: int = 0

    def read_into(self, view: memoryview, offset: int, ahead_bytes: int) -> None:
        """Fill `view`; where the file is cold, request the next `ahead_bytes` as well."""
        done = self._read_cached(view, offset)
        if done < len(view):
            self.cold_until = offset + COLD_BYTES
        if ahead_bytes and offset < self.cold_until:
            self._ask_ahead(offset + done, offset + len(view), ahead_bytes)
        if done < len(view):
            read_into(self.path, self.fd, view[done:], offset + done)

    def _read_cached(self, view: memoryview, offset: int) -> int:
        """Read what the page cache has from `offset` on; return how many bytes."""
        if self.tells_cached:
            try:
                return os.preadv(self.fd, [view], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError:  # a real error will show up in the read that may wait
                self.tells_cached = False
        return 0

    def _ask_ahead(self, start: int, end: int, ahead_bytes: int) -> None:
        """Have the kernel fetch from `start` to some way beyond `end`, without waiting for it."""
        # Threads read a little out of order; what is further away was another pass's request.
        asked_until = self.asked_until if self.asked_until <= end + 2 * ahead_bytes else 0
        if asked_until < end + ahead_bytes // 2:
            self.asked_until = end + ahead_bytes
            for offset in range(max(start, asked_until), end + ahead_bytes, _ASKED_BYTES):
                os.posix_fadvise(self.fd, offset, _ASKED_BYTES, os.POSIX_FADV_WILLNEED)


def descriptor_limit() -> int:
    """Return how many input files may be open: a third of what the system allows this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(1024, soft // 3 if soft != resource.RLIM_INFINITY else 1024))


@dataclass(slots=True)
class LocalPool:
    """A `FilePool` with at most `most_open` open files.

    A file that is not the expected one when it is opened, or at `verify`, raises `FailedError`.
    """

    expected: dict[str, Identity]
    read_in_turn: int = 1
    reads_ahead: bool = _CAN_READ_AHEAD
    most_open: int = field(default_factory=descriptor_limit)
    _files: OrderedDict[str, _Pooled] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ahead_bytes(self) -> int:
        """See `FilePool.ahead_bytes`."""
        return min(_AHEAD_BYTES, _MOST_AHEAD_BYTES // self.read_in_turn) * self.reads_ahead

    def read_into(self, path: str, view: memoryview, offset: int) -> None:
        """See `FilePool.read_into`."""
        with self._used(path) as file:
            file.read_into(view, offset, self.ahead_bytes)

    @contextmanager
    def descriptors(self, paths: Iterable[str]) -> Iterator[list[int]]:
        """See `FilePool.descriptors`."""
        with ExitStack() as stack:
            yield [stack.enter_context(self._used(path)).fd for path in paths]

    def failure(self, path: str, code: int, offset: int) -> FailedError:
        """See `FilePool.failure`."""
        return unreadable(path, code, offset)

    def request(self, ranges: Iterable[Range]) -> None:
        """See `FilePool.request`; `ahead_bytes` serves that here."""

    def held(self, _ranges: Iterable[Range]) -> AbstractContextManager[None]:
        """See `FilePool.held`."""
        return nullcontext()

    def verify(self) -> None:
        """See `FilePool.verify`."""
        for path, identity in self.expected.items():
            try:
                now = identity_of(os.stat(path))
            except OSError as error:
                raise _changed(path) from error
            if now != identity:
                raise _changed(path)

    def cancel(self) -> None:
        """See `FilePool.cancel`."""

    def close(self) -> None:
        """See `FilePool.close`."""
        with self._lock:
            for file in self._files.values():
                os.close(file.fd)
            self._files.clear()

    @contextmanager
    def _used(self, path: str) -> Iterator[_Pooled]:
        """Yield an open file, which stays open meanwhile."""
        file = self._acquire(path)
        try:
            yield file
        finally:
            with self._lock:
                file.readers -= 1

    def _acquire(self, path: str) -> _Pooled:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                self._make_room()
                file = _Pooled(path, self._open_expected(path), self.reads_ahead)
                self._files[path] = file
            self._files.move_to_end(path)
            file.readers += 1
            return file

    def _make_room(self) -> None:
        while len(self._files) >= self.most_open:
            idle = next((path for path, file in self._files.items() if not file.readers), None)
            if idle is None:
                return  # more threads than descriptors: each holds one
            os.close(self._files.pop(idle).fd)

    def _open_expected(self, path: str) -> int:
        try:
            fd = open_fd(path)
        except IncompleteError as error:
            raise _changed(path) from error
        except RefusedError as error:
            raise FailedError(error.message, code=error.code, path=path) from error
        if identity_of(os.fstat(fd)) != self.expected[path]:
            os.close(fd)
            raise _changed(path)
        return fd


def _changed(path: str) -> FailedError:
    return FailedError(
        f"{path} changed or vanished since the plan was made.",
        "Is the run still being saved or rotated? Nothing was published; run it again.",
        code=Code.CHANGED,
        path=path,
    )
