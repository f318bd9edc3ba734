"""The weights: golden vectors, TensorFlow's ramp, and what holds for every length."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_ema.errors import OptionError
from ckpt_ema.schedules.formulas import (
    checkpoints_below_the_cap,
    decays,
    dynamic_decay,
    first_decay_that_matters,
    weights,
)

GOLDEN = [
    ("dynamic", 0.999, [0.004995, 0.022478, 0.082418, 0.247253, 0.642857], 4.5004995005),
    ("dynamic", 0.30, [0.004091, 0.018409, 0.067500, 0.210000, 0.700000], 4.5834090909),
    ("constant", 0.999, [0.996006, 0.000997, 0.000998, 0.000999, 0.001000], 1.0099900050),
    ("constant", 0.9, [0.656100, 0.072900, 0.081000, 0.090000, 0.100000], 1.9049000000),
]


@pytest.mark.parametrize(("schedule", "decay", "expected", "value"), GOLDEN)
def test_five_checkpoints_get_the_golden_weights(
    schedule: str, decay: float, expected: list[float], value: float
) -> None:
    shares = weights(decays(5, schedule, decay))
    assert shares == pytest.approx(expected, abs=5e-7)
    assert sum(w * theta for w, theta in zip(shares, range(1, 6), strict=True)) == pytest.approx(
        value, abs=5e-11
    )


def test_three_checkpoints_by_hand() -> None:
    """d_2 = 2/11 and d_3 = 3/12, so the weights are 2/11 * 1/4, 9/11 * 1/4 and 3/4."""
    assert decays(3, "dynamic", 1.0) == [2 / 11, 3 / 12]
    expected = [Fraction(2, 44), Fraction(9, 44), Fraction(3, 4)]
    assert weights(decays(3, "dynamic", 1.0)) == pytest.approx([float(w) for w in expected])


def test_the_ramp_is_tensorflows() -> None:
    expected = [0.1, 0.181818, 0.25, 0.307692, 0.357143, 0.4, 0.4375]
    assert [dynamic_decay(n, 0.999) for n in range(7)] == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("count", [5, 10, 20, 50, 100])
def test_below_the_cap_the_weights_have_a_closed_form(count: int) -> None:
    """The p-th of M folds weighs 9 * (p+2)...(p+9) / ((M+2)...(M+10))."""
    folds = count - 1
    whole = Fraction(math.prod(range(folds + 2, folds + 11)))
    shares = weights(decays(count, "dynamic", 1.0))
    for p in range(1, count):
        assert shares[p] == pytest.approx(float(9 * math.prod(range(p + 2, p + 10)) / whole))
    assert shares[-1] == pytest.approx(9 / (folds + 10))


@given(
    count=st.integers(1, 2000),
    schedule=st.sampled_from(["dynamic", "constant"]),
    decay=st.floats(0, 1),
)
def test_weights_sum_to_one_and_none_is_negative(count: int, schedule: str, decay: float) -> None:
    shares = weights(decays(count, schedule, decay))
    assert len(shares) == count
    assert abs(math.fsum(shares) - 1) <= 1e-12
    assert min(shares) >= 0


@given(count=st.integers(2, 300), cap=st.floats(0.01, 1))
def test_the_first_decay_that_matters_is_the_first(count: int, cap: float) -> None:
    """At the end of the ramp and above it a cap changes nothing; below, the last decay."""
    first = first_decay_that_matters(count)
    free = decays(count, "dynamic", 1.0)
    assert decays(count, "dynamic", max(cap, first)) == free
    if cap < first:
        assert decays(count, "dynamic", cap)[-1] < free[-1]


@pytest.mark.parametrize(
    ("decay", "folds"),
    [(0.5, 8), (0.8, 35), (0.9, 80), (0.95, 170), (0.99, 890), (0.999, 8990), (0.9999, 89990)],
)
def test_the_cap_binds_beyond_the_known_number_of_folds(decay: float, folds: int) -> None:
    """At 0.999 the ramp alone decides for the first 8991 checkpoints."""
    assert checkpoints_below_the_cap(decay) == folds + 1
    assert dynamic_decay(folds, decay) == pytest.approx((1 + folds) / (10 + folds))
    assert dynamic_decay(folds + 1, decay) == decay


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan, math.inf])
def test_a_decay_outside_0_to_1_is_refused(decay: float) -> None:
    with pytest.raises(OptionError, match="must lie between 0 and 1"):
        decays(3, "dynamic", decay)


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match="must be one of dynamic, constant"):
        decays(3, "cosine", 0.9)
