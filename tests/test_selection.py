"""Which checkpoints take part: exact numbers, whole names, the metric that a trainer wrote."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema import OptionError, RefusedError
from ckpt_ema.errors import Code
from ckpt_ema.find.select import higher_is_better
from ckpt_ema.find.verdict import Reason
from tests.conftest import MakeRun, noise, series, write_safetensors

STEPS = [100, 200, 300, 400, 1000, 1100, 2000]


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """Seven checkpoints at STEPS."""
    return make_run(series(7, w=noise(7, 5)), steps=STEPS)


def chosen(run: Path | list[Path], **options: Any) -> list[list[int | None]]:
    """The steps of each average's checkpoints."""
    plan = ckpt_ema.plan(run, schedule=options.pop("schedule", "uniform"), **options)
    return [[plan.checkpoints[n].step for n in c.members] for c in plan.averages]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [STEPS]),
        ({"last": 3}, [[1000, 1100, 2000]]),
        ({"last": "1,2"}, [[2000], [1100, 2000]]),
        ({"from_step": 400}, [[400, 1000, 1100, 2000]]),
        ({"from_step": 401}, [[1000, 1100, 2000]]),
        ({"to_step": 300}, [[100, 200, 300]]),
        ({"from_step": 200, "to_step": 400}, [[200, 300, 400]]),
        ({"every": 2}, [[100, 300, 1000, 2000]]),
        ({"every": 3}, [[100, 400, 2000]]),
        ({"every": 100}, [[2000]]),
        # 100 is not 1000: numbers are exact.
        ({"steps": "100"}, [[100]]),
        ({"steps": "100,2000"}, [[100, 2000]]),
        ({"steps": "100-300,1100"}, [[100, 200, 300, 1100]]),
        ({"steps": [100, (900, 5000)]}, [[100, 1000, 1100, 2000]]),
        # From the newest back, the next one that is far enough away.
        ({"min_gap": 500}, [[400, 1100, 2000]]),
        ({"min_gap": 100}, [STEPS]),
        ({"min_gap": 101}, [[200, 400, 1100, 2000]]),
        ({"include": ["checkpoint-1*"]}, [[100, 1000, 1100]]),
        ({"include": ["checkpoint-100"]}, [[100]]),
        ({"include": ["checkpoint-100", "*-200"]}, [[100, 200]]),
        ({"exclude": ["checkpoint-100"]}, [[200, 300, 400, 1000, 1100, 2000]]),
        ({"exclude": ["checkpoint-?00", "checkpoint-2000/"]}, [[1000, 1100]]),
        ({"include": ["*00"], "exclude": ["*000"]}, [[100, 200, 300, 400, 1100]]),
        # Steps first, then distances, then the last.
        ({"to_step": 1100, "last": 2}, [[1000, 1100]]),
        ({"min_gap": 500, "last": 2}, [[1100, 2000]]),
        ({"every": 2, "last": 2}, [[1000, 2000]]),
    ],
)
def test_selections(run: Path, options: dict[str, Any], expected: list[list[int]]) -> None:
    assert chosen(run, **options) == expected


def test_a_list_of_checkpoints_is_selected_from_in_the_same_way(run: Path) -> None:
    listed = [run / f"checkpoint-{step}" for step in STEPS]
    assert chosen(listed, last=2) == [[1100, 2000]]
    assert chosen(listed, exclude=["checkpoint-2000"], every=3) == [[300, 1100]]
    assert chosen(listed, include=["checkpoint-1*"]) == [[100, 1000, 1100]]


def test_more_than_there_are_is_all_there_are_and_said(run: Path) -> None:
    plan = ckpt_ema.plan(run, last="3,50")
    assert [len(average.members) for average in plan.averages] == [3, 7]
    assert "--last 50 takes all 7 checkpoints that there are." in map(str, plan.warnings)


def test_what_is_taken_is_said(run: Path) -> None:
    plan = ckpt_ema.plan(run, from_step=200, every=2, last="1,2")
    assert "--from 200 --every 2 --last 1,2 takes 2 of 7 checkpoints." in map(str, plan.notes)
    assert len(plan.checkpoints) == 2
    [left_out] = ckpt_ema.plan(run, exclude=["*-100"]).left_out
    assert (left_out.name, left_out.verdict.reason) == ("checkpoint-100", Reason.EXCLUDED)


@pytest.mark.parametrize(
    ("options", "code", "shown"),
    [
        ({"steps": "150"}, Code.NO_SUCH_STEP, "100, 200"),
        ({"steps": "10-50"}, Code.NOTHING_SELECTED, "7 checkpoints"),
        ({"from_step": 5000}, Code.NOTHING_SELECTED, "checkpoint-2000"),
        ({"include": ["step*"]}, Code.NO_MATCH, "checkpoint-100"),
        ({"include": ["checkpoint-1"]}, Code.NO_MATCH, "checkpoint-100"),
        ({"pattern": "step"}, Code.NO_MATCH, "checkpoint-100"),
        ({"exclude": ["*"]}, Code.NOTHING_SELECTED, "checkpoint-100"),
    ],
)
def test_a_selection_that_leaves_none_is_refused_with_what_there_is(
    run: Path, options: dict[str, Any], code: Code, shown: str
) -> None:
    write_safetensors(run / "model.safetensors", {"w": torch.zeros(5)})  # not to be taken instead
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run, **options)
    assert caught.value.code is code
    assert shown in str(caught.value)


def test_an_exclude_that_matches_nothing_is_a_warning(run: Path) -> None:
    plan = ckpt_ema.plan(run, exclude=["checkpoint-7"])
    assert "--exclude checkpoint-7 matches nothing." in map(str, plan.warnings)


def test_a_broken_checkpoint_that_takes_no_part_is_no_obstacle(run: Path) -> None:
    broken = run / "checkpoint-300/model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-3])
    for options in ({"last": 3}, {"exclude": ["checkpoint-300"]}, {"steps": "100,400"}):
        assert 300 not in chosen(run, **options)[0]
    with pytest.raises(RefusedError) as caught:
        chosen(run)
    assert (caught.value.code, caught.value.path) == (Code.INCOMPLETE, str(broken.parent))


def test_the_last_of_a_run_that_is_being_saved_are_the_last_whole_ones(run: Path) -> None:
    (run / "checkpoint-2000/model.safetensors").write_bytes(b"")
    assert chosen(run, last=2) == [[1000, 1100]]


def test_an_alias_can_be_excluded(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 5)))
    write_safetensors(run / "last.safetensors", {"w": torch.zeros(5)})
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run)
    assert caught.value.code is Code.UNKNOWN_ORDER
    assert chosen(run, exclude=["last"]) == chosen(run, include=["checkpoint-*"]) == [[1, 2]]


# --- Schedules and selections that count steps ----------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"half_life": 10},
        {"decay_per_step": 0.9},
        {"sigma_rel": 0.1},
        {"num_updates": "step"},
        {"min_gap": 10},
    ],
)
def test_steps_that_the_run_does_not_have_are_refused_by_the_option(
    make_run: MakeRun, options: dict[str, Any]
) -> None:
    """accelerate numbers its saves, which says nothing of steps."""
    run = make_run(series(4, w=noise(4, 5)), steps=[0, 1, 2, 3], pattern="checkpoint_{}")
    name = "--" + next(iter(options)).replace("_", "-")
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run, **options)
    assert str(caught.value).startswith(name)
    assert caught.value.code is Code.NO_STEPS
    assert chosen(run, steps="1,3") == [[1, 3]]  # by the number that it has


def test_a_list_without_steps_or_in_another_order_has_no_distances(
    run: Path, tmp_path: Path
) -> None:
    backwards = [run / "checkpoint-200", run / "checkpoint-100"]
    copytree(run / "checkpoint-200", tmp_path / "other/checkpoint-200")
    same_step = [run / "checkpoint-200", tmp_path / "other/checkpoint-200"]
    unnamed = [tmp_path / "a", tmp_path / "b"]
    for step, path in zip((300, 400), unnamed, strict=True):
        (run / f"checkpoint-{step}").rename(path)
    asked: list[dict[str, Any]] = [
        *({"run": paths, "half_life": 5} for paths in (backwards, same_step, unnamed)),
        {"run": unnamed, "from_step": 3},
    ]
    for options in asked:
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.plan(**options)
        assert caught.value.code is Code.NO_STEPS


def test_epochs_are_a_unit_and_said_to_be_it(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 5)), pattern="epoch_{}")
    [average] = ckpt_ema.plan(run, half_life=1).averages
    assert (average.unit, average.decays) == ("epochs", (0.5, 0.5))
    assert average.text == "half-life 1 epochs"


def test_a_checkpoint_at_step_0_is_no_part_of_a_power_function(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 5)), steps=[0, 10, 20])
    with pytest.raises(RefusedError):
        ckpt_ema.plan(run, sigma_rel=0.1)
    assert chosen(run, sigma_rel=0.1, schedule="power", from_step=1) == [[10, 20]]


# --- The best -------------------------------------------------------------------------------------


def log(run: Path, values: dict[int, Any], *, only_newest: bool = False) -> None:
    """Write what the trainer of transformers logs, into the checkpoints that are evaluated."""
    for step in [max(values)] if only_newest else values:
        history = [{"step": s, "eval_loss": v, "epoch": 1} for s, v in values.items() if s <= step]
        history.insert(0, {"step": step, "loss": 1.5})
        state = {"global_step": step, "log_history": history}
        (run / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps(state))


LOSSES = dict(zip(STEPS, [5.0, 1.0, 2.0, 1.0, 3.0, 0.5, 1.0], strict=True))


def test_the_best_by_the_trainers_log_ties_to_the_later(run: Path) -> None:
    log(run, LOSSES)
    best = chosen(run, best="1,2,3,4", metric="eval_loss")
    assert best == [[1100], [1100, 2000], [400, 1100, 2000], [200, 400, 1100, 2000]]
    assert chosen(run, best=1, metric="loss")  # transformers' short name, or the training loss
    assert chosen(run, best=2, metric="eval_loss", metric_mode="max") == [[100, 1000]]
    assert chosen(run, best=2, metric="eval_loss", last=3) == [[1100, 2000]]
    plan = ckpt_ema.plan(run, best="2,50", metric="eval_loss")
    assert [average.name for average in plan.averages] == [
        *("dynamic-0.999-best-2", "dynamic-0.999-best-50")
    ]
    assert "--best 50 takes all 7 checkpoints that there are." in map(str, plan.warnings)


def test_the_log_of_the_newest_has_the_metrics_of_all(run: Path) -> None:
    log(run, LOSSES, only_newest=True)
    assert chosen(run, best=1, metric="eval_loss") == [[1100]]


def test_a_log_tells_of_checkpoints_that_are_left_out_too(run: Path) -> None:
    """transformers may evaluate after it saved, so that the next save has the result."""
    log(run, {step: loss for step, loss in LOSSES.items() if step < 2000}, only_newest=True)
    (run / "checkpoint-1100/trainer_state.json").rename(run / "checkpoint-2000/trainer_state.json")
    assert chosen(run, best=2, metric="eval_loss", exclude=["*-2000"]) == [[400, 1100]]
    assert chosen(run, best=1, metric="eval_loss", to_step=1000) == [[400]]


def test_as_many_as_there_are_is_no_warning(run: Path) -> None:
    log(run, LOSSES)
    warnings = ckpt_ema.plan(run, last=7, best=7, metric="eval_loss").warnings
    assert not any("takes all" in str(warning) for warning in warnings)


def test_what_is_told_closest_to_the_weights_wins(run: Path) -> None:
    log(run, LOSSES)
    (run / "checkpoint-100/eval_results.json").write_text('{"eval_loss": 0.1}')
    assert chosen(run, best=1, metric="eval_loss") == [[100]]


def test_a_number_too_large_for_a_float_is_no_metric(run: Path) -> None:
    log(run, LOSSES)
    (run / "checkpoint-100/eval_results.json").write_text('{"eval_loss": 1' + 400 * "0" + "}")
    assert chosen(run, best=1, metric="eval_loss") == [[1100]]


def test_results_beside_the_weights_are_found(run: Path) -> None:
    for step, value in LOSSES.items():
        name = "eval_results.json" if step < 1000 else "metrics.json"
        (run / f"checkpoint-{step}" / name).write_text(json.dumps({"accuracy": value}))
    assert chosen(run, best=2, metric="accuracy") == [[100, 1000]]


def test_metrics_in_names_and_in_torch_files_are_found(tmp_path: Path) -> None:
    lightning, timm, wenet = (tmp_path / name for name in ("lightning", "timm", "wenet"))
    for folder in (lightning, timm, wenet):
        folder.mkdir()
    for epoch, value in enumerate([0.5, 0.2, 3e-05, 0.3]):
        weights = {"w": noise(4, 3)[epoch]}
        torch.save({"state_dict": weights}, lightning / f"epoch={epoch}-val_loss={value}.ckpt")
        state = {"state_dict": weights, "metric": value, "epoch": epoch}
        torch.save(state, timm / f"checkpoint-{epoch}.pth.tar")
        torch.save(weights, wenet / f"epoch_{epoch}.pt")
        (wenet / f"epoch_{epoch}.yaml").write_text(f"epoch: {epoch}\ncv_loss: {value}\ntag: x\n")
    assert chosen(lightning, best=2, metric="val_loss") == [[1, 2]]
    assert chosen(timm, best=1, metric="metric", metric_mode="max") == [[0]]
    assert chosen(wenet, best=1, metric="cv_loss") == [[2]]


@pytest.mark.parametrize(
    ("values", "metric", "message"),
    [
        (LOSSES, "eval_los", "eval_loss, loss"),
        ({}, "eval_loss", "no metrics found"),
        ({100: 1.0, 300: 2.0}, "eval_loss", "missing for 5 of 7 checkpoints: checkpoint-200"),
        ({**LOSSES, 400: float("nan")}, "eval_loss", "NaN for 1 of 7 checkpoints: checkpoint-400"),
    ],
)
def test_a_metric_that_is_missing_or_nan_is_refused_with_what_was_found(
    run: Path, values: dict[int, float], metric: str, message: str
) -> None:
    if values:
        log(run, values)
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run, best=2, metric=metric)
    assert caught.value.code is Code.NO_METRIC
    assert message in str(caught.value)


def test_epochs_are_not_looked_up_as_steps(make_run: MakeRun) -> None:
    """The log counts steps; epoch 2 is not step 2."""
    run = make_run(series(3, w=noise(3, 5)), pattern="epoch_{}")
    state = {"log_history": [{"step": n, "eval_loss": float(n)} for n in (1, 2, 3)]}
    (run / "epoch_3/trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run, best=1, metric="eval_loss")
    assert caught.value.code is Code.NO_METRIC


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        *((name, False) for name in ("eval_loss", "loss", "val/loss", "wer", "test_perplexity")),
        *((name, False) for name in ("FID", "fid50k", "eval.rmse", "nll")),
        *((name, True) for name in ("accuracy", "eval_f1", "top1", "val/acc@5", "rougeL", "bleu4")),
        *((name, True) for name in ("bbox_mAP_50", "reward", "recall@10", "exact_match")),
    ],
)
def test_which_way_a_metric_is_good_is_known_by_its_words(metric: str, higher: bool) -> None:
    assert higher_is_better(metric, "auto") is higher
    assert higher_is_better(metric, "min") is False
    assert higher_is_better(metric, "max") is True


@pytest.mark.parametrize("metric", ["metric", "closs", "loss_accuracy", "temperature", "1"])
def test_where_words_do_not_tell_it_has_to_be_said(metric: str) -> None:
    with pytest.raises(OptionError) as caught:
        higher_is_better(metric, "auto")
    assert "--metric-mode" in caught.value.hint
