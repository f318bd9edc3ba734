"""The protocol of folding a tile, whichever module does the arithmetic."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from ckpt_ema.fold.tiles import Tile, TileSegments
from ckpt_ema.fold.views import Seen
from ckpt_ema.planning.plan import Plan


class Use(NamedTuple):
    """How one checkpoint is used by one of the averages that are made together."""

    average: int
    decay: float | None  # None for the first one, which initialises the shadow


class Folded(NamedTuple):
    """The result of folding a tile; the averages themselves have been written."""

    seen: Seen
    # Average -> its first element that is not finite, except infinities in every checkpoint.
    problems: Mapping[int, int]


class TileFold(Protocol):
    """Reads tiles, folds them and writes the averages; for one thread."""

    def most_elements(self, tile: Tile) -> int:
        """Return how many elements of a tile, from its start on, it takes at a time."""

    def fold(self, tile: Tile, segments: TileSegments, *, hashes: bool) -> Folded:
        """Fold a tile of every checkpoint; with `hashes`, hash its values in each of them."""


def uses(plan: Plan) -> list[list[Use]]:
    """Return how each input of a plan is used by each of its foldings."""
    found: list[list[Use]] = [[] for _ in plan.inputs]
    for number, folding in enumerate(plan.foldings):
        for read, decay in zip(folding.reads, (None, *folding.decays), strict=True):
            found[read].append(Use(number, decay))
    return found
