"""Finds neighbours in an average that hold the same state, by hashes of what is read anyway."""

import threading
from typing import Any

from ckpt_ema.containers.reader import same_values
from ckpt_ema.fold.monitors.protocol import Monitor, Pair, Watched
from ckpt_ema.fold.views import Seen, TileView
from ckpt_ema.notices import Notice


class Twins(Monitor):
    """A `Monitor` of pairs of checkpoints that have been equal so far."""

    name = "twins"

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._equal = {(one, other) for one, other in watched.pairs}
        self._lock = threading.Lock()

    def wants_hashes(self) -> bool:
        """See `Monitor.wants_hashes`."""
        return bool(self._equal)

    def look(self, _view: TileView, seen: Seen) -> None:
        """See `Monitor.look`."""
        if seen.hashes:
            with self._lock:
                equal = {(a, b) for a, b in self._equal if seen.hashes[a] == seen.hashes[b]}
                self._equal = equal

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
