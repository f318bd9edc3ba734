"""Telling two steps that hold one state, from the bytes that are read anyway.

Neighbours in an average are compared, tile by tile, until a tile differs; that is mostly the first
one, so that it costs nothing. Frozen tensors are alike in all of them.
"""

import hashlib
import threading
from collections.abc import Collection, Iterable

Pair = tuple[int, int]  # two checkpoints, by their numbers


class Twins:
    """Which pairs of checkpoints, by number, have been alike so far; for many threads."""

    def __init__(self, pairs: Iterable[Pair], different: Collection[Pair] = ()) -> None:
        """All `pairs` are alike but those that are known to be `different`."""
        self._alike = {pair: pair not in different for pair in pairs}
        self._lock = threading.Lock()

    @property
    def found(self) -> list[Pair]:
        """The pairs that are alike in all that was compared."""
        with self._lock:
            return [pair for pair, alike in self._alike.items() if alike]

    @property
    def different(self) -> list[Pair]:
        """The pairs that are known to differ."""
        with self._lock:
            return [pair for pair, alike in self._alike.items() if not alike]

    def differ(self, pair: Pair) -> None:
        """Note that the two checkpoints of a pair differ."""
        with self._lock:
            self._alike[pair] = False


class TileTwins:
    """The comparison within one tile, whose values come checkpoint after checkpoint."""

    def __init__(self, twins: Twins) -> None:
        self._twins = twins
        self._wanted: set[int] = set()
        self._earlier: dict[int, list[int]] = {}  # of a checkpoint, those it may be alike
        for one, other in twins.found:
            self._wanted |= {one, other}
            self._earlier.setdefault(other, []).append(one)
        self._digests: dict[int, bytes] = {}

    def see(self, number: int, values: memoryview) -> None:
        """Compare the bytes of checkpoint `number` with those of the ones before it."""
        if number not in self._wanted:
            return
        digest = self._digests[number] = hashlib.blake2b(values).digest()
        for earlier in self._earlier.get(number, ()):
            if self._digests.get(earlier, digest) != digest:
                self._twins.differ((earlier, number))
