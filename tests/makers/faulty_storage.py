"""A storage in which something happens when the first bytes of a tensor are read."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ckpt_ema.storage import STORAGES
from ckpt_ema.storage.local import Local
from ckpt_ema.storage.local_pool import LocalPool
from ckpt_ema.storage.protocol import FilePool, Identity, Range

Hook = Callable[[], object]
BeforeRead = Callable[[Path, int, int], object]


class WatchedPool:
    """A pool of files; `before_read` is called with path, offset and size before each read.

    What is read by descriptor is not seen: `before_read` is called with zeros when the files are
    open.
    """

    def __init__(self, real: FilePool, before_read: BeforeRead) -> None:
        self._real, self._before_read = real, before_read
        self.ahead_bytes, self.most_open = real.ahead_bytes, real.most_open
        self.failure, self.verify, self.close = real.failure, real.verify, real.close

    def read_into(self, path: str, view: memoryview, offset: int) -> None:
        """See `FilePool.read_into`."""
        self._before_read(Path(path), offset, len(view))
        self._real.read_into(path, view, offset)

    def cancel(self) -> None:
        """See `FilePool.cancel`."""
        self._real.cancel()

    def request(self, ranges: Iterable[Range]) -> None:
        """See `FilePool.request`."""
        self._real.request(ranges)

    def held(self, ranges: Iterable[Range]) -> AbstractContextManager[None]:
        """See `FilePool.held`."""
        return self._real.held(ranges)

    @contextmanager
    def descriptors(self, paths: Iterable[str]) -> Iterator[list[int]]:
        """See `FilePool.descriptors`."""
        wanted = list(paths)
        with self._real.descriptors(wanted) as opened:
            for path in wanted:
                self._before_read(Path(path), 0, 0)
            yield opened


class HookedStorage(Local):
    """Local files; `hook` runs once, before any thread reads the first bytes of a tensor.

    Headers are read before that. What the hook raises is raised by the read.
    """

    def __init__(self, hook: Hook) -> None:
        self._hooks, self._lock = [hook], threading.Lock()

    def pool(self, expected: Mapping[str, Identity], read_in_turn: int = 1) -> FilePool:
        """Return a pool whose first read runs the hook."""
        return WatchedPool(super().pool(expected, read_in_turn), self._run_hook)

    def _run_hook(self, *_: object) -> None:
        with self._lock:
            if self._hooks:
                self._hooks.pop()()


def on_first_read(hook: Hook) -> None:
    """Run `hook` when this process first reads a tensor; only in a process of its own."""
    STORAGES[""] = HookedStorage(hook)


class WatchedStorage(Local):
    """Local files, whose pools are watched as by `WatchedPool`."""

    def __init__(self, before_read: BeforeRead) -> None:
        self._before_read = before_read

    def pool(self, expected: Mapping[str, Identity], read_in_turn: int = 1) -> FilePool:
        """Return a pool that is watched."""
        return WatchedPool(super().pool(expected, read_in_turn), self._before_read)


class FewFiles(Local):
    """Local files, of which eight may be open at a time."""

    def pool(self, expected: Mapping[str, Identity], read_in_turn: int = 1) -> FilePool:
        """Return a pool that is smaller than it would be."""
        return LocalPool(dict(expected), read_in_turn, most_open=8)


@contextmanager
def watching_reads(before_read: BeforeRead) -> Iterator[None]:
    """Call `before_read` before each read of a tensor, see `WatchedPool`."""
    real = STORAGES[""]
    STORAGES[""] = WatchedStorage(before_read)
    try:
        yield
    finally:
        STORAGES[""] = real
