"""Bounds how far products of averaged factors are from averages of products, as in LoRA.

With weights w_i, factors x_ij of checkpoint i, averages m_j and differences d_ij = x_ij - m_j, the
average of a product of k factors is

    sum_i w_i prod_j (m_j + d_ij),

and in its expansion the terms with no difference are the product of the averages, those with one
sum to zero but for rounding, and the others have at most the product of the norms (Frobenius; also
of elementwise and Kronecker products, as in LoHa and LoKr).

OFT rotates by R(Q) = (I - Q)^-1 (I + Q) with a skew-symmetric Q, whose norm is at most twice that
of what is stored. The second derivative of R is at most 4 in any direction of norm 1, since
(I - Q)^-1 has a norm of at most 1; by Taylor's theorem the deviation is at most
sum_i w_i 8 |d_i|^2.
"""

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from ckpt_ema.errors import Code
from ckpt_ema.fold.monitors.protocol import Monitor, Watched, average_and_name, key_of
from ckpt_ema.fold.tiles import Segment
from ckpt_ema.fold.views import Seen, TileView, describe, distance
from ckpt_ema.notices import Notice
from ckpt_ema.trainers.conventions import FACTOR, FACTORS, ROTATION

# A smaller share is less than what bfloat16 rounds away.
_LEAST = 1e-3


class Factors(Monitor):
    """A `Monitor` of the differences between each factor and its average."""

    name = "factors"

    def __init__(self, watched: Watched) -> None:
        self._weights = watched.weights
        self._is_continued = bool(watched.states)
        # Average and name -> start of a part -> squares of the average and of each difference.
        self._parts: dict[str, dict[str, list[float]]] = {}
        self._lock = threading.Lock()

    def look(self, view: TileView, _seen: Seen) -> None:
        """See `Monitor.look`; reads the factors again, to compare them with their average."""
        for number, name in enumerate(view.segments.names()):
            if _is_factor(name):
                for average in range(len(view.plan.averages)):
                    self._compare(view, view.segments[number], average)

    def _compare(self, view: TileView, one: Segment, average: int) -> None:
        own = view.read_average(average, one.start, one.stop)
        share = own.elements / math.prod(one.tensor.shape)
        norms = [math.sqrt(describe(own).squares)]
        if ROTATION.search(one.tensor.name):
            norms = [math.sqrt(_rotation_size(one.tensor.shape) * share)]
        for checkpoint in view.plan.averages[average].reads:
            norms.append(distance(view.read_again(checkpoint, one.start, one.stop), own))
        start = view.position(one)
        with self._lock:
            parts = self._parts.setdefault(key_of(average, one), {})
            parts[start] = [norm**2 for norm in norms]

    def state(self) -> Any:
        """Return the squares of each part of each factor."""
        with self._lock:
            return {key: {**parts} for key, parts in self._parts.items()}

    def merge(self, state: Any) -> None:
        """See `Monitor.merge`."""
        with self._lock:
            for key, parts in state.items():
                self._parts.setdefault(key, {}).update(parts)

    def verdict(self) -> tuple[Notice, ...]:
        """Return a warning that says by how much at most a product deviates."""
        products: dict[tuple[int, str], list[list[float]]] = {}
        for key, parts in self.state().items():
            average, name = average_and_name(key)
            stem = FACTOR.sub("", name)
            whole = [math.sqrt(sum(column)) for column in zip(*parts.values(), strict=True)]
            products.setdefault((average, stem), []).append(whole)
        bounds = [
            (_bound_of(stem)(self._weights[average], factors), stem)
            for (average, stem), factors in products.items()
        ]
        worst, stem = max(bounds, default=(0.0, ""))
        if bounds and self._is_continued:
            text = "How far the averaged adapter is from the average of the products of its factors"
            text = f"{text} is not known, since earlier checkpoints are not read again."
            return (Notice(Code.ADAPTER_FACTORS, text),)
        if worst < _LEAST:
            return ()
        what, norm = "products of its factors", "product of their norms"
        if ROTATION.search(stem):
            what, norm = "rotations", "norm of a rotation"
        where = stem.replace("..", ".").strip(".")
        text = (
            f"The averaged adapter differs from the average of the {what} by at most {worst:.2%} of"
            f" the {norm}, but for rounding (in {where}); if that is too much, merge each adapter"
            " into its base model and average those."
        )
        return (Notice(Code.ADAPTER_FACTORS, text),)


@cache
def _is_factor(name: str) -> bool:
    return any(pattern.search(name) for pattern in FACTORS)


def _rotation_size(shape: Sequence[int]) -> float:
    """Return the square of the norm of a rotation, its rows: of blocks, or of their halves."""
    if len(shape) > 2:
        return math.prod(shape[:-1])
    return shape[0] * (1 + math.sqrt(1 + 8 * shape[-1])) / 2


def _bound_of(stem: str) -> Callable[[Sequence[float], Sequence[Sequence[float]]], float]:
    return rotation_deviation if ROTATION.search(stem) else deviation


def rotation_deviation(weights: Sequence[float], factors: Sequence[Sequence[float]]) -> float:
    """Return the bound for OFT, as a share of the norm of the rotation.

    `factors` has one entry: the norm of the rotation, then that of each checkpoint's difference.
    """
    [[norm, *differences]] = factors
    pairs = zip(weights, differences, strict=True)
    return sum(8 * weight * difference**2 for weight, difference in pairs) / norm


def deviation(weights: Sequence[float], factors: Iterable[Sequence[float]]) -> float:
    """Return the bound, as a share of the product of the norms of the averages.

    `factors` has the norm of the average of each factor, then the norm of the difference of each
    checkpoint from it.

    >>> deviation([0.5, 0.5], [[2.0, 1.0, 1.0], [4.0, 1.0, 1.0]])  # 1 * 1 / (2 * 4)
    0.125
    """
    shares = [[one / average for one in rest] for average, *rest in factors if average]
    total = 0.0
    for weight, row in zip(weights, zip(*shares, strict=True), strict=False):
        # All terms, less those with no difference or one.
        total += weight * (math.prod(1 + share for share in row) - 1 - sum(row))
    return total
