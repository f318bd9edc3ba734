"""A storage in which something happens when the first bytes of a tensor are read."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ckpt_ema.storage import STORAGES
from ckpt_ema.storage.local import Local
from ckpt_ema.storage.protocol import FilePool, Identity

Hook = Callable[[], object]


class HookedStorage(Local):
    """Local files; `hook` runs once, before any thread reads the first bytes of a tensor.

    Headers are read before that. What the hook raises is raised by the read.
    """

    def __init__(self, hook: Hook) -> None:
        self._hooks, self._lock = [hook], threading.Lock()

    def pool(self, expected: Mapping[str, Identity], read_in_turn: int = 1) -> FilePool:
        """Return a pool whose first read runs the hook."""
        return _HookedPool(super().pool(expected, read_in_turn), self._run_hook)

    def _run_hook(self) -> None:
        with self._lock:
            if self._hooks:
                self._hooks.pop()()


class _HookedPool:
    def __init__(self, real: FilePool, before_read: Hook) -> None:
        self._real, self._before_read = real, before_read
        self.verify, self.close = real.verify, real.close

    def read_into(self, path: str, view: memoryview, offset: int) -> None:
        self._before_read()
        self._real.read_into(path, view, offset)


def on_first_read(hook: Hook) -> None:
    """Run `hook` when this process first reads a tensor; only in a process of its own."""
    STORAGES[""] = HookedStorage(hook)


class WatchedStorage(Local):
    """Local files; `before_read` is called with path, offset and size before tensors are read."""

    def __init__(self, before_read: Callable[[Path, int, int], object]) -> None:
        self._before_read = before_read

    def pool(self, expected: Mapping[str, Identity], read_in_turn: int = 1) -> FilePool:
        """Return a pool that is watched."""
        return _WatchedPool(super().pool(expected, read_in_turn), self._before_read)


class _WatchedPool:
    def __init__(self, real: FilePool, before_read: Callable[[Path, int, int], object]) -> None:
        self._real, self._before_read = real, before_read
        self.verify, self.close = real.verify, real.close

    def read_into(self, path: str, view: memoryview, offset: int) -> None:
        self._before_read(Path(path), offset, len(view))
        self._real.read_into(path, view, offset)


@contextmanager
def watching_reads(before_read: Callable[[Path, int, int], object]) -> Iterator[None]:
    """Call `before_read` with path, offset and size before each read of a tensor."""
    real = STORAGES[""]
    STORAGES[""] = WatchedStorage(before_read)
    try:
        yield
    finally:
        STORAGES[""] = real
