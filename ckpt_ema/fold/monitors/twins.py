"""Finds neighbours in an average that hold the same state, from the bytes that are read anyway."""

import hashlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckpt_ema.containers.reader import same_values
from ckpt_ema.fold.monitors.protocol import Monitor, Pair, TileView, Watch, Watched
from ckpt_ema.notices import Notice

if TYPE_CHECKING:
    import torch


class Twins(Monitor):
    """A `Monitor` of pairs of checkpoints that have been equal so far."""

    name = "twins"

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._equal = {(one, other) for one, other in watched.pairs}
        self._lock = threading.Lock()

    def watch(self, _view: TileView) -> Watch | None:
        """See `Monitor.watch`."""
        with self._lock:
            return _Watch(self, sorted(self._equal)) if self._equal else None

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


class _Watch(Watch):
    """Compares the digests of pairs in one tile."""

    def __init__(self, monitor: Twins, pairs: Sequence[Pair]) -> None:
        self._monitor = monitor
        self._earlier: dict[int, list[int]] = {}  # of a checkpoint, those it may be equal to
        for one, other in pairs:
            self._earlier.setdefault(other, []).append(one)
        self._wanted = {number for pair in pairs for number in pair}
        self._digests: dict[int, bytes] = {}

    def see(self, checkpoint: int, content: memoryview, _values: "torch.Tensor") -> None:
        """See `Watch.see`."""
        if checkpoint in self._wanted:
            digest = self._digests[checkpoint] = hashlib.blake2b(content).digest()
            for one in self._earlier.get(checkpoint, ()):
                if self._digests.get(one, digest) != digest:
                    self._monitor.merge([(one, checkpoint)])
