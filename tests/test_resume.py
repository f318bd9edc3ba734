"""An interrupted run goes on where it stopped, and its bytes are those of one that was not."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import FailedError, RefusedError
from ckpt_ema.fold import engine
from ckpt_ema.fold.monitors.twins import Twins
from ckpt_ema.fold.monitors.zeros import Turn, Zeroed
from ckpt_ema.output import ledger, publish, workspace
from tests.command import Command, wait_for
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, series

OPTIONS: dict[str, Any] = {"device": "cpu", "tile_size": 256, "resume": True}


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """A run of three checkpoints in about twenty tiles."""
    return make_run(series(3, a=noise(3, 1000), b=noise(3, 50, 4, dtype=torch.float16)))


def fail_after(count: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the write after `count` tiles fail; returns what mends it."""
    real, done = publish.StagedOutput.write, []

    def failing(staged: Any, file: int, data: memoryview, offset: int) -> None:
        if offset > 0 or file > 0:
            done.append(offset)
            if len(done) > count:
                raise FailedError("The disk is gone.")
        real(staged, file, data, offset)

    monkeypatch.setattr(publish.StagedOutput, "write", failing)
    return lambda: monkeypatch.setattr(publish.StagedOutput, "write", real)


def folded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the tiles that are folded from now on."""
    numbers: list[int] = []
    real = engine.run

    def run(plan: Any, tiles: Any, *arguments: Any, **options: Any) -> Any:
        given = list(tiles)
        numbers.extend(number for tile in given for number in tile.numbers)
        return real(plan, given, *arguments, **options)

    monkeypatch.setattr(engine, "run", run)
    return numbers


@pytest.mark.parametrize("count", [0, 1, 7, 18])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_done_is_not_done_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, threads: int
) -> None:
    whole = ckpt_ema.average(run, output=tmp_path / "whole", device="cpu").output
    mend = fail_after(count, monkeypatch)
    with pytest.raises(FailedError, match="The disk is gone"):
        ckpt_ema.average(run, output=tmp_path / "out", threads=threads, **OPTIONS)
    assert not (tmp_path / "out").exists()
    mend()
    numbers = folded(monkeypatch)
    made = ckpt_ema.average(run, output=tmp_path / "out", threads=threads, **OPTIONS)
    total = 16 + 4  # tiles of a and b
    assert total - count - threads <= len(numbers) <= total - count
    assert (made.output / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "whole"]


def test_progress_counts_what_is_left(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend = fail_after(10, monkeypatch)
    with pytest.raises(FailedError):
        ckpt_ema.average(run, output=tmp_path / "out", threads=1, **OPTIONS)
    mend()
    calls: list[tuple[int, int]] = []
    made = ckpt_ema.average(
        run, output=tmp_path / "out", progress=lambda *call: calls.append(call), **OPTIONS
    )
    assert calls[-1] == (calls[-1][1], calls[-1][1])
    assert 0 < calls[-1][1] < made.plan.bytes_read


def test_without_resume_nothing_is_kept_and_nothing_taken_up(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend = fail_after(5, monkeypatch)
    with pytest.raises(FailedError):
        ckpt_ema.average(run, output=tmp_path / "out", device="cpu", tile_size=256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    mend()
    mend = fail_after(5, monkeypatch)
    with pytest.raises(FailedError):
        ckpt_ema.average(run, output=tmp_path / "out", **OPTIONS)
    assert len(list(tmp_path.iterdir())) == 2
    mend()
    numbers = folded(monkeypatch)
    ckpt_ema.average(run, output=tmp_path / "out", device="cpu", tile_size=256)
    assert len(numbers) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("change", [{"decay": 0.2}, {"tile_size": 128}, {"dtype": "float32"}])
def test_another_average_starts_anew(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    mend = fail_after(5, monkeypatch)
    with pytest.raises(FailedError):
        ckpt_ema.average(run, output=tmp_path / "out", **OPTIONS)
    mend()
    numbers = folded(monkeypatch)
    ckpt_ema.average(run, output=tmp_path / "out", **{**OPTIONS, **change})
    assert numbers[0] == 0 and len(numbers) >= 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_what_is_refused_is_not_kept(make_run: MakeRun, tmp_path: Path) -> None:
    weights = noise(3, 500)
    weights[1][450] = float("nan")
    with pytest.raises(RefusedError, match="NaN"):
        ckpt_ema.average(make_run(series(3, w=weights)), output=tmp_path / "out", **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_what_was_seen_to_differ_is_remembered(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is left to fold is frozen, which does not make copies of the checkpoints."""
    run = make_run(series(3, a=noise(3, 64), b=torch.ones(640)))
    mend = fail_after(4, monkeypatch)
    with pytest.raises(FailedError):
        ckpt_ema.average(run, output=tmp_path / "out", threads=1, **OPTIONS)
    mend()
    assert ckpt_ema.average(run, output=tmp_path / "out", **OPTIONS).output.is_dir()


def test_a_line_that_is_half_there_is_no_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend = fail_after(9, monkeypatch)
    with pytest.raises(FailedError):
        ckpt_ema.average(run, output=tmp_path / "out", threads=1, **OPTIONS)
    mend()
    [lines] = tmp_path.glob(".out*/tiles-*.jsonl")
    os.truncate(lines, lines.stat().st_size - 5)
    numbers = folded(monkeypatch)
    ckpt_ema.average(run, output=tmp_path / "out", **OPTIONS)
    assert len(numbers) == 20


def test_bytes_are_on_disk_before_they_count_as_done(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_write = os.fsync, ledger.Journal.write

    def fsync(fd: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).suffix)
        real_fsync(fd)

    def written(*arguments: Any) -> None:
        events.append("write")
        real_write(*arguments)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(ledger.Journal, "write", written)
    monkeypatch.setattr(ledger, "_SECONDS", 0.0)
    ckpt_ema.average(run, output=tmp_path / "out", **OPTIONS)
    first = events[events.index("write") :]
    assert first.index(".safetensors") < first.index(".jsonl")


def write_slowly() -> None:
    """Take a while for each tile, and note each in the journal."""
    real, patched = publish.StagedOutput.write, pytest.MonkeyPatch()

    def slow(*arguments: Any) -> None:
        time.sleep(0.02)
        real(*arguments)

    patched.setattr(ledger, "_SECONDS", 0.0)
    patched.setattr(publish.StagedOutput, "write", slow)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.sweep)]
)
def test_a_killed_process_is_taken_up_by_the_next(
    make_run: MakeRun, tmp_path: Path, number: signal.Signals
) -> None:
    run = make_run(series(4, w=noise(4, 3_000_000)))
    whole = ckpt_ema.average(run, output=tmp_path / "whole", device="cpu").output
    words = ("average", run, "-o", tmp_path / "out", "--resume", "-q", "--tile-size", "65536")
    process = Command(*words, before=write_slowly)
    wait_for(lambda: list(tmp_path.glob(".out*/tiles-*.jsonl")))
    process.send_signal(number)
    done = process.wait()
    assert done.returncode == (-9 if number == signal.SIGKILL else 143)
    if number == signal.SIGTERM:
        assert done.stderr == "terminated, what is done is kept: go on with --resume\n"
    [lines] = tmp_path.glob(".out*/tiles-*.jsonl")
    assert lines.stat().st_size > 0
    assert command(*words).returncode == 0
    made = tmp_path / "out/model.safetensors"
    assert made.read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "whole"]


def test_two_processes_do_not_take_up_one_work(run: Path, tmp_path: Path) -> None:
    plan = ckpt_ema.plan(run, output=tmp_path / "out", device="cpu", tile_size=256)
    from ckpt_ema.output.workspace import Workspace

    with (
        Workspace(plan.output, plan.work_id),
        pytest.raises(RefusedError, match="Another process is at work on"),
    ):
        ckpt_ema.average(run, output=tmp_path / "out", **OPTIONS)


def test_what_is_written_down_of_an_output_that_is_published_is_void(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run was killed after it had published, and somebody has moved the output away."""
    output = tmp_path / "out"
    with monkeypatch.context() as killed:
        killed.setattr(workspace, "remove", lambda _: None)
        ckpt_ema.average(run, output=output, **OPTIONS)
    expected = (output / "model.safetensors").read_bytes()
    assert list(tmp_path.glob(".out.ckpt-ema-*/tiles-*.jsonl"))
    shutil.rmtree(output)
    ckpt_ema.average(run, output=output, **OPTIONS)
    assert (output / "model.safetensors").read_bytes() == expected
    assert not list(tmp_path.glob(".out.ckpt-ema-*"))


@pytest.mark.parametrize(
    "junk", [b"", b"\xff\xfe\n", b"\0" * 99, b"7\n", b"{}\n", b'{"tiles": [[0']
)
def test_a_journal_has_all_its_lines_and_passes_over_what_is_none(
    run: Path, tmp_path: Path, junk: bytes
) -> None:
    twins, zeroed = Twins([(0, 1)]), Zeroed(ckpt_ema.plan(run), [Turn(1, 7, 9, "w")])
    with workspace.Workspace(tmp_path / "out", "key") as folder:
        folder.output.mkdir()
        log = ledger.Journal(folder, lambda: None)
        for tiles in (range(3), [7], range(20, 22)):
            log.finish(tiles)
            log.write(twins, zeroed)
        [path] = folder.path.glob("*.jsonl")
        path.write_bytes(path.read_bytes() + junk)
        again = ledger.Journal(folder, lambda: None)
        assert again.done == {0, 1, 2, 7, 20, 21}
        assert set(again.zeroed) == {Turn(1, 7, 9, "w")}
