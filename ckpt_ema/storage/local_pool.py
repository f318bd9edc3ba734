"""The local files of one job: a bounded number of them open, their bytes requested ahead.

Many files are read in turn, and the kernel's own read-ahead, 128 KiB on most systems, is too short
for that.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

from ckpt_ema.errors import FailedError, IncompleteError, RefusedError
from ckpt_ema.storage.descriptors import descriptor_limit, identity_of, open_fd, read_into
from ckpt_ema.storage.failures import changed, unreadable
from ckpt_ema.storage.protocol import Identity, Range

_CAN_READ_AHEAD = hasattr(os, "RWF_NOWAIT") and hasattr(os, "posix_fadvise")  # Linux
_AHEAD_BYTES = 1 << 22  # requested ahead, of each file that is not in the cache
_MOST_AHEAD_BYTES = 1 << 28  # of all files that are read in turn
_ASKED_BYTES = 1 << 19  # at a time: the kernel cuts larger requests down to one of the disk
COLD_BYTES = 1 << 26  # beyond an uncached place, taken to be uncached too


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
                raise changed(path) from error
            if now != identity:
                raise changed(path)

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
            raise changed(path) from error
        except RefusedError as error:
            raise FailedError(error.message, code=error.code, path=path) from error
        if identity_of(os.fstat(fd)) != self.expected[path]:
            os.close(fd)
            raise changed(path)
        return fd
