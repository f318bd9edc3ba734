"""The protocol of monitors: look at each tile when it is folded, and judge all at the end."""

from typing import Any, NamedTuple, Protocol

from ckpt_ema.fold.tiles import Segment, Tile
from ckpt_ema.fold.views import Seen, TileView
from ckpt_ema.notices import Notice

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
    # Of inputs that are states, the first ones: where each is, and its checksum.
    states: tuple[tuple[str, int], ...] = ()
    outputs: int = 0  # foldings whose checksums are wanted, the states that are written last


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


class Monitor(Protocol):
    """Looks at all values of a plan, or of a share, from many threads; methods do nothing here."""

    name: str  # of its state in records
    sees_copies: bool = False  # also of tensors that are in the output twice
    merges_twice: bool = True  # a state that is merged again adds nothing

    def wants_hashes(self) -> bool:
        """Return whether the values of the next tile should be hashed."""
        return False

    def look(self, _view: TileView, _seen: Seen) -> None:
        """Look at what screening found in a tile, and closer if need be."""
        return

    def see_problem(self, _view: TileView, _average: int, _element: int) -> None:
        """Look at an average that is not finite; raise `RefusedError` to end the work at once."""
        return

    def see_kept(self, _tile: Tile, _data: memoryview) -> None:
        """Look at bytes that are kept, as they are written."""
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
