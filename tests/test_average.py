"""A whole average: what is made of a run, and what a failure leaves."""

import errno
import json
import math
import os
import resource
import threading
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema import FailedError, OptionError, RefusedError
from ckpt_ema.errors import Code
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, read_safetensors, series, write_safetensors
from tests.makers.faulty_os import faulty
from tests.makers.faulty_storage import watching_reads
from tests.makers.folds import by_torch

both_ways = pytest.mark.usefixtures("either_fold")
MADE = {"model.safetensors", "config.json", "ckpt_ema.json", "README.md"}


def entries(folder: Path) -> set[str]:
    """Everything in a folder, hidden names too."""
    return {path.name for path in folder.iterdir()}


def test_the_output_is_a_sibling_that_mirrors_the_newest_checkpoint(make_run: MakeRun) -> None:
    run = make_run(series(3, b=noise(3, 4), a=noise(3, 2, 2)), steps=[5, 10, 100])
    result = ckpt_ema.average(run, device="cpu")
    assert result.output == run.parent / "run-ema"
    assert entries(result.output) == MADE
    newest = run / "checkpoint-100"
    assert (result.output / "config.json").read_bytes() == (newest / "config.json").read_bytes()
    assert list(read_safetensors(result.output / "model.safetensors")) == list(
        read_safetensors(newest / "model.safetensors")
    )


@both_ways
def test_shards_index_and_metadata_are_mirrored(make_run: MakeRun) -> None:
    states = series(3, **{f"layer{i}": noise(3, 3, 5, dtype=torch.bfloat16) for i in range(5)})
    run = make_run(states, shards=2)
    output = ckpt_ema.average(run, device="cpu").output
    index = json.loads((output / "model.safetensors.index.json").read_text())
    original = json.loads((run / "checkpoint-3/model.safetensors.index.json").read_text())
    assert index["weight_map"] == original["weight_map"]
    assert index["metadata"] == {"total_parameters": 75, "total_size": 150}
    tensors = {}
    for shard in set(index["weight_map"].values()):
        tensors.update(read_safetensors(output / shard))
    whole = make_run(states, name="whole")
    single = ckpt_ema.average(whole, device="cpu").output
    expected = read_safetensors(single / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_single_shard_keeps_its_index(make_run: MakeRun) -> None:
    """Without it no loader finds model-00001-of-00001.safetensors."""
    run = make_run(series(2, w=noise(2, 4)), shards=1)
    output = ckpt_ema.average(run, device="cpu").output
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"w": "model-00001-of-00001.safetensors"}
    assert (output / "model-00001-of-00001.safetensors").is_file()


def test_every_header_says_format_pt_and_where_it_comes_from(
    make_run: MakeRun, tmp_path: Path
) -> None:
    from safetensors import safe_open

    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        metadata = {"ss_network_dim": "8", "sshs_model_hash": "stale"}
        write_safetensors(
            run / f"lora-{step:06}.safetensors", {"w": torch.ones(2) * step}, metadata
        )
    output = ckpt_ema.average(run, device="cpu").output
    assert entries(output) == {"lora-000002.safetensors", "ckpt_ema.json", "README.md"}
    with safe_open(output / "lora-000002.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "ss_network_dim", "ckpt_ema"}
    assert metadata["format"] == "pt"
    provenance = json.loads(metadata["ckpt_ema"])
    assert [checkpoint["step"] for checkpoint in provenance["checkpoints"]] == [1, 2]


@both_ways
def test_torch_files_come_out_as_model_safetensors(make_run: MakeRun) -> None:
    states = series(4, w=noise(4, 6, 6), n=torch.tensor(7))
    from_torch = ckpt_ema.average(make_run(states, torch_files=True), device="cpu").output
    assert entries(from_torch) == MADE
    native = ckpt_ema.average(make_run(states, name="native"), device="cpu").output
    one, other = (read_safetensors(p / "model.safetensors") for p in (from_torch, native))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@both_ways
def test_tied_tensors_are_averaged_once_and_both_names_are_written(tmp_path: Path) -> None:
    """Peers add a shared storage twice: 5.67, 4.11 or 1.89 where 3.0 is right."""
    run = tmp_path / "run"
    run.mkdir()
    for step, value in enumerate((1.0, 3.0, 5.0), start=1):
        shared = torch.full((4,), value)
        torch.save({"state_dict": {"emb": shared, "head": shared}}, run / f"step_{step}.pt")
    result = ckpt_ema.average(run, device="cpu")
    tensors = read_safetensors(result.output / "model.safetensors")
    expected = 1 * 2 / 44 + 3 * 9 / 44 + 5 * 3 / 4
    assert tensors["emb"].tolist() == tensors["head"].tolist() == [pytest.approx(expected)] * 4
    assert result.plan.bytes_read == 3 * 4 * 4  # once, although there are two names


@both_ways
@pytest.mark.parametrize("legacy", [False, True])
def test_views_in_torch_files_are_read_in_their_logical_order(tmp_path: Path, legacy: bool) -> None:
    states = []
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2, 3):
        base = noise(3, 6, 8)[step - 1]
        states.append(
            {"t": base.t(), "slice": base[1:4, ::2], "row": base[2], "n": base.long().t()}
        )
        torch.save(states[-1], run / f"{step}.pt", _use_new_zipfile_serialization=not legacy)
    output = ckpt_ema.average(run, device="cpu", tile_size=20).output
    shadow = ckpt_ema.Shadow(0.999)
    for state in states:
        shadow.apply(state)
    tensors = read_safetensors(output / "model.safetensors")
    for name, expected in shadow.state_dict().items():
        assert torch.equal(tensors[name], expected.contiguous())


def test_the_manifest_tells_order_decays_and_weights(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 4)), steps=[9, 10, 100])
    output = ckpt_ema.average(run, device="cpu").output
    manifest = json.loads((output / "ckpt_ema.json").read_text())
    rows = manifest["checkpoints"]
    assert [row["step"] for row in rows] == [9, 10, 100]
    assert [row["decay"] for row in rows] == [None, 2 / 11, 0.25]
    assert [row["weight"] for row in rows] == pytest.approx([2 / 44, 9 / 44, 33 / 44])
    assert rows[0]["path"] == str(run / "checkpoint-9")
    assert manifest["device"] == "cpu"


def test_inputs_are_not_touched(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 4)), shards=1)

    def state() -> list[tuple[str, int, bytes]]:
        files = sorted(path for path in run.rglob("*") if path.is_file())
        return [(str(path), path.stat().st_mtime_ns, path.read_bytes()) for path in files]

    before = state()
    ckpt_ema.average(run, device="cpu")
    assert state() == before


def test_neighbouring_tensors_are_read_together(make_run: MakeRun) -> None:
    """A hundred small tensors of one dtype are one span, in the output and in every checkpoint."""
    run = make_run(series(3, **{f"w{i:03}": noise(3, 5) for i in range(100)}))
    plan = ckpt_ema.plan(run)
    assert len(plan.work.spans) == 1
    assert plan.bytes_read == 3 * 100 * 5 * 4


@both_ways
def test_progress_ends_at_the_planned_number_of_bytes(make_run: MakeRun) -> None:
    calls = []
    run = make_run(series(3, w=noise(3, 500), mask=torch.tensor([-math.inf]), n=torch.arange(9)))
    result = ckpt_ema.average(run, device="cpu", progress=lambda *call: calls.append(call))
    total = result.plan.bytes_read
    assert total == 3 * (500 + 1) * 4 + 9 * 8
    assert calls[-1] == (total, total)


def test_torchs_thread_setting_is_left_alone(make_run: MakeRun) -> None:
    before = torch.get_num_threads()
    ckpt_ema.average(make_run(series(2, w=noise(2, 4))), device="cpu", threads=3)
    assert torch.get_num_threads() == before


@both_ways
def test_one_checkpoint_alone_is_the_result(make_run: MakeRun) -> None:
    values = noise(1, 8)
    run = make_run(series(1, w=values), steps=[10])
    result = ckpt_ema.average(run, device="cpu")
    assert torch.equal(read_safetensors(result.output / "model.safetensors")["w"], values[0])
    assert ckpt_ema.plan(run / "checkpoint-10").output == run.parent / "run-ema"


def test_a_run_of_integers_only_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(RefusedError, match="no floating-point tensor"):
        ckpt_ema.plan(make_run(series(2, n=torch.arange(3))))


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", "opengl"])
def test_a_device_that_is_not_there_is_an_option_error(make_run: MakeRun, device: str) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    with pytest.raises(OptionError) as caught:
        ckpt_ema.average(run, device=device)
    assert caught.value.code is Code.DEVICE_UNAVAILABLE
    assert entries(run.parent) == {"run"}


@both_ways
@pytest.mark.parametrize("error", [errno.ENOSPC, KeyboardInterrupt])
def test_a_failure_while_writing_leaves_nothing(make_run: MakeRun, error: Any) -> None:
    run = make_run(series(2, w=noise(2, 4000)))
    expected = FailedError if error == errno.ENOSPC else KeyboardInterrupt
    with faulty("pwrite", 4, error), pytest.raises(expected):
        ckpt_ema.average(run, device="cpu", tile_size=400)
    assert entries(run.parent) == {"run"}


@pytest.mark.parametrize(
    ("is_write", "error", "code", "file"),
    [
        (False, errno.EIO, Code.READ_FAILED, "run/checkpoint-1/model.safetensors"),
        (True, errno.ENOSPC, Code.WRITE_FAILED, "run-ema"),
    ],
)
def test_an_error_in_the_compiled_fold_names_the_file(
    make_run: MakeRun,
    compiled_module: ModuleType,
    is_write: bool,
    error: int,
    code: Code,
    file: str,
) -> None:
    run = make_run(series(2, w=noise(2, 4000)))
    compiled_module.fail(is_write, 1, 1 << 62, error)
    try:
        with pytest.raises(FailedError) as caught:
            ckpt_ema.average(run, device="cpu")
    finally:
        compiled_module.fail(is_write, 1 << 62, 1 << 62, 0)
    assert (caught.value.code, caught.value.path) == (code, str(run.parent / file))
    assert os.strerror(error) in caught.value.message
    assert entries(run.parent) == {"run"}


def interrupt(*_: int) -> None:
    """Fail at the first call of progress, a tenth of a second after the first tile was begun."""
    raise KeyboardInterrupt


def test_threads_stop_within_a_tile(make_run: MakeRun) -> None:
    """Reading 100 checkpoints by torch takes 5 s here."""
    run = make_run(series(100, w=noise(100, 10)))
    before = time.monotonic()
    slow = watching_reads(lambda *_: time.sleep(0.05))
    with by_torch(), slow, pytest.raises(KeyboardInterrupt):
        ckpt_ema.average(run, device="cpu", threads=2, tile_size=20, progress=interrupt)
    assert time.monotonic() - before < 2.5
    assert entries(run.parent) == {"run"}


def test_the_compiled_fold_stops_within_a_tile(
    make_run: MakeRun, compiled_module: ModuleType
) -> None:
    """The 40th read does not end before the threads were told to stop; few more are made then."""
    run = make_run(series(100, w=noise(100, 10)))
    module, is_write = compiled_module, False
    module.fail(is_write, 40, 1 << 62, errno.EINTR)  # such a call is made again, and again
    timer = threading.Timer(0.5, module.fail, (is_write, 1 << 62, 1 << 62, 0))  # counts anew
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ckpt_ema.average(run, device="cpu", threads=1, progress=interrupt)
    timer.join()
    reads, _, _ = module.count_call(is_write)
    assert reads < 40
    assert entries(run.parent) == {"run"}


@both_ways
def test_a_file_that_vanishes_after_it_was_read_is_noticed(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    model = run / "checkpoint-1/model.safetensors"

    def rotate(done: int, total: int) -> None:
        if done == total:
            model.unlink(missing_ok=True)

    with pytest.raises(FailedError) as caught:
        ckpt_ema.average(run, device="cpu", progress=rotate)
    assert (caught.value.code, caught.value.path) == (Code.CHANGED, str(model))
    assert entries(run.parent) == {"run"}


def test_more_files_than_descriptors(make_run: MakeRun, tmp_path: Path) -> None:
    few = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 64))
    words = ("-q", "--device", "cpu", "--tile-size", "4", "--threads", "4")
    runs = [
        make_run(series(100, w=noise(100, 40)), name="steps"),
        make_run(series(2, **{f"w{i:03}": noise(2, 3) for i in range(120)}), shards=120),
    ]
    for run in runs:
        whole = ckpt_ema.average(run, device="cpu", output=tmp_path / "whole", overwrite=True)
        done = command("average", run, *words, before=few)
        assert (done.returncode, done.stderr) == (0, "")
        for path in whole.output.glob("*.safetensors"):
            made = Path(done.stdout.strip()) / path.name
            assert made.read_bytes() == path.read_bytes()


def test_a_run_whose_name_is_not_utf8_is_averaged(tmp_path: Path) -> None:
    run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff"))
    for step in (1, 2):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        state = {"w": torch.ones(2) * step}
        write_safetensors(run / f"checkpoint-{step}/model.safetensors", state)
    done = command("average", run, "-q", "--device", "cpu")
    assert (done.returncode, done.stdout) == (0, f"{run}-ema\n"), done.stderr
