"""An operating system in which the k-th call of a kind fails, or calls are slow.

It stands under everything that calls `os` or opens files, readers and writers alike, as the faulty
file systems of SQLite's tests do: fail the first call, the second, and so on, until all pass. The
compiled fold makes its own system calls; they count together with those through `os`.
"""

import builtins
import contextlib
import errno
import io
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ckpt_ema.fold.native import compiled

# All calls on files that are made through `os`, and `open`.
_OF_OS = (
    *("open", "close", "pread", "preadv", "pwrite", "fsync", "fdatasync", "ftruncate"),
    *("posix_fallocate", "stat", "lstat", "fstat", "listdir", "scandir"),
    *("mkdir", "rmdir", "unlink", "rename", "replace", "link"),
)
KINDS = (*_OF_OS, "open file")  # the latter is Python's own `open`
# The kinds of calls that the compiled fold makes too, all on model files; whether they write.
_OF_THE_FOLD = {"preadv": False, "pwrite": True}
_NEVER = 1 << 62  # the number of a call that is never made


class Faults:
    """Which call fails, and how; how many of each kind there were."""

    def __init__(
        self, kind: str, k: int, error: int | type[BaseException], ever_after: bool, suffix: str
    ) -> None:
        """Fail call number `k` of a kind, from 1, and with `ever_after` all that follow.

        `error` is an errno, or 0 for transferring less than was asked for, or what the handler of a
        signal raises that arrives while the call is made. With a `suffix`, only calls on
        descriptors of such files count.
        """
        self.calls: Counter[str] = Counter()
        self.injected = 0
        self._kind, self._k, self._error, self._ever_after = kind, k, error, ever_after
        self._suffix, self._lock = suffix, threading.Lock()
        self._module = None if isinstance(error, type) else _fold_that_makes(kind, suffix)

    def begin(self) -> None:
        """Have calls of the compiled fold fail too."""
        if self._module:
            last = _NEVER if self._ever_after else self._k
            self._module.fail(_OF_THE_FOLD[self._kind], self._k, last, self._error)

    def end(self) -> None:
        """Have no more of its calls fail, and take over how many there were."""
        if self._module:
            calls, injected, fails = self._module.count_call(_OF_THE_FOLD[self._kind])
            self.calls[self._kind], self.injected = calls - 1, injected - fails
            self._module.fail(_OF_THE_FOLD[self._kind], _NEVER, _NEVER, 0)

    def call(self, kind: str, real: Any, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
        """Make a call, or have it fail."""
        if kind == self._kind and self._suffix and not _path(arguments[0]).endswith(self._suffix):
            return real(*arguments, **options)
        if not self._fails(kind):
            return real(*arguments, **options)
        if isinstance(self._error, type):
            with contextlib.suppress(OSError):
                _dropped(kind, real(*arguments, **options))
            raise self._error
        if self._error:
            if kind == "close":
                real(*arguments)  # as Linux does it: the descriptor is gone all the same
            raise OSError(self._error, os.strerror(self._error))
        return _short(kind, real, arguments)

    def _fails(self, kind: str) -> bool:
        """Count a call; return whether it shall fail."""
        with self._lock:
            if kind == self._kind and self._module:
                counted = self._module.count_call(_OF_THE_FOLD[kind])
                self.calls[kind], self.injected, fails = counted
                return bool(fails)
            self.calls[kind] += 1
            count = self.calls[kind]
            is_one = count == self._k or (self._ever_after and count > self._k)
            self.injected += is_one and kind == self._kind
            return is_one and kind == self._kind


def _fold_that_makes(kind: str, suffix: str) -> Any:
    """Return the compiled fold if it makes calls of this kind, on files with this suffix."""
    is_counted = kind in _OF_THE_FOLD and suffix in ("", ".safetensors")
    return compiled() if is_counted else None


def _path(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def slowed(kind: str, seconds: float) -> None:
    """Have calls of a kind, and those of the compiled fold, take a while until the process ends."""

    def slow(real: Any, *arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return real(*arguments, **options)

    setattr(os, kind, partial(slow, getattr(os, kind)))
    if module := _fold_that_makes(kind, ""):
        module.fold = partial(slow, module.fold)


def _dropped(kind: str, made: Any) -> None:
    """Close what a call has made, which nobody gets."""
    if kind == "open":
        os.closerange(made, made + 1)
    elif kind in ("scandir", "open file"):
        made.close()


def _short(kind: str, real: Any, arguments: Sequence[Any]) -> Any:
    """Transfer the first half, but a byte at least."""
    fd, data, *rest = arguments
    if kind == "pread":
        return real(fd, (data + 1) // 2, *rest)
    if kind == "preadv":
        [view] = data
        return real(fd, [view[: (len(view) + 1) // 2]], *rest)
    return real(fd, memoryview(data)[: (len(data) + 1) // 2], *rest)


@contextmanager
def faulty(
    kind: str = "",
    k: int = 0,
    error: int | type[BaseException] = errno.EIO,
    *,
    ever_after: bool = False,
    suffix: str = "",
) -> Iterator[Faults]:
    """Have calls fail inside of the block; without a kind they are only counted."""
    faults = Faults(kind, k, error, ever_after, suffix)
    places = [(os, name, name) for name in _OF_OS]
    places += [(io, "open", "open file"), (builtins, "open", "open file")]
    if isinstance(error, type) and (module := _fold_that_makes(kind, suffix)):
        places.append((module, "fold", kind))  # a signal arrives while a tile is folded
    real = [getattr(module, name) for module, name, _ in places]

    def wrapped(kind: str, function: Any) -> Any:
        return lambda *arguments, **options: faults.call(kind, function, arguments, options)

    try:
        for (module, name, kind), function in zip(places, real, strict=True):
            setattr(module, name, wrapped(kind, function))
        faults.begin()
        yield faults
    finally:
        faults.end()
        for (module, name, _), function in zip(places, real, strict=True):
            setattr(module, name, function)
