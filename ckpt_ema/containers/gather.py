"""Reading a range of a tensor that lies in pieces: strided views, and chunks in several files.

A range of elements is cut into boxes, each box into its overlaps with the pieces, and those into
reads that fetch little else. So a tile costs the memory of a tile, however the tensor is laid out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from operator import add
from typing import NamedTuple

from ckpt_ema.containers.specs import (
    DTYPE_BITS,
    MOST_READ_PER_WANTED,
    Piece,
    TensorSpec,
    is_packed,
    packed_strides,
    spanned,
)

_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}  # by their width in bytes

Box = tuple[tuple[int, ...], tuple[int, ...]]  # starts, sizes
ReadInto = Callable[[int, memoryview, int], None]  # file, where to, offset in bytes


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut the elements from `start` to `stop` of a tensor into boxes, in order.

    >>> list(boxes((4, 3), 2, 10))
    [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = packed_strides(shape)[0]
    first, last = -(-start // row), stop // row  # the complete rows
    if first > last:  # all of it lies inside one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row if start % row else 0)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for starts, sizes in boxes(shape[1:], start, stop):
        yield (row, *starts), (1, *sizes)


def gather(tensor: TensorSpec, start: int, values: memoryview, read_into: ReadInto) -> None:
    """Fill `values` (bytes) with the elements of a tensor in pieces from element `start` on."""
    width = DTYPE_BITS[tensor.dtype] // 8
    gatherer = _Gatherer(values, width, read_into)
    at = 0
    for starts, sizes in boxes(tensor.shape, start, start + len(values) // width):
        strides = packed_strides(sizes)
        for piece in tensor.pieces:
            begins, part = _overlap(piece, starts, sizes)
            if 0 not in part:
                source = piece.offset + width * _distance(piece.starts, begins, piece.strides)
                target = at + _distance(starts, begins, strides)
                gatherer.copy(piece, source, part, target, strides)
        at += math.prod(sizes)


def _overlap(piece: Piece, starts: Sequence[int], sizes: Sequence[int]) -> Box:
    """Return the part of a box that a piece has; a size of it is 0 if it has none."""
    begins = tuple(map(max, starts, piece.starts))
    ends = map(min, map(add, starts, sizes), map(add, piece.starts, piece.sizes))
    return begins, tuple(max(0, end - begin) for begin, end in zip(begins, ends, strict=True))


def _distance(start: Sequence[int], end: Sequence[int], strides: Sequence[int]) -> int:
    return sum((e - s) * stride for s, e, stride in zip(start, end, strides, strict=True))


class _Gatherer(NamedTuple):
    """Where the elements go, and how they are read."""

    values: memoryview
    width: int  # of an element, in bytes
    read_into: ReadInto

    def copy(
        self, piece: Piece, source: int, sizes: tuple[int, ...], target: int, strides: Sequence[int]
    ) -> None:
        """Read a box of `piece` that begins at byte `source` to element `target`."""
        width, count = self.width, math.prod(sizes)
        span = spanned(sizes, piece.strides)
        if is_packed(sizes, piece.strides) and is_packed(sizes, strides):
            # The common case, a chunk of whole rows: straight to where it belongs.
            view = self.values[target * width : (target + count) * width]
            self.read_into(piece.file, view, source)
        elif span <= MOST_READ_PER_WANTED * count:
            raw = bytearray(span * width)
            self.read_into(piece.file, memoryview(raw), source)
            self._scatter(raw, piece.strides, sizes, target, strides)
        else:
            axis = max(range(len(sizes)), key=lambda axis: (sizes[axis] > 1) * piece.strides[axis])
            half = sizes[axis] // 2
            for begin, size in ((0, half), (half, sizes[axis] - half)):
                self.copy(
                    piece,
                    source + begin * piece.strides[axis] * width,
                    (*sizes[:axis], size, *sizes[axis + 1 :]),
                    target + begin * strides[axis],
                    strides,
                )

    def _scatter(
        self,
        raw: bytearray,
        raw_strides: Sequence[int],
        sizes: Sequence[int],
        target: int,
        strides: Sequence[int],
    ) -> None:
        """Copy a strided box out of `raw` to element `target`."""
        import torch  # here, so that planning, which reads few tensors, rarely pays for it

        dtype = getattr(torch, _INTEGERS[self.width])
        box = torch.frombuffer(raw, dtype=dtype).as_strided(sizes, raw_strides)
        torch.frombuffer(self.values, dtype=dtype).as_strided(sizes, strides, target).copy_(box)
