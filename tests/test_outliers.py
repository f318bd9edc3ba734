"""Which checkpoints stand out: planted ones are found, and healthy runs raise no alarm."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

from ckpt_ema.measure.outliers import Gap, Judged, Reason, judge

SIZE = 4000  # of a model
Run = torch.Tensor  # checkpoints x SIZE


def judged(run: Run, steps: Sequence[int] | None = None, **bad: int) -> list[Judged]:
    """The judgement on a run, from the sums that one pass makes."""
    changes = run[1:] - run[:-1]
    before = torch.cat([torch.zeros_like(run[:1]), changes[:-1]]) if len(run) > 1 else changes
    counts = [None] * len(changes) if steps is None else [b - a for a, b in pairwise(steps)]
    gaps = [
        Gap(float(change @ change), float(change @ earlier), count)
        for change, earlier, count in zip(changes, before, counts, strict=True)
    ]
    return judge(gaps, [bad.get(f"nonfinite_{n}", 0) for n in range(len(run))])


def standing_out(run: Run, steps: Sequence[int] | None = None) -> list[int]:
    return [number for number, one in enumerate(judged(run, steps)) if one.reason]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# --- By hand --------------------------------------------------------------------------------------


def points(*places: tuple[float, float]) -> Run:
    return torch.tensor(places, dtype=torch.float64)


def test_the_ratio_is_the_distance_to_the_segment_in_its_lengths() -> None:
    # From (0, 0) to (4, 0), whatever the place along it; then beyond its end.
    for x in (0.5, 1, 2, 3.9):
        assert judged(points((0, 0), (x, 3), (4, 0), (8, 0), (12, 0)))[1].ratio == pytest.approx(
            3 / 4
        )
    for place, distance in (((4 + 3, 4), 5), ((-3, 4), 5), ((6, 0), 2)):
        found = judged(points((0, 0), place, (4, 0), (8, 0), (12, 0)))[1].ratio
        assert found == pytest.approx(distance / 4)


def test_the_z_score_is_of_logarithms_and_of_the_other_checkpoints() -> None:
    found = judged(points((0, 0), (1, 40), (2, 0), (3, 4), (4, 0), (5, 8), (6, 0)))
    assert found[1].ratio == pytest.approx(20)
    # Three others, and what is usual: sqrt(3/4), sqrt(17/20), 2 and 4; the neighbour is left out.
    one, two, three, four = map(math.log, (0.75**0.5, 0.85**0.5, 2, 4))
    middle = (two + three) / 2
    spread = ((three - middle) + (middle - one)) / 2  # the middle two of four
    assert four - middle > middle - one > three - middle == pytest.approx(middle - two)
    assert found[1].z_score == pytest.approx(0.6745 * (math.log(20) - middle) / spread)
    assert found[1].reason is Reason.OFF_PATH


def test_small_differences_are_never_unusual() -> None:
    zigzag = [(float(n), 2.0 * (n % 2)) for n in range(9)]
    assert [one.ratio for one in judged(points(*zigzag))[1:-1]] == pytest.approx([1] * 7)
    zigzag[1] = (1.0, 3.0)  # a ratio of 1.5, where all others are 1
    second = judged(points(*zigzag))[1]
    assert second.z_score == pytest.approx(0.6745 * math.log(1.5) / 0.1)
    assert second.reason is None


def test_ends_are_judged_by_their_gap_and_its_steps() -> None:
    run = points((0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (24, 0))
    assert standing_out(run, [1, 2, 3, 4, 5, 6]) == [5]
    assert judged(run, [1, 2, 3, 4, 5, 6])[5].ratio == pytest.approx(20)
    assert judged(run, [1, 2, 3, 4, 5, 6])[5].reason is Reason.FAR_END
    assert standing_out(run, [1, 2, 3, 4, 5, 25]) == []  # twenty times as many steps
    assert standing_out(run.flip(0), [1, 2, 3, 4, 5, 6]) == [0]
    assert standing_out(run) == []  # steps are not known: it may be twenty times as many


def test_equal_neighbours_are_duplicates_however_few_there_are() -> None:
    found = judged(points((0, 0), (1, 0), (1, 0)))
    assert [one.reason for one in found] == [None, None, Reason.DUPLICATE]


def test_what_is_not_finite_always_stands_out() -> None:
    assert judged(points((0, 0)), nonfinite_0=3) == [Judged(None, None, Reason.NONFINITE)]
    found = judged(points((0, 0), (1, 0), (1, 0)), nonfinite_2=1)
    assert found[2].reason is Reason.NONFINITE  # which says more than that it is a duplicate


def test_gaps_that_are_not_known_leave_their_neighbours_unjudged() -> None:
    gap = Gap(1.0, 0.0, 1)
    found = judge([gap, gap, None, None, gap, gap, gap], [0, 0, 0, 9, 0, 0, 0, 0])
    assert [one.ratio is None for one in found] == [False, False, True, True, True, *[False] * 3]
    assert [n for n, one in enumerate(found) if one.reason] == [3]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_with_fewer_than_five_distances_judge_nobody(count: int) -> None:
    run = noise(count, SIZE).cumsum(0)
    run[count // 2] += 1000
    assert [one.z_score for one in judged(run)] == [None] * count


# --- Healthy runs, and what is planted in them ----------------------------------------------------

EVEN = [100 * n for n in range(1, 21)]
UNEVEN = list(
    accumulate([100, 100, 400, 50, 50, 1000, 100, 700, 30, 30, 30, 800, 100, 100, 60, 500])
)


def walk(steps: Sequence[int], rate: Callable[[float], float], drift: float, seed: int) -> Run:
    """A random walk, and a straight line, both as fast as the learning rate."""
    towards = noise(SIZE, seed=seed + 1)
    run = [noise(SIZE, seed=seed + 2) * 1000]
    for number, (one, other) in enumerate(pairwise(steps)):
        gap, speed = (other - one) / 100, rate(number / len(steps))
        jitter = noise(SIZE, seed=seed + 3 + number)
        run.append(run[-1] + speed * (gap * drift * towards + gap**0.5 * jitter))
    return torch.stack(run)


def around(steps: Sequence[int], rate: Callable[[float], float], drift: float, seed: int) -> Run:
    """Independent noise around a point that moves, as large as the learning rate."""
    still = walk(steps, lambda _: 1e-3, drift, seed)
    sizes = torch.tensor([rate(n / len(steps)) for n in range(len(steps))], dtype=torch.float64)
    return still + sizes[:, None] * noise(len(steps), SIZE, seed=seed)


RATES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)) + 1e-3,
    "exponential": lambda share: 0.001**share,
    "a drop": lambda share: 1.0 if share < 0.6 else 0.05,
    "warmup": lambda share: min(1.0, 5 * share + 0.1),
}
KINDS: dict[str, Any] = {"walk": walk, "around": around}
HEALTHY = [
    pytest.param((kind, rate, drift, steps), id=f"{kind}-{rate}-{drift}-{name}")
    for kind in KINDS
    for rate in RATES
    for drift in (0.0, 0.3, 10.0)
    for name, steps in (("even", EVEN), ("uneven", UNEVEN), ("few", EVEN[:5]))
]


def healthy(how: tuple[str, str, float, list[int]], seed: int = 0) -> tuple[Run, list[int]]:
    kind, rate, drift, steps = how
    run: Run = KINDS[kind](steps, RATES[rate], drift, seed)
    return run, steps


@pytest.mark.parametrize("how", HEALTHY)
def test_a_healthy_run_raises_no_alarm(how: tuple[str, str, float, list[int]]) -> None:
    for seed in (0, 100):
        run, steps = healthy(how, seed)
        assert standing_out(run, steps) == []


@pytest.mark.parametrize("how", HEALTHY)
def test_a_foreign_checkpoint_is_found_wherever_it_is(
    how: tuple[str, str, float, list[int]],
) -> None:
    run, steps = healthy(how)
    for place in range(1, len(run) - 1):
        planted = run.clone()
        planted[place] = noise(SIZE, seed=999) * 1000
        assert standing_out(planted, steps) == [place]


@pytest.mark.parametrize("how", HEALTHY)
def test_a_checkpoint_damaged_by_more_than_twice_the_gap_is_found(
    how: tuple[str, str, float, list[int]],
) -> None:
    run, steps = healthy(how)
    for place in range(1, len(run) - 1):
        planted = run.clone()
        span = float((run[place + 1] - run[place - 1]).norm())
        planted[place] += noise(SIZE, seed=999) * (2.5 * span / SIZE**0.5)
        assert place in standing_out(planted, steps)


@pytest.mark.parametrize("rate", RATES)
def test_a_diverged_end_is_found(rate: str) -> None:
    run = walk(EVEN, RATES[rate], 0.3, 0)
    for end in (0, -1):
        planted = run.clone()
        planted[end] = noise(SIZE, seed=999) * 2000
        assert standing_out(planted, EVEN) == [end % len(run)]


def test_a_mislabelled_checkpoint_is_found() -> None:
    run = walk(EVEN, RATES["constant"], 10.0, 0)
    planted = run.clone()
    planted[4] = run[15]  # step 1600 under the name of step 500
    assert standing_out(planted, EVEN) == [4]


def test_oscillation_is_usual_where_all_of_a_run_oscillates() -> None:
    run = walk(EVEN, RATES["constant"], 0.0, 0) * 0.01
    run += torch.tensor([1.0, -1.0] * 10, dtype=torch.float64)[:, None] * noise(SIZE, seed=5)
    assert standing_out(run, EVEN) == []
