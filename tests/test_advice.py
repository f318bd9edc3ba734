"""Warnings and notes about weights and runs, each with a number that really changes it."""

import re
from pathlib import Path
from typing import Any

import pytest

import ckpt_ema
from ckpt_ema.errors import Code
from ckpt_ema.notices import Notice
from tests.conftest import MakeRun, noise, series


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """Ten checkpoints, 1000 steps apart."""
    return make_run(series(10, w=noise(10, 5)), steps=range(1000, 11_000, 1000))


def about(code: Code, run: Any, **options: Any) -> list[str]:
    """The sentences of a plan's warnings and notes that have a code."""
    plan = ckpt_ema.plan(run, **options)
    return [notice.message for notice in (*plan.warnings, *plan.notes) if notice.code is code]


def warnings(run: Any, **options: Any) -> tuple[Notice, ...]:
    """The warnings of a plan."""
    return ckpt_ema.plan(run, **options).warnings


def test_an_ordinary_run_gets_no_warning(run: Path) -> None:
    assert warnings(run) == ()


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"decay": 0.999}, ["10 checkpoints", "0.5263", "8991 checkpoints"]),
        ({"decay": 0.99999999}, ["0.5263"]),
        (
            {"decay": 0.9999, "num_updates": "step"},
            ["10000 steps", "0.9991", "step 89990"],
        ),
        ({"schedule": "warmup", "decay": 0.9}, ["10 checkpoints", "0.7846"]),
        ({"decay": 1.0}, ["0.5263"]),
    ],
)
def test_a_cap_without_effect_is_a_note(
    run: Path, options: dict[str, Any], numbers: list[str]
) -> None:
    [message] = about(Code.NO_EFFECT, run, **options)
    assert all(number in message for number in numbers), message
    [below] = re.findall(r"less than ([\d.]+)", message)
    assert not about(Code.NO_EFFECT, run, **{**options, "decay": float(below) - 1e-4})
    assert about(Code.NO_EFFECT, run, **{**options, "decay": float(below) + 1e-4})


def test_a_decay_that_is_said_to_matter_matters(run: Path) -> None:
    def weights(decay: float) -> tuple[float, ...]:
        return ckpt_ema.plan(run, decay=decay).averages[0].weights

    assert weights(0.5264) == weights(0.999) == weights(1.0)
    assert weights(0.526) != weights(0.999)


NUMBER = re.compile(r"(--[a-z-]+) (?:below|above) ([\d.]+)")
# Options, the weight of the checkpoint that has too much, and the number that changes it.
OLDEST: list[tuple[dict[str, Any], str, float]] = [
    ({"schedule": "constant", "decay": 0.999}, "99.1%", 0.9259),
    ({"half_life": 20_000}, "73.2%", 9000),
    ({"decay_per_step": 0.99999}, "91.4%", 0.999923),
    ({"sigma_rel": 0.2, "from_step": 9000}, "74.2%", 0.116),
]
NEWEST: list[tuple[dict[str, Any], str, float]] = [
    ({"schedule": "constant", "decay": 0.01}, "99.0%", 0.05),
    ({"decay": 0.01}, "99.0%", 0.05),
    ({"half_life": 100}, "99.9%", 231.4),
    ({"decay_per_step": 0.99}, "100.0%", 0.997009),
    ({"sigma_rel": 0.02}, "99.4%", 0.0328),
]


@pytest.mark.parametrize(("options", "weight", "number"), OLDEST + NEWEST)
def test_too_much_weight_on_one_checkpoint_is_a_warning_with_a_remedy(
    run: Path, options: dict[str, Any], weight: str, number: float
) -> None:
    """On the one side of the number the warning stands, on the other it is gone."""
    is_oldest = (options, weight, number) in OLDEST
    [message] = about(Code.UNEVEN_WEIGHTS, run, **options)
    assert weight in message
    assert ("oldest" in message) == is_oldest
    [(flag, found)] = NUMBER.findall(message)
    assert float(found) == number
    name = flag.removeprefix("--").replace("-", "_")
    for factor, stands in ((0.98, not is_oldest), (1.02, is_oldest)):
        value = number * factor if name != "decay_per_step" else 1 - (1 - number) / factor
        assert bool(about(Code.UNEVEN_WEIGHTS, run, **{**options, name: value})) == stands


@pytest.mark.parametrize(
    ("steps", "options", "weight"),
    [
        ([10, 1000], {"sigma_rel": 0.2}, "100.0%"),
        ([10, 1000], {"num_updates": "step"}, "100.0%"),
        ([1000, 1010, 1020], {"num_updates": "step"}, "83.8%"),
        (range(1000, 11_000, 1000), {"schedule": "warmup", "power": 3.0}, "81.3%"),
    ],
)
def test_where_no_number_would_do_none_is_named(
    make_run: MakeRun, steps: list[int], options: dict[str, Any], weight: str
) -> None:
    run = make_run(series(len(steps), w=noise(len(steps), 5)), steps=steps)
    [message] = about(Code.UNEVEN_WEIGHTS, run, **options)
    assert message.endswith(f"has {weight} of the weight.")


def test_one_checkpoint_alone_is_a_warning(run: Path) -> None:
    assert [notice.code for notice in warnings(run, last=1)] == [Code.FEW_CHECKPOINTS]


def test_checkpoints_without_steps_get_no_advice_in_steps(make_run: MakeRun) -> None:
    run = make_run(series(4, w=noise(4, 5)), steps=[100, 200, 300, 1000])
    assert about(Code.UNEVEN_GAPS, run, schedule="uniform")
    (run / "checkpoint-200").rename(run / "final")
    assert not about(Code.UNEVEN_GAPS, run, append=["final"], schedule="uniform")
    backwards = [run / "checkpoint-300", run / "checkpoint-1000", run / "checkpoint-100"]
    assert not about(Code.UNEVEN_GAPS, backwards)


def test_epochs_are_called_epochs(make_run: MakeRun) -> None:
    run = make_run(series(4, w=noise(4, 5)), steps=[1, 2, 3, 9], pattern="epoch_{}")
    plans = [ckpt_ema.plan(run, num_updates="step"), ckpt_ema.plan(run)]
    text = " ".join(str(notice) for plan in plans for notice in (*plan.warnings, *plan.notes))
    assert "with 9 epochs" in text
    assert "after epoch 8990" in text
    assert "6 epochs from epoch_3 to epoch_9" in text
    assert "step" not in text


def test_uneven_gaps_are_a_warning_with_the_half_life_that_counts_steps(make_run: MakeRun) -> None:
    run = make_run(series(4, w=noise(4, 5)), steps=[100, 200, 300, 900])
    [message] = about(Code.UNEVEN_GAPS, run)
    assert "600 steps from checkpoint-300 to checkpoint-900, median 100;" in message
    half_life = float(message.split("--half-life ")[1].split()[0])
    age = ckpt_ema.plan(run).averages[0].statistics.mean_age
    same = ckpt_ema.plan(run, half_life=half_life)
    assert same.averages[0].statistics.mean_age == pytest.approx(age, rel=0.01)
    assert not about(Code.UNEVEN_GAPS, run, half_life=half_life)


def test_equal_averages_are_a_warning(run: Path) -> None:
    found = about(Code.SAME_WEIGHTS, run, decay="0.6,0.999,0.2", last="10,11")
    names = [re.findall(r"dynamic-[\w.-]+", message) for message in found]
    of_each = ("dynamic-0.6-last-{}", "dynamic-0.999-last-{}")
    assert names == [
        [name.format(last) for last in (10, 11) for name in of_each],
        ["dynamic-0.2-last-10", "dynamic-0.2-last-11"],
    ]


def test_of_several_averages_those_concerned_are_named(run: Path) -> None:
    found = about(Code.UNEVEN_WEIGHTS, run, half_life="100,3000,50000")
    assert [message.split(": ")[0] for message in found] == ["half-life-100", "half-life-50000"]


def test_a_run_of_few_is_a_note_and_a_choice_of_few_is_none(make_run: MakeRun) -> None:
    few = make_run(series(4, w=noise(4, 5)), name="few")
    many = make_run(series(9, w=noise(9, 5)), name="many")
    assert len(about(Code.FEW_CHECKPOINTS, few)) == 1
    assert warnings(few) == ()
    assert not about(Code.FEW_CHECKPOINTS, many, last=3)
    assert not about(Code.FEW_CHECKPOINTS, many, include=["*-1", "*-2"])
    assert not about(Code.FEW_CHECKPOINTS, [few / "checkpoint-1", few / "checkpoint-2"])


def test_explicit_weights_are_not_argued_with(run: Path) -> None:
    assert warnings(run, weights={"1000": 0.99, "10000": 0.01}) == ()
