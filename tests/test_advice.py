"""Warnings about weights: what is wrong, and a number that really changes it."""

import re
from pathlib import Path
from typing import Any

import pytest

import ckpt_ema
from tests.conftest import MakeRun, noise, series


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """Ten checkpoints, 1000 steps apart."""
    return make_run(series(10, w=noise(10, 5)), steps=range(1000, 11_000, 1000))


def warnings(run: Path, **options: Any) -> list[str]:
    """The warnings of a plan."""
    return list(ckpt_ema.plan(run, **options).warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"decay": 0.999},
            "--decay 0.999 changes nothing here: over 10 checkpoints the dynamic decay ends at"
            " 0.5263, and the first decay to matter is one below that (0.999 is reached beyond"
            " 8991 checkpoints).",
        ),
        (
            {"decay": 0.9999, "num_updates": "step"},
            "--decay 0.9999 changes nothing here: over 10000 training steps the dynamic decay ends"
            " at 0.9991, and the first decay to matter is one below that (0.9999 is reached beyond"
            " training step 89990).",
        ),
        (
            {"schedule": "warmup", "decay": 0.9},
            "--decay 0.9 changes nothing here: the warmup ends at 0.7846, and the first decay to"
            " matter is one below that.",
        ),
        (
            {"schedule": "constant"},
            "The oldest checkpoint, checkpoint-1000, has 99.1% of the weight; a --decay below"
            " 0.9259 gives it less than half.",
        ),
        (
            {"half_life": 20_000},
            "The oldest checkpoint, checkpoint-1000, has 73.2% of the weight; a --half-life below"
            " 9000 gives it less than half.",
        ),
        (
            {"decay_per_step": 0.99999},
            "The oldest checkpoint, checkpoint-1000, has 91.4% of the weight; a --decay-per-step"
            " below 0.999923 gives it less than half.",
        ),
        (
            {"sigma_rel": 0.2, "from_step": 9000},
            "The oldest checkpoint, checkpoint-9000, has 74.2% of the weight; a --sigma-rel below"
            " 0.116 gives it less than half.",
        ),
        (
            {"half_life": 100},
            "The average is nearly its newest checkpoint, checkpoint-10000, which has 99.9% of the"
            " weight; a --half-life above 231.4 gives the others more.",
        ),
        (
            {"schedule": "constant", "decay": 0.01},
            "which has 99.0% of the weight; a --decay above 0.05 gives the others more.",
        ),
        ({"decay_per_step": 0.99}, "a --decay-per-step above 0.997009 gives the others more."),
        ({"sigma_rel": 0.02}, "a --sigma-rel above 0.0328 gives the others more."),
        (
            {"decay": 0.01},
            "which has 99.0% of the weight; a --decay above 0.05 gives the others more.",
        ),
        ({"decay": 0.99999999}, "--decay 0.99999999 changes nothing here"),
        (
            {"schedule": "warmup", "power": 3.0},
            "The oldest checkpoint, checkpoint-1000, has 81.3% of the weight.",
        ),
        ({"last": 1}, "There is one checkpoint only, so the average is that checkpoint."),
    ],
)
def test_warnings_hold_a_number(run: Path, options: dict[str, Any], message: str) -> None:
    found = warnings(run, **options)
    assert any(message in warning for warning in found), found


NUMBER = re.compile(r"(--[a-z-]+) (?:below|above) ([\d.]+)")
OLDEST = [
    {"schedule": "constant", "decay": 0.999},
    {"half_life": 20_000},
    {"decay_per_step": 0.99999},
    {"sigma_rel": 0.28, "from_step": 9000},
]
NEWEST = [
    {"schedule": "constant", "decay": 0.01},
    {"half_life": 100},
    {"decay_per_step": 0.99},
    {"sigma_rel": 0.02},
]


@pytest.mark.parametrize("options", OLDEST + NEWEST)
def test_the_number_is_where_it_changes(run: Path, options: dict[str, Any]) -> None:
    """On the one side of it the warning stands, on the other it is gone."""
    [match] = filter(None, map(NUMBER.search, warnings(run, **options)))
    name, number = match[1].removeprefix("--").replace("-", "_"), float(match[2])
    kind = "The oldest" if options in OLDEST else "The average is nearly"
    for factor, stands in ((0.98, options in NEWEST), (1.02, options in OLDEST)):
        value = number * factor if name != "decay_per_step" else 1 - (1 - number) / factor
        found = warnings(run, **{**options, name: value})
        assert any(warning.startswith(kind) for warning in found) == stands


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        ([10, 1000], {"sigma_rel": 0.2}, "has 100.0% of the weight."),
        ([10, 1000], {"num_updates": "step"}, "has 100.0% of the weight."),
        ([1000, 1010, 1020], {"num_updates": "step"}, "has 83.8% of the weight."),
    ],
)
def test_where_no_number_would_do_none_is_named(
    make_run: MakeRun, steps: list[int], options: dict[str, Any], message: str
) -> None:
    run = make_run(series(len(steps), w=noise(len(steps), 5)), steps=steps)
    found = warnings(run, **options)
    assert any(warning.endswith(message) for warning in found), found


def test_checkpoints_without_steps_get_no_advice_in_steps(make_run: MakeRun) -> None:
    run = make_run(series(4, w=noise(4, 5)), steps=[100, 200, 300, 1000])
    (run / "checkpoint-200").rename(run / "final")
    assert not any("half-life" in w for w in warnings(run, append=["final"], schedule="uniform"))
    backwards = [run / "checkpoint-300", run / "checkpoint-1000", run / "checkpoint-100"]
    assert not any("half-life" in warning for warning in ckpt_ema.plan(backwards).warnings)


def test_epochs_are_told_as_epochs(make_run: MakeRun) -> None:
    run = make_run(series(4, w=noise(4, 5)), steps=[1, 2, 3, 9], pattern="epoch_{}")
    text = " ".join(warnings(run, num_updates="step") + warnings(run))
    assert "over 9 epochs the dynamic decay" in text
    assert "is reached beyond epoch 8990" in text
    assert "the weights count checkpoints, not epochs; by epochs, --half-life" in text
    assert "step" not in text


def test_the_decay_that_is_said_to_matter_matters(run: Path) -> None:
    def weights(decay: float) -> tuple[float, ...]:
        return ckpt_ema.plan(run, decay=decay).averages[0].weights

    assert weights(0.5264) == weights(0.999) == weights(1.0)
    assert weights(0.526) != weights(0.999)
    assert not any("changes nothing" in warning for warning in warnings(run, decay=0.526))


def test_irregular_gaps_are_said_with_the_half_life_that_counts_steps(make_run: MakeRun) -> None:
    run = make_run(series(4, w=noise(4, 5)), steps=[100, 200, 300, 900])
    [message] = [w for w in warnings(run) if w.startswith("The gaps")]
    assert "600 from checkpoint-300 to checkpoint-900, half of them at most 100;" in message
    half_life = float(message.split("--half-life ")[1].split()[0])
    age = ckpt_ema.plan(run).averages[0].statistics.mean_age
    same = ckpt_ema.plan(run, half_life=half_life)
    assert same.averages[0].statistics.mean_age == pytest.approx(age, rel=0.01)
    assert not any("gaps" in warning for warning in same.warnings)  # which counts steps


def test_equal_averages_are_said(run: Path) -> None:
    found = warnings(run, decay="0.6,0.999,0.2", last="10,11")
    assert (
        "dynamic-0.6-last-10, dynamic-0.999-last-10, dynamic-0.6-last-11, dynamic-0.999-last-11"
        " have the same weights."
    ) in found
    assert "dynamic-0.2-last-10, dynamic-0.2-last-11 have the same weights." in found


def test_of_several_averages_those_concerned_are_named(run: Path) -> None:
    found = warnings(run, half_life="100,3000,50000")
    assert [w.split(": ")[0] for w in found] == ["half-life-100", "half-life-50000"]


def test_a_run_of_few_is_a_warning_and_a_choice_of_few_is_none(make_run: MakeRun) -> None:
    few = make_run(series(4, w=noise(4, 5)), name="few")
    many = make_run(series(9, w=noise(9, 5)), name="many")
    assert any("There are 4 checkpoints only" in warning for warning in warnings(few))
    assert not any("checkpoints only" in warning for warning in warnings(many, last=3))
    assert not any("checkpoints only" in w for w in warnings(many, include=["*-1", "*-2"]))
    given = [few / "checkpoint-1", few / "checkpoint-2"]
    assert not any("checkpoints only" in w for w in ckpt_ema.plan(given).warnings)


def test_stated_weights_are_not_argued_with(run: Path) -> None:
    assert warnings(run, weights={"1000": 0.99, "10000": 0.01}) == []
