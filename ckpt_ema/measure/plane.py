"""The run in the plane of its first two principal directions, from the Gram matrix.

Principal component analysis of few points in many dimensions: the coordinates of the points are
the leading eigenvectors of their centred Gram matrix, scaled by the roots of the eigenvalues
(Gower 1966, "Some distance properties of latent root and vector methods", section 3).
"""

import math
from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

_MOST_SWEEPS = 30
_NEGLIGIBLE = 1e-15  # of the largest entry: what is left off the diagonal
_NO_DIRECTION = 1e-12  # of the variance: rounding, along which nothing lies

Matrix = Sequence[Sequence[float]]
Point = tuple[float, float]


class Plane(NamedTuple):
    """Where points lie in their first two principal directions."""

    points: tuple[Point, ...]
    origin: Point  # that of the vectors the Gram matrix is of
    explained: Point  # the share of the variance along each direction


def plane_of(gram: Matrix) -> Plane:
    """Return the plane of some points, whose inner products are given.

    Distances are kept as far as two dimensions can. The last point is to the right of the first,
    and the second direction is such that the point farthest along it lies above.

    >>> [round(x, 6) for x, _ in plane_of([[0, 0, 0], [0, 1, 2], [0, 2, 4]]).points]
    [-1.0, 0.0, 1.0]
    """
    count = len(gram)
    means = [math.fsum(row) / count for row in gram]
    mean = math.fsum(means) / count
    centred = [
        [value - mine - theirs + mean for value, theirs in zip(row, means, strict=True)]
        for row, mine in zip(gram, means, strict=True)
    ]
    values, vectors = eigen(centred)
    total = math.fsum(max(value, 0.0) for value in values)
    to_origin = [mean - one for one in means]  # products of each centred point and the origin
    axes: list[list[float]] = []
    origin, explained = [], []
    for value, vector in [*zip(values, vectors, strict=True), (0.0, [0.0] * count)][:2]:
        length = math.sqrt(max(value, 0.0)) if value > _NO_DIRECTION * total else 0.0
        axis = [length * one for one in vector]
        place = sum(map(mul, vector, to_origin)) / length if length else 0.0
        ends = axis[-1] - axis[0] if not axes else max(axis, key=abs)
        sign = -1.0 if ends < 0 else 1.0
        axes.append([sign * one for one in axis])
        origin.append(sign * place)
        explained.append(length**2 / total if total else 0.0)
    first, second = axes if len(axes) == 2 else (*axes, [0.0] * count)
    points = tuple(zip(first, second, strict=True))
    return Plane(points, _pair(origin), _pair(explained))


def _pair(numbers: Sequence[float]) -> Point:
    return numbers[0], numbers[1] if len(numbers) > 1 else 0.0


def eigen(matrix: Matrix) -> tuple[list[float], list[list[float]]]:
    """Return the eigenvalues of a symmetric matrix, the largest first, and their unit vectors.

    By Jacobi's rotations (Golub and Van Loan, Matrix Computations, algorithm 8.5.2), row by row.
    """
    rows = [list(row) for row in matrix]
    count = len(rows)
    vectors = [[float(i == j) for j in range(count)] for i in range(count)]
    least = _NEGLIGIBLE * max((abs(one) for row in rows for one in row), default=0.0)
    for _ in range(_MOST_SWEEPS):
        pairs = [(p, q) for p in range(count) for q in range(p + 1, count)]
        found = [_rotated(rows, vectors, p, q, least) for p, q in pairs]
        if not any(found):
            break
    order = sorted(range(count), key=lambda n: -rows[n][n])
    return [rows[n][n] for n in order], [vectors[n] for n in order]


def _rotated(
    rows: list[list[float]], vectors: list[list[float]], p: int, q: int, least: float
) -> bool:
    """Make entry (p, q) zero by a rotation; return whether there was something to do."""
    entry = rows[p][q]
    if abs(entry) <= least:
        return False
    half = (rows[q][q] - rows[p][p]) / (2 * entry)
    tangent = math.copysign(1.0, half) / (abs(half) + math.hypot(1.0, half))
    cosine = 1 / math.hypot(1.0, tangent)
    sine = tangent * cosine
    for each in (rows, vectors):
        one, other = each[p], each[q]
        each[p] = [cosine * a - sine * b for a, b in zip(one, other, strict=True)]
        each[q] = [sine * a + cosine * b for a, b in zip(one, other, strict=True)]
    for row in rows:
        row[p], row[q] = cosine * row[p] - sine * row[q], sine * row[p] + cosine * row[q]
    return True
