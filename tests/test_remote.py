"""A run that is reached over a network is averaged to the same bytes as its copy on a disk."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.storage import STORAGES
from ckpt_ema.storage.client import RemoteFile
from ckpt_ema.storage.remote import Remote
from tests.conftest import MakeRun, noise, series
from tests.makers import dcp_folders, deepspeed_folders
from tests.makers.torch_files import save

pytestmark = pytest.mark.usefixtures("either_fold")

STEPS = (100, 200, 300)


class Folders:
    """A `Client` whose bucket is a folder; counts requests, and fails where it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reads: list[tuple[str, int, int]] = []
        self.lists = 0
        self._lock = threading.Lock()

    def files(self, path: str) -> list[RemoteFile]:
        self.lists += 1
        root = self.folder / path.removeprefix("s3://bucket").lstrip("/")
        if root.is_file():
            return [self._file("", root)]
        found = (one for one in sorted(root.rglob("*")) if one.is_file())
        return [self._file(one.relative_to(root).as_posix(), one) for one in found]

    def _file(self, name: str, path: Path) -> RemoteFile:
        status = path.stat()
        return RemoteFile(name, status.st_size, status.st_mtime_ns, f"etag-{status.st_mtime_ns}")

    def read(self, path: str, file: RemoteFile, start: int, count: int) -> bytes:
        with self._lock:
            self.reads.append((f"{path}/{file.name}", start, count))
        root = self.folder / path.removeprefix("s3://bucket").lstrip("/")
        source = root / file.name if file.name else root
        with source.open("rb") as stream:
            stream.seek(start)
            content = stream.read(count)
        assert len(content) == count
        return content


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Folders]:
    """A bucket with what is in a folder."""
    client = Folders(tmp_path / "bucket")
    client.folder.mkdir()
    STORAGES["s3"] = Remote("s3", client)
    yield client
    del STORAGES["s3"]


def tensors(step: int) -> dict[str, torch.Tensor]:
    """A model with every layout."""
    generator = torch.Generator().manual_seed(step)
    base = torch.randn(12, 10, generator=generator)
    return {
        "table": torch.randn(300, 40, generator=generator),
        "turned": base.t(),
        "half": torch.randn(33, generator=generator).half(),
        "codes": torch.arange(9),
        "scalar": torch.randn((), generator=generator),
    }


def safetensors_run(folder: Path, make_run: MakeRun) -> None:
    states = series(3, a=noise(3, 50, 70), b=noise(3, 40, dtype=torch.bfloat16), n=torch.arange(9))
    run = make_run(states, steps=STEPS, shards=2)
    run.rename(folder)
    for step in STEPS:
        (folder / f"checkpoint-{step}/config.json").write_text("{}")
        (folder / f"checkpoint-{step}/trainer_state.json").write_text(
            json.dumps({"global_step": step})
        )


def torch_run(folder: Path, _make_run: MakeRun) -> None:
    folder.mkdir()
    for step in STEPS:
        save(
            folder / f"epoch=0-step={step}.ckpt", {"state_dict": tensors(step), "global_step": step}
        )


def dcp_run(folder: Path, _make_run: MakeRun) -> None:
    for step in STEPS:
        dcp_folders.save(folder / f"step-{step}", {"model": tensors(step)})


def deepspeed_run(folder: Path, _make_run: MakeRun) -> None:
    for step in STEPS:
        own = {name: one.float() for name, one in tensors(step).items() if name != "codes"}
        deepspeed_folders.save(folder / f"global_step{step}", own, stage=3, ranks=3, step=step)


RUNS = [safetensors_run, torch_run, dcp_run, deepspeed_run]


def files_of(output: Path) -> dict[str, bytes]:
    """The files of an output but those with paths and times."""
    found = (one for one in output.rglob("*") if one.is_file())
    return {
        str(one.relative_to(output)): one.read_bytes()
        for one in found
        if one.name not in ("ckpt_ema.json", "README.md")
    }


@pytest.mark.parametrize("save_as", [None, "checkpoint"])
@pytest.mark.parametrize("make", RUNS)
def test_the_output_is_that_of_a_local_run(
    bucket: Folders, tmp_path: Path, make_run: MakeRun, make: Any, save_as: str | None
) -> None:
    run = bucket.folder / "my run"
    make(run, make_run)
    options: dict[str, Any] = {"device": "cpu", "save_as": save_as, "last": "2,3"}
    local = ckpt_ema.average(run, output=tmp_path / "local", **options).output
    ways: list[Any] = [{}, {"threads": 3, "tile_size": 1024}]
    for number, more in enumerate(ways):
        result = ckpt_ema.average(
            "s3://bucket/my run", output=tmp_path / f"far-{number}", **options, **more
        )
        assert files_of(result.output) == files_of(local)
    for one in ckpt_ema.plan("s3://bucket/my run", output=tmp_path / "x", **options).checkpoints:
        assert str(one.path).startswith("s3://bucket/my run/")
