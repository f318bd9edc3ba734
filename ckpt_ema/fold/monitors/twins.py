"""Finds neighbours in an average that hold the same state, from the bytes that are read anyway."""

import hashlib
import threading
from typing import Any

from ckpt_ema.containers.reader import same_values
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
        earlier: dict[int, list[int]] = {}  # of a checkpoint, those it may be equal to
        with self._lock:
            for one, other in self._equal:
                earlier.setdefault(other, []).append(one)
        digests: dict[int, bytes] = {}
        wanted = {number for other, ones in earlier.items() for number in (other, *ones)}

        def see(checkpoint: int, values: memoryview, _itemsize: int) -> None:
            if checkpoint in wanted:
                digest = digests[checkpoint] = hashlib.blake2b(values).digest()
                for one in earlier.get(checkpoint, ()):
                    if digests.get(one, digest) != digest:
                        self.merge([(one, checkpoint)])

        return see if wanted else None

    def state(self) -> list[Pair]:
        """Return the pairs that differ."""
        with self._lock:
            return [(a, b) for a, b in self._watched.pairs if (a, b) not in self._equal]

    def merge(self, state: Any) -> None:
        """See `Monitor.merge`."""
        with self._lock:
            self._equal.difference_update(map(tuple, state))

    def verdict(self) -> tuple[Notice, ...]:
        """Raise `RefusedError` if two checkpoints are equal, unless that is allowed."""
        if self._equal and not self._watched.allow_duplicates:
            raise same_values(*(self._watched.checkpoints[number] for number in min(self._equal)))
        return ()
