"""The command line as a process: streams, exit codes, messages, signals, imports."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_ema.fold import engine
from ckpt_ema.fold.sources import Sources
from ckpt_ema.output import publish, workspace
from ckpt_ema.report.progress import ByteProgress
from tests.command import ENVIRONMENT, Command, ckpt_ema, wait_for
from tests.conftest import MakeRun, noise, series


def imported_by(*words: Any) -> tuple[str, set[str]]:
    """Run the command in a fresh interpreter: its stdout, and the modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ckpt_ema", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        check=True,
    )
    lines = done.stderr.splitlines()
    return done.stdout, {line.split("|")[-1].strip() for line in lines if "|" in line}


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """A run of four small checkpoints."""
    return make_run(series(4, w=noise(4, 100)), steps=[9, 10, 100, 1000])


def test_average_prints_the_output_path_and_nothing_else_on_stdout(run: Path) -> None:
    done = ckpt_ema("average", run, "--decay", "0.999", "--device", "cpu")
    assert done.returncode == 0
    assert done.stdout == f"{run}-ema\n"
    assert "checkpoint-1000  1000  900  0.3077  69.23%" in done.stderr
    assert "--decay 0.999 changes nothing here" in done.stderr
    assert "ends at 0.3077" in done.stderr
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("read 1.6 KiB and wrote")
    assert last_line.endswith(f": {run}-ema")


def test_the_second_time_it_is_up_to_date_without_torch(run: Path) -> None:
    assert ckpt_ema("average", run, "-q", "--device", "cpu").returncode == 0
    assert "is up to date" in ckpt_ema("average", run).stderr
    stdout, imported = imported_by("average", run)
    assert stdout == f"{run}-ema\n"
    assert "ckpt_ema.run" in imported
    assert "torch" not in imported


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["average", "--help"], ["--version"], ["plan", "RUN"], ["plan", "RUN", "--json"]],
)
def test_help_and_plan_never_import_torch(run: Path, arguments: list[str]) -> None:
    words = [str(run) if word == "RUN" else word for word in arguments]
    _, imported = imported_by(*words)
    assert "ckpt_ema.cli.app" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torch", "numpy")}


def averages(stdout: str) -> list[dict[str, Any]]:
    """The averages of a plan that was printed as JSON."""
    found: list[dict[str, Any]] = json.loads(stdout)["averages"]
    return found


def test_plan_as_json_has_the_promised_fields(run: Path) -> None:
    done = ckpt_ema("plan", run, "--json")
    [average] = averages(done.stdout)
    rows = average["checkpoints"]
    assert [list(row)[:7] for row in rows] == [
        ["path", "name", "step", "unit", "gap", "decay", "weight"]
    ] * 4
    assert [row["gap"] for row in rows] == [None, 1, 90, 900]
    assert rows[0]["decay"] is None
    assert sum(row["weight"] for row in rows) == pytest.approx(1, abs=1e-12)
    assert (average["schedule"], average["decay"]) == ("dynamic", 0.999)
    assert average["statistics"]["unit"] == "steps"
    assert average["tensors"] == [
        {"name": "w", "file": "model.safetensors", "dtype": "F32", "shape": [100], "averaged": True}
    ]
    plan = json.loads(done.stdout)
    assert plan["bytes_read"] == 4 * 100 * 4
    assert all(isinstance(warning, str) for warning in plan["warnings"])
    assert not Path(f"{run}-ema").exists()


def test_average_as_json_prints_the_manifest(run: Path) -> None:
    done = ckpt_ema("average", run, "--json", "-q", "--device", "cpu")
    assert done.stderr == ""
    assert json.loads(done.stdout) == json.loads(Path(f"{run}-ema/ckpt_ema.json").read_text())
    assert "average" in json.loads(done.stdout)["command"]


def test_every_average_is_a_line_of_stdout(run: Path) -> None:
    arguments = ["--half-life", "10,500", "--last", "2,4", "-q", "--device", "cpu"]
    names = ["half-life-10-last-2", "half-life-500-last-2"]
    names += ["half-life-10-last-4", "half-life-500-last-4"]
    for _ in range(2):  # the second time they are up to date
        done = ckpt_ema("average", run, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [f"{run}-ema/{name}" for name in names]
        assert all(Path(line, "model.safetensors").is_file() for line in done.stdout.splitlines())
    manifests = json.loads(ckpt_ema("average", run, *arguments, "--json").stdout)
    assert [manifest["name"] for manifest in manifests] == names
    card = Path(f"{run}-ema", names[0], "README.md").read_text()
    assert f"$ python -m ckpt_ema average {run} --half-life 10,500" in card


def test_every_option_of_the_weights_and_the_selection_reaches_the_plan(run: Path) -> None:
    weights = run.parent / "weights.txt"
    weights.write_text("checkpoint-100 1\ncheckpoint-1000 3\n")
    for arguments, schedule, taken in (
        (["--schedule", "karras", "--sigma-rel", "0.1"], "power", [9, 10, 100, 1000]),
        (["--schedule", "constant", "--zero-debias"], "constant", [9, 10, 100, 1000]),
        (["--power", "0.7", "--inv-gamma", "2"], "warmup", [9, 10, 100, 1000]),
        (["--num-updates", "step", "--from", "10", "--to", "100"], "dynamic", [10, 100]),
        (["--decay-per-step", "0.99", "--steps", "9,50-2000"], "per-step", [9, 100, 1000]),
        (["--weights", str(weights), "--normalize"], "weights", [100, 1000]),
        (["--min-gap", "90", "--every", "1"], "dynamic", [10, 100, 1000]),
        (["--include", "*-1*", "--exclude", "*-10"], "dynamic", [100, 1000]),
    ):
        done = ckpt_ema("plan", run, "--json", *arguments)
        assert done.returncode == 0, done.stderr
        [average] = averages(done.stdout)
        assert average["schedule"] == schedule
        assert [row["step"] for row in average["checkpoints"]] == taken


def test_the_best_are_taken_by_command(run: Path) -> None:
    for step, accuracy in ((9, 0.1), (10, 0.9), (100, 0.9), (1000, 0.2)):
        (run / f"checkpoint-{step}/eval_results.json").write_text(f'{{"acc": {accuracy}}}')
    done = ckpt_ema("plan", run, "--json", "--best", "1", "--metric", "acc")
    assert [row["step"] for row in averages(done.stdout)[0]["checkpoints"]] == [100]
    for arguments, code in ((["--best", "1"], 2), (["--best", "1", "--metric", "los"], 3)):
        wrong = ckpt_ema("plan", run, *arguments)
        assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (code, "", 1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["average", "NOWHERE"], 3, "error: NOWHERE does not exist. Check the path."),
        (["average", "RUN", "--decay", "1.5"], 2, "error: --decay is 1.5; it must lie between 0"),
        (["average", "RUN", "--decay", "nan"], 2, "error: --decay is nan"),
        (["average", "RUN", "--decay", "much"], 2, "error: --decay is 'much'; it must be numbers"),
        (["average", "RUN", "--device", "cuda:7"], 2, "error: --device cuda:7 cannot be used"),
        (["average", "RUN", "--shedule", "constant"], 2, "--schedule"),
        (["average", "RUN", "-o", "RUN/in"], 3, "lies inside the input"),
        (["average", "RUN", "--threads", "0"], 2, "--threads"),
        (["average"], 2, "Missing argument"),
        (["average", "RUN", "--schedule", "constant", "--half-life", "9"], 2, "takes no --half"),
        (["average", "RUN", "--half-life", "soon"], 2, "--half-life is 'soon'; it must be numbers"),
        (["average", "RUN", "--last", "0"], 2, "--last is 0; it must be at least 1"),
        (["average", "RUN", "--steps", "11"], 3, "no checkpoint has this number; the nearest are"),
        (["average", "RUN", "--weights", "NOWHERE"], 2, "cannot be read: No such file"),
        (["average", "RUN", "--plot", "weights.jpg"], 2, "pictures are .png and .svg"),
        (["plan", "RUN", "--decay", "0.1,0.2", "-o", "a.safetensors"], 2, "is one file, and 2"),
    ],
)
def test_mistakes_are_one_sentence_and_the_right_code(
    run: Path, arguments: list[str], code: int, message: str
) -> None:
    done = ckpt_ema(*(word.replace("RUN", str(run)) for word in arguments))
    assert (done.returncode, done.stdout) == (code, "")
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not Path(f"{run}-ema").exists()


def test_an_existing_output_is_refused_and_kept(run: Path) -> None:
    Path(f"{run}-ema").mkdir()
    Path(f"{run}-ema/model.safetensors").write_text("mine")
    done = ckpt_ema("average", run, "-q")
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: The output {run}-ema exists already")
    assert "--overwrite" in done.stderr
    assert Path(f"{run}-ema/model.safetensors").read_text() == "mine"


def test_a_cut_off_file_is_named_with_what_to_do(run: Path) -> None:
    path = run / "checkpoint-100/model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    done = ckpt_ema("average", run, "-q")
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: {run}/checkpoint-100 is incomplete, but later")
    assert f"{path} is cut short: its header promises 400 bytes" in done.stderr
    assert "--skip-incomplete" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount and to be nobody")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        done = ckpt_ema("average", run, "-q", "-o", small / "out", "--device", "cpu")
        left = list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert done.returncode == 1
    assert "cannot be written: No space left on device. Nothing was published." in done.stderr
    assert left == []


def test_environment_variables_set_options(run: Path) -> None:
    done = ckpt_ema(
        "plan", run, "--json", env={"CKPT_EMA_DECAY": "0.25", "CKPT_EMA_DTYPE": "float16"}
    )
    [average] = averages(done.stdout)
    assert (average["decay"], average["dtype"]) == (0.25, "float16")


def test_the_command_in_the_output_tells_what_the_environment_said(run: Path) -> None:
    folder = run.parent / ("a long name " * 20)
    folder.mkdir()
    done = ckpt_ema("average", run, "-o", folder / "out", env={"CKPT_EMA_HALF_LIFE": "9,90"})
    assert done.returncode == 0, done.stderr
    card = (folder / "out/half-life-90/README.md").read_text()
    [command] = [line for line in card.splitlines() if line.startswith("$ ")]
    assert command.startswith("$ CKPT_EMA_HALF_LIFE=9,90 python -m ckpt_ema average /")
    assert shlex.split(command)[-1] == str(folder / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_stdout_that_is_full_is_said_beside_what_was_done(run: Path) -> None:
    done = ckpt_ema("average", run, "--device", "cpu", "-q", stdout="/dev/full")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: stdout cannot be written: No space left on device; {run}-ema is complete.\n"
    )
    assert Path(f"{run}-ema/model.safetensors").is_file()


def test_an_empty_run_is_not_the_current_folder(run: Path) -> None:
    done = ckpt_ema("plan", "", cwd=run)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: No run and no checkpoints were given.\n"


def test_every_option_has_an_environment_variable_and_help_shows_examples() -> None:
    text = ckpt_ema("average", "--help", env={"COLUMNS": "200"}).stdout
    for option in (
        "DECAY",
        "SCHEDULE",
        "OUTPUT",
        "DTYPE",
        "DEVICE",
        "THREADS",
        "OVERWRITE",
        "QUIET",
    ):
        assert f"CKPT_EMA_{option}" in text
    assert "ckpt-ema average runs/" in text
    assert "--json" in text


def test_the_step_summary_gets_the_table(run: Path, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    done = ckpt_ema(
        "average", run, "-q", "--device", "cpu", env={"GITHUB_STEP_SUMMARY": str(summary)}
    )
    assert done.returncode == 0
    assert "| checkpoint-1000 | 1000 | 900 | 0.3077 | 69.23% |" in summary.read_text()


def test_control_characters_in_names_do_not_reach_the_terminal(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(series(2, **{"a\x1b[31m\nb": noise(2, 3), "\x1b]0;n\x07": torch.arange(2)}))
    done = ckpt_ema("plan", run)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert "\x07" not in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        pytest.param(
            *(signal.SIGHUP, 129, "terminated, nothing was written\n"), marks=pytest.mark.sweep
        ),
        (signal.SIGINT, 130, "interrupted, nothing was written\n"),
        pytest.param(
            *(signal.SIGTERM, 143, "terminated, nothing was written\n"), marks=pytest.mark.sweep
        ),
    ],
)
def test_a_signal_ends_it_with_one_line_and_nothing_left(
    make_run: MakeRun, number: int, code: int, line: str
) -> None:
    run = make_run(series(20, w=noise(20, 1_000_000)))
    command = Command("average", run, "-q", "--tile-size", "400", "--device", "cpu")
    wait_for(lambda: list(run.parent.glob(".run-ema.*")))
    time.sleep(0.3)
    command.send_signal(number)
    done = command.wait()
    assert (done.returncode, done.stdout, done.stderr) == (code, "", line)
    assert {path.name for path in run.parent.iterdir()} == {"run"}


def end_once_it_is_named() -> None:
    """Have a signal come when the output has its name, and its folder is synced."""
    real = workspace.fsync_folder

    def synced(path: Path | str) -> None:
        real(path)
        if Path(path, "run-ema").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    pytest.MonkeyPatch().setattr(publish, "fsync_folder", synced)


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_signal_that_comes_when_all_is_done_does_not_deny_it(
    run: Path, options: list[str]
) -> None:
    if options:
        assert ckpt_ema("average", run, "--decay", "0.1", "--device", "cpu").returncode == 0
    words = ("average", run, "-q", "--decay", "0.2", "--device", "cpu", *options)
    done = ckpt_ema(*words, before=end_once_it_is_named)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run}-ema\n", "")
    assert {path.name for path in run.parent.iterdir()} == {"run", "run-ema"}


class Ending:
    """Its destructor is where a signal arrives, and Python swallows what that raises."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass


def end_in_a_destructor() -> None:
    """Have it happen each time that progress is told, and the reading take its time."""
    real, read = ByteProgress.__call__, Sources.values

    def call(*arguments: Any) -> None:
        Ending()
        real(*arguments)

    def slow(*arguments: Any) -> Any:
        time.sleep(0.01)
        return read(*arguments)

    patched = pytest.MonkeyPatch()
    patched.setattr(ByteProgress, "__call__", call)
    patched.setattr(Sources, "values", slow)
    patched.setattr(engine, "_POLL_SECONDS", 0.01)


def test_a_signal_in_a_destructor_which_swallows_it_ends_the_run(run: Path) -> None:
    done = ckpt_ema(
        *("average", run, "-q", "--tile-size", "8", "--device", "cpu"), before=end_in_a_destructor
    )
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr == "terminated, nothing was written\n"
    assert {path.name for path in run.parent.iterdir()} == {run.name}


def test_a_limit_on_descriptors_is_respected(make_run: MakeRun) -> None:
    run = make_run(series(60, w=noise(60, 10)))
    done = ckpt_ema(
        "average",
        run,
        "-q",
        "--device",
        "cpu",
        before=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (40, 40)),
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--tile-size", "512MiB"], 1, "error: The machine ran out of memory. Try --max-memory"),
        (["--tile-size", "512MiB", "--max-memory", "64MiB"], 0, ""),
    ],
)
def test_a_limit_on_memory_is_survived(
    run: Path, options: list[str], code: int, message: str
) -> None:
    done = ckpt_ema(
        *("average", run, "-q", "--device", "cpu", "--threads", "2", *options),
        before=partial(resource.setrlimit, resource.RLIMIT_AS, (1 << 32, 1 << 32)),
    )
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == code
    left = {path.name for path in run.parent.iterdir()} - {run.name}
    assert left == (set() if code else {f"{run.name}-ema"})


def test_formats_shows_every_trainer_and_what_to_do_instead() -> None:
    done = ckpt_ema("formats")
    assert (done.returncode, done.stderr) == (0, "")
    assert "transformers Trainer" in done.stdout
    assert "zero_to_fp32.py" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    rows = json.loads(ckpt_ema("formats", "--json").stdout)
    assert {row["tier"] for row in rows} == {"1", "2", "R", "N"}


def test_options_that_decide_between_two_readings_reach_the_plan(run: Path) -> None:
    for step, twin in ((1, 9), (2, 10)):
        shutil.copytree(run / f"checkpoint-{twin}", run / f"step_{step}")
    refused = ckpt_ema("plan", run)
    assert refused.returncode == 3
    assert "holds 2 sets of checkpoints: 4 × checkpoint-<n> and 2 × step_<n>" in refused.stderr
    pattern = r"^step_(\d+)$"
    assert f"--pattern '{pattern}'" in refused.stderr
    by_option = ckpt_ema("plan", run, "--pattern", pattern, "--json")
    by_variable = ckpt_ema("plan", run, "--json", env={"CKPT_EMA_PATTERN": pattern})
    for done in (by_option, by_variable):
        assert [row["step"] for row in averages(done.stdout)[0]["checkpoints"]] == [1, 2]
    wrong = ckpt_ema("plan", run, "--pattern", "(")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "--pattern is no regular expression" in wrong.stderr


def test_a_list_of_checkpoints_and_a_single_file(run: Path) -> None:
    listed = ckpt_ema("plan", run / "checkpoint-9", run / "checkpoint-100", "--json")
    assert [row["step"] for row in averages(listed.stdout)[0]["checkpoints"]] == [9, 100]
    alone = ckpt_ema("plan", run / "checkpoint-9/model.safetensors", "--json")
    assert [row["step"] for row in averages(alone.stdout)[0]["checkpoints"]] == [9]
    wrong = ckpt_ema("plan", run, "--append", "")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


def test_a_signal_in_the_middle_of_a_lock_is_still_a_signal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import typer

    from ckpt_ema.cli import exits

    with pytest.raises(typer.Exit) as caught, exits.errors_reported():
        try:
            raise exits.SignalError(signal.SIGTERM)
        finally:
            raise RuntimeError("release unlocked lock")
    assert caught.value.exit_code == 143
    assert capsys.readouterr().err == "terminated, nothing was written\n"
    with pytest.raises(RuntimeError, match="something else"), exits.errors_reported():
        raise RuntimeError("something else")
