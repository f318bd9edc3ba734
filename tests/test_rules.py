"""From options to schedules: which option means which, which add up, which contradict."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ckpt_ema.errors import OptionError
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
    ("options", "message"),
    [
        ({"schedule": "constant", "half_life": 5}, "--schedule constant takes no --half-life"),
        ({"schedule": "uniform", "decay": 0.9}, "--schedule uniform takes no --decay"),
        ({"schedule": "dynamic", "sigma_rel": 0.1}, "takes no --sigma-rel, which belongs to power"),
        ({"schedule": "dynamic", "power": 0.5}, "takes no --power, which belongs to warmup"),
        ({"schedule": "constant", "num_updates": "step"}, "takes no --num-updates"),
        ({"schedule": "swa", "weights": {"a": 1.0}}, "takes no --weights"),
        ({"schedule": "power"}, "--schedule power needs --sigma-rel"),
        ({"schedule": "cosine"}, "must be one of dynamic, constant, uniform"),
        ({"power": 0.5, "zero_debias": True}, "--zero-debias belongs to --schedule constant and"),
        ({"num_updates": "step", "power": 0.5}, "--num-updates belongs to --schedule dynamic"),
        ({"decay": 1.1}, "--decay is 1.1; it must lie between 0 and 1"),
        ({"decay": math.nan}, "--decay is nan"),
        ({"decay": "0.9,-0.1"}, "--decay is -0.1"),
        ({"decay": "0.9,much"}, "'0.9,much'; it must be numbers, separated by commas"),
        ({"decay": ""}, "--decay is ''; it must be numbers"),
        ({"decay": []}, "--decay has no value"),
        ({"decay": [0.9, 0.9]}, "dynamic, decay 0.9 is asked for twice"),
        ({"decay_per_step": 2}, "--decay-per-step is 2"),
        ({"half_life": 0}, "--half-life is 0; it must be above 0"),
        ({"half_life": math.inf}, "--half-life is inf"),
        ({"sigma_rel": 0.3}, "and 1 / sqrt(12) = 0.288675, which is the uniform mean"),
        ({"sigma_rel": 0}, "--sigma-rel is 0"),
        ({"sigma_rel": 1e-200}, "--sigma-rel is 1e-200; it must lie between 1e-06 and"),
        ({"decay": True}, "--decay is 'True'; it must be numbers"),
        ({"half_life": 10**400}, "it must be numbers"),
        ({"power": "x"}, "--power is 'x'; it must be a number"),
        ({"last": 2.5}, "--last is '2.5'; it must be whole numbers"),
        ({"last": math.inf}, "--last is 'inf'; it must be whole numbers"),
        ({"every": 1.5}, "--every is '1.5'; it must be a whole number"),
        ({"threads": "many"}, "--threads is 'many'; it must be a whole number"),
        ({"from_step": math.nan}, "--from is 'nan'; it must be a whole number"),
        ({"output": 5}, "--output is '5'; it must be a path"),
        ({"weights": [0.5, 0.5]}, "--weights is '[0.5, 0.5]'; it must be a path"),
        ({"append": [1]}, "--append must be a list of names"),
        ({"include": None}, "--include must be a list of names"),
        ({"dtype": None}, "--dtype is 'None'; it must be one of same, float32"),
        ({"metric": 5, "best": 1}, "--metric is 5; it must be a text"),
        ({"schedule": "uniform", "half_life": 5}, "--half-life, which is a schedule of its own"),
        ({"power": -1}, "--power is -1"),
        ({"inv_gamma": 0}, "--inv-gamma is 0"),
        ({"num_updates": "epoch"}, "--num-updates is 'epoch'; it must be one of index, step"),
        ({"last": 0}, "--last is 0; it must be at least 1"),
        ({"last": "4,x"}, "must be whole numbers"),
        ({"every": 0}, "--every is 0"),
        ({"min_gap": -5}, "--min-gap is -5"),
        ({"best": 3}, "--best and --metric go together"),
        ({"metric": "loss"}, "--best and --metric go together"),
        ({"metric_mode": "max"}, "--metric-mode goes with --best"),
        ({"normalize": True}, "--normalize goes with --weights"),
        ({"from_step": 9, "to_step": 3}, "--from 9 is later than --to 3"),
        ({"steps": "100,x"}, "--steps has 'x'"),
        ({"steps": "500-100"}, "--steps has '500-100'"),
        ({"steps": []}, "--steps has no value"),
        ({"include": "a*"}, "--include must be a list"),
    ],
)
def test_contradictions_and_impossible_values_are_usage_errors(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError) as caught:
        make_options(options)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "dynamic, decay 0.999"),
        ({"num_updates": "step"}, "dynamic, decay 0.999, at steps"),
        ({"half_life": 2000}, "half-life 2000 steps"),
        ({"decay_per_step": 0.999}, "decay 0.999 per step"),
        ({"sigma_rel": 0.1}, "power function, sigma_rel 0.1"),
        ({"schedule": "constant", "zero_debias": True}, "constant, decay 0.999, debiased"),
        ({"weights": {"a": 1.0}}, "stated weights"),
        (
            {"power": 1e-7, "inv_gamma": 1e-5},
            "warmup, decay at most 0.999, power 1e-07, inv gamma 1e-05",
        ),
    ],
)
def test_people_read_what_a_rule_is(options: dict[str, Any], text: str) -> None:
    assert [rule.told() for rule in make_options(options).weighting.rules] == [text]


def test_numbers_may_be_texts_and_one_value_needs_no_list() -> None:
    given: dict[str, Any] = {"every": "2", "threads": 4.0, "from_step": "100", "steps": 100}
    assert make_options(given) == make_options(
        dict(every=2, threads=4, from_step=100, steps=((100, 100),))
    )


def test_what_was_given_is_told_as_plain_values() -> None:
    assert make_options({}).given() == {}
    given: dict[str, Any] = {"decay": 0.5, "output": Path("o"), "weights": {1: 1.0}}
    options = make_options(dict(**given, append=[Path("a"), "b"]))
    assert json.loads(json.dumps(options.given())) == {
        "decay": [0.5],
        "weights": {"1": 1.0},
        "append": ["a", "b"],
        "output": "o",
    }


def test_steps_are_numbers_and_ranges_in_any_form() -> None:
    expected = ((100, 100), (200, 300))
    for given in ("100,200-300", " 100 , 200 - 300 ", [100, (200, 300)], ["100", "200-300"]):
        assert make_options(dict(steps=given)).steps == expected  # type: ignore[arg-type]
