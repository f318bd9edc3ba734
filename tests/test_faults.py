"""What once went wrong, or nearly: each test is a fault that a review or a user found."""

import errno
import json
import math
import os
import resource
import signal
import stat
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

import ckpt_ema
from ckpt_ema import FailedError, OptionError, RefusedError
from ckpt_ema.errors import Code
from ckpt_ema.output import publish, workspace
from ckpt_ema.report import lines
from tests.command import Command, wait_for
from tests.command import ckpt_ema as command
from tests.conftest import (
    MakeRun,
    noise,
    raw,
    series,
    write_safetensors,
    write_shards,
)


def test_nan_is_not_blamed_on_a_mask_that_never_changes(make_run: MakeRun) -> None:
    values = noise(4, 9)
    values[2][5] = math.nan
    run = make_run(series(4, a_mask=torch.full((8,), -math.inf), w=values))
    with pytest.raises(RefusedError, match=r"checkpoint-3: tensor w holds 1 NaN values \(of 9\)"):
        ckpt_ema.average(run, device="cpu")


def test_checkpoints_that_share_an_index_file_are_all_counted(make_run: MakeRun) -> None:
    """A store of blobs, or a tool that links equal files, gives equal indexes one inode."""
    run = make_run(series(3, a=noise(3, 2), b=noise(3, 2)), shards=2)
    for step in (2, 3):
        index = run / f"checkpoint-{step}" / "model.safetensors.index.json"
        index.unlink()
        os.link(run / "checkpoint-1" / "model.safetensors.index.json", index)
    assert len(ckpt_ema.plan(run).checkpoints) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("notes"),
        lambda path: [(path / "src").mkdir(parents=True), (path / "data.tar").touch()],
        lambda path: [path.mkdir(), (path / "step_1.safetensors").touch()],
        lambda path: [
            (path / "checkpoint-1").mkdir(parents=True),
            (path / "model.safetensors").touch(),
        ],
    ],
    ids=["a text file", "a project", "a flat run", "a run"],
)
def test_overwrite_never_deletes_what_is_more_than_a_model(
    make_run: MakeRun, tmp_path: Path, make: Any
) -> None:
    run = make_run(series(2, w=noise(2, 3)))
    target = tmp_path / "precious"
    make(target)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RefusedError, match="is more than a model"):
        ckpt_ema.average(run, output=target, overwrite=True, device="cpu")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_is_a_link_is_followed(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(2, w=noise(2, 3)))
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for decay in (0.1, 0.2):
        ckpt_ema.average(run, output=tmp_path / "link", decay=decay, overwrite=True, device="cpu")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "disk", "link"}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_is_replaced_is_gone_and_what_fails_leaves_the_old(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    output = ckpt_ema.average(run, device="cpu", decay=0.1).output
    old = (output / "model.safetensors").read_bytes()
    if not can_exchange:
        monkeypatch.setattr(publish, "_exchange", lambda *_: False)
        real, moves = os.rename, []

        def rename(*paths: Any) -> None:
            moves.append(paths)
            if len(moves) == 2:
                raise OSError(5, "Input/output error")
            real(*paths)

        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(FailedError, match="Input/output error"):
            ckpt_ema.average(run, device="cpu", decay=0.2, overwrite=True)
        assert (output / "model.safetensors").read_bytes() == old
        monkeypatch.setattr(os, "rename", real)
    ckpt_ema.average(run, device="cpu", decay=0.2, overwrite=True)
    assert (output / "model.safetensors").read_bytes() != old
    assert {path.name for path in run.parent.iterdir()} == {"run", "run-ema"}


def test_the_last_output_is_kept_when_a_run_was_killed_between_two_names(
    make_run: MakeRun,
) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    output = ckpt_ema.average(run, device="cpu").output
    hidden = output.with_name(".run-ema.ckpt-ema-00112233")
    output.rename(hidden)
    broken = make_run(series(2, w=torch.tensor([math.nan])), name="broken")
    with pytest.raises(RefusedError):
        ckpt_ema.average(broken, output=output, device="cpu")
    assert (hidden / "model.safetensors").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "model.safetensors.index.json").unlink(),
        lambda out: (out / "model.safetensors.index.json").write_text("{}"),
        lambda out: (out / "config.json").write_text("changed"),
        lambda out: (out / "config.json").unlink(),
        lambda out: os.truncate(out / "model-00001-of-00002.safetensors", 100),
        lambda out: (out / "model-00001-of-00002.safetensors").write_bytes(
            bytes((out / "model-00001-of-00002.safetensors").stat().st_size)
        ),
    ],
)
def test_a_damaged_output_is_not_up_to_date(make_run: MakeRun, damage: Any) -> None:
    run = make_run(series(3, a=noise(3, 4), b=noise(3, 4)), shards=2)
    output = ckpt_ema.average(run, device="cpu").output
    assert ckpt_ema.average(run, device="cpu").is_up_to_date
    damage(output)
    assert not ckpt_ema.average(run, device="cpu", overwrite=True).is_up_to_date
    assert ckpt_ema.average(run, device="cpu").is_up_to_date


def test_more_shards_than_descriptors(make_run: MakeRun) -> None:
    states = series(2, **{f"w{i:03}": noise(2, 3) for i in range(120)})
    run = make_run(states, shards=120)
    few = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 64))
    done = command("average", run, "-q", "--device", "cpu", before=few)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(Path(done.stdout.strip()).glob("*.safetensors"))) == 120


def test_a_finished_file_that_the_library_refuses_is_not_published(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    real = publish.StagedOutput.create

    def create(staged: publish.StagedOutput, files: Any) -> None:
        real(staged, files)
        staged.write(0, memoryview(b"\0" * 8), 0)

    monkeypatch.setattr(publish.StagedOutput, "create", create)
    with pytest.raises(FailedError, match="the safetensors library refuses what was written"):
        ckpt_ema.average(run, device="cpu")
    assert {path.name for path in run.parent.iterdir()} == {"run"}


def test_a_finished_file_that_cannot_be_read_again_is_not_published(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library has torch open it, whose error is no OSError."""
    run = make_run(series(2, w=noise(2, 4)))

    def failing(*_: Any) -> None:
        raise RuntimeError("unable to open file </dev/fd/10>: Input/output error (5)")

    monkeypatch.setattr("safetensors.safe_open", failing)
    with pytest.raises(FailedError, match=r"run-ema cannot be read again: .*Input/output error"):
        ckpt_ema.average(run, device="cpu")
    assert {path.name for path in run.parent.iterdir()} == {"run"}


def test_everything_is_durable_before_it_has_its_name(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    events: list[str] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(fd: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real_fsync(fd)

    def rename(source: Any, target: Any) -> None:
        events.append(f"rename to {Path(target).name}")
        real_rename(source, target)

    def replace(source: Any, target: Any) -> None:
        assert events[-1] == Path(source).name
        events[-1] = Path(target).name  # what was made durable is called so now
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    ckpt_ema.average(run, device="cpu")
    named = events.index("rename to run-ema")
    before, after = events[:named], events[named + 1 :]
    assert {"model.safetensors", "config.json", "ckpt_ema.json"} < set(before)
    assert "output" in before  # the folder in the work folder
    assert before[-2] == "rename to published"
    assert before[-1].startswith(".run-ema.ckpt-ema-")
    assert after == [run.parent.name]


def test_a_single_file_keeps_the_race_winner(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    target = tmp_path / "out.safetensors"
    real = publish.StagedOutput.check_loads

    def overtaken(staged: publish.StagedOutput) -> None:
        real(staged)
        target.write_bytes(b"the winner")

    monkeypatch.setattr(publish.StagedOutput, "check_loads", overtaken)
    with pytest.raises(RefusedError, match="another run wrote it"):
        ckpt_ema.average(run, output=target, device="cpu")
    assert target.read_bytes() == b"the winner"


def test_a_numbered_folder_without_a_model_is_a_warning(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    (run / "checkpoint-2" / "model.safetensors").unlink()
    plan = ckpt_ema.plan(run)
    assert any("checkpoint-2 holds no model" in warning for warning in plan.warnings)


def test_weights_files_given_one_by_one_are_known_by_their_folders(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 4)), steps=[5, 10, 15])
    plan = ckpt_ema.plan([run / f"checkpoint-{step}/model.safetensors" for step in (5, 10)])
    assert [checkpoint.step for checkpoint in plan.checkpoints] == [5, 10]


def test_a_run_whose_name_is_not_utf8_is_averaged(tmp_path: Path) -> None:
    run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff"))
    for step in (1, 2):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        state = {"w": torch.ones(2) * step}
        write_safetensors(run / f"checkpoint-{step}/model.safetensors", state)
    done = command("average", run, "-q", "--device", "cpu")
    assert (done.returncode, done.stdout) == (0, f"{run}-ema\n"), done.stderr


def test_the_second_json_of_a_single_file_has_the_same_fields(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    target = tmp_path / "out.safetensors"
    first = ckpt_ema.average(run, output=target, device="cpu").manifests[0]
    second = ckpt_ema.average(run, output=target, device="cpu").manifests[0]
    assert first["checkpoints"] == second["checkpoints"]
    assert first["warnings"] == second["warnings"]


def test_a_shadow_keeps_the_dtype_of_the_last_integers() -> None:
    shadow = ckpt_ema.Shadow(0.9)
    shadow.apply({"n": torch.tensor(1, dtype=torch.int32)})
    shadow.apply({"n": torch.tensor(2**40 + 5)})
    assert shadow.average("n").item() == 2**40 + 5


@pytest.mark.parametrize("decay", [0.999, 0.99999, 0.3])
def test_float32_accumulators_weigh_as_they_should(decay: float) -> None:
    from ckpt_ema.fold.shadow import fold_

    shadow, value = torch.zeros(5), torch.ones(5)
    fold_(shadow, value, decay)
    assert shadow.tolist() == pytest.approx([1 - decay] * 5, rel=2e-7)
    zero = torch.tensor([-0.0, 0.0])
    frozen = zero.clone()
    fold_(frozen, zero, decay)
    assert raw(frozen) == raw(zero)


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")


def be_nobody() -> None:
    """Be the user nobody from now on."""
    os.setgroups([])
    os.setreuid(65534, 65534)


def let_others_in(run: Path) -> None:
    """Let other users read a run; pytest's folders are for their owner alone."""
    for folder in (run, *run.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            folder.chmod(0o755)


@AS_ROOT
@pytest.mark.parametrize("locked", ["", "checkpoint-2", "checkpoint-2/model.safetensors"])
def test_what_may_not_be_read_is_one_sentence(make_run: MakeRun, locked: str) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    let_others_in(run)
    (run / locked).chmod(0)
    done = command("average", run, "-q", before=be_nobody)
    (run / locked).chmod(0o755)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("\n") == 1
    assert "Permission denied" in done.stderr


def test_a_full_stderr_changes_no_result(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    done = command("average", run, "--device", "cpu", stderr="/dev/full")
    assert (done.returncode, done.stdout) == (0, f"{run}-ema\n")


def test_a_closed_stderr_changes_no_result(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    done = command("average", run, "--device", "cpu", before=partial(os.close, 2))
    assert (done.returncode, done.stdout) == (0, f"{run}-ema\n")


def test_signals_one_after_the_other_leave_nothing(make_run: MakeRun) -> None:
    run = make_run(series(20, w=noise(20, 1_000_000)))
    process = Command("average", run, "-q", "--tile-size", "400", "--device", "cpu")
    wait_for(lambda: list(run.parent.glob(".run-ema.*")))
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.02)
    done = process.wait()
    assert (done.returncode, done.stderr) == (130, "interrupted, nothing was written\n")
    assert {path.name for path in run.parent.iterdir()} == {"run"}


def test_shards_of_a_list_and_a_stale_one_are_told(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    write_shards(run / "checkpoint-2", {"w": torch.ones(4)}, 1)
    with pytest.raises(RefusedError, match="one of them is stale"):
        ckpt_ema.plan(run)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "dcp"])
def test_a_file_that_is_not_all_on_the_disk_is_warned_of(tmp_path: Path, form: str) -> None:
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
    assert Code.HOLES not in [warning.code for warning in ckpt_ema.plan(run).warnings]
    newest = max(run.glob("checkpoint-3/*"), key=lambda path: path.stat().st_size)
    content = newest.read_bytes()
    with newest.open("wb") as file:
        file.write(content[:2_000_000])
        file.seek(3_900_000)
        file.write(content[3_900_000:])  # where a zip has its directory
    [message] = [w.message for w in ckpt_ema.plan(run).warnings if w.code is Code.HOLES]
    assert message.startswith(f"{newest} has a hole at byte 20")


@pytest.fixture
def in_time() -> Iterator[None]:
    """What hangs is interrupted."""

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


@AS_ROOT
def test_what_somebody_else_has_left_beside_the_output_is_no_obstacle(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    let_others_in(run)
    run.parent.chmod(0o777)
    theirs = run.parent / ".out.ckpt-ema-00112233"
    theirs.mkdir(mode=0o700)
    words = ("average", run, "-o", run.parent / "out", "-q", "--device", "cpu")
    done = command(*words, before=be_nobody)
    assert (done.returncode, done.stderr) == (0, "")
    assert theirs.is_dir()


@pytest.mark.parametrize("told", [5, None, "abc", {"a": 1}, ["\x1b[31mred", 7]])
def test_a_manifest_that_somebody_has_changed_does_no_harm(make_run: MakeRun, told: Any) -> None:
    result = ckpt_ema.average(make_run(series(2, w=noise(2, 4))), device="cpu")
    path = result.output / "ckpt_ema.json"
    changed = {**json.loads(path.read_bytes()), "warnings_of_reading": told, "device": "\x1b[2J"}
    path.write_text(json.dumps(changed))
    finished = ckpt_ema.finish(result.output)
    said = "\n".join([*lines.reading_lines(finished), lines.result_line(finished)])
    assert "\x1b" not in said
    assert said.count("\n") == (len(told) if isinstance(told, list) else 0)


@AS_ROOT
def test_a_folder_without_a_number_that_may_not_be_read_is_no_obstacle(make_run: MakeRun) -> None:
    """As lost+found is, where a run has a disk of its own."""
    run = make_run(series(2, w=noise(2, 4)))
    let_others_in(run)
    (run / "lost+found").mkdir(mode=0o700)
    (run / "lost+found").chmod(0)
    done = command("plan", run, "-q", before=be_nobody)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_output_that_is_named_and_not_yet_durable_is_said_to_be_published(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    fsync_folder = workspace.fsync_folder

    def failing(path: Any) -> None:
        if Path(path) == run.parent:
            raise OSError(errno.EIO, "Input/output error")
        fsync_folder(path)

    monkeypatch.setattr(publish, "fsync_folder", failing)
    with pytest.raises(FailedError, match="run-ema is published, and may not survive a loss of"):
        ckpt_ema.average(run, device="cpu")
    assert (run.parent / "run-ema" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["trainer_state.json", "config.json"])
def test_a_sparse_file_beside_the_weights_costs_nothing(make_run: MakeRun, name: str) -> None:
    """It claims a terabyte."""
    run = make_run(series(2, w=noise(2, 4)))
    with (run / "checkpoint-2" / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RefusedError, match=f"{name} has 1099511627776 bytes, too many"):
        ckpt_ema.plan(run)


@pytest.mark.parametrize("device", ["meta", "opengl"])
def test_a_device_that_torch_lacks_is_an_option_error(make_run: MakeRun, device: str) -> None:
    with pytest.raises(OptionError):
        ckpt_ema.average(make_run(series(2, w=noise(2, 4))), device=device)
