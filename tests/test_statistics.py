"""What weights come to: by hand, against the schedules themselves, and what always holds."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_ema.schedules import by_checkpoint, by_step, dynamic
from ckpt_ema.schedules.statistics import mean_age, statistics
from ckpt_ema.schedules.weights import learning_rate, weights_of

EVEN = list(range(1000, 21_000, 1000))
rising = st.lists(st.integers(1, 10**6), min_size=3, max_size=30, unique=True).map(sorted)


def test_two_checkpoints_by_hand() -> None:
    """Weights 1/4 and 3/4, 100 steps apart: 1 / (1/16 + 9/16), 25 steps, 3/4."""
    found = statistics([100, 200], [0.25])
    assert found.effective_number == pytest.approx(1.6)
    assert found.mean_age == 25
    assert found.last_tenth == 0.75
    assert found.half_life == pytest.approx(50)  # 0.5^(100 / 50) = 1/4
    # (100 / 200)^(g + 1) = 1/4 for g = 1, and the width of g = 1 is sqrt(1/18).
    assert found.sigma_rel == pytest.approx(math.sqrt(1 / 18))


def test_the_last_tenth_is_that_of_the_run_and_not_of_the_list() -> None:
    """Of 20 000 steps the last tenth begins after 18 000: two of twenty checkpoints."""
    assert statistics(EVEN, by_checkpoint.uniform(EVEN)).last_tenth == pytest.approx(0.1)
    assert statistics([19_000, 20_000], [0.5]).last_tenth == pytest.approx(1.0)
    assert statistics([0], []).last_tenth == 1.0


@pytest.mark.parametrize(
    ("count", "effective"), [(5, 2.1), (10, 3.1), (20, 5.2), (50, 11.5), (100, 22.0)]
)
def test_the_effective_number_of_the_default_is_the_known_one(count: int, effective: float) -> None:
    found = statistics(range(1, count + 1), dynamic.dynamic(range(count), 0.999))
    assert found.effective_number == pytest.approx(effective, abs=0.05)


@given(steps=rising, half_life=st.floats(10, 1e6))
def test_the_equivalent_half_life_of_a_half_life_is_itself(
    steps: list[int], half_life: float
) -> None:
    found = statistics(steps, by_step.half_life(steps, half_life)).half_life
    if found is not None:
        assert found == pytest.approx(half_life, rel=1e-4)
    else:  # nothing, or all, is left of the oldest
        age = mean_age(steps, by_step.half_life(steps, half_life))
        assert age < 1e-6 or age > (steps[-1] - steps[0]) * (1 - 1e-6)


@given(steps=rising, sigma_rel=st.floats(0.02, 0.288))
def test_the_equivalent_sigma_rel_of_a_power_function_is_itself(
    steps: list[int], sigma_rel: float
) -> None:
    decays = by_step.power(steps, sigma_rel)
    found = statistics(steps, decays).sigma_rel
    assert found == pytest.approx(sigma_rel, rel=1e-3) or mean_age(steps, decays) < 1e-6


@given(steps=rising, decays=st.data())
def test_the_mean_age_is_the_sum_of_weights_and_ages(
    steps: list[int], decays: st.DataObject
) -> None:
    drawn = decays.draw(st.lists(st.floats(0, 1), min_size=len(steps) - 1, max_size=len(steps) - 1))
    shares = weights_of(drawn)
    expected = math.fsum(w * (steps[-1] - t) for w, t in zip(shares, steps, strict=True))
    assert mean_age(steps, drawn) == pytest.approx(expected, rel=1e-9, abs=1e-6)
    found = statistics(steps, drawn)
    assert 1 - 1e-9 <= found.effective_number <= len(steps) + 1e-6
    assert -1e-9 <= found.last_tenth <= 1 + 1e-9


def test_what_nothing_is_as_old_as_has_no_equivalent() -> None:
    oldest = statistics(EVEN, by_checkpoint.constant(EVEN, 1.0))
    assert (oldest.half_life, oldest.sigma_rel) == (None, None)
    newest = statistics(EVEN, by_checkpoint.constant(EVEN, 0.0))
    assert (newest.mean_age, newest.half_life, newest.sigma_rel) == (0.0, None, None)
    older_than_uniform = statistics(EVEN, by_checkpoint.wsm(EVEN, by_checkpoint.minus_sqrt))
    assert older_than_uniform.sigma_rel is None
    assert older_than_uniform.half_life is not None


def test_the_uniform_mean_is_the_widest_power_function() -> None:
    found = statistics(EVEN, by_checkpoint.uniform(EVEN)).sigma_rel
    assert found == pytest.approx(by_step.MOST_SIGMA_REL, rel=1e-6)


@given(st.lists(st.floats(0, 1), max_size=30))
def test_the_learning_rate_falls_from_one_to_the_newest_weight(decays: list[float]) -> None:
    shares = weights_of(decays)
    rates = learning_rate(shares)
    assert rates[0] == pytest.approx(1)
    assert rates[-1] == shares[-1]
    assert all(a >= b - 1e-12 for a, b in pairwise(rates))


def test_the_shape_of_a_learning_rate_decay_comes_back_from_its_weights() -> None:
    shares = weights_of(by_checkpoint.wsm(range(10), by_checkpoint.cosine))
    assert learning_rate(shares) == pytest.approx([by_checkpoint.cosine(n / 10) for n in range(10)])
