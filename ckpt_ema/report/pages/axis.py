"""The ticks of an axis: round numbers, and labels that never collide."""

import math
from collections.abc import Callable, Sequence

_MOST_TICKS = 6
_ROUNDING = 1e-6  # of quotients of floats
_MOST_CHARACTERS = 30  # of all labels below a chart: a phone has room for more
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def ticks(low: float, high: float, most: int = _MOST_TICKS, *, whole: bool = False) -> list[float]:
    """Return at most `most` + 1 round numbers from `low` to `high`, `whole` ones if asked for.

    >>> ticks(0, 0.2929, 4), ticks(50, 1000, whole=True), ticks(1, 3, whole=True)
    ([0.0, 0.1, 0.2], [200, 400, 600, 800, 1000], [1, 2, 3])
    """
    if not high > low:
        return [low]
    # As a decimal exponent, so that 3 * 10 ** -1 is the nearest number to 0.3.
    exponent = math.floor(math.log10(high - low) - math.log10(most))
    for factor in (1, 2, 5, 10):
        if (high - low) / _scaled(factor, exponent) <= most * (1 + _ROUNDING):
            break
    if whole and exponent < 0:
        factor, exponent = 1, 0
    step = _scaled(factor, exponent)
    first, last = math.ceil(low / step - _ROUNDING), math.floor(high / step + _ROUNDING)
    return [_scaled(count * factor, exponent) for count in range(first, last + 1)]


def _scaled(number: int, exponent: int) -> float:
    power: int = 10 ** abs(exponent)
    return number * power if exponent >= 0 else number / power


def labelled(
    low: float, high: float, label: Callable[[Sequence[float]], list[str]]
) -> list[tuple[float, str]]:
    """Return ticks below a chart with their labels, as many as fit."""
    for most in range(_MOST_TICKS, 0, -1):
        found = ticks(low, high, most, whole=True)
        labels = label(found)
        if sum(map(len, labels)) <= _MOST_CHARACTERS:
            break
    return [*zip(found, labels, strict=True)]


def counts(values: Sequence[float]) -> list[str]:
    """Return whole numbers in the shortest exact form that they share.

    >>> counts([0, 500, 1000]), counts([100_000, 150_000]), counts([1_000_000, 1_000_050])
    (['0', '500', '1000'], ['100k', '150k'], ['1000000', '1000050'])
    """
    best = [f"{value:.0f}" for value in values]
    for unit, size in _UNITS.items():
        scaled = [f"{value / size:g}{unit if value else ''}" for value in values]
        is_exact = all(float(f"{value / size:g}") * size == value for value in values)
        if is_exact and _longest(scaled) < min(5, _longest(best)):
            best = scaled
    return best


def _longest(texts: Sequence[str]) -> int:
    return max(map(len, texts), default=0)


def shares(values: Sequence[float]) -> list[str]:
    """Return shares as percentages with as many decimals as tell them apart.

    >>> shares([0.0, 0.1, 0.2]), shares([0.0, 0.0025])
    (['0%', '10%', '20%'], ['0.00%', '0.25%'])
    """
    for decimals in range(8):
        texts = [f"{value:.{decimals}%}" for value in values]
        if all(abs(float(t[:-1]) / 100 - v) < 1e-12 for t, v in zip(texts, values, strict=True)):
            break
    return texts


def plain(values: Sequence[float]) -> list[str]:
    """Return any numbers.

    >>> plain([0.0, 0.25, 12000.0])
    ['0', '0.25', '12000']
    """
    return [f"{value:g}" for value in values]
