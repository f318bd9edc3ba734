"""A remote run is averaged to the same bytes as its copy on a disk."""

import json
import os
import resource
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

import ckpt_ema
from ckpt_ema.errors import Code, FailedError, OptionError, RefusedError
from ckpt_ema.report import figure
from ckpt_ema.report.terminal import plan_text
from ckpt_ema.storage import STORAGES
from ckpt_ema.storage.client import RemoteFile
from ckpt_ema.storage.protocol import Range
from ckpt_ema.storage.remote import Remote
from ckpt_ema.storage.remote_pool import RemotePool
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, series
from tests.makers import dcp_folders, deepspeed_folders
from tests.makers.fake_hub import FakeHub, fake_hub
from tests.makers.fake_s3 import Fault as S3Fault
from tests.makers.fake_s3 import fake_s3
from tests.makers.parsed_page import ParsedPage
from tests.makers.torch_files import save

pytestmark = pytest.mark.usefixtures("either_fold")

STEPS = (100, 200, 300)


class Folders:
    """A `Client` whose bucket is a folder; it records requests, and `before_tensor` may fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reads: list[tuple[str, int, int]] = []
        self.lists = 0
        self.most = self._now = 0  # concurrent requests
        self.before_tensor: Callable[[], object] = int
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
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(0.002)
        with self._lock:
            self._now -= 1
        if start and count >= 1 << 16:
            self.before_tensor()
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
    STORAGES["s3"] = Remote("s3", lambda _: client)
    yield client
    del STORAGES["s3"]


def tensors(step: int) -> dict[str, torch.Tensor]:
    """A model with matrices, a transposed one, a scalar, float16 and integers."""
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


def test_a_chunk_beside_what_a_tile_reads_is_not_needed(bucket: Folders, tmp_path: Path) -> None:
    """A tile has the end of a row and the begin of the next, and nothing of the middle columns."""
    for step in STEPS:
        whole = torch.arange(12.0).reshape(2, 6) * step
        parts = {f"w{at}": whole[:, at : at + 2].clone() for at in (0, 2, 4)}
        folder = bucket.folder / f"run/step-{step}"
        writer = FileSystemWriter(folder, single_file_per_rank=False)  # a file for each
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process is what is wanted
            state_dict_saver.save({"model": parts}, storage_writer=writer, no_dist=True)
        dcp_folders.edit(folder, _join_columns)
    options: dict[str, Any] = {"device": "cpu", "tile_size": 16}
    local = ckpt_ema.average(bucket.folder / "run", output=tmp_path / "local", **options).output
    far = ckpt_ema.average("s3://bucket/run", output=tmp_path / "far", **options).output
    assert files_of(far) == files_of(local)


def _join_columns(metadata: Metadata) -> None:
    """Make one tensor of three, two columns each."""
    entry = metadata.state_dict_metadata["model.w0"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.size, entry.chunks = torch.Size((2, 6)), []
    for at in (0, 2, 4):
        offsets = torch.Size((0, at))
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size((2, 2))))
        info = metadata.storage_data.pop(MetadataIndex(f"model.w{at}", (0, 0)))
        metadata.storage_data[MetadataIndex("model.w", offsets)] = info
        del metadata.state_dict_metadata[f"model.w{at}"]
    metadata.state_dict_metadata["model.w"] = entry


def test_threads_share_what_files_may_be_open(bucket: Folders, tmp_path: Path) -> None:
    """Each tile has as many files in memory as there are checkpoints."""
    run = one_tensor_run(bucket, 100)
    options: dict[str, Any] = {"device": "cpu", "tile_size": 1 << 14}
    local = ckpt_ema.average(run, output=tmp_path / "local", **options).output
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        far = ckpt_ema.average("s3://bucket/run", output=tmp_path / "far", threads=4, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert files_of(far.output) == files_of(local)


# --- What is asked for, and in which order --------------------------------------------------------


def one_tensor_run(bucket: Folders, steps: int = 3) -> Path:
    """Steps of one tensor of 256 KiB."""
    run = bucket.folder / "run"
    for step in range(1, steps + 1):
        values = torch.full((1 << 16,), float(step))
        (run / f"checkpoint-{step}").mkdir(parents=True)
        save_file({"w": values}, run / f"checkpoint-{step}/model.safetensors")
    return run


def test_each_byte_is_read_once_in_the_order_of_the_fold(bucket: Folders, tmp_path: Path) -> None:
    one_tensor_run(bucket)
    plan = ckpt_ema.plan("s3://bucket/run", output=tmp_path / "out")
    bucket.reads.clear()
    ckpt_ema.average(
        "s3://bucket/run", output=tmp_path / "out", device="cpu", threads=1, tile_size=1 << 16
    )
    tensor = [one for one in bucket.reads if one[2] == 1 << 16]
    assert sorted(tensor) == sorted(set(tensor))
    assert sum(count for _, _, count in tensor) == plan.bytes_read == 3 << 18
    offsets = [start for _, start, _ in tensor]
    assert [min(offsets[at : at + 3]) for at in range(0, 12, 3)] == sorted({*offsets})


def test_a_plan_lists_once_and_reads_headers_alone(bucket: Folders, tmp_path: Path) -> None:
    one_tensor_run(bucket)
    text = plan_text(ckpt_ema.plan("s3://bucket/run", output=tmp_path / "out"), None, 9)
    assert "768 KiB to read in 3 requests" in text
    assert bucket.lists == 1
    assert {start for _, start, _ in bucket.reads} == {0}


@pytest.mark.parametrize(("tile_size", "requests"), [(None, 3), (1 << 16, 12)])
def test_a_plan_counts_the_requests_of_the_average(
    bucket: Folders, tmp_path: Path, tile_size: int | None, requests: int
) -> None:
    one_tensor_run(bucket)
    options: dict[str, Any] = {"output": tmp_path / "out", "tile_size": tile_size}
    assert ckpt_ema.plan("s3://bucket/run", **options).requests == requests
    bucket.reads.clear()
    ckpt_ema.average("s3://bucket/run", device="cpu", **options)
    assert sum(start > 0 for _, start, _ in bucket.reads) == requests


def test_what_is_alike_in_other_steps_is_read_with_it(bucket: Folders, tmp_path: Path) -> None:
    """After a few sequential requests, the rest are sent concurrently."""
    one_tensor_run(bucket, 40)
    bucket.most = 0
    ckpt_ema.plan("s3://bucket/run", output=tmp_path / "out")
    assert len(bucket.reads) == len(set(bucket.reads)) == 40
    assert bucket.most > 8


# --- Everything that works on a disk --------------------------------------------------------------


def test_parts_and_up_to_date(bucket: Folders, tmp_path: Path) -> None:
    run = one_tensor_run(bucket)
    options: dict[str, Any] = {"device": "cpu", "tile_size": 1 << 16}
    local = ckpt_ema.average(run, output=tmp_path / "local", **options).output
    output = tmp_path / "out"
    for part in ("2/3", "1/3", "3/3"):
        ckpt_ema.average_part("s3://bucket/run/", part, output=output, **options)
    ckpt_ema.finish(output)
    assert files_of(output) == files_of(local)
    bucket.reads.clear()
    assert ckpt_ema.average("s3://bucket/run", output=output, **options).is_up_to_date
    assert {start for _, start, _ in bucket.reads} == {0}  # headers


def test_a_list_of_uris_and_a_configuration_from_one(bucket: Folders, tmp_path: Path) -> None:
    run = one_tensor_run(bucket)
    base = bucket.folder / "base"
    base.mkdir()
    (base / "config.json").write_text('{"a": 1}')
    uris = [f"s3://bucket/run/checkpoint-{step}" for step in (1, 2, 3)]
    options: dict[str, Any] = {"device": "cpu", "config_from": "s3://bucket/base"}
    output = ckpt_ema.average(uris, output=tmp_path / "out", **options).output
    local = ckpt_ema.average(run, output=tmp_path / "local", device="cpu").output
    assert (output / "config.json").read_text() == '{"a": 1}'
    assert files_of(output)["model.safetensors"] == files_of(local)["model.safetensors"]


def test_the_manifest_has_uris_and_what_identifies_their_files(
    bucket: Folders, tmp_path: Path
) -> None:
    one_tensor_run(bucket)
    output = ckpt_ema.average("s3://bucket/run", output=tmp_path / "out", device="cpu").output
    manifest = json.loads((output / "ckpt_ema.json").read_text())
    assert manifest["run"] == "s3://bucket/run"
    for one in manifest["checkpoints"]:
        assert one["path"].startswith("s3://bucket/run/checkpoint-")
        assert one["files"][0]["tag"].startswith("etag-")


def test_the_default_output_is_in_the_current_folder(
    bucket: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_tensor_run(bucket)
    monkeypatch.chdir(tmp_path)
    assert ckpt_ema.plan("s3://bucket/run").output == Path("run-ema")
    with pytest.raises(OptionError, match="s3://bucket/out is a URI"):
        ckpt_ema.plan("s3://bucket/run", output="s3://bucket/out")


def test_weights_are_drawn_to_a_local_file(bucket: Folders, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one_tensor_run(bucket)
    plan = ckpt_ema.plan("s3://bucket/run", output=tmp_path / "out")
    figure.plot(plan, tmp_path / "weights.svg")
    assert (tmp_path / "weights.svg").stat().st_size
    with pytest.raises(OptionError, match="a folder that does not exist"):
        figure.plot(plan, "s3://bucket/run/weights.svg")


def test_a_page_about_a_remote_run_is_a_local_file(bucket: Folders, tmp_path: Path) -> None:
    one_tensor_run(bucket)
    path = tmp_path / "page.html"
    ckpt_ema.average("s3://bucket/run", output=tmp_path / "out", report=path)
    assert "s3://bucket/run" in ParsedPage(path.read_text()).text
    with pytest.raises(OptionError, match="a folder that does not exist"):
        ckpt_ema.average("s3://bucket/run", output=tmp_path / "out", report="s3://bucket/a.html")


# --- What goes wrong ------------------------------------------------------------------------------


def test_a_file_that_changes_is_noticed_and_nothing_is_published(
    bucket: Folders, tmp_path: Path
) -> None:
    run = one_tensor_run(bucket)
    path = run / "checkpoint-2/model.safetensors"

    def change() -> None:
        os.utime(path, (1, 1))

    bucket.before_tensor = change
    with pytest.raises(FailedError, match=r"checkpoint-2/model\.safetensors changed") as caught:
        ckpt_ema.average("s3://bucket/run", output=tmp_path / "out", device="cpu")
    assert caught.value.code is Code.CHANGED
    assert {one.name for one in tmp_path.iterdir()} == {"bucket"}


def test_a_place_without_checkpoints_is_refused(bucket: Folders, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="s3://bucket/nothing"):
        ckpt_ema.plan("s3://bucket/nothing", output=tmp_path / "out")
    assert bucket.lists


def test_a_read_that_fails_ends_the_run(bucket: Folders, tmp_path: Path) -> None:
    one_tensor_run(bucket)

    def fail() -> None:
        raise FailedError("s3://bucket/run cannot be read: 503.", code=Code.READ_FAILED)

    bucket.before_tensor = fail
    with pytest.raises(FailedError, match="503"):
        ckpt_ema.average("s3://bucket/run", output=tmp_path / "out", device="cpu", threads=2)
    assert {one.name for one in tmp_path.iterdir()} == {"bucket"}


# --- Real protocols -------------------------------------------------------------------------------

SECRETS = ("wJalrSECRETvalue", "hf_SECRETtoken", "Signature=")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub whose revisions are steps, with a private repository."""
    for number, step in enumerate(STEPS):
        folder = tmp_path / f"hub/org/run/step{step}"
        folder.mkdir(parents=True)
        save_file({"w": noise(3, 400, 300)[number]}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    monkeypatch.setenv("HF_TOKEN", SECRETS[1])
    with fake_hub(tmp_path / "hub") as found:
        monkeypatch.setenv("HF_ENDPOINT", found.endpoint)
        found.token = SECRETS[1]
        yield found
    STORAGES.pop("hf", None)


def ran(*arguments: str, **options: Any) -> str:
    """The output of a command that succeeds and prints no secret."""
    done = command(*arguments, **options)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert not any(secret in said for secret in SECRETS)
    return said


def test_revisions_on_the_hub_are_steps(hub: FakeHub, tmp_path: Path) -> None:
    local = ckpt_ema.average(tmp_path / "hub/org/run", output=tmp_path / "local", device="cpu")
    ran("average", "hf://org/run@step*", "-o", str(tmp_path / "far"), "--device", "cpu", "--json")
    assert files_of(tmp_path / "far") == files_of(local.output)
    assert hub.authorized["hub"]
    assert not hub.authorized["cdn"]
    manifest = (tmp_path / "far/ckpt_ema.json").read_text()
    assert "hf://org/run@step*/step300" in manifest
    assert not any(secret in manifest for secret in SECRETS)


def test_objects_are_averaged_to_the_bytes_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in STEPS:
        folder = tmp_path / f"store/bucket/a run/checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"w": noise(3, 400, 300)[STEPS.index(step)]}, folder / "model.safetensors")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS[0])
    run = tmp_path / "store/bucket/a run"
    local = ckpt_ema.average(run, output=tmp_path / "local", device="cpu")
    with fake_s3(tmp_path / "store") as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        ran("average", "s3://bucket/a run", "-o", str(tmp_path / "far"), "--device", "cpu")
        store.faults.append(S3Fault("403", "checkpoint-200"))
        done = command("average", "s3://bucket/a run", "-o", str(tmp_path / "other"))
    assert files_of(tmp_path / "far") == files_of(local.output)
    assert done.returncode == 3
    assert "s3://bucket/a run/checkpoint-200" in done.stderr
    assert done.stderr.count("\n") <= 2
    assert not any(secret in done.stderr for secret in SECRETS)
    assert not (tmp_path / "other").exists()


def test_the_name_of_a_repository_leads_to_its_uri(tmp_path: Path) -> None:
    done = command("plan", "EleutherAI/pythia-14m", cwd=tmp_path)
    assert done.returncode == 3
    assert "pass hf://EleutherAI/pythia-14m." in done.stderr


def test_other_schemes_and_several_places_are_refused(bucket: Folders, tmp_path: Path) -> None:
    one_tensor_run(bucket)
    with pytest.raises(OptionError, match="https:// is not supported"):
        ckpt_ema.plan("https://example.com/run")
    with pytest.raises(OptionError, match="in several places"):
        ckpt_ema.plan(["s3://bucket/run/checkpoint-1", tmp_path])


def test_a_later_plan_sees_what_was_saved_since(bucket: Folders, tmp_path: Path) -> None:
    one_tensor_run(bucket)
    assert len(ckpt_ema.plan("s3://bucket/run", output=tmp_path / "out").checkpoints) == 3
    later = bucket.folder / "run/checkpoint-4/model.safetensors"
    later.parent.mkdir()
    save_file({"w": torch.full((1 << 16,), 9.0)}, later)
    assert len(ckpt_ema.plan("s3://bucket/run", output=tmp_path / "out").checkpoints) == 4


def test_a_failure_does_not_wait_for_the_link(bucket: Folders, tmp_path: Path) -> None:
    """A later read fails while those of the first tiles would take ten seconds."""
    one_tensor_run(bucket)
    numbers = iter(range(1000))
    released = threading.Event()

    def fail_once() -> None:
        if next(numbers) == 8:
            raise FailedError("s3://bucket/run cannot be read: 503.", code=Code.READ_FAILED)
        released.wait(10)

    bucket.before_tensor = fail_once
    began = time.monotonic()
    with pytest.raises(FailedError, match="503"):
        ckpt_ema.average(
            "s3://bucket/run", output=tmp_path / "out", device="cpu", threads=2, tile_size=1 << 16
        )
    assert time.monotonic() - began < 5
    released.set()


def test_files_of_a_list_have_the_configuration_beside_them(
    bucket: Folders, tmp_path: Path
) -> None:
    run = one_tensor_run(bucket)
    for folder in run.iterdir():
        (folder / "config.json").write_text("{}")
    names = [f"checkpoint-{step}/model.safetensors" for step in (1, 2, 3)]
    local = ckpt_ema.average([run / n for n in names], output=tmp_path / "local", device="cpu")
    uris = [f"s3://bucket/run/{name}" for name in names]
    remote = ckpt_ema.average(uris, output=tmp_path / "remote", device="cpu")
    assert files_of(remote.output) == files_of(local.output)
    assert "config.json" in files_of(remote.output)


def test_headers_of_many_steps_are_read_once(bucket: Folders, tmp_path: Path) -> None:
    one_tensor_run(bucket, 300)
    ckpt_ema.plan("s3://bucket/run", output=tmp_path / "out")
    assert len(bucket.reads) == len(set(bucket.reads)) == 300


def test_a_resumed_run_fetches_only_what_is_left(bucket: Folders, tmp_path: Path) -> None:
    run = one_tensor_run(bucket)
    options: dict[str, Any] = {"device": "cpu", "threads": 1, "tile_size": 1 << 12}
    local = ckpt_ema.average(run, output=tmp_path / "local", **options).output

    def folded(done_bytes: int, _total_bytes: int) -> None:
        if done_bytes:
            raise KeyboardInterrupt

    far: dict[str, Any] = {**options, "output": tmp_path / "far", "resume": True}
    with pytest.raises(KeyboardInterrupt):
        ckpt_ema.average("s3://bucket/run", progress=folded, **far)
    first = sum(count for _, start, count in bucket.reads if start)
    bucket.reads.clear()
    result = ckpt_ema.average("s3://bucket/run", **far)
    assert files_of(result.output) == files_of(local)
    assert first
    assert sum(count for _, start, count in bucket.reads if start) < 3 << 18


def test_what_is_fetched_ahead_is_bounded(
    bucket: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_tensor_run(bucket, 6)
    ahead, most = 0, 0
    request, held = RemotePool.request, RemotePool.held

    def requesting(pool: RemotePool, ranges: Iterable[Range]) -> None:
        nonlocal ahead, most
        wanted = list(ranges)
        ahead += sum(one.size_bytes for one in wanted)
        most = max(most, ahead)
        request(pool, wanted)

    def holding(pool: RemotePool, ranges: Iterable[Range]) -> Any:
        nonlocal ahead
        needed = list(ranges)
        ahead -= sum(one.size_bytes for one in needed)
        return held(pool, needed)

    monkeypatch.setattr(RemotePool, "request", requesting)
    monkeypatch.setattr(RemotePool, "held", holding)
    options: dict[str, Any] = {"output": tmp_path / "out", "max_memory": 1 << 22, "threads": 1}
    result = ckpt_ema.average("s3://bucket/run", device="cpu", **options)
    assert result.plan
    assert result.plan.memory_bytes <= 1 << 22
    assert 0 < most <= 1 << 21
    assert ahead == 0
