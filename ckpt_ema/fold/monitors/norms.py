"""Finds averages that are no weights by their norms: unit vectors, and signs that cancel.

A vector of norm 1 in every checkpoint is a direction, such as a singular vector, and its average is
shorter. An average with far less than the newest checkpoint's norm comes of opposite signs.
"""

import math
import threading
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ckpt_ema.errors import Code, some
from ckpt_ema.fold.monitors.protocol import (
    Monitor,
    TileView,
    Watch,
    Watched,
    average_and_name,
    key_of,
)
from ckpt_ema.fold.tiles import Segment
from ckpt_ema.notices import Notice

if TYPE_CHECKING:
    import torch

_UNIT = 1e-3  # how far from 1 the norm of a unit vector may be
_SHRUNK = 0.5  # of the newest norm: less is left only where values cancel
_SAMPLE = 1 << 12  # elements of a matrix whose norm is taken, until it is in doubt
_FEW = 8  # segments of a tile: more are reduced at once


class Norms(Monitor):
    """A `Monitor` of the norms of tensors that are averaged, by their names."""

    name = "norms"

    def __init__(self, watched: Watched) -> None:
        self._newest = watched.checkpoints[-1]
        # Keys are the number of an average and the name of a tensor.
        self._unit: set[str] = set()
        self._shrunk: set[str] = set()
        self._not_shrunk: set[str] = set()  # some part of a tensor that is in several tiles
        self._parts: dict[str, dict[str, list[float]]] = {}  # of vectors in several tiles
        self._lock = threading.Lock()

    def watch(self, view: TileView) -> Watch | None:
        """See `Monitor.watch`; of a tensor that has kept its norm elsewhere, nothing is taken."""
        averages = range(len(view.plan.averages))
        is_known = all(
            key_of(average, one) in self._not_shrunk and not _is_vector(one)
            for one in view.segments
            for average in averages
        )
        return None if is_known else _Watch(self, view)

    def add_vector(self, key: str, start: int, sums: list[float]) -> None:
        """Add the sums of squares of a part of a vector: of all checkpoints, then the average."""
        with self._lock:
            self._parts.setdefault(key, {})[str(start)] = sums

    def add_unit(self, key: str) -> None:
        """Add a vector that has norm 1 in every checkpoint and not in the average."""
        with self._lock:
            self._unit.add(key)

    def add_shrunk(self, key: str, *, is_shrunk: bool) -> None:
        """Add a tensor, or part of one, whose average has less than half of the norm, or not."""
        with self._lock:
            (self._shrunk if is_shrunk else self._not_shrunk).add(key)

    def state(self) -> Any:
        """Return what was found, and the parts of vectors."""
        with self._lock:
            names = (self._unit, self._shrunk, self._not_shrunk)
            return [*map(sorted, names), {key: {**parts} for key, parts in self._parts.items()}]

    def merge(self, state: Any) -> None:
        """See `Monitor.merge`."""
        *names, parts = state
        with self._lock:
            mine = (self._unit, self._shrunk, self._not_shrunk)
            for known, found in zip(mine, names, strict=True):
                known.update(found)
            for key, sums in parts.items():
                self._parts.setdefault(key, {}).update(sums)

    def verdict(self) -> tuple[Notice, ...]:
        """Return a warning for each kind of tensors that was found."""
        for key, parts in self._parts.items():
            whole = [sum(column) for column in zip_longest(*parts.values(), fillvalue=0.0)]
            if is_lost_unit(whole):
                self._unit.add(key)
        unit = _names(self._unit)
        shrunk = _names(self._shrunk - self._not_shrunk - self._unit)
        settle = "decide with --keep GLOB or --average GLOB"
        texts = {
            Code.NOT_A_WEIGHT: f"{some(unit, 3)} have norm 1 in every checkpoint but not in the"
            f" average, as directions (singular vectors) do, which are no weights; {settle}.",
            Code.CANCELLED: f"The average of {some(shrunk, 3)} has less than half of the norm in"
            f" {self._newest}: values of opposite sign may cancel; {settle}.",
        }
        found = {Code.NOT_A_WEIGHT: unit, Code.CANCELLED: shrunk}
        return tuple(Notice(code, texts[code]) for code, names in found.items() if names)


class _Watch(Watch):
    """Takes the norms in one tile."""

    def __init__(self, monitor: Norms, view: TileView) -> None:
        self._monitor, self._view, self._plan = monitor, view, view.plan
        self._newest = {one.newest for one in view.plan.averages if len(one.members) > 1}
        self._segments = view.segments
        vectors = {n for n, one in enumerate(view.segments) if _is_vector(one)}
        self._parts = {number for number in vectors if not view.segments[number].is_whole}
        self._vectors = vectors  # that have had norm 1 in each checkpoint so far, or a part of it
        self._sums: dict[int, list[float]] = {}  # of a checkpoint: of the squares in each segment

    def see(self, checkpoint: int, _content: memoryview, values: "torch.Tensor") -> None:
        """See `Watch.see`."""
        if self._vectors or checkpoint in self._newest:
            sums = self._sums[checkpoint] = squares(values, self._segments)
            self._vectors = {n for n in self._vectors if self._may_be_unit(n, sums[n])}

    def see_average(self, average: int, values: "torch.Tensor") -> None:
        """See `Watch.see_average`."""
        members = self._plan.averages[average].members
        if len(members) == 1:
            return
        results = squares(values, self._segments)
        newest = self._sums[members[-1]]
        for number, (one, result) in enumerate(zip(self._segments, results, strict=True)):
            is_shrunk = result < _SHRUNK**2 * newest[number] < math.inf
            if is_shrunk and is_sampled(one):
                is_shrunk = self._is_shrunk(members[-1], one, values[one.start : one.stop])
            if not is_shrunk and one.is_whole and number not in self._vectors:
                continue
            if self._plan.rulings[one.tensor.key].is_asked:
                continue
            if number in self._vectors | self._parts:
                self._see_vector(average, number, result)
            if newest[number]:
                self._monitor.add_shrunk(key_of(average, one), is_shrunk=is_shrunk)

    def _see_vector(self, average: int, number: int, result: float) -> None:
        one, members = self._segments[number], self._plan.averages[average].members
        sums = [math.inf, math.inf]  # no part of a unit vector
        if number in self._vectors:
            sums = [*(self._sums[checkpoint][number] for checkpoint in members), result]
        if not one.is_whole:
            start = self._view.tile.start + one.start
            self._monitor.add_vector(key_of(average, one), start, sums)
        elif is_lost_unit(sums):
            self._monitor.add_unit(key_of(average, one))

    def _is_shrunk(self, newest: int, one: Segment, average: "torch.Tensor") -> bool:
        """Compare whole norms, with the values of the newest checkpoint read again."""
        own = self._view.read_again(newest, one.start, one.stop)
        return float(average.double().norm()) < _SHRUNK * float(own.double().norm())

    def _may_be_unit(self, number: int, square: float) -> bool:
        return _is_unit(square) or (square < 1 and not self._segments[number].is_whole)


def _names(keys: Iterable[str]) -> list[str]:
    return sorted({average_and_name(key)[1] for key in keys})


def squares(values: "torch.Tensor", segments: Sequence[Segment]) -> list[float]:
    """Return the sum of squares of each segment of a tile; of large matrices, of their start."""
    import torch

    if len(segments) > _FEW:
        lengths = torch.tensor([one.stop - one.start for one in segments])
        wide = values.float().square()  # not in place: the values may be float32
        sums: list[float] = torch.segment_reduce(wide, "sum", lengths=lengths).tolist()
        return sums
    found = []
    for one in segments:
        if is_sampled(one):  # which says enough in any dtype
            own = values[one.start : one.start + _SAMPLE]
        else:
            own = values[one.start : one.stop].float()
        found.append(float(torch.linalg.vector_norm(own)) ** 2)
    return found


def is_sampled(segment: Segment) -> bool:
    """Return whether the norm of a segment is first taken of its start alone."""
    return segment.stop - segment.start > _SAMPLE and not _is_vector(segment)


def _is_vector(segment: Segment) -> bool:
    return sum(size > 1 for size in segment.tensor.shape) == 1


def is_lost_unit(squares: Sequence[float]) -> bool:
    """Return whether all norms but the last, the average's, are 1."""
    *checkpoints, average = squares
    return all(map(_is_unit, checkpoints)) and not _is_unit(average)


def _is_unit(square: float) -> bool:
    return abs(math.sqrt(square) - 1) <= _UNIT
