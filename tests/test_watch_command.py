"""The command that watches a run, as a process: signals, kills, and what it prints."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.output.workspace import HELD, Workspace
from ckpt_ema.updating import folded_so_far
from tests.command import Command, processes, wait_for
from tests.conftest import MakeRun, noise, series, write_safetensors
from tests.makers.fake_trainer import Trainer
from tests.makers.imports import imported_by

STEPS = [100, 200, 300, 400]
STATES = series(4, a=noise(4, 5, 70), b=noise(4, 40, dtype=torch.bfloat16))
OPTIONS = ("--schedule", "constant", "--decay", "0.5")


@pytest.fixture
def trainer(make_run: MakeRun) -> Trainer:
    """A trainer that keeps all that it saves."""
    whole = make_run(STATES, STEPS, name="whole")
    return Trainer(whole, whole.parent / "run")


def watching(trainer: Trainer, *words: Any, **options: Any) -> Command:
    """Start the command, which looks 20 times a second."""
    output = trainer.run.parent / "out"
    words = ("watch", trainer.run, "-o", output, "--interval", "0.05", *OPTIONS, *words)
    return Command(*words, **options)


def models(output: Path) -> dict[str, bytes]:
    """The files of an output that are the same each time it is made."""
    files = (path for path in sorted(output.rglob("*")) if path.is_file())
    told = ("ckpt_ema.json", "README.md")
    return {path.name: path.read_bytes() for path in files if path.name not in told}


def check_batch(trainer: Trainer) -> None:
    """Check that the output is the batch average of all checkpoints."""
    output = trainer.run.parent / "out"
    found = models(output)
    trainer.put(*(name for name in trainer.names if not (trainer.run / name).exists()))
    options: dict[str, Any] = {"schedule": "constant", "decay": 0.5, "keep_state": True}
    ckpt_ema.average(trainer.run, output=output, overwrite=True, **options)
    assert models(output) == found
    assert [one.name for one in output.parent.iterdir() if one.name.startswith(".")] == []


def folded(trainer: Trainer) -> list[str]:
    """The checkpoints that were folded so far, whether they are published or held."""
    output = trainer.run.parent / "out"
    so_far = folded_so_far(output, Workspace(output, HELD).output)
    states = so_far.held or so_far.published
    return [one.name for one in states[0].checkpoints] if states else []


def test_stdout_has_the_path_and_stderr_a_line_for_each_event(trainer: Trainer) -> None:
    trainer.put(*trainer.names)
    done = watching(trainer, "--until-step", 400).wait()
    output = trainer.run.parent / "out"
    assert (done.returncode, done.stdout) == (0, f"{output}\n")
    times, texts = zip(*((one[:19], one[20:]) for one in done.stderr.splitlines()), strict=True)
    assert all(time.strptime(one, "%Y-%m-%d %H:%M:%S") for one in times)
    assert texts == (
        f"watching {trainer.run}: 0 checkpoints so far",
        "checkpoint-100, checkpoint-200, checkpoint-300, ... (4 in all) folded, 4 in all",
        f"published {output}",
    )
    check_batch(trainer)


def test_neither_torch_nor_numpy_is_imported(trainer: Trainer, compiled_module: ModuleType) -> None:
    assert compiled_module
    trainer.put("checkpoint-100", "checkpoint-200")
    output = trainer.run.parent / "out"
    options = ("--idle", 0, "--interval", 0.05, "--on-publish", "true")
    imported = imported_by("watch", trainer.run, "-o", output, *OPTIONS, *options)
    trainer.put("checkpoint-300")
    imported |= imported_by("update", output)
    assert not {"torch", "numpy", "pydantic", "rich"} & {one.partition(".")[0] for one in imported}


def test_events_are_lines_of_json(trainer: Trainer) -> None:
    trainer.put("checkpoint-100")
    done = watching(trainer, "--idle", 0, "--json").wait()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["event"] for row in rows] == ["started", "folded", "published"]
    assert rows[1]["checkpoints"] == ["checkpoint-100"]
    assert all(row.keys() == {"time", "event", "text", "checkpoints"} for row in rows)
    assert done.stderr == ""


def test_quiet_hides_all_but_warnings(trainer: Trainer) -> None:
    trainer.put(*trainer.names)
    (trainer.run / "last").mkdir()
    write_safetensors(trainer.run / "last" / "model.safetensors", STATES[0])
    done = watching(trainer, "--idle", 0, "-q", "--on-publish", "exit 3 #").wait()
    assert done.stderr[20:] == "the command of --on-publish failed with exit code 3: exit 3 #\n"


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["--interval", "0"], 2, "--interval is '0'; it must be a time of more than 0 s"),
        (["--idle", "long"], 2, "--idle is 'long'; it must be a time"),
        (["--publish-every", "0"], 2, "--publish-every is '0'; it must be a whole number"),
        (["--until-step", "x"], 2, "--until-step is 'x'; it must be a whole number"),
        (["--idle", "0"], 3, "No checkpoints found"),
    ],
)
def test_what_cannot_be_is_one_line(
    trainer: Trainer, words: list[str], code: int, error: str
) -> None:
    trainer.run.mkdir()
    done = watching(trainer, *words).wait()
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: {error}")


def test_a_missed_checkpoint_is_a_failure(trainer: Trainer) -> None:
    """One that was seen incomplete, as its line says."""
    trainer.put("checkpoint-100")
    errors = trainer.run.parent / "errors"
    process = watching(trainer, stderr=errors)
    wait_for(lambda: folded(trainer))
    trainer.put("checkpoint-200")
    os.truncate(trainer.run / "checkpoint-200" / "model.safetensors", 900)
    wait_for(lambda: "checkpoint-200 is not complete yet" in errors.read_text())
    trainer.remove("checkpoint-200")
    done = process.wait()
    assert done.returncode == 1
    assert "checkpoint-200 was deleted before it was folded" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_publishes_what_was_folded(trainer: Trainer, number: int, code: int) -> None:
    trainer.put("checkpoint-100", "checkpoint-200")
    process = watching(trainer, "--publish-every", 99)
    wait_for(lambda: folded(trainer))
    process.send_signal(number)
    done = process.wait()
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].endswith("; what was folded is kept")
    assert folded(trainer) == ["checkpoint-100", "checkpoint-200"]
    assert (trainer.run.parent / "out" / "ckpt_ema.json").is_file()
    trainer.remove("checkpoint-100")
    trainer.put(*trainer.names[2:])
    assert watching(trainer, "--until-step", 400).wait().returncode == 0
    check_batch(trainer)


def test_a_signal_ends_the_wait_for_a_command_that_hangs(trainer: Trainer) -> None:
    trainer.put("checkpoint-100")
    mark = trainer.run.parent / "started"
    process = watching(trainer, "--idle", 0, "--on-publish", f"touch {mark}; sleep 30 #")
    wait_for(mark.exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20).returncode == 143


def watch_on(run: Path, output: Path, until_step: int) -> None:
    """Watch in a process of its own."""
    options: dict[str, Any] = {"schedule": "constant", "decay": 0.5, "tile_size": 64, "threads": 1}
    ckpt_ema.watch(
        run, output=output, until_step=until_step, interval=0.01, publish_every=2, **options
    )


def kill_at_random(trainer: Trainer, seed: int) -> int:
    """Kill it again and again while a trainer deletes what was folded; return how often."""
    random_seconds, kills = random.Random(seed), 0
    trainer.put("checkpoint-100", "checkpoint-200")
    for number in range(100):
        output = trainer.run.parent / "out"
        process = processes().Process(target=watch_on, args=(trainer.run, output, STEPS[-1]))
        process.start()
        process.join(random_seconds.uniform(0, 0.1 + 0.1 * number))  # later ones get somewhere
        process.kill()
        process.join()
        kills += process.exitcode != 0
        done = folded(trainer)
        assert done == trainer.names[: len(done)]
        if process.exitcode == 0:
            return kills
        if len(done) >= 2:
            trainer.put(*trainer.names[2:])
        for name in done[:-1]:
            if (trainer.run / name).exists():
                trainer.remove(name)
    raise AssertionError


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(1, 20))]
)
def test_killed_at_random_it_ends_with_the_average_of_all(trainer: Trainer, seed: int) -> None:
    assert kill_at_random(trainer, seed) > 0
    check_batch(trainer)
