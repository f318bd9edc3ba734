"""What monitors get of a tile: what screening found in it, and a closer look at any part.

Screening looks at every tensor while it is folded, at little cost. It clears nearly all of them
and flags the others with the reason; a tensor that may not be a weight is never cleared.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import DTYPE_BITS, FOLDED, TensorSpec
from ckpt_ema.fold.native import DTYPES, compiled
from ckpt_ema.fold.tiles import Segment, Tile, TileSegments
from ckpt_ema.planning.plan import Plan

if TYPE_CHECKING:
    import torch

# Why a segment needs a closer look. All these numbers are in native/fold.c too.
FEW_VALUES = 1  # eight elements of the first checkpoint have at most two values
UNIT = 2  # a vector that may have norm 1 in every checkpoint
SHRUNK = 4  # an average may have less than SHRUNK_NORM of the newest checkpoint's norm
EMPTIED = 8  # zero in a checkpoint, and not in the one before
UNIT_TOLERANCE = 1e-3  # how far from 1 the norm of a unit vector may be
SHRUNK_NORM = 0.5  # of the newest checkpoint's: less is left only where values cancel
HEAD = 4096  # elements of a large tensor whose norm is taken by screening


class Seen(NamedTuple):
    """What screening found in a tile."""

    flags: Sequence[int]  # of each segment
    last_nonzero: Sequence[int]  # of each checkpoint: its last element that is not zero, or -1
    hashes: Sequence[int]  # of each checkpoint's values; empty where none was asked for
    sums: Sequence[int] = ()  # checksums of the inputs, then of the foldings, that are float64

    def having(self, flags: int) -> list[int]:
        """Return the numbers of the segments that have one of some flags."""
        return [number for number, found in enumerate(self.flags) if found & flags]


class Content(NamedTuple):
    """Elements of a tensor in memory."""

    data: bytearray
    dtype: str
    elements: int


class Description(NamedTuple):
    """What some elements have in common."""

    squares: float  # their sum
    low: float  # NaN ignored
    high: float
    others: int  # elements that are neither `low` nor `high`
    nans: int
    infinities: int

    @property
    def is_zero(self) -> bool:
        """Whether all elements are zero."""
        return self.low == self.high == 0.0 and not self.others


class Sink(Protocol):
    """Where averages are written, from many threads, and read again; files go by their numbers."""

    def write(self, file: int, data: memoryview, offset: int) -> None:
        """Write bytes at `offset` of a file."""

    def descriptors(self, files: Sequence[int]) -> AbstractContextManager[list[int]]:
        """Yield descriptors to write files with; an `OSError` inside is theirs."""

    def written(self, file: int, offset: int, size_bytes: int) -> None:
        """Note that bytes were written by descriptor at `offset` of a file."""

    def read_into(self, file: int, view: memoryview, offset: int) -> None:
        """Fill `view` with bytes of a file that have been written."""


class TileView(NamedTuple):
    """A tile that has been folded, for monitors that need to look closer."""

    plan: Plan
    tile: Tile
    segments: TileSegments
    reader: Reader
    sink: Sink

    def position(self, one: Segment) -> str:
        """Return where a segment is written, which tells it from the other parts of its tensor."""
        place = self.tile.span.places[0]
        offset = place.offset * 8 + (self.tile.start + one.start) * DTYPE_BITS[place.dtype]
        return f"{place.file}:{offset // 8}"

    def read_again(self, checkpoint: int, start: int, stop: int) -> Content:
        """Read elements of the tile, from `start` to `stop`, of one checkpoint again."""
        source = self.tile.span.sources[self.plan.work.layout_of[checkpoint]]
        return self.read(checkpoint, source, self.tile.start + start, stop - start)

    def read(self, checkpoint: int, source: TensorSpec, start: int, count: int) -> Content:
        """Read `count` elements of an averaged tensor of one checkpoint."""
        width = DTYPE_BITS[source.dtype] // 8
        data = bytearray(count * width)
        self.reader.read_into(checkpoint, source, start * width, memoryview(data))
        return Content(data, source.dtype, count)

    def read_average(self, average: int, start: int, stop: int) -> Content:
        """Read elements of the tile, from `start` to `stop`, of an average."""
        place = next(one for one in self.tile.span.places if one.average == average)
        width = DTYPE_BITS[place.dtype] // 8
        data = bytearray((stop - start) * width)
        offset = place.offset + (self.tile.start + start) * width
        self.sink.read_into(place.file, memoryview(data), offset)
        return Content(data, place.dtype, stop - start)


def describe(content: Content) -> Description:
    """Describe elements, in float64."""
    if module := compiled():
        code = DTYPES.index(content.dtype)
        return Description(*module.describe(content.data, code, content.elements))
    values = _as_tensor(content)
    numbers = values[~values.isnan()]
    low, high = (float(one) for one in numbers.aminmax()) if len(numbers) else (math.inf, -math.inf)
    others = int(((values != low) & (values != high)).sum())
    infinities = int(values.isinf().sum())
    return Description(
        float(values.square().sum()), low, high, others, len(values) - len(numbers), infinities
    )


def distance(one: Content, other: Content) -> float:
    """Return the norm (Frobenius) of the difference of equally many elements."""
    if module := compiled():
        codes = [DTYPES.index(content.dtype) for content in (one, other)]
        squares = module.distance(one.data, codes[0], other.data, codes[1], one.elements)
        return math.sqrt(squares)
    return float((_as_tensor(one) - _as_tensor(other)).norm())


def _as_tensor(content: Content) -> "torch.Tensor":
    import torch

    dtype = getattr(torch, FOLDED[content.dtype])
    return torch.frombuffer(content.data, dtype=dtype, count=content.elements).double()
