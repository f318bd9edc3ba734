"""An interrupted run resumes where it stopped, and its bytes are those of one that was not."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import Code, FailedError, RefusedError
from ckpt_ema.fold.monitors import make_monitors, watched
from ckpt_ema.output import ledger
from ckpt_ema.output.ledger import Ledger
from ckpt_ema.output.workspace import Workspace
from tests.command import Command, wait_for
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, series
from tests.makers.faulty_os import faulty, slowed
from tests.makers.faulty_storage import watching_reads

OPTIONS: dict[str, Any] = {"device": "cpu", "tile_size": 256, "resume": True}
TILES = 16 + 4  # of a and b


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """A run of three checkpoints in twenty tiles."""
    return make_run(series(3, a=noise(3, 1000), b=noise(3, 50, 4, dtype=torch.float16)))


def interrupted(run: Path, count: int, **options: Any) -> None:
    """Average into `out`, where the write after `count` tiles fails."""
    # The first write is that of the header.
    failing = faulty("pwrite", count + 2, ever_after=True, suffix=".safetensors")
    with failing, pytest.raises(FailedError) as caught:
        ckpt_ema.average(run, output=run.parent / "out", **{**OPTIONS, **options})
    assert caught.value.code is Code.WRITE_FAILED
    assert not (run.parent / "out").exists()


def tiles_folded(run: Path, **options: Any) -> int:
    """Average into `out`; how many tiles were folded."""
    read: list[Path] = []
    with watching_reads(lambda path, *_: read.append(path)):
        ckpt_ema.average(run, output=run.parent / "out", **{**OPTIONS, **options})
    return read.count(run / "checkpoint-1/model.safetensors")


def model(output: Path) -> bytes:
    """The model file of an output."""
    return (output / "model.safetensors").read_bytes()


def entries(folder: Path) -> list[str]:
    """Everything in a folder, hidden names too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("count", [0, 1, 7, 18])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_done_is_not_done_again(
    run: Path, tmp_path: Path, count: int, threads: int
) -> None:
    whole = ckpt_ema.average(run, output=tmp_path / "whole", device="cpu").output
    interrupted(run, count, threads=threads)
    folded = tiles_folded(run, threads=threads)
    assert TILES - count - threads <= folded <= TILES - count
    assert model(tmp_path / "out") == model(whole)
    assert entries(tmp_path) == ["out", "run", "whole"]


def test_progress_counts_what_is_left(run: Path, tmp_path: Path) -> None:
    interrupted(run, 10, threads=1)
    calls: list[tuple[int, int]] = []
    made = ckpt_ema.average(
        run, output=tmp_path / "out", progress=lambda *call: calls.append(call), **OPTIONS
    )
    assert calls[-1] == (made.bytes_read, made.bytes_read)
    assert 0 < made.bytes_read < made.plan.bytes_read


def test_without_resume_nothing_is_kept_and_nothing_used(run: Path, tmp_path: Path) -> None:
    interrupted(run, 5, resume=False)
    assert entries(tmp_path) == ["run"]
    interrupted(run, 5)
    assert len(entries(tmp_path)) == 2
    assert tiles_folded(run, resume=False) == TILES
    assert entries(tmp_path) == ["out", "run"]


@pytest.mark.parametrize("change", [{"decay": 0.2}, {"tile_size": 128}, {"dtype": "float32"}])
def test_another_average_starts_anew(run: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    interrupted(run, 5)
    assert tiles_folded(run, **change) >= TILES
    assert entries(tmp_path) == ["out", "run"]


def test_what_is_refused_is_not_kept(make_run: MakeRun, tmp_path: Path) -> None:
    weights = noise(3, 500)
    weights[1][450] = float("nan")
    with pytest.raises(RefusedError):
        ckpt_ema.average(make_run(series(3, w=weights)), output=tmp_path / "out", **OPTIONS)
    assert entries(tmp_path) == ["run"]


def test_what_was_seen_to_differ_is_remembered(make_run: MakeRun, tmp_path: Path) -> None:
    """All that is left to fold is frozen, which does not make copies of the checkpoints."""
    run = make_run(series(3, a=noise(3, 64), b=torch.ones(640)))
    interrupted(run, 4, threads=1)
    assert ckpt_ema.average(run, output=tmp_path / "out", **OPTIONS).output.is_dir()


def test_a_line_that_is_incomplete_does_not_count(run: Path, tmp_path: Path) -> None:
    interrupted(run, 9, threads=1)
    [lines] = tmp_path.glob(".out*/tiles-*.jsonl")
    os.truncate(lines, lines.stat().st_size - 5)
    assert tiles_folded(run) == TILES


@pytest.mark.parametrize(
    "junk", [b"", b"\xff\xfe\n", b"\0" * 99, b"7\n", b"{}\n", b'{"tiles": [[0']
)
def test_a_ledger_has_all_its_lines_and_skips_everything_else(
    run: Path, tmp_path: Path, junk: bytes
) -> None:
    plan = ckpt_ema.plan(run)
    with Workspace(tmp_path / "out", "key") as workspace:
        workspace.output.mkdir()
        monitors = make_monitors(watched(plan))
        monitors[0].merge([(0, 1)])
        log = Ledger(workspace, monitors, lambda: None, is_kept=True)
        for tiles in (range(3), range(7, 8), range(20, 22)):
            log.finish(tiles)
            log.write()
        [path] = workspace.path.glob("*.jsonl")
        path.write_bytes(path.read_bytes() + junk)
        others = make_monitors(watched(plan))
        again = Ledger(workspace, others, lambda: None, is_kept=True)
        assert again.done == {0, 1, 2, 7, 20, 21}
        assert [json.dumps(other.state()) for other in others] == [
            json.dumps(monitor.state()) for monitor in monitors
        ]


def test_bytes_are_on_disk_before_they_count_as_done(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    calls: dict[str, Any] = {"fsync": os.fsync, "pwrite": os.pwrite}

    def noted(kind: str, fd: int, *rest: Any) -> Any:
        events.append((kind, Path(os.readlink(f"/proc/self/fd/{fd}")).suffix))
        return calls[kind](fd, *rest)

    for kind in calls:
        monkeypatch.setattr(os, kind, partial(noted, kind))
    monkeypatch.setattr(ledger, "SECONDS_BETWEEN_LINES", 0.0)
    ckpt_ema.average(run, output=tmp_path / "out", threads=1, **OPTIONS)
    lines = [place for place, event in enumerate(events) if event == ("pwrite", ".jsonl")]
    assert lines
    assert ("fsync", ".safetensors") in events[: lines[0]]


def write_slowly() -> None:
    """Take a while for each write, and note each tile in the ledger."""
    slowed("pwrite", 0.02)
    ledger.SECONDS_BETWEEN_LINES = 0.0


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.sweep)]
)
def test_the_next_process_continues_the_work_of_a_killed_one(
    make_run: MakeRun, tmp_path: Path, number: signal.Signals
) -> None:
    run = make_run(series(4, w=noise(4, 3_000_000)))
    whole = ckpt_ema.average(run, output=tmp_path / "whole", device="cpu").output
    words = ("average", run, "-o", tmp_path / "out", "--resume", "-q", "--tile-size", "65536")
    process = Command(*words, before=write_slowly)
    wait_for(lambda: [p for p in tmp_path.glob(".out*/tiles-*.jsonl") if p.stat().st_size])
    process.send_signal(number)
    done = process.wait()
    assert done.returncode == (-9 if number == signal.SIGKILL else 143)
    assert number == signal.SIGKILL or "--resume" in done.stderr
    assert list(tmp_path.glob(".out*/tiles-*.jsonl"))
    assert command(*words).returncode == 0
    assert model(tmp_path / "out") == model(whole)
    assert entries(tmp_path) == ["out", "run", "whole"]


def test_two_processes_do_not_share_one_workspace(run: Path, tmp_path: Path) -> None:
    plan = ckpt_ema.plan(run, output=tmp_path / "out", device="cpu", tile_size=256)
    with Workspace(plan.output, plan.work_id), pytest.raises(RefusedError) as caught:
        ckpt_ema.average(run, output=tmp_path / "out", **OPTIONS)
    assert (caught.value.code, caught.value.path) == (Code.OUTPUT_IN_USE, str(tmp_path / "out"))


def test_the_records_of_an_output_that_was_published_are_void(run: Path, tmp_path: Path) -> None:
    """A run was killed after it had published, and somebody has moved the output away."""
    output = tmp_path / "out"
    with faulty("unlink", 1, ever_after=True):
        ckpt_ema.average(run, output=output, **OPTIONS)
    expected = model(output)
    assert list(tmp_path.glob(".out.ckpt-ema-*/tiles-*.jsonl"))
    shutil.rmtree(output)
    ckpt_ema.average(run, output=output, **OPTIONS)
    assert model(output) == expected
    assert not list(tmp_path.glob(".out.ckpt-ema-*"))
