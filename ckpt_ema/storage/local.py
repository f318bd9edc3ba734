"""Files on a local or network file system: opened without waiting for a writer, read at positions.

A file that is truncated meanwhile raises an ordinary error; a memory map would raise SIGBUS.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.storage.descriptors import identity_of, inaccessible, open_fd, read_into
from ckpt_ema.storage.failures import unreadable
from ckpt_ema.storage.local_pool import LocalPool
from ckpt_ema.storage.protocol import FilePool, Identity, Kind, Location
from ckpt_ema.storage.small_files import read_small

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_MOST_LISTED = 1000  # files below a folder


class Local:
    """A `Storage` on a local or network file system."""

    is_remote = False

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
        """See `Storage.read`."""
        return read_small(self, path, most_bytes)

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
