"""Outputs are synced while they are made, and not at all if nobody wants that."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckpt_ema
from ckpt_ema import FailedError
from ckpt_ema.errors import Code
from ckpt_ema.output import publish, sync
from ckpt_ema.output.manifest import Result
from ckpt_ema.output.publish import StagedOutput
from ckpt_ema.output.sync import Syncer
from ckpt_ema.targets.target import OutputFile
from tests import command
from tests.conftest import MakeRun, noise, series
from tests.makers.faulty_os import faulty

OPTIONS: dict[str, Any] = {"device": "cpu", "threads": 2, "tile_size": 256}


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """Three checkpoints, each of two shards."""
    return make_run(series(3, a=noise(3, 1000), b=noise(3, 1000)), shards=2)


@pytest.fixture
def small_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few bytes are synced while they are written, as large ones are."""
    monkeypatch.setattr(sync, "SYNCED_BYTES", 100)


def test_few_bytes_start_no_thread_and_many_one_at_a_time(small_syncs: None) -> None:
    synced: list[int] = []
    going_on = threading.Event()

    def slow(file: int) -> None:
        going_on.wait(10)
        synced.append(file)

    syncer, before = Syncer(slow), threading.active_count()
    syncer.note(1, 99)
    assert threading.active_count() == before
    for file in range(10):
        syncer.note(file, 1000)
    assert threading.active_count() == before + 1
    going_on.set()
    syncer.wait()
    assert synced == [0, 1]  # the others were written after that sync had begun
    syncer.note(3, 1)
    syncer.wait()
    assert {*synced} == {*range(10)}


def test_an_error_of_a_sync_is_raised_by_all_that_follows(small_syncs: None) -> None:
    error = OSError(errno.EIO, "Input/output error")

    def failing(_: int) -> None:
        raise error

    syncer = Syncer(failing)
    syncer.note(0, 100)
    syncer.close()
    later: list[Callable[[], None]] = [
        lambda: syncer.note(0, 100),
        syncer.wait,
        lambda: syncer.note(0, 1),
    ]
    for call in later:
        with pytest.raises(OSError, match="Input/output") as caught:
            call()
        assert caught.value is error


def test_where_no_thread_can_start_the_sync_is_left_to_the_end(
    small_syncs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    syncer = Syncer(lambda _: None)
    for _ in range(3):
        syncer.note(0, 100)
    syncer.wait()


def test_data_that_cannot_be_synced_is_the_failure_that_it_is_at_the_end(
    run: Path, small_syncs: None
) -> None:
    """Linux reports it once to a descriptor, so a later fsync of the same file succeeds."""
    with faulty("fdatasync", 1) as faults, pytest.raises(FailedError) as caught:
        ckpt_ema.average(run, **OPTIONS)
    assert faults.injected
    assert caught.value.code is Code.WRITE_FAILED
    assert str(caught.value) == (
        f"{run}-ema cannot be written: Input/output error. Nothing was published."
    )
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_a_line_of_the_ledger_waits_for_the_sync_under_way(
    tmp_path: Path, small_syncs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sync under way may be the one call that is told of the error."""

    def failing(_: int) -> None:
        time.sleep(0.1)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", failing)
    with StagedOutput(tmp_path / "out", "", False) as staged:
        staged.create([("model.safetensors", OutputFile("model.safetensors", 0, (), 200, ()))])
        staged.write(0, memoryview(bytes(200)), 0)
        with pytest.raises(FailedError):
            staged.make_durable()


def test_descriptors_are_those_of_the_files_however_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "descriptor_limit", lambda: 8)
    names = [f"{number}.safetensors" for number in range(20)]
    with StagedOutput(tmp_path / "out", "", False) as staged:
        staged.create([(name, OutputFile(name, 0, (), 8, ())) for name in names])
        with staged.descriptors([0, 19, 3]) as fds:
            for fd, number in zip(fds, (0, 19, 3), strict=True):
                assert os.path.samestat(os.fstat(fd), (staged.output / names[number]).stat())
        assert [fd for fd in fds if not is_open(fd)] == [fds[1]]
        with pytest.raises(FailedError) as caught, staged.descriptors([19]) as [fd]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert (caught.value.code, is_open(fd)) == (Code.WRITE_FAILED, False)


def is_open(fd: int) -> bool:
    """Whether there is a file behind a descriptor."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def in_parts(run: Path, **options: Any) -> Result:
    """Make an average in two parts."""
    for part in ("1/2", "2/2"):
        ckpt_ema.average_part(run, part, **options)
    return ckpt_ema.finish(Path(f"{run}-ema"), sync=options["sync"])


def resumed(run: Path, **options: Any) -> Result:
    """Make an average with a ledger."""
    return ckpt_ema.average(run, resume=True, **options)


@pytest.mark.parametrize("make", [ckpt_ema.average, in_parts, resumed])
def test_without_sync_nothing_is_synced_and_the_bytes_are_the_same(
    run: Path, small_syncs: None, make: Callable[..., Result]
) -> None:
    models = []
    for wanted in (True, False):
        with faulty() as faults:
            made = make(run, sync=wanted, **OPTIONS)
        counts = [faults.calls[kind] for kind in ("fsync", "fdatasync")]
        assert all(counts) if wanted else not any(counts)
        assert made.manifests[0]["sync"] is wanted
        models.append([path.read_bytes() for path in sorted(made.output.glob("*.safetensors"))])
        again = ckpt_ema.average(run, sync=not wanted, **OPTIONS)
        assert again.is_up_to_date  # it is no reason to make it again
        assert again.manifests[0]["sync"] is wanted
        made.output.rename(run.parent / f"made-{wanted}")
    assert len(models[0]) == 2
    assert models[0] == models[1]


@pytest.mark.parametrize(
    "unsynced", [["1/2"], ["finish"], ["1/2", "2/2"]], ids=lambda ways: "+".join(ways)
)
def test_an_output_of_parts_is_synced_if_all_of_it_was(run: Path, unsynced: list[str]) -> None:
    for part in ("1/2", "2/2"):
        ckpt_ema.average_part(run, part, sync=part not in unsynced, **OPTIONS)
    made = ckpt_ema.finish(Path(f"{run}-ema"), sync="finish" not in unsynced)
    assert made.manifests[0]["sync"] is False


def test_the_command_takes_it_where_an_output_is_written(run: Path) -> None:
    words = ("--device", "cpu", "--no-sync", "-q")
    for part in ("1/2", "2/2"):
        assert command.ckpt_ema("average", run, *words, "--part", part).returncode == 0
    done = command.ckpt_ema("finish", f"{run}-ema", "--no-sync", "--json")
    assert (done.returncode, '"sync": false' in done.stdout) == (0, True)
    done = command.ckpt_ema("average", run, *words, "--sync", "-o", run.parent / "b", "--json")
    assert (done.returncode, '"sync": true' in done.stdout) == (0, True)
