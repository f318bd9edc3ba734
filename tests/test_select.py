"""`select` publishes the average that evaluates best, whole or not at all, and evaluates once."""

import errno
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema import FailedError, OptionError, RefusedError
from ckpt_ema.errors import Code
from ckpt_ema.output.selected import LAST, SOUP
from tests.command import Command, processes, wait_for
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, series
from tests.corpus.case import good_run
from tests.makers import deepspeed_folders, rank_files
from tests.makers.evaluations import Evaluation, mean_of
from tests.makers.fake_s3 import fake_s3
from tests.makers.faulty_os import KINDS, faulty

VALUES = [1.0, 2.0, 4.0, 8.0]
UNIFORM: dict[str, Any] = {"schedule": "uniform", "last": "2,3"}  # 6 and 14/3
NAMES = ["uniform-last-2", "uniform-last-3"]
NUMBERS = itertools.count()

pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the folder of the test."""
    monkeypatch.chdir(tmp_path)


def constants(values: Sequence[float]) -> list[dict[str, torch.Tensor]]:
    """States of two equal numbers each."""
    return series(len(values), w=[torch.tensor([value, value]) for value in values])


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """Four checkpoints of one number each."""
    return make_run(constants(VALUES))


def to(target: float) -> Callable[[Path], dict[str, float]]:
    """A function that measures how far the mean of a model is from a number."""
    return lambda folder: {"loss": abs(mean_of(folder) - target)}


def files(folder: Path) -> dict[str, bytes]:
    """The files of a folder but for what says how it was made."""
    told = ("ckpt_ema.json", "README.md")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in told}


def left(run: Path) -> set[str]:
    """The hidden folders beside a run."""
    return {path.name for path in run.parent.iterdir() if path.name.startswith(".")}


# --- What is chosen ------------------------------------------------------------------------------


def test_the_best_by_hand(run: Path) -> None:
    """(4 + 8) / 2 = 6, (2 + 4 + 8) / 3 = 4.67, and 8 are 1, 1/3 and 3 from 5."""
    found = ckpt_ema.select(run, evaluate=to(5), metric="loss", output="out", **UNIFORM)
    assert (found.best, found.path, found.output) == (NAMES[1], Path("out"), Path("out"))
    assert [one.name for one in found.candidates] == [*NAMES, LAST]
    losses = [one.metrics["loss"] for one in found.candidates]
    assert losses == pytest.approx([1, 1 / 3, 3], rel=1e-6)
    assert found.candidates[0].weights == {"checkpoint-3": 0.5, "checkpoint-4": 0.5}
    assert found.candidates[2].weights == {"checkpoint-4": 1.0}
    assert (found.is_minimized, found.averaging_helps, found.warnings) == (True, True, ())
    assert left(run) == set()


@pytest.mark.usefixtures("either_fold")
def test_what_is_published_is_what_average_makes(run: Path) -> None:
    ckpt_ema.select(run, evaluate=to(5), metric="loss", output="out", **UNIFORM)
    made = ckpt_ema.average(run, output="alone", schedule="uniform", last=3)
    assert files(Path("out")) == files(made.output)
    ours, alone = (json.loads(Path(f"{n}/ckpt_ema.json").read_text()) for n in ("out", "alone"))
    assert ours["fingerprint"] == alone["fingerprint"]
    assert ours["output"] == "out"
    assert ours["evaluation"]["best"] == NAMES[1]
    assert ckpt_ema.average(run, output="out", schedule="uniform", last=3).is_up_to_date


def test_the_last_checkpoint_wins_where_averaging_does_not_help(run: Path) -> None:
    found = ckpt_ema.select(run, evaluate=to(9), metric="loss", output="out", **UNIFORM)
    assert (found.best, found.averaging_helps) == (LAST, False)
    assert mean_of(Path("out")) == 8
    assert "Copy of one checkpoint of `run`" in Path("out/README.md").read_text()


@pytest.mark.parametrize(
    ("metric", "options", "best"),
    [
        ("loss", {}, NAMES[1]),
        ("loss", {"maximize": True}, LAST),
        ("acc", {}, LAST),
        ("acc", {"minimize": True}, NAMES[1]),
        ("quality", {"minimize": True}, NAMES[1]),
    ],
)
def test_the_direction_is_asked_for_or_that_of_the_name(
    run: Path, metric: str, options: dict[str, Any], best: str
) -> None:
    found = ckpt_ema.select(
        run, evaluate=lambda p: {metric: abs(mean_of(p) - 5)}, metric=metric, **options, **UNIFORM
    )
    assert found.best == best


def test_ties_go_to_the_first_and_are_warned_of_if_all_tie(run: Path) -> None:
    found = ckpt_ema.select(run, evaluate=lambda _: {"acc": 0.5}, metric="acc", **UNIFORM)
    assert found.best == NAMES[0]
    assert [warning.code for warning in found.warnings] == [Code.SAME_METRIC]
    by_name = {NAMES[0]: 0.4, NAMES[1]: 0.5, LAST: 0.5}
    found = ckpt_ema.select(
        run, evaluate=lambda p: {"acc": by_name[p.name]}, metric="acc", output="o", **UNIFORM
    )
    assert (found.best, found.warnings) == (NAMES[1], ())


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=5, unique=True),
    st.floats(-100, 100),
)
def test_the_best_is_that_of_torch(make_run: MakeRun, values: list[float], target: float) -> None:
    """The oracle averages in float64 and takes the least loss."""
    name = f"run-{next(NUMBERS)}"
    found = ckpt_ema.select(
        make_run(constants(values), name=name),
        evaluate=to(target),
        metric="loss",
        schedule="constant",
        decay=[0.25, 0.75],
        output=f"{name}-out",
        allow_duplicates=True,
    )
    right = []
    for decay in (0.25, 0.75, 0.0):
        shadow = torch.tensor(values[0], dtype=torch.float64)
        for value in values[1:]:
            shadow = decay * shadow + (1 - decay) * torch.tensor(value, dtype=torch.float64)
        right.append(abs(shadow.float().item() - target))
    losses = [one.metrics["loss"] for one in found.candidates]
    assert losses == pytest.approx(right, rel=1e-5, abs=1e-4)
    assert found.value == min(losses)
    assert abs(mean_of(found.path) - target) == found.value


# --- Every container, and stores -----------------------------------------------------------------


def tensors(folder: Path) -> dict[str, float]:
    """A metric that any model has."""
    return {"size": float(sum(path.stat().st_size for path in folder.glob("*.safetensors")))}


@pytest.mark.parametrize("form", ["safetensors", "shards", "zip", "legacy", "dcp"])
def test_every_container_is_selected_from(form: Any) -> None:
    good_run(Path("run"), form)
    found = ckpt_ema.select(
        "run", evaluate=tensors, metric="size", maximize=True, greedy=True, last="2,3"
    )
    assert not [one.failure for one in found.candidates if one.failure]
    name = found.best.rpartition("-")[2]
    made = ckpt_ema.average("run", output="alone", last=int(name))
    assert files(found.path) == files(made.output)


def test_deepspeed_and_rank_files_are_selected_from(tmp_path: Path) -> None:
    for step in (1, 2):
        state = {"w": torch.full((4, 2), float(step)), "b": torch.ones(2) * step}
        deepspeed_folders.save(tmp_path / f"deep/global_step{step}", state, step=step)
        rank_files.save(tmp_path / f"rank/global_step_{step}/actor", state, {"w": (0,), "b": (0,)})
    for run in ("deep", "rank"):
        found = ckpt_ema.select(run, evaluate=tensors, metric="size", maximize=True)
        assert [one.failure for one in found.candidates] == ["", ""]
        assert found.path == Path(f"{run}-ema")
        assert found.path.is_dir()


def test_a_written_back_checkpoint_is_selected(make_run: MakeRun) -> None:
    run = make_run(constants(VALUES), torch_files=True)
    (run / "checkpoint-4/README.md").write_text("of the trainer")

    def evaluate(folder: Path) -> dict[str, float]:
        state = torch.load(folder / "pytorch_model.bin")
        return {"loss": abs(state["w"].mean().item() - 5)}

    found = ckpt_ema.select(run, evaluate=evaluate, metric="loss", save_as="checkpoint", **UNIFORM)
    assert found.best == NAMES[1]
    assert (found.path / "optimizer.pt").exists()
    assert (found.path / "README.md").read_text() == "of the trainer"


def test_a_run_in_a_store_is_selected_from(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(constants(VALUES))
    (tmp_path / "store/bucket").mkdir(parents=True)
    run.rename(tmp_path / "store/bucket/run")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    evaluation = Evaluation(tmp_path, 5)
    options = ("--schedule", "uniform", "--last", "2,3", "--greedy", "-o", tmp_path / "out")
    words = ("--eval", evaluation.command, "--metric", "loss")
    with fake_s3(tmp_path / "store") as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        done = command("select", "s3://bucket/run", *words, *options)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/out\n"), done.stderr
    assert mean_of(tmp_path / "out") == pytest.approx(14 / 3)


@pytest.mark.parametrize("value", [None, 5, "x", [], {}, [5], {"a": 1}, ["x"]], ids=str)
def test_a_record_that_somebody_has_changed_is_no_selection(run: Path, value: Any) -> None:
    """Then the output is not what was selected, and is refused as any other."""
    options: dict[str, Any] = {"evaluate": "echo loss=1 {}", "metric": "loss", **UNIFORM}
    made = ckpt_ema.select(run, output="out", **options)
    path = made.path / "ckpt_ema.json"
    text = path.read_text()
    names = [*made.described(), *(f"candidates 0 {name}" for name in asdict(made.candidates[0]))]
    for name in names:
        manifest = json.loads(text)
        inner: Any = manifest["evaluation"]
        *keys, last = name.split()
        for key in keys:
            inner = inner[int(key) if key.isdigit() else key]
        inner[last] = value
        path.write_text(json.dumps(manifest))
        try:
            again = ckpt_ema.select(run, output="out", **options)
        except RefusedError as error:
            assert error.code is Code.OUTPUT_EXISTS
            continue
        assert (again.is_up_to_date, again.best, again.value) == (True, made.best, made.value)
        assert all(one.effective_number > 0 for one in again.ranked())


JUNK = [5, [], None, "x", {"evaluated": 1}, {"files": 5}, {"files": {"a": 5}, "folder": "x"}]


def test_notes_of_a_failed_run_may_have_lines_that_are_none(run: Path) -> None:
    """What can be read of them still counts: nothing is averaged again."""
    command = "test -e is-mended && echo loss=1 {}"
    options: dict[str, Any] = {"evaluate": command, "metric": "loss", "output": "out", **UNIFORM}
    with pytest.raises(FailedError):
        ckpt_ema.select(run, **options)
    with Path(".out.ckpt-ema-select/evaluations").open("a") as notes:
        notes.writelines(f"\n{json.dumps(one)}" for one in JUNK)
    Path("is-mended").touch()
    passes: list[tuple[int, int]] = []
    found = ckpt_ema.select(run, progress=lambda *bytes_: passes.append(bytes_), **options)
    assert (found.value, passes) == (1.0, [])


# --- The command ---------------------------------------------------------------------------------


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    """A command that finds `uniform-last-3` best."""
    return Evaluation(tmp_path, 5)


def words(run: Path, evaluation: Evaluation | str, *more: Any) -> list[Any]:
    """The command that selects among two averages and the last checkpoint."""
    text = evaluation if isinstance(evaluation, str) else evaluation.command
    options = ["--eval", text, "--metric", "loss", "--schedule", "uniform", "--last", "2,3"]
    return ["select", run, *options, *more]


def test_stdout_is_the_path_and_stderr_the_rest(run: Path, evaluation: Evaluation) -> None:
    done = command(*words(run, evaluation))
    assert (done.returncode, done.stdout) == (0, f"{run}-ema\n"), done.stderr
    lines = done.stderr.splitlines()
    assert evaluation.names == [*NAMES, LAST]
    assert [line.split(" in ")[0] for line in lines if ": loss " in line] == [
        *("uniform-last-2: loss 1", "uniform-last-3: loss 0.333333", "last-checkpoint: loss 3"),
    ]
    assert lines[-6:-2] == [
        "  candidate        schedule          loss  effective number",
        "* uniform-last-3   uniform       0.333333               3.0",
        "  uniform-last-2   uniform              1               2.0",
        "  last-checkpoint  no averaging         3               1.0",
    ]
    assert lines[-1] == (
        f"best loss: 0.333333, by uniform-last-3 (the last checkpoint alone: 3): {run}-ema"
    )
    assert "warning" not in done.stderr
    card = Path(f"{run}-ema/README.md").read_text()
    assert "| uniform-last-2 | uniform | 1 | 2.0 |" in card
    assert f"$ {evaluation.command}" in card
    assert "ckpt_ema select" in card


def test_quiet_says_nothing(run: Path, evaluation: Evaluation) -> None:
    done = command(*words(run, evaluation, "-q"))
    assert (done.returncode, done.stderr) == (0, "")


def test_where_averaging_does_not_help_the_last_line_says_so(run: Path, tmp_path: Path) -> None:
    done = command(*words(run, Evaluation(tmp_path, 9)))
    assert done.stderr.splitlines()[-1] == (
        f"averaging does not help here: one checkpoint alone has the best loss, 1: {run}-ema"
    )


def test_json_has_the_best_and_every_figure(run: Path, evaluation: Evaluation) -> None:
    done = command(*words(run, evaluation, "--json", "-q"))
    found = json.loads(done.stdout)
    assert (found["best"], found["output"]) == (NAMES[1], f"{run}-ema")
    assert (found["metric"], found["direction"]) == ("loss", "min")
    first = found["candidates"][0]
    assert first["name"] == NAMES[0]
    assert first["metrics"] == {"loss": 1.0, "size": 2.0}
    assert first["weights"] == {"checkpoint-3": 0.5, "checkpoint-4": 0.5}
    kept = json.loads(Path(f"{run}-ema/ckpt_ema.json").read_text())["evaluation"]
    assert {name: kept[name] for name in found} == found


def test_the_same_command_again_is_up_to_date(run: Path, evaluation: Evaluation) -> None:
    first = command(*words(run, evaluation))
    again = command(*words(run, evaluation, "--jobs", "2"))  # nothing that changes the outcome
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert again.stderr.splitlines()[-1].startswith(f"{run}-ema is up to date")
    assert len(evaluation.names) == 3
    for other in (["--maximize"], ["--keep-all"], ["--greedy"], ["--dtype", "bfloat16"]):
        done = command(*words(run, evaluation, *other))
        assert (done.returncode, done.stdout) == (3, ""), other
        assert "--overwrite" in done.stderr
    assert len(evaluation.names) == 3
    assert command(*words(run, evaluation, "--maximize", "--overwrite")).returncode == 0
    assert mean_of(Path(f"{run}-ema")) == 8


def test_a_damaged_output_is_not_up_to_date(run: Path, evaluation: Evaluation) -> None:
    command(*words(run, evaluation))
    manifest = Path(f"{run}-ema/ckpt_ema.json")
    record = json.loads(manifest.read_text())
    for change in ({"best": "nothing"}, {"candidates": 5}, {"candidates": [{"x": 1}]}):
        manifest.write_text(
            json.dumps({**record, "evaluation": {**record["evaluation"], **change}})
        )
        assert command(*words(run, evaluation)).returncode == 3
    manifest.write_text(json.dumps(record))
    assert command(*words(run, evaluation)).returncode == 0
    with Path(f"{run}-ema/model.safetensors").open("ab") as file:
        file.write(b"more")
    assert command(*words(run, evaluation)).returncode == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--eval", "x {}"], "--eval and --metric"),
        (["--metric", "loss"], "--eval and --metric"),
        (["--eval", "x", "--metric", "loss"], "has no {}"),
        (["--eval", "x {}", "--metric", "quality"], "Add --minimize or --maximize"),
        (["--eval", "x {}", "--metric", "loss", "--jobs", "0"], "--jobs is '0'"),
        (["--eval", "x {}", "--metric", "loss", "--timeout", "0"], "--timeout is '0'"),
        (["--eval", "x {}", "--metric", "loss", "--timeout", "inf"], "--timeout is 'inf'"),
        (["--eval", "x {}", "--metric", "loss", "--minimize", "--maximize"], "exclude each other"),
        (["--eval", "x {}", "--metric", "loss", "-o", "a.safetensors"], "is one file"),
        (["--eval", "x {}", "--metric", "loss", "--best", "3"], "No such option"),
    ],
)
def test_wrong_usage_is_one_sentence(run: Path, options: list[str], says: str) -> None:
    done = command("select", run, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in " ".join(done.stderr.split())
    assert left(run) == set()


def test_a_function_takes_no_jobs_and_no_timeout(run: Path) -> None:
    every: list[dict[str, Any]] = [{"jobs": 2}, {"timeout": 5}]
    for options in every:
        with pytest.raises(OptionError, match="apply to commands"):
            ckpt_ema.select(run, evaluate=to(5), metric="loss", **options)


# --- Evaluations that fail -----------------------------------------------------------------------

ONE_FAILS = 'if "last-2" in folder:\n    '


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ('print("loss", "NaN", file=sys.stderr); sys.exit(3)', "ended with exit code 3"),
        ("os.kill(os.getpid(), 9)", "was killed by signal 9"),
        ("mean = float('nan')", "loss is nan"),
        ("mean = float('inf')", "loss is inf"),
        ("print('losses=1'); sys.exit()", "no number called loss was reported"),
        ("print('{\"loss\": true}'); sys.exit()", "no number called loss was reported"),
        ("sys.stdout.buffer.write(b'\\xff\\xfe\\x00'); sys.exit()", "no number called loss"),
        ("time.sleep(60)", "timed out after 1 s"),
    ],
)
def test_one_that_fails_is_told_and_the_rest_goes_on(
    run: Path, tmp_path: Path, then: str, reason: str
) -> None:
    evaluation = Evaluation(tmp_path, 5.5, ONE_FAILS + then)  # 6 would be best
    done = command(*words(run, evaluation, "-q", "--timeout", "1"))
    assert (done.returncode, done.stdout) == (0, f"{run}-ema\n"), done.stderr
    assert mean_of(Path(f"{run}-ema")) == pytest.approx(14 / 3)
    told = [line for line in done.stderr.splitlines() if reason in line]
    assert [line.split(": ")[0] for line in told] == [NAMES[0], "warning"]
    kept = json.loads(Path(f"{run}-ema/ckpt_ema.json").read_text())["evaluation"]
    assert kept["candidates"][0]["metrics"] == {}
    assert reason in kept["candidates"][0]["failure"]
    assert [warning["code"] for warning in kept["warnings"]] == ["evaluation-failed"]


def test_the_last_lines_of_one_that_fails_are_shown(run: Path, tmp_path: Path) -> None:
    then = ONE_FAILS + 'raise KeyError("lm_head")'
    done = command(*words(run, Evaluation(tmp_path, 5, then), "-q"))
    lines = done.stderr.splitlines()
    assert lines[0].startswith("uniform-last-2: failed after")
    assert "  KeyError: 'lm_head'" in lines
    assert any(line.endswith("(KeyError: 'lm_head').") for line in lines)


def test_if_all_fail_nothing_is_published_and_averages_are_kept(
    run: Path, evaluation: Evaluation
) -> None:
    done = command(*words(run, "exec no-such-program {}"))
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: No candidate has a usable loss; uniform-last-2: ")
    assert last.endswith("What was made and evaluated is kept: run the same command again.")
    assert not Path(f"{run}-ema").exists()
    [folder] = run.parent.glob(".run-ema.*/candidates")
    before = (folder / NAMES[1] / "model.safetensors").stat().st_mtime_ns
    assert command(*words(run, evaluation)).returncode == 0
    assert Path(f"{run}-ema/model.safetensors").stat().st_mtime_ns == before  # not made again
    assert left(run) == set()


def test_functions_that_fail_are_told_too(run: Path) -> None:
    def evaluate(folder: Path) -> Any:
        if folder.name == NAMES[0]:
            raise ValueError("no\x1bgood")
        return {"loss": mean_of(folder)} if folder.name == LAST else 5

    found = ckpt_ema.select(run, evaluate=evaluate, metric="loss", output="out", **UNIFORM)
    assert found.best == LAST
    assert [one.failure for one in found.candidates] == [
        *("ValueError: no\\x1bgood", "the function returned int, not a mapping", "")
    ]


def test_a_command_that_cannot_be_started_is_one_sentence(run: Path) -> None:
    command = "true {} # " + "x" * 200_000  # more than an argument may have
    with pytest.raises(FailedError, match="cannot be started: Argument list too long") as caught:
        ckpt_ema.select(run, evaluate=command, metric="loss", **UNIFORM)
    assert caught.value.code is Code.EVALUATION_FAILED


def test_strict_refuses_before_publication_and_keeps_what_was_evaluated(
    run: Path, tmp_path: Path
) -> None:
    evaluation = Evaluation(tmp_path, 5, ONE_FAILS + "sys.exit(1)")
    done = command(*words(run, evaluation, "--strict"))
    assert (done.returncode, done.stdout) == (3, "")
    assert "Without --strict this is a warning." in done.stderr
    assert not Path(f"{run}-ema").exists()
    assert command(*words(run, evaluation)).returncode == 0
    assert evaluation.names == [*NAMES, LAST, NAMES[0]]


# --- Evaluations that change what they evaluate ---------------------------------------------------


def test_what_an_evaluation_adds_is_not_published(run: Path, tmp_path: Path) -> None:
    then = "os.makedirs(folder + '/results/empty'); open(folder + '/results/all.json', 'w').close()"
    done = command(*words(run, Evaluation(tmp_path, 5, then), "-q"))
    assert done.returncode == 0
    wrote = "The evaluation of uniform-last-2 wrote files next to the model, which are not kept"
    assert f"warning: {wrote}: results/all.json, results/empty.\n" in done.stderr
    found = {path.name for path in Path(f"{run}-ema").iterdir()}
    assert found == {"config.json", "model.safetensors", "ckpt_ema.json", "README.md"}


CHANGES = {
    "values": "file = open(folder + '/' + name, 'r+b'); file.seek(-1, 2); file.write(b'A')",
    "a file less": "os.remove(folder + '/config.json')",
    "a link": "os.remove(folder + '/' + name); os.symlink('/etc/passwd', folder + '/' + name)",
    "all": "import shutil; shutil.rmtree(folder)",
}


@pytest.mark.parametrize("then", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("options", [[], ["--keep-all"]])
def test_a_model_that_its_evaluation_changes_is_never_published(
    run: Path, tmp_path: Path, then: str, options: list[str]
) -> None:
    evaluation = Evaluation(tmp_path, 4.7, 'if "last-3" in folder:\n    ' + then)
    done = command(*words(run, evaluation, "-q", *options))
    assert done.returncode == 0, done.stderr
    best = Path(done.stdout.strip())
    assert mean_of(best) == 6
    assert "warning: uniform-last-3 has no usable loss: the evaluation changed" in done.stderr
    if options:
        assert {path.name for path in best.parent.iterdir()} == {NAMES[0], LAST}


def test_the_best_is_refused_if_the_evaluation_of_another_changed_it(
    run: Path, tmp_path: Path
) -> None:
    """And made again the next time, when it is not evaluated again."""
    mark = tmp_path / "once"
    then = f"""
if "last-checkpoint" in folder and not os.path.exists({str(mark)!r}):
    open({str(mark)!r}, "w").close()
    open(folder + "/../{NAMES[1]}/" + name, "ab").close()
    os.utime(folder + "/../{NAMES[1]}/" + name)"""
    evaluation = Evaluation(tmp_path, 5, then)
    done = command(*words(run, evaluation))
    assert done.returncode == 1
    assert "of uniform-last-3, the best candidate, changed after its evaluation." in done.stderr
    assert not Path(f"{run}-ema").exists()
    assert command(*words(run, evaluation)).returncode == 0
    assert len(evaluation.names) == 3
    assert mean_of(Path(f"{run}-ema")) == pytest.approx(14 / 3)


def test_another_that_was_changed_is_not_kept_with_the_rest(run: Path, tmp_path: Path) -> None:
    then = f"""
if "last-checkpoint" in folder:
    os.remove(folder + "/../{NAMES[0]}/" + name)"""
    done = command(*words(run, Evaluation(tmp_path, 5, then), "--keep-all", "-q"))
    assert done.returncode == 0
    changed = "model.safetensors of uniform-last-2 changed after its evaluation"
    assert done.stderr == f"warning: {changed}, so it is not kept.\n"
    assert {path.name for path in Path(f"{run}-ema").iterdir()} == {NAMES[1], LAST}
    again = command(*words(run, Evaluation(tmp_path, 5, then), "--keep-all"))
    assert "is up to date" in again.stderr
    Path(f"{run}-ema/{LAST}/config.json").unlink()
    assert command(*words(run, Evaluation(tmp_path, 5, then), "--keep-all")).returncode == 3


def test_equal_averages_are_evaluated_once(run: Path, evaluation: Evaluation) -> None:
    done = command(*words(run, evaluation, "-q", "--last", "4,9"))
    assert done.returncode == 0
    assert evaluation.names == ["uniform-last-4", LAST]


# --- Jobs, kills and signals ---------------------------------------------------------------------


def test_jobs_run_at_the_same_time(run: Path, tmp_path: Path) -> None:
    """Each waits for another one, for ten seconds at most."""
    then = """
for _ in range(500):
    if len(open(log).read().splitlines()) > 1:
        break
    time.sleep(0.02)
else:
    sys.exit(1)"""
    done = command(*words(run, Evaluation(tmp_path, 5, then), "--jobs", "3", "--strict"))
    assert done.returncode == 0, done.stderr


ONCE = """
if "last-3" in folder and len(open(log).read().splitlines()) == 2:
    time.sleep(60)"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_what_was_evaluated_is_not_evaluated_again(
    run: Path, tmp_path: Path, number: int, code: int
) -> None:
    evaluation = Evaluation(tmp_path, 5, ONCE)
    running = Command(*words(run, evaluation, "-q"))
    wait_for(lambda: len(evaluation.names) == 2)
    running.send_signal(number)
    done = running.wait()
    assert (done.returncode, done.stdout) == (code, "")
    if code > 0:
        how = "interrupted" if code == 130 else "terminated"
        assert done.stderr == f"{how}; partial work kept, the same command continues\n"
    assert not Path(f"{run}-ema").exists()
    [folder] = run.parent.glob(".run-ema.*/candidates")
    before = (folder / NAMES[1] / "model.safetensors").stat().st_mtime_ns
    again = command(*words(run, evaluation))
    assert (again.returncode, again.stdout) == (0, f"{run}-ema\n"), again.stderr
    assert evaluation.names == [*NAMES, *NAMES[1:], LAST]
    assert Path(f"{run}-ema/model.safetensors").stat().st_mtime_ns == before
    assert left(run) == set()


def test_a_signal_ends_the_evaluation_too(run: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    evaluation = Evaluation(tmp_path, 5, f"open({str(tmp_path / 'up')!r}, 'w')\ntime.sleep(60)")
    running = Command(*words(run, evaluation, "-q"))
    wait_for((tmp_path / "up").exists)
    running.send_signal(signal.SIGINT)
    assert running.wait().returncode == 130
    assert time.monotonic() - begin < 30
    listed = [Path(f"/proc/{pid}/cmdline") for pid in os.listdir("/proc") if pid.isdigit()]
    assert not [one for one in listed if str(tmp_path / "evaluate.py") in read_text(one)]


def read_text(path: Path) -> str:
    """The text of a file, if it is still there."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_a_signal_before_anything_is_made_leaves_nothing(make_run: MakeRun) -> None:
    run = make_run(series(20, w=[torch.full((300_000,), float(n)) for n in range(20)]))
    running = Command(*words(run, "true {}", "-q", "--tile-size", "400"))
    wait_for(lambda: list(run.parent.glob(".run-ema.*/.candidates.*")))
    running.send_signal(signal.SIGTERM)
    done = running.wait()
    assert (done.returncode, done.stderr) == (143, "terminated; nothing was written\n")
    assert left(run) == set()


def test_lines_that_were_cut_are_evaluated_again(run: Path, evaluation: Evaluation) -> None:
    assert command(*words(run, "exit 1 {}")).returncode == 1
    [notes] = run.parent.glob(".run-ema.*/evaluations")
    with notes.open("ab") as file:
        file.write(b'\n{"evaluated": "abc", "by": "x", "met\xff')
    assert command(*words(run, evaluation)).returncode == 0
    assert evaluation.names == [*NAMES, LAST]


def test_candidates_of_other_options_are_made_again(run: Path, evaluation: Evaluation) -> None:
    assert command(*words(run, "exit 1 {}")).returncode == 1
    assert command(*words(run, evaluation, "--keep-all", "--last", "3")).returncode == 0
    assert {path.name for path in Path(f"{run}-ema").iterdir()} == {"uniform", LAST}
    assert left(run) == set()


def test_a_plain_function_is_known_again_and_another_is_not(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def closure(folder: Path) -> dict[str, float]:
        called.append(folder.name)
        return counted(folder)

    for evaluate, twice in ((counted, False), (closure, True)):
        monkeypatch.setenv("FAILS", LAST)
        with pytest.raises(RefusedError, match="--strict"):
            ckpt_ema.select(
                run, evaluate=evaluate, metric="loss", output="out", strict=True, **UNIFORM
            )
        monkeypatch.delenv("FAILS")
        ckpt_ema.select(run, evaluate=evaluate, metric="loss", output="out", **UNIFORM)
        names = Path("called").read_text().splitlines()
        assert names == [*NAMES, LAST, *(NAMES if twice else []), LAST]
        Path("called").unlink()
        ckpt_ema.output.workspace.remove(Path("out"))


def counted(folder: Path) -> dict[str, float]:
    """An evaluation without values of its own, that fails for one name."""
    with open("called", "a") as file:
        file.write(f"{folder.name}\n")
    return {} if folder.name == os.environ.get("FAILS") else {"loss": mean_of(folder)}


def test_two_at_one_output_do_not_disturb_each_other(run: Path, tmp_path: Path) -> None:
    evaluation = Evaluation(tmp_path, 5, "time.sleep(1)")
    first = Command(*words(run, evaluation))
    wait_for(lambda: evaluation.names)
    second = command(*words(run, evaluation))
    assert (second.returncode, second.stdout) == (3, "")
    assert "is being made by another process" in second.stderr
    average = command("average", run, "--decay", "0.1", "-o", tmp_path / "other")
    assert average.returncode == 0
    assert first.wait().returncode == 0
    assert len(evaluation.names) == 3


def test_an_output_that_appears_meanwhile_is_not_replaced(run: Path, tmp_path: Path) -> None:
    then = f"os.makedirs('{run}-ema/mine', exist_ok=True)"
    evaluation = Evaluation(tmp_path, 5, then)
    done = command(*words(run, evaluation))
    assert done.returncode == 3
    assert "appeared while this average was made" in done.stderr
    assert Path(f"{run}-ema/mine").is_dir()
    Path(f"{run}-ema/mine").rmdir()
    assert command(*words(run, evaluation)).returncode == 0
    assert len(evaluation.names) == 3


def test_an_existing_output_is_refused_before_anything_is_evaluated(
    run: Path, evaluation: Evaluation
) -> None:
    Path(f"{run}-ema").mkdir()
    Path(f"{run}-ema/notes.txt").write_text("mine")
    done = command(*words(run, evaluation, "--overwrite"))
    assert (done.returncode, evaluation.names) == (3, [])


# --- Faults --------------------------------------------------------------------------------------


def by_name(folder: Path) -> dict[str, float]:
    """An evaluation that reads nothing."""
    return {"loss": float(len(folder.name))}


def job(run: Path, keep_all: bool, greedy: bool) -> None:
    """Select, in the place of what is at the output."""
    ckpt_ema.select(
        run,
        evaluate=by_name,
        metric="loss",
        output="out",
        threads=1,
        overwrite=True,
        keep_all=keep_all,
        greedy=greedy,
        **UNIFORM,
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every model file below a folder."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*.safetensors")}
    return {name: path.read_bytes() for name, path in sorted(found.items())}


def sweep(run: Path, kind: str, error: int, keep_all: bool, greedy: bool) -> int:
    """Fail the first call of a kind, and so on until all pass: the output is old or new, whole."""
    ckpt_ema.average(run, output="out", decay=0.1)
    old = tree(Path("out"))
    job(run, keep_all, greedy)
    new = tree(Path("out"))
    for k in itertools.count(1):
        ckpt_ema.average(run, output="old", decay=0.1, overwrite=True)
        ckpt_ema.output.workspace.remove(Path("out"))
        Path("old").rename("out")
        failure: BaseException | None = None
        with faulty(kind, k, error) as faults:
            try:
                job(run, keep_all, greedy)
            except (ckpt_ema.CkptEmaError, OSError) as caught:
                failure = caught
        assert tree(Path("out")) in ([new] if failure is None else [old, new])
        job(run, keep_all, greedy)
        assert tree(Path("out")) == new
        assert left(run) == set()
        if not faults.injected:
            assert failure is None
            return k - 1
    raise AssertionError


@pytest.mark.parametrize("kind", ["rename", "replace", "fsync"])
def test_a_full_disk_leaves_a_whole_output_or_none(run: Path, kind: str) -> None:
    assert sweep(run, kind, errno.ENOSPC, keep_all=False, greedy=False) > 3


@pytest.mark.sweep
@pytest.mark.parametrize("is_all", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_whichever_call_fails(run: Path, kind: str, is_all: bool) -> None:
    sweep(run, kind, errno.EIO, keep_all=is_all, greedy=is_all)


def slowly(run: Path) -> None:
    """Select with evaluations that take a moment, and note them."""

    def evaluate(folder: Path) -> dict[str, float]:
        time.sleep(0.01)
        return by_name(folder)

    ckpt_ema.select(run, evaluate=evaluate, metric="loss", output=run.parent / "out", **UNIFORM)


def test_killed_at_any_moment_the_output_is_whole_or_absent(run: Path) -> None:
    killed = 0
    for number in range(12):
        process = processes().Process(target=slowly, args=(run,))
        process.start()
        process.join(0.02 * number)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if Path("out").exists():
            assert mean_of(Path("out")) == 6
            assert Path("out/README.md").exists()
        slowly(run)
        assert mean_of(Path("out")) == 6
        assert left(run) == set()
        ckpt_ema.output.workspace.remove(Path("out"))
    assert killed > 3


# --- All candidates, and greedy soups ------------------------------------------------------------


def test_all_candidates_are_kept_if_asked_for(run: Path, evaluation: Evaluation) -> None:
    for _ in range(2):  # the second time they are up to date
        done = command(*words(run, evaluation, "--keep-all", "--greedy"))
        assert (done.returncode, done.stdout) == (0, f"{run}-ema/{NAMES[1]}\n"), done.stderr
        folders = sorted(Path(f"{run}-ema").iterdir())
        assert [path.name for path in folders] == sorted([*NAMES, LAST, SOUP])
        for folder in folders:
            manifest = json.loads((folder / "ckpt_ema.json").read_text())
            assert manifest["output"] == str(folder)
            assert manifest["evaluation"]["best"] == NAMES[1]
            assert f"# {folder.name}" in (folder / "README.md").read_text()
    count = len(evaluation.names)
    assert len(set(evaluation.names)) == count


def test_a_greedy_soup_competes_and_its_steps_are_recorded(run: Path, tmp_path: Path) -> None:
    """Nearest to 3: 2 and 4 are each 1 away, 4 is later; with 2 it is 3 exactly."""
    evaluation = Evaluation(tmp_path, 3)
    done = command(*words(run, evaluation, "--greedy", "--json"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["best"] == SOUP
    assert [one["name"] for one in found["candidates"]] == [*NAMES, SOUP, LAST]
    steps = [(one["checkpoint"], one["metric"], one["is_kept"]) for one in found["greedy"]]
    assert steps == [
        *(("checkpoint-3", 1.0, True), ("checkpoint-2", 1.0, True)),
        ("checkpoint-4", 5.0, False),
    ]
    assert mean_of(Path(f"{run}-ema")) == 3
    # Three candidates, two more checkpoints, one soup: that of all three is uniform-last-3.
    assert len(evaluation.names) == len(set(evaluation.names)) == 6
    again = command(*words(run, evaluation, "--greedy", "--json"))
    assert json.loads(again.stdout) == found
    assert len(evaluation.names) == 6
    made = ckpt_ema.average(run, output="alone", schedule="uniform", steps="2,3")
    assert files(Path(f"{run}-ema")) == files(made.output)


@pytest.mark.parametrize("count", range(1, 7))
def test_a_greedy_soup_is_continued_after_a_kill(run: Path, tmp_path: Path, count: int) -> None:
    evaluation = Evaluation(tmp_path, 3, "time.sleep(0.01)")
    running = Command(*words(run, evaluation, "--greedy", "-q"))
    wait_for(lambda: len(evaluation.names) >= count)
    running.send_signal(signal.SIGKILL)
    assert running.wait().returncode == -signal.SIGKILL
    done = command(*words(run, evaluation, "--greedy", "-q"))
    assert done.returncode == 0, done.stderr
    assert mean_of(Path(f"{run}-ema")) == 3
    assert len(evaluation.names) <= 7  # only what was being evaluated is so twice
    assert left(run) == set()


def test_checkpoints_whose_evaluation_fails_are_left_out_of_a_soup(
    run: Path, tmp_path: Path
) -> None:
    then = "if mean == 4 or mean == 2 and 'soup' in folder:\n    sys.exit(1)"
    done = command(*words(run, Evaluation(tmp_path, 3, then), "--greedy", "-q", "--json"))
    found = json.loads(done.stdout)
    assert "checkpoint-3" not in [one["checkpoint"] for one in found["greedy"]]
    assert "warning: checkpoint-3 has no usable loss: " in done.stderr


def test_no_more_checkpoints_of_a_soup_than_jobs_are_on_the_disk(run: Path, tmp_path: Path) -> None:
    then = "print(len(os.listdir(folder + '/..')), file=open(log + '-beside', 'a'))"
    done = command(*words(run, Evaluation(tmp_path, 3, then), "--greedy", "--jobs", "2"))
    assert done.returncode == 0
    counts = (tmp_path / "evaluated-beside").read_text().split()
    assert max(map(int, counts[3:])) <= 2


def test_checkpoints_of_the_same_name_are_told_apart(make_run: MakeRun) -> None:
    given = [
        make_run(constants([value]), name=f"of-{value:g}", pattern="model") / "model"
        for value in VALUES
    ]
    found = ckpt_ema.select(given, evaluate=to(3), metric="loss", output="out", greedy=True)
    assert list(found.candidates[0].weights) == ["of-1", "of-2", "of-4", "of-8"]
    assert found.candidates[1].weights == {"of-2": 0.5, "of-4": 0.5}
    assert (found.best, mean_of(found.path)) == (SOUP, 3)


def test_report_writes_a_page_of_the_candidates(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    words = (
        "select",
        run,
        "--eval",
        "echo size=1 # {}",
        "--metric",
        "size",
        "--minimize",
        "--report",
    )
    inside = command(*words, run / "checkpoint-1" / "report.html")
    assert inside.returncode == 2, inside.stderr
    assert not (tmp_path / "run-ema").exists()
    done = command(*words, page)
    assert done.returncode == 0, done.stderr
    assert "last-checkpoint" in page.read_text()
    page.unlink()
    assert command(*words, page).returncode == 0  # up to date
    assert page.exists()
