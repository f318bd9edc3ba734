"""Figures of weights: effective number, mean age, and equivalent half-life and sigma_rel."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from ckpt_ema.schedules.by_step import MOST_SIGMA_REL, half_life, power
from ckpt_ema.schedules.schedule import Steps
from ckpt_ema.schedules.weights import weights_of

_NOTHING = 1e-18  # a weight below it changes no sum
_LEAST_EQUIVALENT = 1e-4


class Statistics(NamedTuple):
    """The figures of one average; ages are in steps, or in checkpoints where steps are unknown."""

    effective_number: float  # of checkpoints, 1 / sum(w^2)
    mean_age: float  # of the checkpoints, before the newest
    last_tenth: float  # the weight on the last 10 % of training
    half_life: float | None  # equivalent: with the same mean age
    sigma_rel: float | None  # equivalent: with the same mean age


def statistics(steps: Steps, decays: Sequence[float]) -> Statistics:
    """Return the figures of folding checkpoints saved at `steps`, oldest first, with `decays`.

    `half_life` and `sigma_rel` are None where no valid value has the same mean age.

    >>> found = statistics([1000, 2000, 3000], [0.5, 0.5])
    >>> round(found.effective_number, 2), found.mean_age, found.last_tenth, round(found.half_life)
    (2.67, 750.0, 0.5, 1000)
    """
    weights = weights_of(decays)
    age = mean_age(steps, decays)
    newest = steps[-1]
    rows = zip(steps, weights, strict=True)
    return Statistics(
        1 / sum(weight * weight for weight in weights),
        age,
        sum(weight for step, weight in rows if step == newest or 10 * step > 9 * newest),
        _equivalent_half_life(steps, age),
        _equivalent_sigma_rel(steps, age),
    )


def mean_age(steps: Steps, decays: Sequence[float]) -> float:
    """Return sum(w_j (t_N - t_j)), the weighted mean number of steps before the newest.

    >>> mean_age([0, 10, 30], [0.5, 0.5])
    12.5
    """
    age, older = 0.0, 1.0  # `older` is the weight before the gap
    gaps = [after - before for before, after in pairwise(steps)]
    for decay, gap in zip(reversed(decays), reversed(gaps), strict=True):
        older *= decay
        age += older * gap
        if older < _NOTHING:
            break
    return age


def _equivalent_half_life(steps: Steps, age: float) -> float | None:
    span = steps[-1] - steps[0]
    if not 0 < age < span * (1 - 1e-9):
        return None
    return _solved(lambda h: mean_age(steps, half_life(steps, h)), age, 1e-3, 1e12 * span)


def _equivalent_sigma_rel(steps: Steps, age: float) -> float | None:
    if steps[0] <= 0 or not age > 0:
        return None
    low, high = _LEAST_EQUIVALENT, MOST_SIGMA_REL
    youngest, oldest = (mean_age(steps, power(steps, sigma_rel)) for sigma_rel in (low, high))
    if not youngest <= age <= oldest * (1 + 1e-9):
        return None
    return _solved(lambda sigma_rel: mean_age(steps, power(steps, sigma_rel)), age, low, high)


def _solved(rising: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Find where a rising function reaches `value`, between `low` and `high`, by bisection."""
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return math.sqrt(low * high)
