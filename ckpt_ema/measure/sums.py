"""Sums over the elements of several checkpoints: squares, differences, and products of a sample.

All in float64. Each thread adds to totals of its own; they hold two doubles for every sum, so that
the order in which threads got their work changes no digit of the result.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

STRIP = 256  # elements that are sampled together, and summed up at a time
_SMALL = 1 << 22  # elements that are not sampled
MOST_MEMBERS = 64  # checkpoints in the Gram matrix: beyond that, evenly spread ones


class Row(NamedTuple):
    """The sums of one checkpoint; what is not finite is counted, and left out of all others."""

    squares: float  # of its values
    change: float  # squares of the differences to the checkpoint before
    turn: float  # products of these differences and of those one checkpoint earlier
    away: float  # squares of the differences to the average
    zeros: float  # how many
    nonfinite: float  # how many
    largest: float  # difference to the checkpoint before


class Block(NamedTuple):
    """Equally many elements of every checkpoint, in memory."""

    content: bytearray
    places: Sequence[tuple[str, int]]  # of each: its dtype, and where it begins, in whole elements
    length: int
    strip: int = 0  # the number of its first strip, which decides whether it is sampled


class Sums(NamedTuple):
    """What was summed over all blocks."""

    rows: tuple[Row, ...]
    products: tuple[tuple[float, ...], ...]  # members x members, of differences to the average
    sampled: int  # elements of each checkpoint that the products are of


class Summing(Protocol):
    """The totals of one thread."""

    def add(self, block: Block) -> None:
        """Add the elements of a block."""

    def totals(self) -> Sequence[float]:
        """Return two numbers for each sum: rows, lower triangle of the products, sampled."""


def merged(parts: Iterable[Summing], checkpoints: int, members: int = 0) -> Sums:
    """Return the sums of all threads."""
    columns = list(zip(*(part.totals() for part in parts), strict=True))
    width, largest = len(Row._fields), Row._fields.index("largest")
    found = [
        max(high)
        if number < checkpoints * width and number % width == largest
        else math.fsum((*high, *low))
        for number, (high, low) in enumerate(zip(columns[::2], columns[1::2], strict=True))
    ]
    rows = tuple(Row(*found[n * width : (n + 1) * width]) for n in range(checkpoints))
    *triangle, sampled = found[checkpoints * width :]
    corner = [triangle[n * (n + 1) // 2 :][: n + 1] for n in range(members)]
    products = tuple(
        tuple(corner[max(i, j)][min(i, j)] for j in range(members)) for i in range(members)
    )
    return Sums(rows, products, round(sampled))


def members_of(checkpoints: int) -> list[int]:
    """Return which checkpoints the Gram matrix is of: all, or the ends and some between.

    >>> members_of(3), len(members_of(1000)), members_of(1000)[-1]
    ([0, 1, 2], 64, 999)
    """
    count = min(checkpoints, MOST_MEMBERS)
    return [n * (checkpoints - 1) // max(count - 1, 1) for n in range(count)]


def every_of(checkpoints: int, elements: int) -> int:
    """Return of how many strips one is sampled, for products to cost no more than the rest.

    Of a small model, all are.

    >>> every_of(6, 10**9), every_of(16, 10**9), every_of(16, 10**6)
    (2, 4, 1)
    """
    if elements <= _SMALL:
        return 1
    return max(1, round(min(checkpoints, MOST_MEMBERS) ** 2 / checkpoints / 4))
