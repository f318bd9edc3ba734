"""Joins chunks of a tensor from several files, and checks that they cover it."""

import math
from collections.abc import Iterable, Sequence

from ckpt_ema.containers.specs import Box, Piece, TensorSpec, packed_strides

_MOST_COMPARISONS = 200_000


def cover_once(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Return whether boxes inside a shape hold each of its elements once.

    >>> cover_once((3, 2), [((0, 0), (2, 2)), ((2, 0), (1, 2))]), cover_once((2,), [((0,), (1,))])
    (True, False)
    """
    filled = [(starts, sizes) for starts, sizes in boxes if 0 not in sizes]
    count = sum(math.prod(sizes) for _, sizes in filled)
    return count == math.prod(shape) and not _overlap(sorted(filled), 0)


def in_pieces(tensor: TensorSpec, pieces: Iterable[Piece]) -> TensorSpec:
    """Return a tensor of these pieces, without any where one piece is all of it in place."""
    filled = tuple(piece for piece in pieces if 0 not in piece.sizes)
    if not filled:
        return tensor
    is_whole = len(filled) == 1 and filled[0].strides == packed_strides(tensor.shape)
    first, kept = filled[0], () if is_whole else filled
    return tensor._replace(file=first.file, offset=first.offset, pieces=kept)


def _overlap(boxes: list[Box], axis: int) -> bool:
    """Return whether two boxes share an element, comparing only boxes that meet along `axis`."""
    groups: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box[0][axis : axis + 1]):
        start, size = (box[0][axis], box[1][axis]) if box[0] else (0, 1)
        if start >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, start + size)
    crowded = [group for group in groups if len(group) > 1]
    if crowded and axis + 1 >= len(boxes[0][0]):
        # No single axis separates these boxes; compare them two by two.
        if sum(len(group) ** 2 for group in crowded) > _MOST_COMPARISONS:
            return True  # no ranks lay out chunks like that
        return any(_meet(a, b) for group in crowded for i, a in enumerate(group) for b in group[:i])
    return any(_overlap(group, axis + 1) for group in crowded)


def _meet(one: Box, other: Box) -> bool:
    return all(a < b + m and b < a + n for a, n, b, m in zip(*one, *other, strict=True))
