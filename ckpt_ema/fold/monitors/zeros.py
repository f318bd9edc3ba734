"""Finds tensors that end in zeros, as a save that sets the size first leaves them if cut off."""

import threading
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

from ckpt_ema.containers.specs import DTYPE_BITS
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.fold.monitors.protocol import Monitor, Watched
from ckpt_ema.fold.tiles import Segment
from ckpt_ema.fold.views import EMPTIED, Seen, TileView, describe
from ckpt_ema.notices import Notice

_FEWEST = 8  # elements; fewer zeros may well be values


class Onset(NamedTuple):
    """Where new zeros begin in a checkpoint, which is known by its number."""

    checkpoint: int
    tile: int
    element: int  # of the tile's span, where that becomes certain
    tensor: str
    offset: int  # of the first zero, in bytes of the tensor


class Zeros(Monitor):
    """A `Monitor` of where zeros begin in each checkpoint that its neighbours do not have."""

    name = "zeros"

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._first: dict[int, Onset] = {}
        self._lock = threading.Lock()

    def look(self, view: TileView, seen: Seen) -> None:
        """See `Monitor.look`."""
        for checkpoint, zeros in (*_tails(view, seen), *_emptied(view, seen)):
            if checkpoint >= len(self._watched.states):  # these were looked at when they were made
                self._note(view, checkpoint, zeros)

    def state(self) -> list[Onset]:
        """Return the first onset in each checkpoint that has one."""
        with self._lock:
            return sorted(self._first.values())

    def merge(self, state: Any) -> None:
        """See `Monitor.merge`."""
        for values in state:
            self.add(Onset(*values))

    def add(self, onset: Onset) -> None:
        """Add an onset of zeros."""
        with self._lock:
            self._first[onset.checkpoint] = min(onset, self._first.get(onset.checkpoint, onset))

    def _note(self, view: TileView, checkpoint: int, zeros: range) -> None:
        """Add an onset if these elements of a tile, zeros in one checkpoint alone, end a tensor."""
        tile, place = view.tile, view.tile.span.places[0]
        one = _segment_at(view, zeros[-1])
        if len(zeros) < _FEWEST or not (one.start >= zeros[0] or one.ends):
            return
        start = tile.start + max(one.start, zeros[0])
        offset = place.offset + start * DTYPE_BITS[place.dtype] // 8 - one.tensor.offset
        last = tile.start + zeros[-1]
        self.add(Onset(checkpoint, tile.numbers[0], last, one.tensor.name, offset))

    def verdict(self) -> tuple[Notice, ...]:
        """Raise `RefusedError` for new zeros, or return warnings if they are allowed."""
        onsets = self.state()
        if not onsets:
            return ()
        names = [self._watched.checkpoints[onset.checkpoint] for onset in onsets]
        found = [
            f"{name}: tensor {onset.tensor} holds zeros from byte {onset.offset} to its end, unlike"
            " the checkpoint next to it"
            for name, onset in zip(names, onsets, strict=True)
        ]
        if self._watched.allow_zeros:
            return tuple(Notice(Code.ZEROS, f"{one}.") for one in found)
        message = f"{found[0]}, as an interrupted save leaves it; the average would mix them in."
        hint = f"Leave it out with --exclude {names[0]}, or pass --allow-zeros."
        raise RefusedError(message, hint, code=Code.ZEROS, tensor=onsets[0].tensor)


_Found = Iterator[tuple[int, range]]  # checkpoints, and elements of a tile that are zero there


def _tails(view: TileView, seen: Seen) -> _Found:
    """Yield the trailing zeros of a tile in a checkpoint that the previous one does not have."""
    ends = [last + 1 for last in seen.last_nonzero]
    if min(ends) == view.tile.length:  # as nearly always
        return
    for later, (before, now) in enumerate(pairwise(ends), start=1):
        if now < before:
            yield later, range(now, before)
    if len(ends) > 1 and ends[0] < ends[1]:
        one = _segment_at(view, ends[1] - 1)
        # One tensor that is zero as a whole may have started so.
        if ends[0] > one.start or not _is_zero(view, 1, ends[0], one.start):
            yield 0, range(ends[0], ends[1])


def _emptied(view: TileView, seen: Seen) -> _Found:
    """Yield each tensor that is zero as a whole, and was not in the checkpoint before."""
    for number in seen.having(EMPTIED):
        one = view.segments[number]
        checkpoints = range(len(view.plan.inputs))
        are_zero = [_is_zero(view, checkpoint, one.start, one.stop) for checkpoint in checkpoints]
        for later, (before, now) in enumerate(pairwise(are_zero), start=1):
            if now and not before:
                yield later, range(one.start, one.stop)


def _is_zero(view: TileView, checkpoint: int, start: int, stop: int) -> bool:
    return start >= stop or describe(view.read_again(checkpoint, start, stop)).is_zero


def _segment_at(view: TileView, element: int) -> Segment:
    number = bisect_right(view.segments, element, key=attrgetter("start")) - 1
    found: Segment = view.segments[number]
    return found
