"""A whole average: what comes out, what travels, what is refused, and what is left on disk."""

import errno
import json
import math
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema import FailedError, OptionError, RefusedError
from ckpt_ema.fold import engine
from ckpt_ema.storage.pool import LocalPool
from tests.conftest import (
    MakeRun,
    noise,
    read_safetensors,
    series,
    write_safetensors,
)

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


def test_torch_files_come_out_as_model_safetensors(make_run: MakeRun) -> None:
    states = series(4, w=noise(4, 6, 6), n=torch.tensor(7))
    from_torch = ckpt_ema.average(make_run(states, torch_files=True), device="cpu").output
    assert entries(from_torch) == MADE
    native = ckpt_ema.average(make_run(states, name="native"), device="cpu").output
    one, other = (read_safetensors(p / "model.safetensors") for p in (from_torch, native))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


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


def test_one_file_can_be_the_output(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(3, a=noise(3, 4), b=noise(3, 5)), shards=2)
    target = tmp_path / "average.safetensors"
    first = ckpt_ema.average(run, output=target, device="cpu")
    assert read_safetensors(target).keys() == {"a", "b"}
    assert entries(tmp_path) == {"run", "average.safetensors"}
    assert not first.is_up_to_date
    assert ckpt_ema.average(run, output=target, device="cpu").is_up_to_date


def test_a_second_run_is_up_to_date_until_something_changes(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    output = ckpt_ema.average(run, device="cpu").output
    before = (output / "ckpt_ema.json").stat().st_mtime_ns
    assert ckpt_ema.average(run, device="cpu").is_up_to_date
    assert (output / "ckpt_ema.json").stat().st_mtime_ns == before
    with pytest.raises(RefusedError, match="exists already and is not this average"):
        ckpt_ema.average(run, decay=0.1, device="cpu")
    (output / "model.safetensors").unlink()
    assert not ckpt_ema.average(run, device="cpu", overwrite=True).is_up_to_date
    os.utime(run / "checkpoint-2/model.safetensors", (1, 1))
    assert not ckpt_ema.average(run, device="cpu", overwrite=True).is_up_to_date


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
    assert all(isinstance(warning, str) for warning in manifest["warnings"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_or_infinity_in_a_checkpoint_is_named_and_nothing_is_left(
    make_run: MakeRun, bad: float
) -> None:
    values = noise(4, 300)
    values[2][[7, 200]] = bad
    run = make_run(series(4, fine=noise(4, 90), w=values))
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.average(run, device="cpu", tile_size=400)
    kind = "2 NaN" if math.isnan(bad) else "2 infinite"
    assert "checkpoint-3: tensor w holds " + kind + " values (of 300)" in str(caught.value)
    assert "--allow-nonfinite" in caught.value.hint
    assert entries(run.parent) == {"run"}
    output = ckpt_ema.average(run, device="cpu", allow_nonfinite=True).output
    tensors = read_safetensors(output / "model.safetensors")
    assert not tensors["w"][7].isfinite()
    assert tensors["w"][8].isfinite()
    assert tensors["fine"].isfinite().all()


def test_overflow_of_a_narrow_output_is_named(make_run: MakeRun) -> None:
    run = make_run(series(2, w=torch.tensor([70000.0])))
    with pytest.raises(RefusedError, match="tensor w has values beyond the range of F16"):
        ckpt_ema.average(run, device="cpu", dtype="float16")


def test_overwrite_replaces_a_model_and_nothing_else(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    with pytest.raises(RefusedError, match="is more than a model"):
        ckpt_ema.average(run, output=precious, overwrite=True, device="cpu")
    assert (precious / "thesis.tex").read_text() == "..."
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "model.safetensors").write_text("a model")
    (mixed / "train.py").write_text("...")
    with pytest.raises(RefusedError, match=r"--overwrite would delete train\.py\."):
        ckpt_ema.average(run, output=mixed, overwrite=True, device="cpu")
    old = tmp_path / "old"
    old.mkdir()
    (old / "model.safetensors").write_text("an old model")
    (old / "vocabulary.txt").write_text("of the old model")
    ckpt_ema.average(run, output=old, overwrite=True, device="cpu")
    assert entries(old) == MADE
    assert entries(tmp_path) == {"run", "precious", "mixed", "old"}


@pytest.mark.parametrize("decay", [0.1, "0.1,0.2"])
def test_overwrite_deletes_nothing_that_was_put_into_an_output(
    make_run: MakeRun, decay: Any
) -> None:
    run = make_run(series(2, v=noise(2, 4), w=noise(2, 4)), shards=2)
    (run / "checkpoint-2/tokenizer").mkdir()
    (run / "checkpoint-2/tokenizer/vocab.txt").write_text("a")
    [folder, *_] = ckpt_ema.average(run, decay=decay, device="cpu").outputs
    (folder / "logs").mkdir()
    (folder / "logs/eval.json").write_text("{}")
    with pytest.raises(RefusedError, match=r"--overwrite would delete logs/eval\.json\."):
        ckpt_ema.average(run, decay=0.15, device="cpu", overwrite=True, output=folder)
    (folder / "logs/eval.json").rename(folder.parent / "eval.json")
    made = ckpt_ema.average(run, decay=0.15, device="cpu", overwrite=True, output=folder)
    assert (made.output / "tokenizer/vocab.txt").is_file()
    assert not (made.output / "logs").exists()


def test_an_empty_folder_is_free_to_be_the_output(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    (tmp_path / "made").mkdir()
    assert ckpt_ema.average(run, output=tmp_path / "made", device="cpu").output.is_dir()


def test_a_device_that_is_not_there_is_an_option_error(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(OptionError, match=r"--device .* cannot be used"):
            ckpt_ema.average(run, device=device)
    assert entries(run.parent) == {"run"}


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failure_while_writing_leaves_nothing(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    run = make_run(series(2, w=noise(2, 4000)))
    real, calls = os.pwrite, []

    def pwrite(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 3:
            raise failure
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    expected = FailedError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        ckpt_ema.average(run, device="cpu", tile_size=400)
    if expected is FailedError:
        assert "No space left on device" in str(caught.value)
    assert entries(run.parent) == {"run"}


def test_threads_stop_within_a_tile(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading 100 checkpoints takes 5 s here; the error comes in the first tenth of a second."""
    run = make_run(series(100, w=noise(100, 10)))
    read_into = LocalPool.read_into

    def slow(*arguments: Any) -> None:
        time.sleep(0.05)
        read_into(*arguments)

    def fail(*_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalPool, "read_into", slow)
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ckpt_ema.average(run, device="cpu", threads=2, tile_size=20, progress=fail)
    assert time.monotonic() - before < 2.5
    assert {path.name for path in run.parent.iterdir()} == {"run"}


def test_a_file_that_changes_while_it_is_read_is_noticed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    real = engine._run_threads

    def rotate(*arguments: Any) -> None:
        real(*arguments)
        (run / "checkpoint-1/model.safetensors").unlink()

    monkeypatch.setattr(engine, "_run_threads", rotate)
    with pytest.raises(FailedError, match="changed or vanished since the plan"):
        ckpt_ema.average(run, device="cpu")
    assert entries(run.parent) == {"run"}


def test_two_runs_to_one_output_leave_one_whole_and_tell_the_other(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    real = engine._run_threads

    def overtake(*arguments: Any) -> None:
        monkeypatch.setattr(engine, "_run_threads", real)
        ckpt_ema.average(run, device="cpu", decay=0.1)
        real(*arguments)

    monkeypatch.setattr(engine, "_run_threads", overtake)
    with pytest.raises(RefusedError, match="another run wrote it"):
        ckpt_ema.average(run, device="cpu")
    manifest = json.loads((run.parent / "run-ema/ckpt_ema.json").read_text())
    assert manifest["decay"] == 0.1
    assert entries(run.parent) == {"run", "run-ema"}


def test_what_a_killed_run_left_is_removed_by_the_next(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    left = run.parent / ".run-ema.ckpt-ema-0123abcd"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    ckpt_ema.average(run, device="cpu")
    assert entries(run.parent) == {"run", "run-ema"}


def test_output_files_honour_the_umask(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    old = os.umask(0o027)
    try:
        output = ckpt_ema.average(run, device="cpu").output
    finally:
        os.umask(old)
    assert stat.S_IMODE(output.stat().st_mode) == 0o750
    assert stat.S_IMODE((output / "model.safetensors").stat().st_mode) == 0o640


def test_inputs_are_not_touched(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 4)), shards=1)

    def state() -> list[tuple[str, int, bytes]]:
        files = sorted(path for path in run.rglob("*") if path.is_file())
        return [(str(path), path.stat().st_mtime_ns, path.read_bytes()) for path in files]

    before = state()
    ckpt_ema.average(run, device="cpu")
    assert state() == before


def test_more_checkpoints_than_descriptors(make_run: MakeRun) -> None:
    import resource

    run = make_run(series(100, w=noise(100, 40)))
    whole = ckpt_ema.average(run, device="cpu").output
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        few = ckpt_ema.average(
            run, device="cpu", tile_size=4, threads=4, output=run.parent / "few"
        ).output
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    name = "model.safetensors"
    assert (few / name).read_bytes() == (whole / name).read_bytes()


def test_neighbouring_tensors_are_read_together(make_run: MakeRun) -> None:
    """A hundred small tensors of one dtype are one span, in the output and in every checkpoint."""
    run = make_run(series(3, **{f"w{i:03}": noise(3, 5) for i in range(100)}))
    plan = ckpt_ema.plan(run)
    assert len(plan.work.spans) == 1
    assert plan.bytes_read == 3 * 100 * 5 * 4


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


def test_a_checkpoint_of_two_hundred_shards_is_planned_opening_each_file_once(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"layer.{number}" for number in range(200)]
    states = [{name: torch.full((2,), float(step)) for name in names} for step in (1, 2)]
    run = make_run(states, shards=200)
    opened: list[str] = []
    real = os.open

    def counted(path: Any, *arguments: Any, **options: Any) -> int:
        opened.append(os.fspath(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    ckpt_ema.plan(run)
    shards = [path for path in opened if path.endswith(".safetensors")]
    assert len(shards) == len(set(shards)) == 400


def test_one_checkpoint_alone_is_the_result(make_run: MakeRun) -> None:
    values = noise(1, 8)
    run = make_run(series(1, w=values), steps=[10])
    output = ckpt_ema.average(run, device="cpu").output
    assert torch.equal(read_safetensors(output / "model.safetensors")["w"], values[0])
    assert ckpt_ema.plan(run / "checkpoint-10").output == run.parent / "run-ema"
