"""From options to schedules: which option means which, which add up, which contradict."""

from typing import Any

import pytest

from ckpt_ema.errors import Code, OptionError
from ckpt_ema.options import make_options


def names(**options: Any) -> list[str]:
    """The names of the rules that options mean."""
    return [rule.name for rule in make_options(options).weighting.rules]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["dynamic-0.999"]),
        ({"decay": 0.9}, ["dynamic-0.9"]),
        ({"decay": "0.9,0.99"}, ["dynamic-0.9", "dynamic-0.99"]),
        ({"decay": [0.9, 0.99]}, ["dynamic-0.9", "dynamic-0.99"]),
        ({"schedule": "constant"}, ["constant-0.999"]),
        ({"schedule": "constant", "decay": "0.5,0.9"}, ["constant-0.5", "constant-0.9"]),
        ({"schedule": "ema", "decay": 0.9}, ["dynamic-0.9"]),
        ({"schedule": "swa"}, ["uniform"]),
        ({"schedule": "lawa"}, ["uniform"]),
        ({"schedule": "karras", "sigma_rel": 0.1}, ["sigma-rel-0.1"]),
        ({"schedule": "linear"}, ["linear"]),
        ({"schedule": "wsm-cosine"}, ["wsm-cosine"]),
        ({"schedule": "wsm-minus-sqrt"}, ["wsm-minus-sqrt"]),
        ({"schedule": "warmup"}, ["warmup-0.999"]),
        # An option that implies a schedule selects it.
        ({"half_life": 2000}, ["half-life-2000"]),
        ({"half_life": "1000.5"}, ["half-life-1000.5"]),
        ({"decay_per_step": 0.9995}, ["per-step-0.9995"]),
        ({"sigma_rel": "0.05,0.1"}, ["sigma-rel-0.05", "sigma-rel-0.1"]),
        ({"power": 0.75}, ["warmup-0.999-power-0.75"]),
        ({"power": 0.75, "inv_gamma": 2, "decay": 0.9}, ["warmup-0.9-power-0.75-inv-gamma-2"]),
        ({"zero_debias": True, "decay": 0.9}, ["constant-0.9-debiased"]),
        ({"num_updates": "step"}, ["dynamic-0.999-at-steps"]),
        ({"num_updates": "index", "decay": 0.9}, ["dynamic-0.9"]),
        ({"weights": {"a": 1.0}}, ["weights"]),
        # Several options add up.
        ({"decay": 0.9, "half_life": 1000}, ["dynamic-0.9", "half-life-1000"]),
        (
            {"decay": "0.5,0.9", "sigma_rel": 0.1, "half_life": "1,2", "decay_per_step": 0.9},
            [
                *("dynamic-0.5", "dynamic-0.9", "sigma-rel-0.1"),
                *("per-step-0.9", "half-life-1", "half-life-2"),
            ],
        ),
        ({"zero_debias": True, "half_life": 3}, ["constant-0.999-debiased", "half-life-3"]),
        # No digit is lost in a name.
        ({"decay": 0.9999999}, ["dynamic-0.9999999"]),
    ],
)
def test_options_mean_schedules(options: dict[str, Any], expected: list[str]) -> None:
    assert names(**options) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "constant", "half_life": 5},
        {"schedule": "uniform", "decay": 0.9},
        {"schedule": "uniform", "half_life": 5},
        {"schedule": "dynamic", "sigma_rel": 0.1},
        {"schedule": "dynamic", "power": 0.5},
        {"schedule": "constant", "num_updates": "step"},
        {"schedule": "swa", "weights": {"a": 1.0}},
        {"schedule": "power"},
        {"power": 0.5, "zero_debias": True},
        {"num_updates": "step", "power": 0.5},
        {"decay": [0.9, 0.9]},
    ],
)
def test_options_of_different_schedules_contradict_each_other(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        make_options(options)
    assert caught.value.code is Code.CONFLICTING_OPTIONS


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "dynamic, decay 0.999"),
        ({"num_updates": "step"}, "dynamic, decay 0.999, at steps"),
        ({"half_life": 2000}, "half-life 2000 steps"),
        ({"decay_per_step": 0.999}, "decay 0.999 per step"),
        ({"sigma_rel": 0.1}, "power function, sigma_rel 0.1"),
        ({"schedule": "constant", "zero_debias": True}, "constant, decay 0.999, debiased"),
        ({"weights": {"a": 1.0}}, "explicit weights"),
        (
            {"power": 1e-7, "inv_gamma": 1e-5},
            "warmup, decay at most 0.999, power 1e-07, inv gamma 1e-05",
        ),
    ],
)
def test_people_read_what_a_rule_is(options: dict[str, Any], text: str) -> None:
    assert [rule.text() for rule in make_options(options).weighting.rules] == [text]
