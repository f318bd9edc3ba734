"""A `Sink` that compares what would be written with the files that are there."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from ckpt_ema.containers.checksums import Checksum
from ckpt_ema.storage.descriptors import read_into
from ckpt_ema.storage.remote_pool import in_memory

_CHUNK_BYTES = 1 << 18
_CHECKSUM_BYTES = 4
_PUNCH_HOLE_AND_KEEP_SIZE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


class Difference(NamedTuple):
    """The first byte that is not what it should be."""

    file: int
    offset: int  # in the file that is there


class There(NamedTuple):
    """A file of an output, where it may begin with more bytes than planned."""

    path: Path
    checksums: Sequence[Checksum]  # which are written last and not compared
    shift: int  # from planned offsets to those in the file


class Comparing(contextlib.AbstractContextManager["Comparing"]):
    """Takes averages from many threads; what is written by descriptor goes to memory and is freed.

    Files go by their numbers.
    """

    def __init__(self, files: Sequence[There]) -> None:
        self._files = files
        self._places = [[p for one in file.checksums for p in one.places] for file in files]
        self._stack = contextlib.ExitStack()
        self._there: dict[int, int] = {}
        self._made: dict[int, IO[bytes]] = {}
        self._lock, self._of_thread = threading.Lock(), threading.local()
        self.difference: Difference | None = None

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def write(self, file: int, data: memoryview, offset: int) -> None:
        """See `Sink.write`; compares the bytes."""
        for start in range(0, len(data), _CHUNK_BYTES):
            part = data[start : start + _CHUNK_BYTES]
            made, _ = self._buffers()
            made[: len(part)] = part
            self._compare(file, len(part), offset + start)

    def _compare(self, file: int, count: int, offset: int) -> None:
        """Compare what the first buffer of this thread holds with a range of a file."""
        made, there = self._buffers()
        self.read_into(file, memoryview(there)[:count], offset)
        for place in self._places[file]:
            inside = slice(max(0, place - offset), max(0, place + _CHECKSUM_BYTES - offset))
            made[inside] = there[inside]
        # Whole buffers are compared at once; views, element by element.
        if made != there and made[:count] != there[:count]:
            pairs = enumerate(zip(made, there, strict=True))
            first = next(place for place, (one, other) in pairs if one != other)
            self._note(Difference(file, offset + first + self._files[file].shift))

    def _buffers(self) -> tuple[bytearray, bytearray]:
        """Return the two buffers of this thread."""
        if not hasattr(self._of_thread, "buffers"):
            self._of_thread.buffers = bytearray(_CHUNK_BYTES), bytearray(_CHUNK_BYTES)
        found: tuple[bytearray, bytearray] = self._of_thread.buffers
        return found

    @contextlib.contextmanager
    def descriptors(self, files: Sequence[int]) -> Iterator[list[int]]:
        """See `Sink.descriptors`."""
        yield [self._memory(file).fileno() for file in files]

    def written(self, file: int, offset: int, size_bytes: int) -> None:
        """See `Sink.written`; compares the bytes and frees their memory."""
        fd = self._memory(file).fileno()
        for start in range(0, size_bytes, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, size_bytes - start)
            made, _ = self._buffers()
            read_into("memory", fd, memoryview(made)[:count], offset + start)
            self._compare(file, count, offset + start)
        _free(fd, offset, size_bytes)

    def read_into(self, file: int, view: memoryview, offset: int) -> None:
        """See `Sink.read_into`; reads the files that are there."""
        path, _, shift = self._files[file]
        read_into(str(path), self._descriptor(file), view, offset + shift)

    def _note(self, difference: Difference) -> None:
        with self._lock:
            self.difference = min(difference, self.difference or difference)

    def _descriptor(self, file: int) -> int:
        with self._lock:
            if file not in self._there:
                fd = os.open(self._files[file].path, os.O_RDONLY | os.O_CLOEXEC)
                self._stack.callback(os.close, fd)
                self._there[file] = fd
            return self._there[file]

    def _memory(self, file: int) -> IO[bytes]:
        with self._lock:
            if file not in self._made:
                self._made[file] = self._stack.enter_context(in_memory())
            return self._made[file]


def _free(fd: int, offset: int, size_bytes: int) -> None:
    """Free the memory of a range of a file in memory, where the system can."""
    fallocate = getattr(ctypes.CDLL(None), "fallocate64", None)
    if fallocate:
        numbers = (ctypes.c_int64(offset), ctypes.c_int64(size_bytes))
        fallocate(fd, _PUNCH_HOLE_AND_KEEP_SIZE, *numbers)
