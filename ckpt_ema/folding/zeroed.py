"""Telling weights that turn to zeros, as a save leaves them that was interrupted with its size set.

A header says nothing of it. Tensors that are zero from the start, such as masks and fresh adapters,
are no matter.
"""

import threading

from ckpt_ema.errors import printable
from ckpt_ema.folding.nonfinite import tensor_at
from ckpt_ema.folding.tiles import Tile
from ckpt_ema.planning.plan import Plan

_PROBE = bytes(16)


class Zeroed:
    """Where each checkpoint, by number, first turns to zeros; for many threads."""

    def __init__(self) -> None:
        self._first: dict[int, Tile] = {}
        self._lock = threading.Lock()

    def note(self, checkpoint: int, tile: Tile) -> None:
        """Note that a checkpoint turns to zeros in a tile."""
        with self._lock:
            first = self._first.get(checkpoint, tile)
            self._first[checkpoint] = min(first, tile, key=lambda one: (one.numbers[0], one.start))

    def warnings(self, plan: Plan) -> list[str]:
        """A sentence for each checkpoint."""
        found = []
        for number, tile in sorted(self._first.items()):
            tensor = tensor_at(plan, tile.span, tile.span.targets[0].candidate, tile.start)
            found.append(
                f"{printable(plan.checkpoints[number].name)} turns to zeros in tensor"
                f" {printable(tensor.name)}, which were none in the checkpoint before: was its save"
                " interrupted?"
            )
        return found


class TileZeros:
    """The comparison within one tile, whose values come checkpoint after checkpoint."""

    def __init__(self) -> None:
        self._earlier_is_zero = True

    def turns(self, values: memoryview) -> bool:
        """Whether these bytes are all zero and those of the checkpoint before were not."""
        is_zero = _is_zero(values)
        turns = is_zero and not self._earlier_is_zero
        self._earlier_is_zero = is_zero
        return turns


def _is_zero(values: memoryview) -> bool:
    # A look at the end nearly always answers it.
    end = values[-len(_PROBE) :]
    return end.tobytes() == _PROBE[: len(end)] and values.tobytes().count(0) == len(values)
