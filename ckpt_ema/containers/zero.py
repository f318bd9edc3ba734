"""Turns ZeRO's partitions, a flat run of elements on each rank, into pieces of tensors."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from operator import mul
from typing import NamedTuple

from ckpt_ema.containers.checks import refused
from ckpt_ema.containers.gather import boxes
from ckpt_ema.containers.specs import DTYPE_BITS, Piece, TensorSpec, packed_strides
from ckpt_ema.errors import RefusedError

TWO_SAVES = "Restore the files of one save, or leave the checkpoint out."
Shapes = Mapping[str, tuple[int, ...]]  # of weights, in the order in which they lie


class Part(NamedTuple):
    """A run of elements in one file."""

    file: int  # index into Specs.files
    offset: int  # of its first element, in bytes
    length: int  # in elements


class Partition(NamedTuple):
    """The optimizer's file of one rank."""

    path: str
    stage3: bool
    groups: Sequence[Part]  # its part of each group of weights
    dtype: str
    paddings: Sequence[Sequence[int]]  # elements after each weight of each group, where it says so
    partitions: int  # of how many ranks it is one
    step: float | None  # of the optimizer


def join_zero_1_and_2(
    path: str, shapes: Sequence[Shapes], ranks: Sequence[Partition]
) -> dict[str, TensorSpec]:
    """Join the parts of all ranks to one flat run for each group, and cut it by the shapes.

    Raises `RefusedError`, which names the file at `path`, if they do not fit.
    """
    lengths = [len(named) for named in shapes]
    paddings = ranks[0].paddings or [[0] * length for length in lengths]
    if len(ranks[0].groups) != len(shapes) or [len(padded) for padded in paddings] != lengths:
        raise refused(path, "has other groups of weights than the ranks' files", TWO_SAVES)
    tensors = {}
    for number, (named, padded) in enumerate(zip(shapes, paddings, strict=True)):
        parts = [rank.groups[number] for rank in ranks]
        start = end = 0
        for (name, shape), padding in zip(named.items(), padded, strict=True):
            end = start + math.prod(shape)
            tensors[name] = cut(ranks[0].dtype, shape, [(parts, start, end)])
            start = end + padding
        count = sum(part.length for part in parts)
        # The run is padded to a multiple of twice the number of ranks; releases cut that off again.
        if not end <= count <= start + -start % (2 * len(ranks)):
            raise no_fit(path, f"group {number} of the ranks' files", count, end)
    return tensors


def join_zero_3(
    path: str, shapes: Sequence[Shapes], ranks: Sequence[Partition]
) -> dict[str, TensorSpec]:
    """Join each weight from equal parts of all ranks, the last of which is padded.

    Raises `RefusedError`, which names the file at `path`, if they do not fit.
    """
    tensors, start = {}, 0
    for name, shape in (row for named in shapes for row in named.items()):
        end = start + part_size(shape, len(ranks))
        tensors[name] = cut(ranks[0].dtype, shape, [(rank.groups, start, end) for rank in ranks])
        start = end
    for rank in ranks:
        count = sum(part.length for part in rank.groups)
        if count != start:
            raise no_fit(path, os.path.basename(rank.path), count, start)
    return tensors


def part_size(shape: tuple[int, ...], ranks: int) -> int:
    """Return how many elements of a weight each rank has with ZeRO-3, padding included.

    >>> part_size((3, 3), 2)
    5
    """
    return -(-math.prod(shape) // ranks)


def no_fit(path: str, where: str, found: int, wanted: int) -> RefusedError:
    """Return the error for a file at `path` whose shapes are those of other weights."""
    why = f"has shapes for {wanted} elements of weights where {where} has {found}"
    return refused(path, why, TWO_SAVES)


Range = tuple[Sequence[Part], int, int]  # parts in their order; from and to which element


def cut(dtype: str, shape: tuple[int, ...], ranges: Sequence[Range]) -> TensorSpec:
    """Return a tensor whose elements are these ranges one after the other, without the padding."""
    width, strides, count = DTYPE_BITS[dtype] // 8, packed_strides(shape), math.prod(shape)
    pieces, place = [], 0
    for part in _ranged(ranges, width):
        stop = min(place + part.length, count)
        for starts, sizes in boxes(shape, place, stop):
            offset = part.offset + width * (sum(map(mul, starts, strides)) - place)
            pieces.append(Piece(part.file, offset, starts, sizes, strides))
        place = stop
    if not pieces:
        return TensorSpec(dtype, shape, 0, 0)
    kept = () if len(pieces) == 1 else tuple(pieces)
    return TensorSpec(dtype, shape, pieces[0].file, pieces[0].offset, kept)


def _ranged(ranges: Sequence[Range], width: int) -> Iterator[Part]:
    for parts, start, end in ranges:
        for part in parts:
            first, last = max(start, 0), min(end, part.length)
            if first < last:
                yield Part(part.file, part.offset + width * first, last - first)
            start, end = start - part.length, end - part.length
