"""The sums of `measure.sums` by torch, where there is no compiled module."""

from collections.abc import Sequence

import torch

from ckpt_ema.containers.specs import FOLDED
from ckpt_ema.measure.sums import STRIP, Block, Row

_MOST_VALUES = 1 << 18  # that are widened at a time


class TorchSums:
    """A `Summing` by torch."""

    def __init__(self, weights: Sequence[float], members: Sequence[int], every: int) -> None:
        torch.set_num_threads(1)  # there is one thread per core already
        self._weights = torch.tensor(weights, dtype=torch.float64)[:, None]
        self._members, self._every = list(members), every
        triangle = len(members) * (len(members) + 1) // 2
        self._rows = torch.zeros(2, len(weights), len(Row._fields), dtype=torch.float64)
        self._products = torch.zeros(2, triangle + 1, dtype=torch.float64)

    def add(self, block: Block) -> None:
        """See `Summing.add`."""
        length = max(1, _MOST_VALUES // len(block.places) // STRIP) * STRIP
        for start in range(0, block.length, length):
            count = min(length, block.length - start)
            self._add(_values(block, start, count), block.strip + start // STRIP)

    def totals(self) -> Sequence[float]:
        """See `Summing.totals`."""
        pairs = [each.reshape(2, -1).T for each in (self._rows, self._products)]
        found: list[float] = torch.cat(pairs).flatten().tolist()
        return found

    def _add(self, values: torch.Tensor, strip: int) -> None:
        """Add values of shape (checkpoints, elements); those that are not finite become NaN."""
        gaps = ~values.isfinite()
        known, values = values.masked_fill(gaps, 0.0), values.masked_fill(gaps, torch.nan)
        average = (self._weights * known).sum(0)
        if bool(gaps.any()):  # the average of the others, NaN where there are none
            average = average / (self._weights * ~gaps).sum(0)
            average = average.masked_fill(average.isinf(), torch.nan)
        now = torch.zeros_like(values)
        now[1:] = (values[1:] - values[:-1]).nan_to_num(0.0)
        apart = (values - average).nan_to_num(0.0)
        rows = torch.zeros(self._rows.shape[1:], dtype=torch.float64)
        rows[:, 0] = known.square().sum(1)
        rows[:, 1] = now.square().sum(1)
        rows[1:, 2] = (now[1:] * now[:-1]).sum(1)
        rows[:, 3] = apart.square().sum(1)
        rows[:, 4] = (values == 0).sum(1)
        rows[:, 5] = gaps.sum(1)
        largest = torch.maximum(self._rows[0, :, 6], now.abs().amax(1))
        _add_to(self._rows, rows)
        self._rows[0, :, 6] = largest
        self._rows[1, :, 6] = 0.0
        strips = strip + torch.arange(values.shape[1]) // STRIP
        hashes = (strips * 2654435761 >> 16) & 0xFFFF  # as in native/fold.c
        sample = apart[self._members][:, hashes % self._every == 0]
        lower = torch.tril_indices(len(sample), len(sample))
        sampled = torch.tensor([sample.shape[1]], dtype=torch.float64)
        _add_to(self._products, torch.cat([(sample @ sample.T)[lower[0], lower[1]], sampled]))


def _values(block: Block, start: int, count: int) -> torch.Tensor:
    """Return elements of a block in float64: shape (checkpoints, count)."""
    rows = []
    for dtype_name, begin in block.places:
        dtype = getattr(torch, FOLDED[dtype_name])
        offset = begin + start * dtype.itemsize
        rows.append(torch.frombuffer(block.content, dtype=dtype, count=count, offset=offset))
    return torch.stack([row.double() for row in rows])


def _add_to(total: torch.Tensor, found: torch.Tensor) -> None:
    """Add to totals of two doubles each, by Knuth's two-sum."""
    high = total[0] + found
    part = high - total[0]
    total[1] += (total[0] - (high - part)) + (found - part)
    total[0] = high
