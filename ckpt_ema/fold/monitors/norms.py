"""Finds averages that are not weights by their norms: unit vectors, and signs that cancel.

A vector of norm 1 in every checkpoint is a direction, such as a singular vector, and its average is
shorter. An average with far less than the newest checkpoint's norm has values that cancel.
"""

import math
import threading
from collections.abc import Iterable, Sequence
from itertools import product, zip_longest
from typing import Any

from ckpt_ema.errors import Code, some
from ckpt_ema.fold.monitors.protocol import Monitor, Watched, average_and_name, key_of
from ckpt_ema.fold.tiles import Segment
from ckpt_ema.fold.views import (
    SHRUNK,
    SHRUNK_NORM,
    UNIT,
    UNIT_TOLERANCE,
    Seen,
    TileView,
    describe,
)
from ckpt_ema.notices import Notice


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

    def look(self, view: TileView, seen: Seen) -> None:
        """See `Monitor.look`."""
        suspects = {*seen.having(UNIT | SHRUNK)}
        ends = {n for n in (0, len(view.segments) - 1) if not view.segments[n].is_whole}
        planned = enumerate(view.plan.averages)
        averages = [number for number, one in planned if len(one.reads) > 1]
        for number, average in product(sorted(suspects | ends), averages):
            one = view.segments[number]
            if not view.plan.rulings[one.tensor.key].is_asked:
                self._look_at(view, one, average, seen.flags[number])

    def _look_at(self, view: TileView, one: Segment, average: int, flags: int) -> None:
        key, members = key_of(average, one), view.plan.averages[average].reads
        if one.is_vector and (flags & UNIT or not one.is_whole):
            self._look_at_vector(view, one, average, may_be_unit=bool(flags & UNIT))
        if not flags & SHRUNK:
            if not one.is_whole:  # one part that has kept its norm clears the tensor
                self._add_shrunk(key, is_shrunk=False)
            return
        if key in self._not_shrunk:
            return
        newest = describe(view.read_again(members[-1], one.start, one.stop)).squares
        if newest:
            least = SHRUNK_NORM**2 * newest
            is_shrunk = _average_squares(view, one, average) < least < math.inf
            self._add_shrunk(key, is_shrunk=is_shrunk)

    def _look_at_vector(
        self, view: TileView, one: Segment, average: int, *, may_be_unit: bool
    ) -> None:
        sums = [math.inf, math.inf]  # no part of a unit vector
        if may_be_unit:
            contents = (
                view.read_again(checkpoint, one.start, one.stop)
                for checkpoint in view.plan.averages[average].reads
            )
            sums = [describe(content).squares for content in contents]
            sums.append(_average_squares(view, one, average))
        key = key_of(average, one)
        with self._lock:
            if not one.is_whole:
                self._parts.setdefault(key, {})[view.position(one)] = sums
            elif is_lost_unit(sums):
                self._unit.add(key)

    def _add_shrunk(self, key: str, *, is_shrunk: bool) -> None:
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
            f" average, as directions (singular vectors) do, which are not weights; {settle}.",
            Code.CANCELLED: f"The average of {some(shrunk, 3)} has less than half of the norm in"
            f" {self._newest}: values of opposite sign may cancel; {settle}.",
        }
        found = {Code.NOT_A_WEIGHT: unit, Code.CANCELLED: shrunk}
        return tuple(Notice(code, texts[code]) for code, names in found.items() if names)


def _average_squares(view: TileView, one: Segment, average: int) -> float:
    return describe(view.read_average(average, one.start, one.stop)).squares


def _names(keys: Iterable[str]) -> list[str]:
    return sorted({average_and_name(key)[1] for key in keys})


def is_lost_unit(squares: Sequence[float]) -> bool:
    """Return whether all norms but the last, the average's, are 1."""
    *checkpoints, average = squares
    return all(map(_is_unit, checkpoints)) and not _is_unit(average)


def _is_unit(square: float) -> bool:
    return abs(math.sqrt(square) - 1) <= UNIT_TOLERANCE
