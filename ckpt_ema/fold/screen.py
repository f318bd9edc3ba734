"""Screens tensors with torch, cheaply, so that monitors need a closer look at only a few.

`native/fold.c` does the same where it folds.
"""

import hashlib
from collections.abc import Sequence

import torch

from ckpt_ema.fold.checksum import checksum_of
from ckpt_ema.fold.tiles import IS_VECTOR, IS_WHOLE, Segment, TileSegments
from ckpt_ema.fold.views import (
    EMPTIED,
    FEW_VALUES,
    HEAD,
    SHRUNK,
    SHRUNK_NORM,
    UNIT,
    UNIT_TOLERANCE,
    Seen,
)
from ckpt_ema.planning.plan import Plan

_PROBES = 8  # elements that tell nearly every weight from a mask
_FEW = 8  # segments: the squares of more are summed at once


class Screen:
    """What is seen of one tile, from one thread."""

    def __init__(
        self, plan: Plan, segments: TileSegments, length: int, *, hashes: bool = False
    ) -> None:
        """For a tile of `length` elements; with `hashes`, its values are hashed."""
        self._segments: Sequence[Segment] = [*segments]
        self._flags = segments.kinds()
        self._vectors = {n for n, kind in enumerate(self._flags) if kind & IS_VECTOR}
        self._newest_of = [one.newest for one in plan.foldings]
        self._squares: dict[int, list[float]] = {}  # of the newest checkpoints
        self._empty: set[int] = set()  # segments that were zero in the checkpoint before
        self._last_nonzero: list[int] = []
        self._wants_hashes, self._hashes = hashes, list[int]()
        self._sums = [0] * (len(plan.inputs) + len(plan.foldings)) if plan.keeps_state else []
        self._inputs = len(plan.inputs)
        self._length = length

    def see(self, checkpoint: int, content: memoryview, values: torch.Tensor) -> None:
        """Look at the values of a checkpoint, oldest first: as bytes, and of shape (count,)."""
        zeros = _zero_bytes_at_end(content) // values.itemsize
        self._last_nonzero.append(self._length - 1 - zeros)
        if self._wants_hashes:
            digest = hashlib.blake2b(content, digest_size=8).digest()
            self._hashes.append(int.from_bytes(digest, "little"))
        if checkpoint == 0:
            for number, one in enumerate(self._segments):
                self._flags[number] |= FEW_VALUES * _has_few_values(values[one.start : one.stop])
        if self._sums and values.dtype == torch.float64:
            self._sums[checkpoint] = checksum_of(values)
        self._see_zeros(checkpoint, values)
        if self._vectors or checkpoint in self._newest_of:
            squares = self._squares[checkpoint] = squares_of(values, self._segments)
            self._vectors = {n for n in self._vectors if self._may_be_unit(n, squares[n])}

    def see_average(self, average: int, values: torch.Tensor) -> None:
        """Look at a rounded average, of shape (count,), after all checkpoints."""
        if self._sums and values.dtype == torch.float64:
            self._sums[self._inputs + average] = checksum_of(values)
        newest = self._squares[self._newest_of[average]]
        for number, squares in enumerate(squares_of(values, self._segments)):
            if squares <= SHRUNK_NORM**2 * newest[number]:  # or both are zero
                self._flags[number] |= SHRUNK

    def seen(self) -> Seen:
        """Return what was seen."""
        for number in self._vectors:
            self._flags[number] |= UNIT
        return Seen(self._flags, self._last_nonzero, self._hashes, self._sums)

    def _see_zeros(self, checkpoint: int, values: torch.Tensor) -> None:
        empty = set()
        for number, one in enumerate(self._segments):
            own = values[one.start : one.stop]
            if not any(own[:2].tolist()) and not bool(own.any()):  # two nearly always settle it
                empty.add(number)
        for number in empty - self._empty if checkpoint else ():
            self._flags[number] |= EMPTIED
        self._empty = empty

    def _may_be_unit(self, number: int, squares: float) -> bool:
        least = (1 - UNIT_TOLERANCE) ** 2 if self._flags[number] & IS_WHOLE else 0.0
        return least <= squares <= (1 + UNIT_TOLERANCE) ** 2


def squares_of(values: torch.Tensor, segments: Sequence[Segment]) -> list[float]:
    """Return the sum of squares of each segment of a tile; of large matrices, of their start."""
    if len(segments) > _FEW:
        lengths = torch.tensor([one.stop - one.start for one in segments])
        wide = values.float().square()  # not in place: the values may be float32
        sums: list[float] = torch.segment_reduce(wide, "sum", lengths=lengths).tolist()
        return sums
    found = []
    for one in segments:
        own = values[one.start : one.stop]
        # Of a large matrix, the start in its own dtype says enough, in a tenth of the time.
        own = own[:HEAD] if len(own) > HEAD and not one.is_vector else own.float()
        found.append(float(torch.linalg.vector_norm(own)) ** 2)
    return found


def _has_few_values(values: torch.Tensor) -> bool:
    step = max(1, len(values) // _PROBES)
    return len({*values[::step].tolist()}) <= 2


def _zero_bytes_at_end(content: memoryview) -> int:
    if content[-1]:  # which nearly always settles it
        return 0
    return len(content) - len(content.tobytes().rstrip(b"\0"))
