"""The command line as a process: streams, exit codes, messages, signals, imports."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from ckpt_ema.cli import exits
from ckpt_ema.cli.options import variable
from ckpt_ema.errors import flag
from ckpt_ema.options import table
from ckpt_ema.report.progress import ByteProgress
from tests.command import ENVIRONMENT, Command, ckpt_ema, wait_for
from tests.conftest import MakeRun, noise, series
from tests.makers.faulty_os import slowed
from tests.makers.folds import without_compiled


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
    """A run of four small checkpoints, 100 steps apart."""
    return make_run(series(4, w=noise(4, 100)), steps=[900, 1000, 1100, 1200])


def test_average_prints_the_output_path_and_nothing_else_on_stdout(run: Path) -> None:
    done = ckpt_ema("average", run, "--decay", "0.999", "--device", "cpu")
    assert done.returncode == 0
    assert done.stdout == f"{run}-ema\n"
    assert "checkpoint-1200  1200  100  0.3077  69.23%" in done.stderr
    assert "warning: " not in done.stderr
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
    assert [row["gap"] for row in rows] == [None, 100, 100, 100]
    assert rows[0]["decay"] is None
    assert sum(row["weight"] for row in rows) == pytest.approx(1, abs=1e-12)
    assert (average["schedule"], average["decay"]) == ("dynamic", 0.999)
    assert average["statistics"]["unit"] == "steps"
    assert average["tensors"] == [
        {"name": "w", "file": "model.safetensors", "dtype": "F32", "shape": [100], "averaged": True}
    ]
    assert json.loads(done.stdout)["bytes_read"] == 4 * 100 * 4
    assert not Path(f"{run}-ema").exists()


def test_average_as_json_prints_the_manifest(run: Path) -> None:
    done = ckpt_ema("average", run, "--json", "-q", "--device", "cpu")
    assert done.stderr == ""
    assert json.loads(done.stdout) == json.loads(Path(f"{run}-ema/ckpt_ema.json").read_text())
    assert "average" in json.loads(done.stdout)["command"]


def test_every_average_is_a_line_of_stdout(run: Path) -> None:
    arguments = ["--half-life", "50,90", "--last", "2,4", "-q", "--device", "cpu"]
    names = ["half-life-50-last-2", "half-life-90-last-2"]
    names += ["half-life-50-last-4", "half-life-90-last-4"]
    for _ in range(2):  # the second time they are up to date
        done = ckpt_ema("average", run, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [f"{run}-ema/{name}" for name in names]
        assert all(Path(line, "model.safetensors").is_file() for line in done.stdout.splitlines())
    manifests = json.loads(ckpt_ema("average", run, *arguments, "--json").stdout)
    assert [manifest["name"] for manifest in manifests] == names
    card = Path(f"{run}-ema", names[0], "README.md").read_text()
    assert f"$ python -m ckpt_ema average {run} --half-life 50,90" in card


def test_options_reach_the_plan_by_their_flags_and_by_their_variables(run: Path) -> None:
    weights = run.parent / "weights.txt"
    weights.write_text("checkpoint-1100 1\ncheckpoint-1200 3\n")
    every = [900, 1000, 1100, 1200]
    for options, schedule, taken in (
        ({"schedule": "karras", "sigma_rel": "0.1"}, "power", every),
        ({"schedule": "constant", "zero_debias": "1"}, "constant", every),
        ({"power": "0.7", "inv_gamma": "2"}, "warmup", every),
        ({"num_updates": "step", "from_step": "1000", "to_step": "1100"}, "dynamic", [1000, 1100]),
        ({"decay_per_step": "0.99", "steps": "900,1050-2000"}, "per-step", [900, 1100, 1200]),
        ({"weights": str(weights), "normalize": "1"}, "weights", [1100, 1200]),
        ({"min_gap": "150", "every": "1"}, "dynamic", [1000, 1200]),
        ({"include": "*-1*", "exclude": "*-1000"}, "dynamic", [1100, 1200]),
        ({"pattern": r"-(1\d+)$", "last": "2"}, "dynamic", [1100, 1200]),
    ):
        is_flag = ("zero_debias", "normalize")
        words = [[flag(n)] if n in is_flag else [flag(n), v] for n, v in options.items()]
        by_flag = ckpt_ema("plan", run, "--json", *(word for pair in words for word in pair))
        variables = {variable(name): value for name, value in options.items()}
        by_variable = ckpt_ema("plan", run, "--json", env=variables)
        for done in (by_flag, by_variable):
            assert done.returncode == 0, done.stderr
            [average] = averages(done.stdout)
            assert average["schedule"] == schedule
            assert [row["step"] for row in average["checkpoints"]] == taken


def test_quiet_hides_notes_and_progress_but_not_warnings(run: Path) -> None:
    words = ("average", run, "--half-life", "5000", "--last", "3", "--device", "cpu")
    loud = ckpt_ema(*words)
    quiet = ckpt_ema(*words, "-q", "--overwrite")
    assert "note: " in loud.stderr
    warnings = [line for line in loud.stderr.splitlines() if line.startswith("warning: ")]
    assert warnings
    assert quiet.stderr.splitlines() == warnings
    assert quiet.stdout == loud.stdout


def test_a_plan_is_explained_entry_by_entry_and_pattern_by_pattern(run: Path) -> None:
    (run / "logs").mkdir()
    plain, explained = ckpt_ema("plan", run), ckpt_ema("plan", run, "--explain")
    assert explained.stdout.startswith(plain.stdout)
    described = json.loads(ckpt_ema("plan", run, "--json").stdout)
    assert {Path(entry["path"]).name for entry in described["entries"]} >= {
        *(f"checkpoint-{step}" for step in (900, 1000, 1100, 1200)),
        "logs",
    }
    assert [role["count"] for role in described["tensor_roles"]] == [1]
    for entry in described["entries"]:
        assert Path(entry["path"]).name in explained.stdout
        assert entry["rule"] in explained.stdout


@pytest.mark.parametrize("command", ["average", "plan", "select", "finish", "formats"])
def test_help_fits_80_lines_with_examples_before_options(command: str) -> None:
    lines = ckpt_ema(command, "--help").stdout.splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 80
    assert lines.index("Examples:") < next(n for n, line in enumerate(lines) if "  --" in line)
    assert "docs/options.md" in lines[-1]
    if command in ("average", "plan"):
        labels = [line[:26].replace(",", "").split() for line in lines if line.startswith("  -")]
        shown = [word for label in labels for word in label]
        for row in table():
            assert shown.count(row.flags[0].rpartition("/")[2]) == 1, row.name


def test_help_of_average_names_the_plan_and_the_variables() -> None:
    text = ckpt_ema("average", "--help").stdout
    assert "ckpt-ema plan" in text
    assert text.count("CKPT_EMA_") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["average", "NOWHERE"], 3, "error: NOWHERE "),
        (["average"], 2, "Usage: "),
        (["average", "RUN", "--weights", "NOWHERE"], 2, "error: --weights NOWHERE "),
        (["average", "RUN", "--plot", "weights.jpg"], 2, "error: --plot weights.jpg "),
        (["plan", "RUN", "--decay", "0.1,0.2", "-o", "a.safetensors"], 2, "error: --output a"),
        (["plan", "RUN", "--best", "1"], 2, "error: --best and --metric "),
        (["plan", "RUN", "--append", ""], 2, "error: --append "),
    ],
)
def test_mistakes_are_one_line_and_the_right_code(
    run: Path, arguments: list[str], code: int, line: str
) -> None:
    done = ckpt_ema(*(word.replace("RUN", str(run)) for word in arguments))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(line)
    assert line == "Usage: " or done.stderr.count("\n") == 1
    assert not Path(f"{run}-ema").exists()


def test_an_existing_output_is_refused_and_kept(run: Path) -> None:
    Path(f"{run}-ema").mkdir()
    Path(f"{run}-ema/model.safetensors").write_text("mine")
    done = ckpt_ema("average", run, "-q")
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert f"{run}-ema" in done.stderr
    assert "--overwrite" in done.stderr
    assert Path(f"{run}-ema/model.safetensors").read_text() == "mine"


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
    assert "No space left on device" in done.stderr
    assert left == []


def test_the_command_in_the_output_has_the_variables_too(run: Path) -> None:
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
    assert done.stderr.startswith("error: stdout ")
    assert f"{run}-ema is complete" in done.stderr
    assert Path(f"{run}-ema/model.safetensors").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("words", [["plan", "RUN", "-q"], ["formats"], ["plan", "-h"], ["-h"]])
def test_a_stdout_that_is_full_or_closed_is_no_traceback(run: Path, words: list[str]) -> None:
    """A real process, since Python writes what is left in its buffer once more at the end."""
    command = [sys.executable, "-m", "ckpt_ema", *(str(run) if w == "RUN" else w for w in words)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: stdout cannot be written: No space left on device.\n"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode in (1, 141)
    assert done.stderr == ""


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["plan", "/nowhere"], 3)])
def test_the_process_ends_at_once(words: list[str], code: int) -> None:
    """Taking an interpreter with torch apart takes 0.4 s; what was printed still comes out."""
    script = (
        "import atexit, sys; from ckpt_ema.cli.app import main;"
        "atexit.register(print, 'still here'); sys.stdout.write('first, '); main()"
    )
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.startswith("first, ")
    assert "still here" not in done.stdout
    assert bool(done.stderr) == bool(code)


def test_an_empty_run_is_not_the_current_folder(run: Path) -> None:
    done = ckpt_ema("plan", "", cwd=run)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")


def test_the_step_summary_gets_the_table(run: Path, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    done = ckpt_ema(
        "average", run, "-q", "--device", "cpu", env={"GITHUB_STEP_SUMMARY": str(summary)}
    )
    assert done.returncode == 0
    assert "| checkpoint-1200 | 1200 | 100 | 0.3077 | 69.23% |" in summary.read_text()


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
            *(signal.SIGHUP, 129, "terminated; nothing was written\n"), marks=pytest.mark.sweep
        ),
        (signal.SIGINT, 130, "interrupted; nothing was written\n"),
        pytest.param(
            *(signal.SIGTERM, 143, "terminated; nothing was written\n"), marks=pytest.mark.sweep
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


def end_once_published(output: Path) -> None:
    """Have a signal arrive when the new output has its name, and its folder is being synced."""
    real = os.fsync

    def synced(fd: int) -> None:
        real(fd)
        manifest = output / "ckpt_ema.json"
        is_parent = os.path.samestat(os.fstat(fd), output.parent.stat())
        if is_parent and manifest.exists() and json.loads(manifest.read_text())["decay"] == 0.2:
            os.kill(os.getpid(), signal.SIGTERM)

    pytest.MonkeyPatch().setattr(os, "fsync", synced)


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_signal_after_publication_does_not_deny_it(run: Path, options: list[str]) -> None:
    if options:
        assert ckpt_ema("average", run, "--decay", "0.1", "--device", "cpu").returncode == 0
    words = ("average", run, "-q", "--decay", "0.2", "--device", "cpu", *options)
    done = ckpt_ema(*words, before=partial(end_once_published, Path(f"{run}-ema")))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run}-ema\n", "")
    assert {path.name for path in run.parent.iterdir()} == {"run", "run-ema"}


def test_a_signal_with_resume_says_that_work_is_kept_and_keeps_it(make_run: MakeRun) -> None:
    run = make_run(series(20, w=noise(20, 1_000_000)))
    command = Command("average", run, "-q", "--resume", "--tile-size", "400", "--device", "cpu")
    wait_for(lambda: list(run.parent.glob(".run-ema.*/output")))
    command.send_signal(signal.SIGINT)
    done = command.wait()
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; partial work kept, rerun with --resume\n"
    assert list(run.parent.glob(".run-ema.*"))


def end_in_plan() -> None:
    """Have a signal arrive when headers are read, before anything is written."""
    pytest.MonkeyPatch().setattr(
        "ckpt_ema.planning.decide.compare", lambda *_: os.kill(os.getpid(), signal.SIGINT)
    )


def test_a_signal_before_anything_is_written_does_not_speak_of_kept_work(run: Path) -> None:
    done = ckpt_ema("average", run, "-q", "--resume", before=end_in_plan)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; nothing was written\n"


class Ending:
    """Its destructor is where a signal arrives, and Python swallows what that raises."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass


def end_in_a_destructor() -> None:
    """Have a signal arrive so at each call of progress, and make reading slow."""
    real = ByteProgress.__call__

    def call(*arguments: Any) -> None:
        Ending()
        real(*arguments)

    pytest.MonkeyPatch().setattr(ByteProgress, "__call__", call)
    slowed("preadv", 0.01)


def test_a_signal_in_a_destructor_which_swallows_it_ends_the_run(run: Path) -> None:
    done = ckpt_ema(
        *("average", run, "-q", "--tile-size", "8", "--device", "cpu"), before=end_in_a_destructor
    )
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr == "terminated; nothing was written\n"
    assert {path.name for path in run.parent.iterdir()} == {run.name}


def test_a_limit_on_descriptors_is_respected(make_run: MakeRun) -> None:
    run = make_run(series(60, w=[1 + one / 10 for one in noise(60, 10)]))
    done = ckpt_ema(
        "average",
        run,
        "-q",
        "--device",
        "cpu",
        before=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (40, 40)),
    )
    assert (done.returncode, done.stderr) == (0, "")


def limit_memory() -> None:
    """Leave 4 GiB of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))


def limit_memory_of_torch() -> None:
    """Leave as much, and have torch fold."""
    without_compiled()
    limit_memory()


@pytest.mark.parametrize(
    ("before", "options", "code", "message"),
    [
        (limit_memory_of_torch, [], 1, "error: The machine ran out of memory"),
        (limit_memory_of_torch, ["--max-memory", "64MiB"], 0, ""),
        (limit_memory, [], 0, ""),  # the compiled fold takes no more for larger tiles
        (limit_memory, ["--max-memory", "64MiB"], 0, ""),
    ],
)
def test_a_limit_on_memory_is_survived(
    run: Path, before: Callable[[], None], options: list[str], code: int, message: str
) -> None:
    words = ("average", run, "-q", "--device", "cpu", "--threads", "2", "--tile-size", "512MiB")
    done = ckpt_ema(*words, *options, before=before)
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == code
    left = {path.name for path in run.parent.iterdir()} - {run.name}
    assert left == (set() if code else {f"{run.name}-ema"})


def test_formats_shows_every_trainer_and_what_to_do_instead() -> None:
    done = ckpt_ema("formats")
    assert (done.returncode, done.stderr) == (0, "")
    assert "transformers Trainer" in done.stdout
    assert "ds_to_universal.py" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    rows = json.loads(ckpt_ema("formats", "--json").stdout)
    assert {row["tier"] for row in rows} == {"1", "2", "R", "N"}


def test_a_list_of_checkpoints_and_a_single_file(run: Path) -> None:
    listed = ckpt_ema("plan", run / "checkpoint-900", run / "checkpoint-1100", "--json")
    assert [row["step"] for row in averages(listed.stdout)[0]["checkpoints"]] == [900, 1100]
    alone = ckpt_ema("plan", run / "checkpoint-900/model.safetensors", "--json")
    assert [row["step"] for row in averages(alone.stdout)[0]["checkpoints"]] == [900]


def test_a_signal_in_the_middle_of_a_lock_is_still_a_signal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit) as caught, exits.errors_reported():
        try:
            raise exits.SignalError(signal.SIGTERM)
        finally:
            raise RuntimeError("release unlocked lock")
    assert caught.value.exit_code == 143
    assert capsys.readouterr().err == "terminated; nothing was written\n"
    with pytest.raises(RuntimeError, match="something else"), exits.errors_reported():
        raise RuntimeError("something else")
