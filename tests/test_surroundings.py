"""Runs on machines as they are: strange files, other users, closed terminals, signals."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

import ckpt_ema
from ckpt_ema import OptionError, RefusedError
from ckpt_ema.errors import Code
from tests.command import Command, wait_for
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, series, write_safetensors
from tests.makers.users import AS_ROOT, be_nobody, let_others_in


def test_checkpoints_that_share_an_index_file_are_all_counted(make_run: MakeRun) -> None:
    """A store of blobs, or a tool that links equal files, gives equal indexes one inode."""
    run = make_run(series(3, a=noise(3, 2), b=noise(3, 2)), shards=2)
    for step in (2, 3):
        index = run / f"checkpoint-{step}" / "model.safetensors.index.json"
        index.unlink()
        os.link(run / "checkpoint-1" / "model.safetensors.index.json", index)
    assert len(ckpt_ema.plan(run).checkpoints) == 3


def test_a_numbered_folder_without_a_model_is_a_warning_at_the_end(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    (run / "checkpoint-3" / "model.safetensors").unlink()
    plan = ckpt_ema.plan(run)
    assert any("checkpoint-3 holds no model" in str(warning) for warning in plan.warnings)


def test_weights_files_given_one_by_one_are_known_by_their_folders(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 4)), steps=[5, 10, 15])
    plan = ckpt_ema.plan([run / f"checkpoint-{step}/model.safetensors" for step in (5, 10)])
    assert [checkpoint.step for checkpoint in plan.checkpoints] == [5, 10]


def test_options_without_sense_are_refused(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    with pytest.raises(OptionError):
        ckpt_ema.plan(run, tile_size=10**12)
    with pytest.raises(OptionError):
        ckpt_ema.plan([])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "dcp"])
def test_a_file_that_is_not_all_on_the_disk_is_a_warning(tmp_path: Path, form: str) -> None:
    """Its length and its header are right, and its end was never written."""
    run = tmp_path / "run"
    for step, weight in enumerate(noise(3, 1_000_000), start=1):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if form == "safetensors":
            write_safetensors(folder / "model.safetensors", {"w": weight})
        elif form == "dcp":
            save({"w": weight}, checkpoint_id=folder, no_dist=True)
        else:
            path = folder / "pytorch_model.bin"
            torch.save({"w": weight}, path, _use_new_zipfile_serialization=form == "zip")
    assert not any("hole" in str(warning) for warning in ckpt_ema.plan(run).warnings)
    newest = max(run.glob("checkpoint-3/*"), key=lambda path: path.stat().st_size)
    content = newest.read_bytes()
    with newest.open("wb") as file:
        file.write(content[:2_000_000])
        file.seek(3_900_000)
        file.write(content[3_900_000:])  # where a zip has its directory
    [warning] = [str(w) for w in ckpt_ema.plan(run).warnings if "hole" in str(w)]
    assert warning.startswith(f"{newest} has a hole at byte 20")


@pytest.fixture
def in_time() -> Iterator[None]:
    """Interrupt what hangs."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "name",
    [
        *("trainer_state.json", "config.json", "adapter_config.json", "README.md"),
        *("training_state/training_step.json", "CKPT.yaml", "all_results.json", "tokenizer.json"),
        *("model_index.json", "../latest_checkpointed_iteration.txt", "../config.json"),
        *("../README.md", "../model_index.json", "../checkpoint-4", "../model.safetensors"),
    ],
)
def test_a_fifo_beside_the_weights_is_not_waited_for(
    make_run: MakeRun, in_time: None, name: str
) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    fifo = run / "checkpoint-3" / name
    fifo.parent.mkdir(exist_ok=True)
    fifo.unlink(missing_ok=True)
    os.mkfifo(fifo)
    plan = ckpt_ema.plan(run)
    assert [checkpoint.step for checkpoint in plan.checkpoints] == [1, 2, 3]
    assert fifo not in [companion.source for companion in plan.averages[0].output.companions]


def test_a_sparse_file_beside_the_weights_costs_nothing(make_run: MakeRun) -> None:
    """It claims a terabyte."""
    run = make_run(series(2, w=noise(2, 4)))
    path = run / "checkpoint-2" / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run)
    assert (caught.value.code, caught.value.path) == (Code.WRONG_FORMAT, str(path))


@AS_ROOT
def test_what_somebody_else_left_beside_the_output_is_no_obstacle(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    let_others_in(run)
    run.parent.chmod(0o777)
    theirs = run.parent / ".out.ckpt-ema-00112233"
    theirs.mkdir(mode=0o700)
    words = ("average", run, "-o", run.parent / "out", "-q", "--device", "cpu")
    done = command(*words, before=be_nobody)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert theirs.is_dir()


@AS_ROOT
def test_an_output_of_somebody_else_that_was_replaced_is_named_where_it_is_left(
    make_run: MakeRun,
) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    let_others_in(run)
    run.parent.chmod(0o777)
    words = ("average", run, "-o", run.parent / "out", "-q", "--device", "cpu")
    assert command(*words, "--decay", "0.1").returncode == 0
    done = command(*words, "--overwrite", before=be_nobody)
    [left] = run.parent.glob(".out.ckpt-ema-*")
    assert done.returncode == 0
    assert done.stderr == (
        f"warning: The output that was replaced cannot be removed and is left as {left}.\n"
    )
    assert (left / "model.safetensors").is_file()


@AS_ROOT
def test_a_folder_without_a_number_that_may_not_be_read_is_no_obstacle(make_run: MakeRun) -> None:
    """Such as lost+found, where a run has a disk of its own."""
    run = make_run(series(2, w=noise(2, 4)))
    let_others_in(run)
    (run / "lost+found").mkdir(mode=0o700)
    (run / "lost+found").chmod(0)
    done = command("plan", run, "-q", before=be_nobody)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stderr_that_is_full_or_closed_changes_no_result(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    full = command("average", run, "-o", run.parent / "full", "--device", "cpu", stderr="/dev/full")
    assert (full.returncode, full.stdout) == (0, f"{run.parent}/full\n")
    closed = command("average", run, "--device", "cpu", before=partial(os.close, 2))
    assert (closed.returncode, closed.stdout) == (0, f"{run}-ema\n")


def test_signals_one_after_the_other_leave_nothing(make_run: MakeRun) -> None:
    run = make_run(series(20, w=noise(20, 1_000_000)))
    process = Command("average", run, "-q", "--tile-size", "400", "--device", "cpu")
    wait_for(lambda: list(run.parent.glob(".run-ema.*")))
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.02)
    done = process.wait()
    assert (done.returncode, done.stderr.count("\n")) == (130, 1)
    assert {path.name for path in run.parent.iterdir()} == {"run"}
