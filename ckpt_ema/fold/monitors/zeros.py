"""Finds weights that turn to zeros, as an interrupted save leaves them if it set the size first."""

import threading
from typing import Any, NamedTuple

from ckpt_ema.containers.specs import DTYPE_BITS
from ckpt_ema.errors import Code
from ckpt_ema.fold.monitors.protocol import Monitor, See, TileView, Watched
from ckpt_ema.fold.tiles import tensor_at
from ckpt_ema.notices import Notice

_PROBE = bytes(16)


class Turn(NamedTuple):
    """A checkpoint, by number, turns to zeros in a tensor."""

    checkpoint: int
    tile: int
    element: int  # of the tile's span, where that becomes certain
    tensor: str
    offset: int  # of the first zero, in bytes of the tensor


class Zeros(Monitor):
    """A `Monitor` of where each checkpoint first turns to zeros."""

    name = "zeros"

    def __init__(self, watched: Watched) -> None:
        self._checkpoints = watched.checkpoints
        self._first: dict[int, Turn] = {}
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

    def state(self) -> list[Turn]:
        """Return the first turn of each checkpoint."""
        with self._lock:
            return sorted(self._first.values())

    def merge(self, state: Any) -> None:
        """See `Monitor.merge`."""
        for values in state:
            self._add(Turn(*values))

    def verdict(self) -> tuple[Notice, ...]:
        """Return a warning for each checkpoint that turns to zeros."""
        return tuple(
            Notice(
                Code.ZEROS,
                f"{self._checkpoints[turn.checkpoint]}: tensor {turn.tensor} turns to zeros at"
                f" offset {turn.offset}, unlike the checkpoint before; was its save interrupted?",
            )
            for turn in self.state()
        )

    def _note(self, view: TileView, checkpoint: int, zeros: range) -> None:
        """Add a turn if these elements of a tile, zeros now, are all that it has of a tensor."""
        tile = view.tile
        target = tile.span.places[0]
        last = tile.start + zeros[-1]
        tensor = tensor_at(view.plan, tile.span, target.average, last)
        bits = DTYPE_BITS[target.dtype]
        first = (tensor.offset - target.offset) * 8 // bits  # of the tensor, in the span
        if max(0, first - tile.start) >= zeros[0]:
            start = max(first, tile.start + zeros[0])
            offset = (start - first) * bits // 8
            self._add(Turn(checkpoint, tile.numbers[0], last, tensor.name, offset))

    def _add(self, turn: Turn) -> None:
        with self._lock:
            self._first[turn.checkpoint] = min(turn, self._first.get(turn.checkpoint, turn))


def _zero_bytes_at_end(values: memoryview) -> int:
    # The very end nearly always settles it.
    end = values[-len(_PROBE) :]
    if end.tobytes() != _PROBE[: len(end)]:
        return 0
    return len(values) - len(values.tobytes().rstrip(b"\0"))
