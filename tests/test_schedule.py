"""Every schedule by its golden vector, by hand, against an oracle, and for what always holds."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.schedules import by_checkpoint, by_step, dynamic
from ckpt_ema.schedules.rules import make_rules
from ckpt_ema.schedules.weights import decays_of, weights_of

EVEN = [1000, 2000, 3000, 4000, 5000]
UNEVEN = [1000, 1500, 3000, 4000, 4100]

# Decays, the weights on checkpoints 1 to 5, and the value for theta = 1, 2, 3, 4, 5.
GOLDEN = {
    "dynamic, cap 0.999": (
        dynamic.dynamic(EVEN, 0.999),
        [0.004995, 0.022478, 0.082418, 0.247253, 0.642857],
        4.5004995005,
    ),
    "dynamic, cap 0.30": (
        dynamic.dynamic(EVEN, 0.30),
        [0.004091, 0.018409, 0.067500, 0.210000, 0.700000],
        4.5834090909,
    ),
    "dynamic at real steps": (
        dynamic.dynamic_at_steps(EVEN, 0.999),
        [0.000001, 0.000266, 0.009884, 0.124430, 0.865420],
        4.8550026468,
    ),
    "constant 0.999": (
        by_checkpoint.constant(EVEN, 0.999),
        [0.996006, 0.000997, 0.000998, 0.000999, 0.001000],
        1.0099900050,
    ),
    "constant 0.9": (
        by_checkpoint.constant(EVEN, 0.9),
        [0.656100, 0.072900, 0.081000, 0.090000, 0.100000],
        1.9049000000,
    ),
    "constant 0.9, debiased": (
        by_checkpoint.constant(EVEN, 0.9, zero_debias=True),
        [0.160216, 0.178018, 0.197797, 0.219775, 0.244194],
        3.2097140485,
    ),
    "per step 0.999": (
        by_step.per_step(EVEN, 0.999),
        [0.018279, 0.031433, 0.085488, 0.232495, 0.632305],
        4.4291132360,
    ),
    "per step 0.999, uneven": (
        by_step.per_step(UNEVEN, 0.999),
        [0.044979, 0.029198, 0.258511, 0.572104, 0.095208],
        3.6433635154,
    ),
    "half-life 1000": (
        by_step.half_life(EVEN, 1000),
        [0.062500, 0.062500, 0.125000, 0.250000, 0.500000],
        4.0625000000,
    ),
    "warmup, power 2/3": (
        by_checkpoint.warmup(EVEN, 0.999, 2 / 3, 1.0),
        [0.076257, 0.129821, 0.190798, 0.261129, 0.341995],
        3.6627852823,
    ),
    "warmup, power 1": (by_checkpoint.warmup(EVEN, 0.999, 1.0, 1.0), [0.2] * 5, 3.0),
    "power function, sigma_rel 0.05": (
        by_step.power(EVEN, 0.05),
        [0.000000, 0.000000, 0.000103, 0.018023, 0.981873],
        4.9817704151,
    ),
    "power function, sigma_rel 0.10": (
        by_step.power(EVEN, 0.10),
        [0.000003, 0.000691, 0.016650, 0.152796, 0.829860],
        4.8118196917,
    ),
    "power function, sigma_rel 0.20": (
        by_step.power(EVEN, 0.20),
        [0.010582, 0.064466, 0.161005, 0.296193, 0.467755],
        4.1460734461,
    ),
    "uniform": (by_checkpoint.uniform(EVEN), [0.2] * 5, 3.0),
    "linear": (
        by_checkpoint.linear(EVEN),
        [0.066667, 0.133333, 0.200000, 0.266667, 0.333333],
        3.6666666667,
    ),
    "WSM minus-sqrt": (
        by_checkpoint.wsm(EVEN, by_checkpoint.minus_sqrt),
        [0.447214, 0.185242, 0.142141, 0.119831, 0.105573],
        2.2513070122,
    ),
    "WSM cosine": (
        by_checkpoint.wsm(EVEN, by_checkpoint.cosine),
        [0.095492, 0.250000, 0.309017, 0.250000, 0.095492],
        3.0000000000,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_five_checkpoints_get_the_golden_weights(name: str) -> None:
    decays, expected, value = GOLDEN[name]
    shares = weights_of(decays)
    assert shares == pytest.approx(expected, abs=5e-7)
    found = sum(share * theta for share, theta in zip(shares, range(1, 6), strict=True))
    assert found == pytest.approx(value, abs=5e-11)


# --- By hand --------------------------------------------------------------------------------------

T = [10, 20, 40]
BY_HAND: list[tuple[str, list[float], list[Fraction]]] = [
    # d_2 = 2/11 and d_3 = 3/12: 2/11 * 1/4, 9/11 * 1/4, 3/4.
    ("dynamic", dynamic.dynamic(T, 1.0), [Fraction(2, 44), Fraction(9, 44), Fraction(3, 4)]),
    # From step 1 to 2 and to 3: (1 + k) / (10 + k) at k = 2 and at k = 3.
    (
        "dynamic at steps",
        dynamic.dynamic_at_steps([1, 2, 3], 1.0),
        [Fraction(1, 4) * Fraction(4, 13), Fraction(3, 4) * Fraction(4, 13), Fraction(9, 13)],
    ),
    ("constant", by_checkpoint.constant(T, 0.5), [Fraction(1, 4), Fraction(1, 4), Fraction(1, 2)]),
    # From zeros: 1/8, 1/4, 1/2, divided by their sum 7/8.
    (
        "debiased",
        by_checkpoint.constant(T, 0.5, zero_debias=True),
        [Fraction(n, 7) for n in (1, 2, 4)],
    ),
    # Two folds over 10 and 20 steps, of which each 10 keep a half.
    ("half-life", by_step.half_life(T, 10), [Fraction(1, 8), Fraction(1, 8), Fraction(3, 4)]),
    (
        "per step",
        by_step.per_step([0, 1, 3], 0.5),
        [Fraction(1, 8), Fraction(1, 8), Fraction(3, 4)],
    ),
    ("uniform", by_checkpoint.uniform(T), [Fraction(1, 3)] * 3),
    ("linear", by_checkpoint.linear(T), [Fraction(n, 6) for n in (1, 2, 3)]),
    # inv_gamma 2 and power 1: 1 - 1 / (1 + n / 2) is 1/3 and 1/2.
    (
        "warmup",
        by_checkpoint.warmup(T, 1.0, 1.0, 2.0),
        [Fraction(1, 6), Fraction(1, 3), Fraction(1, 2)],
    ),
    # The shape 1 - x gives 1 - 2/3, 1/3 and 1/3: a linear decay is the mean.
    ("WSM of a line", by_checkpoint.wsm(T, lambda x: 1 - x), [Fraction(1, 3)] * 3),
    (
        "WSM cosine",
        by_checkpoint.wsm(T, by_checkpoint.cosine),
        [Fraction(1, 4), Fraction(1, 2), Fraction(1, 4)],
    ),
]


@pytest.mark.parametrize(
    ("decays", "expected"), [row[1:] for row in BY_HAND], ids=[r[0] for r in BY_HAND]
)
def test_three_checkpoints_by_hand(decays: list[float], expected: list[Fraction]) -> None:
    assert weights_of(decays) == pytest.approx([float(share) for share in expected], abs=1e-15)


def test_the_power_function_by_hand() -> None:
    """sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)) is 1/18 for g = 1: decays (t_1 / t_2)^2."""
    sigma_rel = math.sqrt(1 / 18)
    assert by_step.gamma_of(sigma_rel) == pytest.approx(1, abs=1e-12)
    assert by_step.power([10, 20, 40], sigma_rel) == pytest.approx([1 / 4, 1 / 4])


def test_the_ramp_is_tensorflows() -> None:
    expected = [0.1, 0.181818, 0.25, 0.307692, 0.357143, 0.4, 0.4375]
    assert [dynamic.dynamic_decay(n, 0.999) for n in range(7)] == pytest.approx(expected, abs=5e-7)


def test_the_ramp_of_the_warmup_is_timms() -> None:
    expected = [0.37004, 0.51925, 0.60315, 0.65800, 0.69715, 0.72672]
    assert by_checkpoint.warmup(range(7), 0.999, 2 / 3, 1.0) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"),
    [
        (0.05, 16.972199),
        (0.075, 10.289116),
        (0.10, 6.937204),
        (0.15, 3.557869),
        (0.20, 1.826214),
        (0.25, 0.719824),
    ],
)
def test_the_widths_of_the_power_function_are_the_papers(sigma_rel: float, gamma: float) -> None:
    assert by_step.gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-7)


# --- Against an oracle ----------------------------------------------------------------------------


def folded(steps: Sequence[int], decay_at: Callable[[int], float]) -> list[float]:
    """The decays of an average that is updated at every training step, the weights held."""
    return [
        math.prod(decay_at(step) for step in range(before + 1, after + 1))
        for before, after in pairwise(steps)
    ]


steps_of_a_run = st.lists(st.integers(1, 400), min_size=1, max_size=12, unique=True).map(sorted)
decays_below_one = st.floats(0.01, 0.9999)


@given(steps=steps_of_a_run, decay=decays_below_one)
def test_dynamic_at_steps_is_the_product_over_all_steps(steps: list[int], decay: float) -> None:
    one_by_one = folded(steps, lambda k: min(decay, (1 + k) / (10 + k)))
    assert dynamic.dynamic_at_steps(steps, decay) == pytest.approx(one_by_one, rel=1e-9, abs=1e-300)


@given(steps=steps_of_a_run, decay=decays_below_one)
def test_per_step_is_a_constant_decay_at_every_step(steps: list[int], decay: float) -> None:
    assert by_step.per_step(steps, decay) == pytest.approx(folded(steps, lambda _: decay), rel=1e-9)


@given(steps=steps_of_a_run, sigma_rel=st.floats(0.02, 0.28))
def test_power_is_the_papers_beta_at_every_step(steps: list[int], sigma_rel: float) -> None:
    """beta(t) = (1 - 1/t)^(gamma + 1), equation 127 with one step at a time, gamma by numpy."""
    r = sigma_rel**-2
    gamma = np.roots([1, 7, 16 - r, 12 - r]).real.max()
    expected = folded(steps, lambda t: (1 - 1 / t) ** (gamma + 1))
    assert by_step.power(steps, sigma_rel) == pytest.approx(expected, rel=1e-6, abs=1e-300)


@given(count=st.integers(1, 60), decay=st.floats(0.0, 0.999))
def test_debiased_is_a_shadow_of_zeros_divided_by_its_mass(count: int, decay: float) -> None:
    values = [float(n * n) for n in range(count)]
    moment = 0.0
    for value in values:
        moment = decay * moment + (1 - decay) * value
    shares = weights_of(by_checkpoint.constant(range(count), decay, zero_debias=True))
    found = sum(share * value for share, value in zip(shares, values, strict=True))
    assert found == pytest.approx(moment / (1 - decay**count), rel=1e-9)


@given(
    count=st.integers(1, 60),
    shape=st.sampled_from([by_checkpoint.minus_sqrt, by_checkpoint.cosine]),
)
def test_wsm_is_a_learning_rate_that_decays(count: int, shape: Callable[[float], float]) -> None:
    """Merging states that are sums of updates is the same as scaling the updates themselves."""
    updates = [math.sin(n) for n in range(count)]
    states = [sum(updates[: n + 1]) for n in range(count)]
    shares = weights_of(by_checkpoint.wsm(range(count), shape))
    merged = sum(share * state for share, state in zip(shares, states, strict=True))
    decayed = sum(shape(n / count) * update for n, update in enumerate(updates))
    assert merged == pytest.approx(decayed, abs=1e-12)


@pytest.mark.parametrize("count", [5, 10, 20, 50, 100])
def test_below_the_cap_the_dynamic_weights_have_a_closed_form(count: int) -> None:
    """The p-th of M folds weighs 9 * (p+2)...(p+9) / ((M+2)...(M+10))."""
    folds = count - 1
    whole = Fraction(math.prod(range(folds + 2, folds + 11)))
    shares = weights_of(dynamic.dynamic(range(count), 1.0))
    for p in range(1, count):
        assert shares[p] == pytest.approx(float(9 * math.prod(range(p + 2, p + 10)) / whole))
    assert shares[-1] == pytest.approx(9 / (folds + 10))


# --- What always holds ----------------------------------------------------------------------------

ANY_RULE: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "dynamic": {"decay": st.floats(0, 1), "num_updates": st.sampled_from(["index", "step"])},
    "constant": {"decay": st.floats(0, 1), "zero_debias": st.booleans()},
    "uniform": {},
    "linear": {},
    "warmup": {
        "decay": st.floats(0, 1),
        "power": st.floats(0.01, 10),
        "inv_gamma": st.floats(0.01, 1e4),
    },
    "power": {"sigma_rel": st.floats(0.001, 0.2886)},
    "wsm-minus-sqrt": {},
    "wsm-cosine": {},
    "per-step": {"decay_per_step": st.floats(0, 1)},
    "half-life": {"half_life": st.floats(0.001, 1e9)},
}
LISTS = {"decay", "decay_per_step", "half_life", "sigma_rel"}


@given(st.data())
def test_weights_sum_to_one_and_none_is_negative(data: st.DataObject) -> None:
    schedule = data.draw(st.sampled_from(sorted(ANY_RULE)))
    numbers = {name: data.draw(value) for name, value in ANY_RULE[schedule].items()}
    given_options = {name: [value] if name in LISTS else value for name, value in numbers.items()}
    named = None if schedule in ("per-step", "half-life") else schedule
    (rule,) = make_rules(named, given_options)
    count = data.draw(st.integers(1, 3000))
    gap = data.draw(st.integers(1, 10_000))
    shares = weights_of(rule.decays(range(gap, gap * (count + 1), gap)))
    assert len(shares) == count
    assert abs(math.fsum(shares) - 1) <= 1e-12
    assert min(shares) >= 0


@given(shares=st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_decays_and_weights_are_each_others_inverse(shares: list[float]) -> None:
    total = math.fsum(shares)
    assume(total > 0)
    expected = [share / total for share in shares]
    assert weights_of(decays_of(shares)) == pytest.approx(expected, abs=1e-12)


@given(steps=steps_of_a_run, factor=st.integers(2, 1000), sigma_rel=st.floats(0.02, 0.28))
def test_power_knows_no_unit_of_time(steps: list[int], factor: int, sigma_rel: float) -> None:
    scaled = [step * factor for step in steps]
    assert by_step.power(scaled, sigma_rel) == pytest.approx(
        by_step.power(steps, sigma_rel), rel=1e-9
    )


@given(steps=steps_of_a_run, shift=st.integers(0, 10**6), half_life=st.floats(1, 1e5))
def test_half_lives_know_no_origin_of_time(steps: list[int], shift: int, half_life: float) -> None:
    shifted = [step + shift for step in steps]
    assert by_step.half_life(shifted, half_life) == by_step.half_life(steps, half_life)


@given(count=st.integers(2, 300), cap=st.floats(0.01, 1))
def test_the_first_decay_that_matters_is_the_first(count: int, cap: float) -> None:
    """At the end of the ramp and above it a cap changes nothing; below, the last decay."""
    first = dynamic.first_decay_that_matters(count)
    free = dynamic.dynamic(range(count), 1.0)
    assert dynamic.dynamic(range(count), max(cap, first)) == free
    if cap < first:
        assert dynamic.dynamic(range(count), cap)[-1] < free[-1]


@pytest.mark.parametrize(
    ("decay", "folds"),
    [(0.5, 8), (0.8, 35), (0.9, 80), (0.95, 170), (0.99, 890), (0.999, 8990), (0.9999, 89990)],
)
def test_the_cap_binds_beyond_the_known_number_of_folds(decay: float, folds: int) -> None:
    """At 0.999 the ramp alone decides for the first 8991 checkpoints."""
    assert dynamic.updates_below_the_cap(decay) == folds
    assert dynamic.dynamic_decay(folds, decay) == pytest.approx((1 + folds) / (10 + folds))
    assert dynamic.dynamic_decay(folds + 1, decay) == decay


def test_a_first_checkpoint_at_step_0_is_not_silently_given_no_weight() -> None:
    with pytest.raises(RefusedError) as caught:
        by_step.power([0, 1000, 2000], 0.1)
    assert caught.value.code is Code.WRONG_WEIGHTS
    assert "--from 1" in caught.value.hint
