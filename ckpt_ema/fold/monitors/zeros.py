"""Finds tensors that end in zeros, as a save that sets the size first leaves them if cut off."""

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt_ema.containers.specs import DTYPE_BITS
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.fold.monitors.protocol import Monitor, TileView, Watch, Watched
from ckpt_ema.fold.tiles import Segment
from ckpt_ema.notices import Notice

if TYPE_CHECKING:
    import torch

_PROBE = bytes(16)
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

    def watch(self, view: TileView) -> Watch:
        """See `Monitor.watch`."""
        return _Watch(self, view)

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


class _Watch(Watch):
    """Compares the zeros at the end of one tile from checkpoint to checkpoint."""

    def __init__(self, monitor: Zeros, view: TileView) -> None:
        self._monitor = monitor
        self._view = view
        self._before = 0  # zeros at the end of the checkpoint before, in elements
        self._empty: set[int] = set()  # segments that were zero in it

    def see(self, checkpoint: int, content: memoryview, values: "torch.Tensor") -> None:
        """See `Watch.see`."""
        zeros = _zero_bytes_at_end(content) // values.itemsize
        count = len(content) // values.itemsize
        if checkpoint and zeros > self._before:
            self._note(checkpoint, range(count - zeros, count - self._before))
        elif checkpoint == 1 and zeros < self._before:
            begin, one = count - self._before, self._segment_at(count - zeros - 1)
            # One tensor that is zero as a whole may have started so.
            if begin > one.start or bool((values[begin : one.start] != 0).any()):
                self._note(0, range(begin, count - zeros))
        self._before = zeros
        self._see_segments(checkpoint, values)

    def _see_segments(self, checkpoint: int, values: "torch.Tensor") -> None:
        """Add an onset for each tensor that is zero as a whole, and was not in the one before."""
        empty = set()
        for number, one in enumerate(self._view.segments):
            own = values[one.start : one.stop]
            if not any(own[:2].tolist()) and not bool(own.any()):  # two nearly always settle it
                empty.add(number)
        for number in sorted(empty - self._empty) if checkpoint else ():
            one = self._view.segments[number]
            self._note(checkpoint, range(one.start, one.stop))
        self._empty = empty

    def _segment_at(self, element: int) -> Segment:
        return next(one for one in self._view.segments if one.start <= element < one.stop)

    def _note(self, checkpoint: int, zeros: range) -> None:
        """Add an onset if these elements of a tile, zeros in one checkpoint alone, end a tensor."""
        tile, place = self._view.tile, self._view.tile.span.places[0]
        one = self._segment_at(zeros[-1])
        if len(zeros) < _FEWEST or not (one.start >= zeros[0] or one.ends):
            return
        start = tile.start + max(one.start, zeros[0])
        offset = place.offset + start * DTYPE_BITS[place.dtype] // 8 - one.tensor.offset
        last = tile.start + zeros[-1]
        self._monitor.add(Onset(checkpoint, tile.numbers[0], last, one.tensor.name, offset))


def _zero_bytes_at_end(values: memoryview) -> int:
    # The very end nearly always settles it.
    end = values[-len(_PROBE) :]
    if end.tobytes() != _PROBE[: len(end)]:
        return 0
    return len(values) - len(values.tobytes().rstrip(b"\0"))
