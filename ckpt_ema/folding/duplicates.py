"""Telling two steps that hold one state, from the bytes that are read anyway.

Each checkpoint is compared with the one before it, tile by tile, until a tile differs; that is
mostly the first one, so that it costs nothing. Frozen tensors are alike in all of them.
"""

import hashlib
import threading


class Twins:
    """Which checkpoints have been like their predecessors so far; for many threads."""

    def __init__(self, count: int) -> None:
        self._alike = [False] + [True] * (count - 1)
        self._lock = threading.Lock()

    @property
    def found(self) -> list[int]:
        """The numbers of checkpoints that are like their predecessors in all that was compared."""
        with self._lock:
            return [number for number, alike in enumerate(self._alike) if alike]

    def is_open(self, number: int) -> bool:
        """Whether a checkpoint may still turn out to be like a neighbour."""
        following = self._alike[number + 1] if number + 1 < len(self._alike) else False
        return self._alike[number] or following

    def differ(self, number: int) -> None:
        """Note that a checkpoint differs from its predecessor."""
        with self._lock:
            self._alike[number] = False


class TileTwins:
    """The comparison within one tile, whose values come checkpoint after checkpoint."""

    def __init__(self, twins: Twins) -> None:
        self._twins = twins
        self._previous = (-1, b"")  # number and digest of the checkpoint that was compared last

    def see(self, number: int, values: memoryview) -> None:
        """Compare the bytes of checkpoint `number` with those of the one before it."""
        if not self._twins.is_open(number):
            return
        digest = hashlib.blake2b(values).digest()
        previous, before = self._previous
        if previous == number - 1 and digest != before:
            self._twins.differ(number)
        self._previous = (number, digest)
