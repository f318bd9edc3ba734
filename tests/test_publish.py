"""An output is published when it is whole, accepted by safetensors, and on the disk."""

import contextlib
import errno
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import ckpt_ema
from ckpt_ema import FailedError
from ckpt_ema.errors import Code
from ckpt_ema.output.library import check_header
from tests.conftest import MakeRun, noise, series
from tests.makers.faulty_os import faulty
from tests.makers.faulty_storage import watching_reads


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SafetensorError("Error while deserializing header"), Code.DAMAGED),
        # The library has torch open the file, whose error is no OSError.
        (RuntimeError("unable to open file </dev/fd/10>: (5)"), Code.READ_FAILED),
        (OSError(errno.EIO, "Input/output error"), Code.READ_FAILED),
    ],
)
def test_a_file_that_the_library_rejects_is_not_published(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, error: Exception, code: Code
) -> None:
    run = make_run(series(2, w=noise(2, 4)))

    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr("safetensors.safe_open", failing)
    with pytest.raises(FailedError) as caught:
        ckpt_ema.average(run, device="cpu")
    assert (caught.value.code, caught.value.path) == (code, f"{run}-ema")
    assert [path.name for path in run.parent.iterdir()] == ["run"]


HEADER = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(7),
        len(HEADER).to_bytes(8, "little") + HEADER + bytes(15),
        len(HEADER).to_bytes(8, "little") + HEADER + bytes(17),
        (len(HEADER) + 1).to_bytes(8, "little") + HEADER + bytes(16),
        len(HEADER).to_bytes(8, "little") + HEADER.replace(b"4", b"5") + bytes(16),
        len(HEADER).to_bytes(8, "little") + HEADER.replace(b"F32", b"F31") + bytes(16),
    ],
)
def test_the_library_rejects_each_kind_of_damaged_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorError):
        check_header(str(path))


def test_asking_the_library_imports_no_framework_and_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + bytes(16))
    code = """
import sys
from ckpt_ema.output.library import check_header
check_header(sys.argv[1])
found = {"torch", "numpy", "paddle", "safetensors.torch", "safetensors.numpy"} & {*sys.modules}
sys.exit(", ".join(found) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_library_that_imports_its_framework_first_is_asked_with_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the failed import would stand for the acceptance of a file that nobody looked at."""
    asked = []

    class Opened(contextlib.nullcontext[None]):
        def __init__(self, path: str, framework: str) -> None:
            super().__init__()
            asked.append((path, framework))
            if framework != "pt":
                raise ModuleNotFoundError

    monkeypatch.setattr("safetensors.safe_open", Opened)
    check_header("some/path")
    assert asked[-1] == ("some/path", "pt")


def test_a_header_that_was_damaged_meanwhile_is_not_published(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))

    def damage(*_: int) -> None:
        [model] = run.parent.glob(".run-ema.*/output/model.safetensors")
        with model.open("r+b") as file:
            file.write(bytes(8))

    with pytest.raises(FailedError) as caught:
        ckpt_ema.average(run, device="cpu", progress=damage)
    assert caught.value.code is Code.DAMAGED
    assert [path.name for path in run.parent.iterdir()] == ["run"]


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
        events[-1] = Path(target).name  # the new name of what was made durable
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    ckpt_ema.average(run, device="cpu")
    named = events.index("rename to run-ema")
    before, after = events[:named], events[named + 1 :]
    assert {"model.safetensors", "config.json", "ckpt_ema.json"} < set(before)
    assert "output" in before  # the folder in the workspace
    assert before[-2] == "rename to published"
    assert before[-1].startswith(".run-ema.ckpt-ema-")
    assert after == [run.parent.name]


def test_an_output_that_may_not_survive_a_power_failure_is_published_with_an_error(
    make_run: MakeRun,
) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    failing = faulty("fsync", 1, errno.EIO, suffix=f"/{run.parent.name}")
    with failing, pytest.raises(FailedError) as caught:
        ckpt_ema.average(run, device="cpu")
    assert (caught.value.code, caught.value.path) == (Code.WRITE_FAILED, f"{run}-ema")
    assert "is published" in caught.value.message
    assert ckpt_ema.average(run, device="cpu").is_up_to_date


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder in a tmpfs, which every Linux has."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def test_space_in_memory_is_not_allocated_ahead(make_run: MakeRun, in_memory: Path) -> None:
    """Allocating takes as long there as writing; on a disk it takes no time."""
    run = make_run(series(2, w=noise(2, 1000)))
    for folder, allocated in ((in_memory, 0), (run.parent, 1)):
        with faulty() as counted:
            ckpt_ema.average(run, device="cpu", output=folder / "out")
        assert counted.calls["posix_fallocate"] == allocated
    outputs = [folder / "out/model.safetensors" for folder in (in_memory, run.parent)]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_too_little_memory_is_known_before_anything_is_read(
    make_run: MakeRun, in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = make_run(series(2, w=noise(2, 1000))), os.statvfs(in_memory)
    full = os.statvfs_result((*real[:4], 0, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with (
        pytest.raises(FailedError, match="No space left on device") as caught,
        watching_reads(lambda *_: pytest.fail("read")),
    ):
        ckpt_ema.average(run, device="cpu", output=in_memory / "out")
    assert caught.value.code is Code.WRITE_FAILED
    assert not [*in_memory.iterdir()]


def test_output_files_honour_the_umask(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    old = os.umask(0o027)
    try:
        output = ckpt_ema.average(run, device="cpu").output
    finally:
        os.umask(old)
    assert stat.S_IMODE(output.stat().st_mode) == 0o750
    assert stat.S_IMODE((output / "model.safetensors").stat().st_mode) == 0o640
