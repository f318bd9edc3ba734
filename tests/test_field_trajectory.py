"""Runs that people reported: which entries are the steps of the run, in which order."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema import RefusedError
from ckpt_ema.errors import Code
from ckpt_ema.planning.plan import Plan
from tests.makers.safetensors_files import read_safetensors, write_safetensors


def state(value: float) -> dict[str, torch.Tensor]:
    """A model of two tensors that tell which checkpoint they are of."""
    return {"layer.weight": torch.full((2, 3), float(value)), "layer.bias": torch.arange(3) + value}


def folders(run: Path, *names: str, first: int = 1) -> Path:
    """Write folders with a model each; the model's value is its place in the list."""
    for value, name in enumerate(names, start=first):
        (run / name).mkdir(parents=True)
        write_safetensors(run / name / "model.safetensors", state(value))
        (run / name / "config.json").write_text("{}")
    return run


def flat(run: Path, contents: Mapping[str, Any]) -> Path:
    """Write files of `torch.save`."""
    run.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        torch.save(content, run / name)
    return run


def check(
    run: Path | Sequence[Path], names: Sequence[str], steps: Sequence[int | None], **options: Any
) -> Plan:
    """The average is over these checkpoints in this order; values are the files' own."""
    plan = ckpt_ema.plan(run, **options)
    assert [one.name for one in plan.checkpoints] == list(names)
    assert [one.step for one in plan.checkpoints] == list(steps)
    return plan


def average_of(run: Path | Sequence[Path], out: Path, **options: Any) -> float:
    """Average with equal weights, and return the one value that the first tensor holds."""
    ckpt_ema.average(run, output=out, schedule="uniform", device="cpu", **options)
    weight = read_safetensors(out / "model.safetensors")["layer.weight"]
    assert torch.equal(weight, weight[0, 0].expand(weight.shape))
    return float(weight[0, 0])


def refused(run: Path | Sequence[Path], code: Code, *words: str, **options: Any) -> str:
    """The plan is refused with this code and these words; returns the message."""
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run, **options)
    message = str(caught.value)
    assert caught.value.code is code, message
    for word in words:
        assert word in message, message
    return message


def warnings(plan: Plan, *words: str) -> list[str]:
    """The warnings in which all these words are."""
    return [str(one) for one in plan.warnings if all(word in str(one) for word in words)]


# --- D: magnitudes in names -----------------------------------------------------------------------

K, M = 1000, 1_000_000


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (("step_800k", "step_900k", "step_1M"), (800 * K, 900 * K, M)),
        (("iter-1e3", "iter-1e4", "iter-1.5e4"), (1000, 10_000, 15_000)),
        (("ckpt_500", "ckpt_1K", "ckpt_1.5K"), (500, 1000, 1500)),
        (("0.5M", "1M", "1.25M"), (500 * K, M, 1_250_000)),
        (("llama-10b-step-100", "llama-10b-step-200", "llama-10b-step-1k"), (100, 200, 1000)),
        (("v2-7B-100k", "v2-7B-250k", "v2-7B-1m"), (100 * K, 250 * K, M)),
        (("model_9ksteps", "model_10ksteps", "model_1Msteps"), (9 * K, 10 * K, M)),
        (("pretrain-100BT-step9k-99B", "pretrain-100BT-step10k-1T"), (9 * K, 10 * K)),
        (("epoch1-a1e3b7", "epoch2-a1e3b7", "epoch10-a1e3b7"), (1, 2, 10)),
        (
            tuple(
                f"TinyLlama-1.1B-intermediate-step-{end}"
                for end in (
                    *("240k-503b", "480k-1T", "715k-1.5T", "955k-token-2T"),
                    *("1195k-token-2.5T", "1431k-3T"),
                )
            ),
            tuple(n * K for n in (240, 480, 715, 955, 1195, 1431)),
        ),
    ],
)
def test_a_number_with_a_magnitude_has_its_factor(
    tmp_path: Path, names: Sequence[str], steps: Sequence[int]
) -> None:
    """For the order and for the steps; a letter that belongs to a word is none."""
    run = folders(tmp_path / "run", *names)
    plan = check(run, names, steps)
    assert not warnings(plan, "left out")
    mean = (1 + len(names)) / 2
    assert average_of(run, tmp_path / "out") == pytest.approx(mean)


def test_half_lives_count_real_steps_where_names_count_thousands(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", "step_1k", "step_2k")
    [average] = ckpt_ema.plan(run, half_life=1000).averages
    assert average.weights == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("pattern", [r"step_(\d+)", r"step_(\d+k|\d+M)", r"_(?P<step>\d+)[kM]"])
def test_a_pattern_that_captures_digits_means_the_whole_number(
    tmp_path: Path, pattern: str
) -> None:
    names = ("step_800k", "step_900k", "step_1M")
    check(folders(tmp_path / "run", *names), names, (800 * K, 900 * K, M), pattern=pattern)


def test_a_rounded_name_does_not_contradict_the_step_that_is_recorded(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", "step_9k", "step_10k")
    for name, step in (("step_9k", 9216), ("step_10k", 10240)):
        (run / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    check(run, ("step_9k", "step_10k"), (9216, 10240))
    (run / "step_10k" / "trainer_state.json").write_text('{"global_step": 30000}')
    refused(run, Code.CONTRADICTORY_STEPS, "step_10k", "30000", "--order")


@pytest.mark.parametrize(
    "names", [("step-100", "step-200", "step-300b"), ("model-1", "model-2", "model-3t")]
)
def test_a_letter_that_may_be_no_magnitude_stops_the_run(
    tmp_path: Path, names: Sequence[str]
) -> None:
    run = folders(tmp_path / "run", *names)
    refused(run, Code.UNKNOWN_ORDER, names[2], "--exclude")
    check(
        run,
        names[:2],
        (int(names[0][-3:].strip("l-")), int(names[1][-3:].strip("l-"))),
        last=2,
        exclude=[names[2]],
    )


@pytest.mark.parametrize(
    "name", ["checkpoint-300-fixed", "checkpoint-300_rerun", "checkpoint-300v2"]
)
def test_a_numbered_checkpoint_with_a_suffix_is_not_left_out_in_silence(
    tmp_path: Path, name: str
) -> None:
    run = folders(tmp_path / "run", "checkpoint-100", "checkpoint-200", name)
    plan = check(run, ("checkpoint-100", "checkpoint-200"), (100, 200))
    assert warnings(plan, name, "--pattern", "--exclude")
    assert not warnings(ckpt_ema.plan(run, exclude=[name]))


def test_a_series_that_would_leave_out_more_than_it_takes_is_refused(tmp_path: Path) -> None:
    names = ("step_1", "step_2", "step_3x", "step_4-b2", "step_5.v")
    run = folders(tmp_path / "run", *names)
    refused(run, Code.SEVERAL_SERIES, "step_1", "step_3x", "--pattern", "--exclude")
    check(run, names, (1, 2, 3, 4, 5), pattern=r"step_(\d)")


# --- M: holes in a series -------------------------------------------------------------------------


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_broken_link(path: Path) -> None:
    path.symlink_to("scratch-that-was-purged")


def an_empty_folder(path: Path) -> None:
    path.mkdir()


def a_folder_of_logs(path: Path) -> None:
    path.mkdir()
    (path / "trainer_state.json").write_text("{}")


@pytest.mark.parametrize("make", [a_fifo, a_broken_link, an_empty_folder, a_folder_of_logs])
@pytest.mark.parametrize(
    "name", ["step-{}.safetensors", "checkpoint-{}", "net_{}", "epoch=1-step={}.ckpt", "{:06}"]
)
def test_a_step_without_a_model_between_two_with_one_is_refused_by_name(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    """It is left out on demand, does not matter outside the selection, and warns at the end."""
    run = tmp_path / "run"
    for step in (100, 300):
        if name.endswith((".safetensors", ".ckpt")):
            run.mkdir(exist_ok=True)
            save = write_safetensors if "safetensors" in name else lambda p, s: torch.save(s, p)
            save(run / name.format(step), state(step))
        else:
            folders(run, name.format(step), first=step)
    middle, newest = name.format(200), name.format(400)
    make(run / middle)
    refused(run, Code.INCOMPLETE, middle, "--exclude " + middle, "--skip-incomplete")
    taken = [name.format(100), name.format(300)]
    check(run, taken, (100, 300), exclude=[middle])
    skipping = check(run, taken, (100, 300), skip_incomplete=True)
    assert warnings(skipping, middle, "left out")
    check(run, taken[1:], (300,), last=1)
    (run / middle).rename(run / newest)
    assert warnings(check(run, taken, (100, 300)), newest, "left out")


def test_a_hole_is_seen_among_checkpoints_with_further_weights(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", "checkpoint-1", "checkpoint-3")
    for name in ("checkpoint-1", "checkpoint-3"):
        write_safetensors(run / name / "projector.safetensors", {"p": torch.ones(2)})
    a_broken_link(run / "checkpoint-2")
    refused(run, Code.INCOMPLETE, "checkpoint-2", "--exclude")


def test_a_folder_with_a_model_among_files_is_warned_of(tmp_path: Path) -> None:
    run = flat(tmp_path / "run", {f"step_{n}.pt": state(n) for n in (100, 300)})
    folders(run, "step_100", "step_200.pt")
    plan = check(run, ("step_100.pt", "step_300.pt"), (100, 300))
    assert warnings(plan, "step_200.pt", "--exclude")
    assert not warnings(plan, "step_100")


def test_a_name_that_is_not_utf_8_is_warned_of(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for step in (100, 300):
        write_safetensors(run / f"step-{step}.safetensors", state(step))
    write_safetensors(run / "x.safetensors", state(200))
    os.rename(run / "x.safetensors", os.fsencode(run) + b"/step-200\xff.safetensors")
    plan = check(run, ("step-100.safetensors", "step-300.safetensors"), (100, 300))
    assert warnings(plan, "step-200", "--exclude")


def test_results_beside_the_files_of_steps_are_no_holes(tmp_path: Path) -> None:
    run = flat(tmp_path / "run", {f"epoch_{n}.pt": state(n) for n in (1, 2, 4)})
    for name in ("epoch_2", "epoch_3"):
        (run / name).mkdir()
        (run / name / "sample.png").touch()
    assert not warnings(
        check(run, ("epoch_1.pt", "epoch_2.pt", "epoch_4.pt"), (1, 2, 4)), "left out"
    )


# --- K: the newest without a number ---------------------------------------------------------------


def recorded(value: float, **counts: int) -> dict[str, Any]:
    return {"model": state(value), **counts}


@pytest.mark.parametrize(
    ("names", "newest", "unit"),
    [
        ("checkpoint{:04}.pth", "checkpoint.pth", "epoch"),
        ("epoch_{}.pt", "model.pt", "epoch"),
        ("net-{}.pt", "ckpt.pth", "global_step"),
        ("step_{}.pt", "letzter.pt", "step"),
        ("weights_ep{}.ckpt", "dernier-modele.ckpt", "epoch"),
    ],
)
def test_a_file_without_a_number_is_a_later_step_by_what_it_records(
    tmp_path: Path, names: str, newest: str, unit: str
) -> None:
    """Whatever it is called; an earlier or equal record makes it a copy or an earlier state."""
    steps = (99, 199, 299)
    run = flat(tmp_path / "run", {names.format(n): recorded(n, **{unit: n}) for n in steps})
    numbered = [names.format(n) for n in steps]
    for record, value in ((299, 299), (250, 7)):
        flat(run, {newest: recorded(value, **{unit: record})})
        assert not warnings(check(run, numbered, steps), newest)
    flat(run, {newest: recorded(403, **{unit: 350})})
    plan = check(run, [*numbered, newest], (*steps, 350))
    assert not warnings(plan, newest)
    assert f"{newest} is used as the last step: it records" in " ".join(map(str, plan.notes))
    assert average_of(run, tmp_path / "out") == (99 + 199 + 299 + 403) / 4


def test_a_folder_without_a_number_is_a_later_step_by_what_it_records(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", "checkpoint-1", "checkpoint-2", "aktuell")
    for name, step in (("checkpoint-1", 1), ("checkpoint-2", 2), ("aktuell", 3)):
        (run / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    check(run, ("checkpoint-1", "checkpoint-2", "aktuell"), (1, 2, 3))


def test_bytes_decide_about_a_file_that_records_nothing(tmp_path: Path) -> None:
    run = flat(tmp_path / "run", {"epoch_1.pt": state(1), "epoch_2.pt": state(2)})
    flat(run, {"weights.pt": state(2), "init.pt": state(0)})
    assert not warnings(check(run, ("epoch_1.pt", "epoch_2.pt"), (1, 2)), ".pt is")
    flat(run, {"weights.pt": {f"module.{name}": value for name, value in state(3).items()}})
    refused(run, Code.UNKNOWN_ORDER, "weights.pt", "--append weights.pt", "--no-aliases")


def test_a_file_of_other_tensors_is_warned_of_by_name(tmp_path: Path) -> None:
    run = flat(tmp_path / "run", {"epoch_1.pt": state(1), "epoch_2.pt": state(2)})
    flat(run, {"speaker.pt": {"table": torch.ones(3)}, "optimizer.pt": {"w": torch.ones(3)}})
    (run / "corpus.bin").write_bytes(bytes(range(256)) * 8)
    plan = check(run, ("epoch_1.pt", "epoch_2.pt"), (1, 2))
    assert warnings(plan, "speaker.pt", "--exclude")
    assert not warnings(plan, "optimizer.pt")
    assert not warnings(plan, "corpus.bin")
    assert not warnings(ckpt_ema.plan(run, exclude=["speaker.pt"]), "speaker")


def test_the_model_in_the_runs_own_folder_is_warned_of_if_it_is_no_step(tmp_path: Path) -> None:
    """A trainer leaves the last or the best step there; the training may have gone on."""
    run = folders(tmp_path / "run", "checkpoint-1", "checkpoint-2")
    write_safetensors(run / "model.safetensors", state(1))
    assert not warnings(ckpt_ema.plan(run), "model.safetensors")
    write_safetensors(run / "model.safetensors", state(3))
    plan = check(run, ("checkpoint-1", "checkpoint-2"), (1, 2))
    assert warnings(plan, "model.safetensors", "--append", "--exclude")
    names = ("checkpoint-1", "checkpoint-2", "model.safetensors")
    assert not warnings(check(run, names, (1, 2, None), append=["model.safetensors"]), "left out")


# --- H: two runs in one folder --------------------------------------------------------------------

Rows = list[dict[str, Any]]


def logged(until: int, every: int = 10, run: float = 1.0, first: int = 10) -> Rows:
    """The log of one run until a step."""
    return [{"step": n, "epoch": n / 100, "loss": run / n} for n in range(first, until + 1, every)]


def run_with_logs(run: Path, logs: Mapping[int, Rows], **options: Any) -> Path:
    for step, rows in logs.items():
        folders(run, f"checkpoint-{step}", first=step)
        content = {"global_step": step, "log_history": rows}
        text = json.dumps(content, **{"indent": 2, "sort_keys": True, **options})
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    return run


@pytest.mark.parametrize(
    ("logs", "pair"),
    [
        # Steps 300 to 500 were left from an earlier run.
        ({n: logged(n, run=1 if n < 300 else 2) for n in (100, 200, 300, 400, 500)}, (200, 300)),
        # A run that went on from step 100 in another way.
        (
            {100: logged(100), 200: logged(200), 300: logged(100) + logged(300, run=3, first=110)},
            (200, 300),
        ),
        # Runs that logged at other steps.
        ({100: logged(100), 200: logged(200, every=25, first=25)}, (100, 200)),
        # A checkpoint without a log between them.
        ({100: logged(100), 200: [], 300: logged(300, run=2)}, (100, 300)),
        # The later log is shorter than the earlier one.
        ({100: logged(100), 200: logged(60)}, (100, 200)),
    ],
)
def test_logs_that_contradict_each_other_are_of_two_runs(
    tmp_path: Path, logs: Mapping[int, Rows], pair: tuple[int, int]
) -> None:
    run = run_with_logs(tmp_path / "run", logs)
    a, b = (f"checkpoint-{step}" for step in pair)
    refused(run, Code.SEVERAL_RUNS, a, b, "--include", "--exclude", "--from")
    assert ckpt_ema.plan(run, from_step=pair[1]).checkpoints
    given = [run / a, run / b]
    assert warnings(check(given, (a, b), pair), "two runs")  # who lists them wants them


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (logged(100), logged(200)),
        (logged(100), logged(200, first=50)),  # cut at the front
        (logged(100), logged(200, first=110)),  # begun anew
        (logged(100), [*logged(100), {"step": 100, "eval_loss": 0.5}, *logged(200, first=110)]),
        (
            [*logged(50), {"step": 50, "loss": float("nan")}],
            [*logged(50), {"step": 50, "loss": float("nan")}, *logged(200, first=60)],
        ),
        ([], logged(200)),
        (logged(100), []),
        ([{"step": 100, "train_loss": [0.5]}], [{"step": 100, "train_loss": [0.5]}]),
    ],
)
def test_a_log_that_goes_on_is_of_one_run(tmp_path: Path, first: Rows, second: Rows) -> None:
    """However it is written, and whatever the times of files are."""
    run = run_with_logs(tmp_path / "run", {100: first, 200: second})
    assert not warnings(check(run, ("checkpoint-100", "checkpoint-200"), (100, 200)))
    state_file = run / "checkpoint-100" / "trainer_state.json"
    state_file.write_text(json.dumps(json.loads(state_file.read_text())))
    assert not warnings(check(run, ("checkpoint-100", "checkpoint-200"), (100, 200)))


def test_times_of_files_prove_nothing_where_logs_go_on(tmp_path: Path) -> None:
    run = run_with_logs(tmp_path / "run", {n: logged(n) for n in (100, 200)})
    for step in (100, 200):
        os.utime(run / f"checkpoint-{step}/model.safetensors", (-3600 * step, -3600 * step))
    assert not warnings(ckpt_ema.plan(run), "was written before")
    (run / "checkpoint-100" / "trainer_state.json").unlink()
    (run / "checkpoint-200" / "trainer_state.json").unlink()
    assert warnings(ckpt_ema.plan(run), "was written before")


# --- R: the best checkpoints under one name -------------------------------------------------------


def lightning(step: int) -> dict[str, Any]:
    return {"state_dict": state(step), "global_step": step, "epoch": step // 4}


@pytest.mark.parametrize("name", ["best", "model", "best_model", "my-run"])
def test_the_steps_inside_order_files_of_one_name(tmp_path: Path, name: str) -> None:
    """Lightning's save_top_k adds -v1, -v2 in the order of saving, which is not that of steps."""
    files = {16: f"{name}.ckpt", 20: f"{name}-v1.ckpt", 12: f"{name}-v2.ckpt"}
    run = flat(tmp_path / "run", {file: lightning(step) for step, file in files.items()})
    check(run, [files[n] for n in (12, 16, 20)], (12, 16, 20))
    assert average_of(run, tmp_path / "out") == 16
    (run / f"{name}.ckpt").unlink()
    check(run, [files[n] for n in (12, 20)], (12, 20))


def test_files_of_one_name_that_may_be_of_two_runs_are_refused(tmp_path: Path) -> None:
    """The same step twice; `last` of two runs; files that record nothing."""
    same = flat(tmp_path / "same", {"best.ckpt": lightning(16), "best-v1.ckpt": lightning(16)})
    refused(same, Code.SEVERAL_RUNS, "best.ckpt", "best-v1.ckpt", "--pattern")
    last = flat(tmp_path / "last", {"last.ckpt": lightning(16), "last-v1.ckpt": lightning(20)})
    refused(last, Code.SEVERAL_RUNS, "last-v1.ckpt")
    mute = flat(tmp_path / "mute", {"best.ckpt": state(1), "best-v1.ckpt": state(2)})
    refused(mute, Code.SEVERAL_RUNS, "best-v1.ckpt")


@pytest.mark.parametrize(
    "name",
    [
        "best_model_{}_val_acc=0.9{}.pt",
        "best_checkpoint_{}_loss=-0.{}.pth",
        "best_net_{}_top_5_acc=0.{}.pt",
    ],
)
def test_a_step_before_a_metric_is_a_number(tmp_path: Path, name: str) -> None:
    """Ignite's names; a pattern takes them among others."""
    files = {step: name.format(step, step) for step in (9, 10, 20)}
    run = flat(tmp_path / "run", {file: state(step) for step, file in files.items()})
    check(run, list(files.values()), list(files))
    flat(run, {f"checkpoint_{step}.pt": state(step) for step in (5, 6)})
    check(run, list(files.values()), list(files), pattern=r"^best_[a-z]+_(\d+)")


def test_a_list_that_contradicts_the_steps_inside_is_warned_of(tmp_path: Path) -> None:
    run = flat(tmp_path / "run", {"a.ckpt": lightning(20), "b.ckpt": lightning(12)})
    given = [run / "a.ckpt", run / "b.ckpt"]
    assert warnings(check(given, ("a.ckpt", "b.ckpt"), (None, None)), "step 20", "12", "order")
    assert not warnings(ckpt_ema.plan(given[::-1]), "order")


# --- Sentences ------------------------------------------------------------------------------------


def test_a_broken_link_as_the_run_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("nowhere")
    refused(tmp_path / "run", Code.NOT_FOUND, "run is a broken link")


def test_only_the_globs_that_were_given_are_named(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", "checkpoint-1", "checkpoint-2")
    message = refused(run, Code.NOTHING_SELECTED, "--exclude leaves none", exclude=["*"])
    assert "--include" not in message
    message = refused(run, Code.NOTHING_SELECTED, include=["*"], exclude=["*"])
    assert "--include and --exclude leave none" in message


def test_a_metric_that_nobody_records_is_a_sentence(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", "checkpoint-1", "checkpoint-2")
    refused(run, Code.NO_METRIC, "No checkpoint records 'loss'", best=1, metric="loss")


# --- O: models and runs one level deeper ----------------------------------------------------------


@pytest.mark.parametrize(
    "inside",
    ["my_adapter", "hf_ckpt", "model", "export/hf", "lora_16b", "weights_for_vllm"],
)
@pytest.mark.parametrize("name", ["checkpoint-{}", "epoch0-global_step{}", "{:04}"])
def test_the_only_folder_with_a_model_in_every_step_is_read(
    tmp_path: Path, name: str, inside: str
) -> None:
    run = tmp_path / "run"
    for step in (100, 200, 300):
        folders(run, f"{name.format(step)}/{inside}", first=step)
        folders(run, f"{name.format(step)}/optimizer", first=9)
        folders(run, f"{name.format(step)}/lr_scheduler", first=9)
    check(run, [name.format(n) for n in (100, 200, 300)], (100, 200, 300))
    assert average_of(run, tmp_path / "out") == 200


@pytest.mark.parametrize("names", [("default", "reward"), ("a/x", "a/y")])
def test_several_models_in_every_step_are_named_with_the_option(
    tmp_path: Path, names: Sequence[str]
) -> None:
    run = tmp_path / "run"
    for step in (100, 200):
        for number, name in enumerate(names):
            folders(run, f"checkpoint-{step}/{name}", first=step + number)
    refused(run, Code.SEVERAL_MODELS, *(f"--component {name}" for name in names))
    for number, name in enumerate(names):
        out = tmp_path / f"out{number}"
        assert average_of(run, out, component=name) == 150 + number


def test_a_folder_with_the_trainers_average_alone_is_read_with_a_warning(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", "checkpoint-100/model_ema", "checkpoint-200/model_ema")
    assert [one.code for one in ckpt_ema.plan(run).warnings] == [Code.ALREADY_AVERAGED]
    assert not ckpt_ema.plan(run, which="ema").warnings
    folders(run, "checkpoint-100/hf_ckpt", "checkpoint-200/hf_ckpt", first=5)
    assert not warnings(ckpt_ema.plan(run), "averaged already")
    assert average_of(run, tmp_path / "out") == 5.5


def test_models_in_folders_of_different_names_are_refused(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", "checkpoint-1/german", "checkpoint-2/french")
    refused(run, Code.SEVERAL_MODELS, "german", "french", "--component")


@pytest.mark.parametrize(
    "names",
    [
        ("run_2024-01-02/checkpoint-100", "run_2024-01-03/checkpoint-200"),
        ("first/step_1k", "first/step_2k", "second/step_3k"),
        ("jobs/41/checkpoints/checkpoint-100", "jobs/57/checkpoints/checkpoint-200"),
        ("version_0/checkpoints/epoch=0-step=5", "version_1/checkpoints/epoch=1-step=9"),
    ],
)
def test_folders_of_checkpoints_that_go_on_are_one_run_if_given_as_a_list(
    tmp_path: Path, names: Sequence[str]
) -> None:
    """What is above them alone does not tell, and names the list."""
    above = folders(tmp_path / "above", *names)
    paths = list(dict.fromkeys(str((above / name).parent) for name in names))
    refused(above, Code.SEVERAL_RUNS, f"ckpt-ema average {' '.join(paths)}")
    plan = ckpt_ema.plan(paths)
    assert [str(one.path) for one in plan.checkpoints] == [str(above / name) for name in names]
    assert not warnings(plan)
    assert average_of([Path(path) for path in paths], tmp_path / "out") == (1 + len(names)) / 2
    assert [one.path for one in ckpt_ema.plan(paths[::-1]).checkpoints] == [
        one.path for one in plan.checkpoints
    ]


def test_folders_whose_logs_go_on_are_one_run(tmp_path: Path) -> None:
    """Without a word from the user; logs that contradict each other are of several runs."""
    run_with_logs(tmp_path / "above/a", {100: logged(100), 200: logged(200)})
    run_with_logs(tmp_path / "above/b", {300: logged(300)})
    names = ("a/checkpoint-100", "a/checkpoint-200", "b/checkpoint-300")
    check(tmp_path / "above", names, (100, 200, 300))
    assert average_of(tmp_path / "above", tmp_path / "out") == 200
    (tmp_path / "above/b/checkpoint-300/trainer_state.json").write_text(
        json.dumps({"global_step": 300, "log_history": logged(300, run=2)})
    )
    refused(tmp_path / "above", Code.SEVERAL_RUNS, "above/a", "above/b")
    given = [tmp_path / "above/a", tmp_path / "above/b"]
    refused(given, Code.SEVERAL_RUNS, "logs contradict")


@pytest.mark.parametrize(
    ("first", "second"),
    [((100, 200), (100, 200)), ((100, 300), (200, 400)), ((100, 200), (200, 300))],
)
def test_folders_of_parallel_runs_are_refused(
    tmp_path: Path, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    for name, steps in (("seed-1", first), ("seed-2", second)):
        for step in steps:
            folders(
                tmp_path / "all" / name, f"checkpoint-{step}", first=step + len(name) * steps[0]
            )
    paths = [tmp_path / "all/seed-1", tmp_path / "all/seed-2"]
    write_safetensors(paths[1] / f"checkpoint-{second[0]}/model.safetensors", state(77))
    for run in (paths, tmp_path / "all"):
        refused(run, Code.SEVERAL_RUNS, "seed-1", "seed-2")


def test_a_step_that_both_folders_hold_is_taken_once(tmp_path: Path) -> None:
    """The checkpoint that a run was resumed from, linked or copied into its folder."""
    a = folders(tmp_path / "a", "checkpoint-1", "checkpoint-2")
    b = folders(tmp_path / "b", "checkpoint-2", "checkpoint-3", first=2)
    plan = check([a, b], ("a/checkpoint-1", "a/checkpoint-2", "b/checkpoint-3"), (1, 2, 3))
    assert [(one.name, one.verdict.reason.name) for one in plan.left_out] == [
        ("b/checkpoint-2", "COPY")
    ]
    assert average_of([a, b], tmp_path / "out") == 2


def test_one_folder_of_checkpoints_below_is_the_run(tmp_path: Path) -> None:
    folders(tmp_path / "above/my experiment/x", "step_1", "step_2")
    check(tmp_path / "above", ("step_1", "step_2"), (1, 2))


def test_a_run_that_ends_in_the_root_of_its_folder_is_a_run_in_a_list_too(tmp_path: Path) -> None:
    a = folders(tmp_path / "a", "checkpoint-1", "checkpoint-2")
    b = folders(tmp_path / "b", "checkpoint-3", first=3)
    write_safetensors(a / "model.safetensors", state(2))
    write_safetensors(b / "model.safetensors", state(3))
    plan = check([a, b], ("a/checkpoint-1", "a/checkpoint-2", "b/checkpoint-3"), (1, 2, 3))
    assert plan.output == tmp_path / "b-ema"
    assert not warnings(plan)


def test_an_error_names_weights_that_are_deeper(tmp_path: Path) -> None:
    folders(tmp_path / "run", "a/b/c/d/e/checkpoint-1")
    refused(tmp_path / "run", Code.NO_CHECKPOINTS, "a/b/c/d/e/checkpoint-1/model.safetensors")


def test_experiments_with_a_best_model_each_are_no_steps(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", "exp_1/best", "exp_2/best", "exp_3/best")
    refused(run, Code.NO_CHECKPOINTS, "exp_1")


def test_a_run_and_a_checkpoint_in_one_list_are_refused(tmp_path: Path) -> None:
    a = folders(tmp_path / "a", "checkpoint-1", "checkpoint-2")
    b = folders(tmp_path / "b", "checkpoint-3")
    refused([a, b / "checkpoint-3"], Code.NOT_A_CHECKPOINT, "checkpoint-3")
    refused([a, a], Code.GIVEN_TWICE, "a is given twice")


def test_commas_in_numbers_are_read(tmp_path: Path) -> None:
    names = ("model-1,000", "model-5,000", "model-10,000")
    check(folders(tmp_path / "run", *names), names, (1000, 5000, 10_000))


def test_bare_numbers_that_files_record_as_epochs_are_epochs(tmp_path: Path) -> None:
    steps = {
        f"checkpoint{n}.pt": {"model": state(n), "epoch": n, "step": 100 * n} for n in (1, 2, 3)
    }
    plan = check(flat(tmp_path / "run", steps), [*steps], (1, 2, 3))
    assert {one.unit for one in plan.checkpoints} == {"epoch"}


def test_a_pattern_that_matches_names_without_a_step_says_so(tmp_path: Path) -> None:
    run = flat(tmp_path / "run", {f"best_0.{n}.pt": state(n) for n in (71, 79, 83)})
    refused(run, Code.NO_MATCH, "of which none is a step", pattern="best_.*")
