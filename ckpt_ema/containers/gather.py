"""Reading a range of a tensor that lies in pieces: strided views, and chunks in several files.

A range of elements is cut into boxes, each box into its overlaps with the pieces, and those into
reads that fetch little else. So a tile costs the memory of a tile, however the tensor is laid out.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import add
from typing import Literal

from ckpt_ema.containers.specs import (
    DTYPE_BITS,
    MOST_READ_PER_WANTED,
    Box,
    Piece,
    TensorSpec,
    is_packed,
    packed_strides,
    spanned,
)

# What a memoryview calls elements, by their width in bytes.
_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
_LONG_ROW = 64  # elements from which copying row by row beats copying the longest axis at a time

ReadInto = Callable[[int, memoryview, int], None]  # file, where to, offset in bytes


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut the elements from `start` to `stop` of a tensor into boxes, in order.

    >>> list(boxes((4, 3), 2, 10))
    [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    """
    if not shape and start < stop:
        yield (), ()
        return
    while start < stop:
        row_size = packed_strides(shape)[0]
        row, within = divmod(start, row_size)
        count = 0 if within else (stop - start) // row_size  # complete rows
        if count:
            yield (row, *[0] * (len(shape) - 1)), (count, *shape[1:])
        else:
            for starts, sizes in boxes(shape[1:], within, min(row_size, stop - row * row_size)):
                yield (row, *starts), (1, *sizes)
        start = (row + max(1, count)) * row_size


def gather(tensor: TensorSpec, start: int, values: memoryview, read_into: ReadInto) -> None:
    """Fill `values` (bytes) with the elements of a tensor in pieces from element `start` on."""
    width = DTYPE_BITS[tensor.dtype] // 8
    for starts, sizes in boxes(tensor.shape, start, start + len(values) // width):
        strides = packed_strides(sizes)
        for piece in tensor.pieces:
            for begins, part in _reads(piece, starts, sizes):
                source = piece.offset + width * _distance(piece.starts, begins, piece.strides)
                target = values[width * _distance(starts, begins, strides) :]
                if is_packed(part, piece.strides) and is_packed(part, strides):
                    # The common case, a chunk of whole rows: straight to where it belongs.
                    read_into(piece.file, target[: width * math.prod(part)], source)
                    continue
                raw = bytearray(width * spanned(part, piece.strides))
                read_into(piece.file, memoryview(raw), source)
                box = memoryview(raw).cast(_FORMATS[width])
                _copy(box, piece.strides, target.cast(_FORMATS[width]), strides, part)
        values = values[width * math.prod(sizes) :]


def covering(
    tensor: TensorSpec, start_byte: int, size_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """Yield a file, an offset and a count of bytes for each piece that has some of a range.

    The range is of the tensor's elements, row-major without gaps; between a piece's first wanted
    element and its last, others may lie.
    """
    if not tensor.pieces:
        yield tensor.file, tensor.offset + start_byte, size_bytes
        return
    width = DTYPE_BITS[tensor.dtype] // 8
    wanted = [*boxes(tensor.shape, start_byte // width, (start_byte + size_bytes) // width)]
    for piece in tensor.pieces:
        found = [
            (piece.offset + width * _distance(piece.starts, begins, piece.strides), part)
            for starts, sizes in wanted
            for begins, part in _overlaps(piece, starts, sizes)
        ]
        if found:
            first = min(offset for offset, _ in found)
            end = max(offset + width * spanned(part, piece.strides) for offset, part in found)
            yield piece.file, first, end - first


def has_some(piece: Piece, starts: Sequence[int], sizes: Sequence[int]) -> bool:
    """Return whether a piece has an element of a box."""
    return any(True for _ in _overlaps(piece, starts, sizes))


def _reads(piece: Piece, starts: Sequence[int], sizes: Sequence[int]) -> Iterable[Box]:
    """Return the parts of a box that a piece has, each to be read at once."""
    for begins, part in _overlaps(piece, starts, sizes):
        yield from _split(begins, part, piece.strides)


def _overlaps(piece: Piece, starts: Sequence[int], sizes: Sequence[int]) -> Iterator[Box]:
    """Yield the part of a box that a piece has, if it has any."""
    begins = tuple(map(max, starts, piece.starts))
    ends = map(min, map(add, starts, sizes), map(add, piece.starts, piece.sizes))
    part = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    if all(size > 0 for size in part):
        yield begins, part


def _split(
    starts: tuple[int, ...], sizes: tuple[int, ...], strides: Sequence[int]
) -> Iterator[Box]:
    """Cut a box until a read of each part fetches little else."""
    if spanned(sizes, strides) <= MOST_READ_PER_WANTED * math.prod(sizes):
        yield starts, sizes
        return
    axis = max(range(len(sizes)), key=lambda axis: (sizes[axis] > 1) * strides[axis])
    half = sizes[axis] // 2
    for begin, size in ((0, half), (half, sizes[axis] - half)):
        later = (*starts[:axis], starts[axis] + begin, *starts[axis + 1 :])
        yield from _split(later, (*sizes[:axis], size, *sizes[axis + 1 :]), strides)


def _copy(
    source: memoryview,
    source_strides: Sequence[int],
    target: memoryview,
    target_strides: Sequence[int],
    sizes: Sequence[int],
) -> None:
    """Copy a strided box of elements into another, one slice along an axis at a time."""
    # An axis more, for a view of one element that was expanded: it has no step but 0.
    axes = [*zip(sizes, source_strides, target_strides, strict=True), (1, 1, 1)]

    def gain(axis: int) -> tuple[bool, int]:
        size, step, target_step = axes[axis]
        return size >= _LONG_ROW and step == target_step == 1, size if step else 0

    size, step, target_step = axes.pop(max(range(len(axes)), key=gain))
    length, target_length = (size - 1) * step + 1, (size - 1) * target_step + 1
    begins = _offsets((size, step) for size, step, _ in axes)
    target_begins = _offsets((size, step) for size, _, step in axes)
    for begin, to in zip(begins, target_begins, strict=True):
        target[to : to + target_length : target_step] = source[begin : begin + length : step]


def _offsets(axes: Iterable[tuple[int, int]]) -> list[int]:
    """Return where the elements of a box lie, in row-major order; axes are sizes and strides."""
    offsets = [0]
    for size, stride in axes:
        steps = [i * stride for i in range(size)]
        offsets = [offset + step for offset in offsets for step in steps]
    return offsets


def _distance(start: Sequence[int], end: Sequence[int], strides: Sequence[int]) -> int:
    return sum((e - s) * stride for s, e, stride in zip(start, end, strides, strict=True))
