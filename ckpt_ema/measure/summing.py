"""Summing over elements by the compiled module, or by torch where there is none."""

from array import array
from collections.abc import Sequence
from itertools import chain
from types import ModuleType

from ckpt_ema.fold.native import DTYPES, compiled
from ckpt_ema.measure.sums import Block, Summing


def summing(weights: Sequence[float], members: Sequence[int] = (), every: int = 1) -> Summing:
    """Return empty totals for checkpoints with these weights in their average.

    The Gram matrix is that of the checkpoints numbered `members`, over one of `every` strips.
    """
    if module := compiled():
        return _CompiledSums(module, weights, members, every)
    from ckpt_ema.measure.torch_sums import TorchSums  # which imports torch

    return TorchSums(weights, members, every)


class _CompiledSums:
    """Totals that the compiled module adds to."""

    def __init__(
        self, module: ModuleType, weights: Sequence[float], members: Sequence[int], every: int
    ) -> None:
        self._module, self._members, self._every = module, members, every
        self._weights = array("d", weights).tobytes()
        sizes = module.measure_bytes(len(weights), len(members))
        self._totals, self._scratch = (bytearray(size) for size in sizes)

    def add(self, block: Block) -> None:
        """See `Summing.add`."""
        places = ((DTYPES.index(dtype), begin) for dtype, begin in block.places)
        sizes = (len(block.places), len(self._members), block.length, block.strip, self._every)
        numbers = array("q", [*sizes, *chain.from_iterable(places), *self._members]).tobytes()
        self._module.measure(block.content, numbers, self._weights, self._totals, self._scratch)

    def totals(self) -> Sequence[float]:
        """See `Summing.totals`."""
        return memoryview(self._totals).cast("d").tolist()
