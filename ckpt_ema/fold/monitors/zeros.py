"""Telling weights that turn to zeros, as a save leaves them that was interrupted with its size set.

A header says nothing of it. Tensors that are zero from the start, such as masks and fresh adapters,
are no matter.
"""

import threading
from collections.abc import Collection
from typing import NamedTuple

from ckpt_ema.containers.specs import DTYPE_BITS
from ckpt_ema.errors import printable
from ckpt_ema.fold.tiles import Tile, tensor_at
from ckpt_ema.planning.plan import Plan

_PROBE = bytes(16)


class Turn(NamedTuple):
    """A checkpoint, by number, turns to zeros in a tensor."""

    checkpoint: int
    tile: int
    element: int  # of the tile's span, where that becomes sure
    tensor: str


class Zeroed:
    """Where each checkpoint first turns to zeros; for many threads."""

    def __init__(self, plan: Plan, known: Collection[Turn] = ()) -> None:
        """`known` is what an interrupted run has found."""
        self._plan = plan
        self._first: dict[int, Turn] = {}
        self._lock = threading.Lock()
        for turn in known:
            self._note(turn)

    @property
    def found(self) -> list[Turn]:
        """The first of each checkpoint."""
        with self._lock:
            return sorted(self._first.values())

    def note(self, checkpoint: int, tile: Tile, zeros: range) -> None:
        """Note it if these elements of a tile, zeros now, hold all that it has of a tensor.

        The last of them is the last in the tile that was no zero in the checkpoint before.
        """
        target = tile.span.places[0]
        last = tile.start + zeros[-1]
        tensor = tensor_at(self._plan, tile.span, target.average, last)
        first = (tensor.offset - target.offset) * 8 // DTYPE_BITS[target.dtype]
        if max(0, first - tile.start) >= zeros[0]:
            self._note(Turn(checkpoint, tile.numbers[0], last, tensor.name))

    def _note(self, turn: Turn) -> None:
        with self._lock:
            first = self._first.get(turn.checkpoint, turn)
            self._first[turn.checkpoint] = min(first, turn)

    def warnings(self) -> list[str]:
        """A sentence for each checkpoint."""
        return [
            f"{printable(self._plan.checkpoints[turn.checkpoint].name)} turns to zeros in tensor"
            f" {printable(turn.tensor)}, which were none in the checkpoint before: was its save"
            " interrupted?"
            for turn in self.found
        ]


class TileZeros:
    """The comparison within one tile, whose values come checkpoint after checkpoint."""

    def __init__(self) -> None:
        self._before: int | None = None  # zeros at the end, in elements; None of the first

    def newly(self, values: memoryview, element_bytes: int) -> range:
        """The elements that are zeros to the end now, up to the last that was none before."""
        count = len(values) // element_bytes
        zeros = _zero_bytes_at_end(values) // element_bytes
        before = zeros if self._before is None else self._before
        self._before = zeros
        return range(count - zeros, count - before)


def _zero_bytes_at_end(values: memoryview) -> int:
    # A look at the very end nearly always answers it.
    end = values[-len(_PROBE) :]
    if end.tobytes() != _PROBE[: len(end)]:
        return 0
    return len(values) - len(values.tobytes().rstrip(b"\0"))
