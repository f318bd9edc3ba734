"""The protocol of monitors: see values while they are folded, and judge them at the end."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ckpt_ema.containers.specs import TensorSpec
from ckpt_ema.fold.tiles import Tile
from ckpt_ema.notices import Notice
from ckpt_ema.planning.plan import Plan

if TYPE_CHECKING:
    import torch

Pair = tuple[int, int]  # two checkpoints, by their numbers in a plan

# Shows a monitor the values of one checkpoint in one tile: number, bytes, bytes of an element.
See = Callable[[int, memoryview, int], None]


class Watched(NamedTuple):
    """What monitors need to know for their verdict; plain values, for `finish` has no plan."""

    checkpoints: tuple[str, ...]  # names
    pairs: tuple[Pair, ...]  # that follow each other in some average
    allow_duplicates: bool
    allow_nonfinite: bool


class TileView(NamedTuple):
    """A tile that is being folded, for monitors that need to look closer."""

    plan: Plan
    tile: Tile
    # Reads elements of a tensor of one checkpoint again: number, tensor, first element, count.
    read: Callable[[int, TensorSpec, int, int], "torch.Tensor"]


class Monitor(Protocol):
    """Looks at all values of a plan, or of a share, from many threads; methods do nothing here."""

    name: str  # of its state in records

    def watch(self, _view: TileView) -> See | None:
        """Return what is called with each checkpoint's values, oldest first; None for nothing."""
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
