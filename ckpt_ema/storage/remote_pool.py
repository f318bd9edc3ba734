"""The tensor bytes of remote files: fetched in the order of use, many ranges at a time.

A thread that folds a tile gets its ranges as files in memory, each range at its own offset, and
reads them by descriptor as it reads files on a disk.
"""

import errno
import os
import tempfile
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import IO

from ckpt_ema.errors import CkptEmaError, Code, FailedError
from ckpt_ema.storage.client import Client, RemoteFile
from ckpt_ema.storage.descriptors import descriptor_limit
from ckpt_ema.storage.failures import changed, unreadable
from ckpt_ema.storage.protocol import REQUEST_BYTES, Range

_REQUESTS = 48  # at a time
_LARGE_REQUESTS = 16  # of REQUEST_BYTES each, at a time
_MOST_OPEN = 256
_FEWEST_FILES = 64
_POLL_SECONDS = 0.2

Located = tuple[str, RemoteFile]  # the URI that was listed, and the file


class _Held(threading.local):
    """What a thread has in memory: for each path a file, and the ranges it holds."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[IO[bytes], list[tuple[int, int]]]] = {}


class RemotePool:
    """A `FilePool` that fetches what is requested, and keeps it until it is used."""

    ahead_bytes = 0
    most_open = _MOST_OPEN

    def __init__(self, client: Client, files: Mapping[str, Located]) -> None:
        self._client, self._files = client, files
        self._threads = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="ckpt-ema-fetch")
        self._requested: dict[Range, deque[list[Future[bytes]]]] = {}
        self._lock = threading.Lock()
        self._held = _Held()
        self._cancelled = False
        self._failure: CkptEmaError | None = None  # of any part, whoever waits for it
        self._free_bytes = _LARGE_REQUESTS * REQUEST_BYTES
        self._room = threading.Condition()
        self._most_in_memory = max(_FEWEST_FILES, 2 * descriptor_limit())  # the rest is for sockets
        self._in_memory = 0  # files, of all threads

    def request(self, ranges: Iterable[Range]) -> None:
        """See `FilePool.request`."""
        for one in ranges:
            with self._lock:
                self._requested.setdefault(one, deque()).append(self._fetched(one))

    def _fetched(self, one: Range) -> list[Future[bytes]]:
        """Start fetching a range; return its parts."""
        root, file = self._files[one.path]
        starts = range(one.offset, one.offset + one.size_bytes, REQUEST_BYTES)
        counts = (min(REQUEST_BYTES, starts.stop - start) for start in starts)
        return [
            self._threads.submit(self._read, root, file, start, count)
            for start, count in zip(starts, counts, strict=True)
        ]

    def _read(self, root: str, file: RemoteFile, start: int, count: int) -> bytes:
        """Read a range, once there is room for it."""
        with self._room:
            self._room.wait_for(lambda: self._free_bytes >= count or self._cancelled)
            self._free_bytes -= count
        try:
            if self._cancelled:
                raise _stopped()
            return self._client.read(root, file, start, count)
        except CkptEmaError as error:
            self._failure = self._failure or error  # the others may follow from the first
            raise
        finally:
            with self._room:
                self._free_bytes += count
                self._room.notify_all()

    @contextmanager
    def held(self, ranges: Iterable[Range]) -> Iterator[None]:
        """See `FilePool.held`."""
        needed = list(ranges)
        with self._files_for({one.path for one in needed}), ExitStack() as stack:
            stack.callback(self._held.files.clear)
            for one in needed:
                stream, known = self._stream(one.path, stack)
                offset = one.offset
                for part in self._taken(one):
                    offset += os.pwrite(stream.fileno(), self._result(part), offset)
                known.append((one.offset, offset))
            yield

    @contextmanager
    def _files_for(self, paths: Collection[str]) -> Iterator[None]:
        """Wait until files for these paths may be open; at any time, one thread may have them."""
        with self._room:
            self._room.wait_for(lambda: self._may_open(len(paths)) or self._cancelled)
            self._in_memory += len(paths)
        try:
            yield
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            message = f"{len(paths)} files have to be open at a time, more than the system allows."
            hint = f"Raise the limit: ulimit -n {len(paths) + 512}."
            raise FailedError(message, hint, code=Code.READ_FAILED) from error
        finally:
            with self._room:
                self._in_memory -= len(paths)
                self._room.notify_all()

    def _may_open(self, count: int) -> bool:
        return not self._in_memory or self._in_memory + count <= self._most_in_memory

    def _result(self, part: Future[bytes]) -> bytes:
        """Wait for a part, or until another part fails or the work is cancelled."""
        while not self._cancelled and not self._failure:
            if part in wait([part], _POLL_SECONDS).done:
                return part.result()
        raise self._failure or _stopped()

    def _stream(self, path: str, stack: ExitStack) -> tuple[IO[bytes], list[tuple[int, int]]]:
        """Return the file in memory for a path, and what this thread has in it."""
        if path not in self._held.files:
            self._held.files[path] = stack.enter_context(in_memory()), []
        return self._held.files[path]

    def _taken(self, one: Range) -> list[Future[bytes]]:
        """Return the parts of a range; one that was not requested is requested now."""
        with self._lock:
            waiting = self._requested.get(one)
            if not waiting:
                return self._fetched(one)
            parts = waiting.popleft()
            if not waiting:
                del self._requested[one]
            return parts

    def read_into(self, path: str, view: memoryview, offset: int) -> None:
        """See `FilePool.read_into`; bytes that are not held are fetched."""
        if held := self._held.files.get(path):
            stream, known = held
            end = offset + len(view)
            if any(start <= offset and end <= stop for start, stop in known):
                os.preadv(stream.fileno(), [view], offset)
                return
        view[:] = self._client.read(*self._files[path], offset, len(view))

    @contextmanager
    def descriptors(self, paths: Iterable[str]) -> Iterator[list[int]]:
        """See `FilePool.descriptors`; they give the held ranges only."""
        yield [self._held.files[path][0].fileno() for path in paths]

    def failure(self, path: str, code: int, offset: int) -> FailedError:
        """See `FilePool.failure`."""
        return unreadable(path, code, offset)

    def verify(self) -> None:
        """See `FilePool.verify`; everything is listed once more."""
        roots = {root for root, _ in self._files.values()}
        now = {root: {one.name: one for one in self._client.files(root)} for root in roots}
        for path, (root, file) in self._files.items():
            if now[root].get(file.name) != file:
                raise changed(path)

    def cancel(self) -> None:
        """See `FilePool.cancel`."""
        self._cancelled = True
        with self._room:
            self._room.notify_all()

    def close(self) -> None:
        """See `FilePool.close`; requests under way are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _stopped() -> FailedError:
    return FailedError("The work was stopped.", code=Code.READ_FAILED)


def in_memory() -> IO[bytes]:
    """Return an empty file in memory; a temporary file where the system has none."""
    if hasattr(os, "memfd_create"):  # Linux
        return os.fdopen(os.memfd_create("ckpt-ema"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
