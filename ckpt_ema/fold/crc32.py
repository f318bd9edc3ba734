"""The CRC-32 of a file that is written in any order: that of each piece, joined where they meet.

The CRC of A followed by B is crc(A) x^(8 |B|) + crc(B), in polynomials over GF(2) modulo
x^32 + x^26 + x^23 + x^22 + x^16 + x^12 + x^11 + x^10 + x^8 + x^7 + x^5 + x^4 + x^2 + x + 1, whose
coefficients are bits, that of x^0 the highest (ISO 3309, as in zip and zlib).
"""

from bisect import bisect_left
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

_POLYNOMIAL = 0xEDB88320  # without x^32
_ONE = 1 << 31


class Piece(NamedTuple):
    """A range of a file and the CRC-32 of its bytes."""

    start: int
    stop: int
    crc: int


class Pieces:
    """The pieces of one file, those that meet joined to one."""

    def __init__(self) -> None:
        self._found: list[Piece] = []  # in order

    def add(self, piece: Piece) -> None:
        """Add a piece that overlaps none of the others."""
        place = bisect_left(self._found, piece)
        before, after = self._found[:place], self._found[place:]
        if before and before[-1].stop == piece.start:
            piece = _joined(before.pop(), piece)
        if after and after[0].start == piece.stop:
            piece = _joined(piece, after.pop(0))
        self._found = [*before, piece, *after]

    def all(self) -> list[Piece]:
        """Return the pieces, in order."""
        return self._found

    def whole(self, size_bytes: int) -> int:
        """Return the CRC of a file of which every byte was added once."""
        if not size_bytes:
            return 0
        [one] = self._found
        assert one[:2] == (0, size_bytes)
        return one.crc


def joined(pieces: Iterable[Piece], size_bytes: int) -> int:
    """Return the CRC of a file from pieces that cover it.

    >>> from zlib import crc32
    >>> joined([Piece(3, 6, crc32(b"def")), Piece(0, 3, crc32(b"abc"))], 6) == crc32(b"abcdef")
    True
    """
    found = Pieces()
    for piece in pieces:
        found.add(piece)
    return found.whole(size_bytes)


def _joined(first: Piece, second: Piece) -> Piece:
    shifted = _product(first.crc, _power(second.stop - second.start))
    return Piece(first.start, second.stop, shifted ^ second.crc)


def _product(one: int, other: int) -> int:
    """Return the product of two polynomials, modulo the polynomial of the CRC."""
    product = 0
    while one:
        if one & _ONE:
            product ^= other
        one = one << 1 & 0xFFFFFFFF
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product


@lru_cache(1024)
def _power(count: int) -> int:
    """Return x^(8 count)."""
    power, square = _ONE, _ONE >> 8
    while count:
        if count & 1:
            power = _product(power, square)
        square = _product(square, square)
        count >>= 1
    return power
