"""Finds two steps that hold the same state, from the bytes that are read anyway.

Neighbours in an average are compared tile by tile until one tile differs. That is usually the
first, so it costs nothing. Frozen tensors are equal in all checkpoints.
"""

import hashlib
import threading
from collections.abc import Callable, Collection
from typing import Any

from ckpt_ema.containers.compare import same_values
from ckpt_ema.fold.monitors.protocol import Monitor, Pair, See, TileView, Watched
from ckpt_ema.notices import Notice


class Twins(Monitor):
    """A `Monitor` of pairs of checkpoints that have been equal so far."""

    name = "twins"

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._equal = {(one, other) for one, other in watched.pairs}
        self._lock = threading.Lock()

    def watch(self, _view: TileView) -> See | None:
        """See `Monitor.watch`."""
        with self._lock:
            equal = list(self._equal)
        return _TileTwins(equal, self._differ).see if equal else None

    def state(self) -> list[Pair]:
        """Return the pairs that differ."""
        with self._lock:
            return [(a, b) for a, b in self._watched.pairs if (a, b) not in self._equal]

    def merge(self, state: Any) -> None:
        """See `Monitor.merge`."""
        for one, other in state:
            self._differ((one, other))

    def verdict(self) -> tuple[Notice, ...]:
        """Raise `RefusedError` if two checkpoints are equal, unless that is allowed."""
        if self._equal and not self._watched.allow_duplicates:
            raise same_values(*(self._watched.checkpoints[number] for number in min(self._equal)))
        return ()

    def _differ(self, pair: Pair) -> None:
        with self._lock:
            self._equal.discard(pair)


class _TileTwins:
    """The comparison within one tile."""

    def __init__(self, pairs: Collection[Pair], differ: Callable[[Pair], None]) -> None:
        self._differ = differ
        self._wanted = {number for pair in pairs for number in pair}
        self._earlier: dict[int, list[int]] = {}  # of a checkpoint, those it may be equal to
        for one, other in pairs:
            self._earlier.setdefault(other, []).append(one)
        self._digests: dict[int, bytes] = {}

    def see(self, number: int, values: memoryview, _itemsize: int) -> None:
        """Compare a checkpoint with those before it."""
        if number not in self._wanted:
            return
        digest = self._digests[number] = hashlib.blake2b(values).digest()
        for earlier in self._earlier.get(number, ()):
            if self._digests.get(earlier, digest) != digest:
                self._differ((earlier, number))
