"""Finds tensors that end in zeros, as a save that sets the size first leaves them if cut off."""

import threading
from typing import Any, NamedTuple

from ckpt_ema.containers.specs import DTYPE_BITS
from ckpt_ema.errors import Code
from ckpt_ema.fold.monitors.protocol import Monitor, See, TileView, Watched
from ckpt_ema.fold.tiles import tensor_at
from ckpt_ema.notices import Notice

_PROBE = bytes(16)


class Onset(NamedTuple):
    """Where new zeros begin in a checkpoint, which is known by its number."""

    checkpoint: int
    tile: int
    element: int  # of the tile's span, where that becomes certain
    tensor: str
    offset: int  # of the first zero, in bytes of the tensor


class Zeros(Monitor):
    """A `Monitor` of where new zeros begin in each checkpoint."""

    name = "zeros"

    def __init__(self, watched: Watched) -> None:
        self._checkpoints = watched.checkpoints
        self._first: dict[int, Onset] = {}
        self._lock = threading.Lock()

    def watch(self, view: TileView) -> See | None:
        """See `Monitor.watch`."""
        before: int | None = None  # zeros at the end of the checkpoint before, in elements

        def see(checkpoint: int, values: memoryview, itemsize: int) -> None:
            nonlocal before
            zeros = _zero_bytes_at_end(values) // itemsize
            if before is not None and zeros > before:
                count = len(values) // itemsize
                self._note(view, checkpoint, range(count - zeros, count - before))
            before = zeros

        return see

    def state(self) -> list[Onset]:
        """Return the first onset in each checkpoint that has one."""
        with self._lock:
            return sorted(self._first.values())

    def merge(self, state: Any) -> None:
        """See `Monitor.merge`."""
        for values in state:
            self._add(Onset(*values))

    def verdict(self) -> tuple[Notice, ...]:
        """Return a warning for each checkpoint with new zeros."""
        return tuple(
            Notice(
                Code.ZEROS,
                f"{self._checkpoints[onset.checkpoint]}: tensor {onset.tensor} has zeros from"
                f" offset {onset.offset} on, unlike the checkpoint before;"
                " was its save interrupted?",
            )
            for onset in self.state()
        )

    def _note(self, view: TileView, checkpoint: int, zeros: range) -> None:
        """Add an onset if these elements of a tile, zeros now, are all that it has of a tensor."""
        tile = view.tile
        target = tile.span.places[0]
        last = tile.start + zeros[-1]
        tensor = tensor_at(view.plan, tile.span, target.average, last)
        bits = DTYPE_BITS[target.dtype]
        first = (tensor.offset - target.offset) * 8 // bits  # of the tensor, in the span
        if max(0, first - tile.start) >= zeros[0]:
            start = max(first, tile.start + zeros[0])
            offset = (start - first) * bits // 8
            self._add(Onset(checkpoint, tile.numbers[0], last, tensor.name, offset))

    def _add(self, onset: Onset) -> None:
        with self._lock:
            self._first[onset.checkpoint] = min(onset, self._first.get(onset.checkpoint, onset))


def _zero_bytes_at_end(values: memoryview) -> int:
    # The very end nearly always settles it.
    end = values[-len(_PROBE) :]
    if end.tobytes() != _PROBE[: len(end)]:
        return 0
    return len(values) - len(values.tobytes().rstrip(b"\0"))
