"""Which checkpoints of a run stand out, from the distances between neighbours alone.

A checkpoint inside the run is measured by its distance to the segment between its two neighbours,
as a multiple of the segment's length. Where on the segment it should lie depends on the gaps and
the learning rate, which need not be known. The multiple is 0 on a straight line, at most 1/2 in a
random walk, and sqrt(3)/2 for independent noise around one point, 1 where that noise ends. The
first and the last checkpoint are measured by their only gap, as a multiple of the gap next to it.
"""

import math
from collections.abc import Sequence
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

FEWEST = 5  # checkpoints: with fewer, nothing is usual
_MOST_Z = 3.5
_MOST_OFF, _OFF_IN_NOISE = 1.25, 0.75**0.5  # of the length of the segment
_MOST_GAP = 5.0  # times the gap next to it
_UNKNOWN_STEPS = 4.0  # times those of the gap next to it
_MOST_TIMES_MEDIAN = 1.5
_LEAST_SPREAD = 0.1  # of logarithms: smaller differences are never unusual
_EXTREME = 1e6  # ratios beyond it are not told apart


class Reason(Enum):
    """Why a checkpoint stands out; the values are stable."""

    NONFINITE = "non-finite values"
    DUPLICATE = "same values as the checkpoint before"
    OFF_PATH = "off the path between its neighbours"
    FAR_END = "far from its neighbour"


class Judged(NamedTuple):
    """How one checkpoint compares with the others."""

    ratio: float | None = None  # to the segment or to the next gap; None where nothing is known
    z_score: float | None = None
    reason: Reason | None = None


class Gap(NamedTuple):
    """From one checkpoint to the next: how far the weights and the counter of steps went."""

    change: float  # squared distance
    turn: float  # product with the change of the gap before
    steps: int | None = None


def judge(gaps: Sequence[Gap | None], nonfinite: Sequence[int]) -> list[Judged]:
    """Return the judgement on each checkpoint; `gaps` are one fewer, None where not known.

    A ratio is unusual if it exceeds a limit, 1.5 times the median, and a robust z-score of 3.5:
    0.6745 (x - median) / MAD, of logarithms (Iglewicz and Hoaglin 1993, "How to detect and handle
    outliers", section 3.3). Median and MAD are those of the other checkpoints, without neighbours,
    whose ratios an outlier changes; ratios below those of independent noise count as these.
    """
    count = len(nonfinite)
    off = [_off_path(gaps[n - 1], gaps[n]) if 0 < n < count - 1 else None for n in range(count)]
    ends = {0: [*gaps], count - 1: [*gaps][::-1]} if count > 1 else {}
    found = []
    for number in range(count):
        before = gaps[number - 1] if number else None
        judged = Judged()
        if count >= FEWEST and number in ends:
            judged = _judge_end(ends[number])
        elif count >= FEWEST:
            near = (off[number - 1], off[number + 1])
            others = [one for n, one in enumerate(off) if one and abs(n - number) > 1]
            judged = _judged(off[number], others or near, _OFF_IN_NOISE, _MOST_OFF)
        if nonfinite[number]:
            judged = judged._replace(reason=Reason.NONFINITE)
        elif before is not None and before.change == 0:
            judged = judged._replace(reason=Reason.DUPLICATE)
        found.append(judged)
    return found


def _off_path(before: Gap | None, after: Gap | None) -> float | None:
    """Return how far a checkpoint lies from the segment between its neighbours, in its lengths."""
    if before is None or after is None or not (before.change and after.change):
        return None
    squared = before.change + after.change + 2 * after.turn  # of the length
    along = before.change + after.turn  # product of the gap before and of the segment
    if squared <= before.change / _EXTREME**2:
        return _EXTREME
    place = min(max(along / squared, 0.0), 1.0)
    away = before.change - 2 * place * along + place**2 * squared
    return _bounded(math.sqrt(max(away, 0.0) / squared))


def _judge_end(gaps: Sequence[Gap | None]) -> Judged:
    """Judge the checkpoint at the end of a run, whose gaps are given from there on."""
    ratios = [_growth(one, other) for one, other in pairwise(gaps)]
    judged = _judged(ratios[0], ratios[2:], 1.0, _MOST_GAP)
    return judged._replace(reason=judged.reason and Reason.FAR_END)


def _growth(gap: Gap | None, other: Gap | None) -> float | None:
    """Return a gap as a multiple of another, less what more steps explain at constant speed."""
    if gap is None or other is None or not (gap.change and other.change):
        return None
    steps = gap.steps / other.steps if gap.steps and other.steps else _UNKNOWN_STEPS
    return _bounded(math.sqrt(gap.change / other.change) / max(1.0, steps))


def _judged(
    ratio: float | None, others: Sequence[float | None], usual: float, limit: float
) -> Judged:
    """Judge a ratio by others; what is less than usual anyway counts as usual."""
    if ratio is None:
        return Judged()
    logarithms = [math.log(max(one, usual)) for one in (*others, usual) if one]
    middle = _median(logarithms)
    spread = _median([abs(one - middle) for one in logarithms])
    z_score = 0.6745 * (math.log(max(ratio, usual)) - middle) / max(spread, _LEAST_SPREAD)
    is_far = ratio > max(limit, _MOST_TIMES_MEDIAN * math.exp(middle))
    return Judged(ratio, z_score, Reason.OFF_PATH if is_far and z_score > _MOST_Z else None)


def _bounded(ratio: float) -> float:
    return min(max(ratio, 1 / _EXTREME), _EXTREME)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)  # the module statistics takes 4 ms to import
    middle = len(ordered) // 2
    return (ordered[middle] + ordered[~middle]) / 2
