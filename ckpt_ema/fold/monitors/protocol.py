"""The protocol of monitors: see values while they are folded, and judge them at the end."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ckpt_ema.containers.specs import TensorSpec
from ckpt_ema.fold.tiles import Segment, Tile
from ckpt_ema.notices import Notice
from ckpt_ema.planning.plan import Plan

if TYPE_CHECKING:
    import torch

Pair = tuple[int, int]  # two checkpoints, by their numbers in a plan


class Watched(NamedTuple):
    """What monitors need to know for their verdict; plain values, for `finish` has no plan."""

    checkpoints: tuple[str, ...]  # names
    pairs: tuple[Pair, ...]  # that follow each other in some average
    weights: tuple[tuple[float, ...], ...]  # of the checkpoints in each average
    allow_duplicates: bool
    allow_nonfinite: bool
    allow_zeros: bool
    is_strict: bool  # every warning is an error


class TileView(NamedTuple):
    """A tile that is being folded, for monitors that need to look closer."""

    plan: Plan
    tile: Tile
    segments: Sequence[Segment]
    # Reads elements of a tensor of one checkpoint again: number, tensor, first element, count.
    read: Callable[[int, TensorSpec, int, int], "torch.Tensor"]

    def read_again(self, checkpoint: int, start: int, stop: int) -> "torch.Tensor":
        """Read elements of the tile, from `start` to `stop`, of one checkpoint again."""
        source = self.tile.span.sources[self.plan.work.layout_of[checkpoint]]
        return self.read(checkpoint, source, self.tile.start + start, stop - start)


def key_of(average: int, segment: Segment) -> str:
    """Return by what the state of a monitor knows a tensor of one average."""
    return f"{average} {segment.tensor.name}"


def average_and_name(key: str) -> tuple[int, str]:
    """Return the number of the average and the name of the tensor in a key.

    >>> average_and_name("0 model.norm.weight")
    (0, 'model.norm.weight')
    """
    average, name = key.split(" ", 1)
    return int(average), name


class Watch:
    """Looks at one tile while it is folded, from one thread; methods do nothing here."""

    def see(self, _checkpoint: int, _content: memoryview, _values: "torch.Tensor") -> None:
        """Look at the values of a checkpoint, oldest first: as bytes, and of shape (count,)."""

    def see_average(self, _average: int, _values: "torch.Tensor") -> None:
        """Look at a rounded average, of shape (count,), after all checkpoints."""


class Monitor(Protocol):
    """Looks at all values of a plan, or of a share, from many threads; methods do nothing here."""

    name: str  # of its state in records

    def watch(self, _view: TileView) -> Watch | None:
        """Return what looks at a tile; None for nothing."""
        return None

    def see_nonfinite(self, _view: TileView, _average: int, _values: "torch.Tensor") -> None:
        """Look at an average that is not finite; raise `RefusedError` to end the work at once."""
        return

    def state(self) -> Any:
        """Return what was seen so far, ready for JSON."""
        return None

    def merge(self, _state: Any) -> None:
        """Add what another process has seen, or an interrupted run."""
        return

    def verdict(self) -> tuple[Notice, ...]:
        """Return warnings, or raise `RefusedError`, once all values were seen."""
        return ()
