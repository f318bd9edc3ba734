"""A plan: where its output goes, what it is known by, and how its files are laid out."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema import OptionError, RefusedError
from ckpt_ema.errors import Code
from ckpt_ema.planning import fingerprint
from tests.conftest import MakeRun, noise, read_safetensors, series, write_safetensors


def test_an_output_that_can_never_be_written_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    for output in (tmp_path / "no" / "where", tmp_path / "fifo", tmp_path / "broken"):
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.plan(run, output=output)
        assert caught.value.code is Code.INVALID_OUTPUT


def test_a_dot_is_the_folder_it_stands_for(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    monkeypatch.chdir(run)
    assert ckpt_ema.plan(".").output == run.parent / "run-ema"
    monkeypatch.chdir(run / "checkpoint-2")
    alone = ckpt_ema.plan(".")
    assert alone.output == run.parent / "run-ema"
    assert alone.checkpoints[0].step == 2


@pytest.mark.parametrize("run", [[], "", ["a", ""]])
def test_no_run_is_a_usage_error(run: Any) -> None:
    with pytest.raises(OptionError):
        ckpt_ema.plan(run)


# --- The fingerprint ------------------------------------------------------------------------------


def identity(run: Path, **options: Any) -> str:
    """The fingerprint of the one average of a plan."""
    [average] = ckpt_ema.plan(run, **options).averages
    return average.output.fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.9},  # the weights are equal, but headers name the decay
        {"last": 2},
        {"dtype": "bfloat16"},
        {"accumulate": "float32"},
        {"card": False},
        {"allow_nonfinite": True},
        {"device": "mps"},
        {"pattern": r"checkpoint-(\d)"},
    ],
    ids=str,
)
def test_what_changes_the_bytes_changes_the_fingerprint(
    make_run: MakeRun, options: dict[str, Any]
) -> None:
    run = make_run(series(3, w=noise(3, 4)), steps=[10, 20, 30])
    assert identity(run, **options) != identity(run)


@pytest.mark.parametrize(
    "options",
    [
        *[{"threads": 3}, {"tile_size": 64}, {"max_memory": "1MiB"}, {"device": "cpu"}],
        *[{"device": "cuda:1"}, {"last": 3}, {"allow_duplicates": True}, {"every": 1}],
    ],
    ids=str,
)
def test_what_leaves_the_bytes_leaves_the_fingerprint(
    make_run: MakeRun, options: dict[str, Any]
) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    assert identity(run, **options) == identity(run)
    assert identity(run, output=run.parent / "elsewhere") == identity(run)


def test_changed_inputs_and_another_fold_change_the_fingerprint(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    found = [identity(run)]
    (run / "checkpoint-2/config.json").write_text('{"architectures": ["Tina"]}')
    found.append(identity(run))
    os.utime(run / "checkpoint-1/model.safetensors", (1, 1))
    found.append(identity(run))
    monkeypatch.setattr(fingerprint, "FOLD_VERSION", fingerprint.FOLD_VERSION + 1)
    found.append(identity(run))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    found.append(identity(run))
    assert len(set(found)) == len(found)
    assert identity(run, device="cpu") == found[-2]


# --- Files ----------------------------------------------------------------------------------------


def test_shards_that_would_share_an_output_name_become_one_file(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        shards = {"a": "text-00001-of-00001.bin", "b": "vision-00001-of-00001.bin"}
        for name, shard in shards.items():
            torch.save({name: torch.ones(3)}, folder / shard)
        index = json.dumps({"weight_map": shards})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    [file] = ckpt_ema.plan(tmp_path / "run").averages[0].output.files
    assert file.name == "model.safetensors"
    assert {tensor.name for tensor in file.tensors} == {"a", "b"}


def test_a_shard_of_a_strange_name_is_averaged_and_not_copied_over(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        write_safetensors(folder / "part.safetensors.v1", {"w": torch.full((2,), float(step))})
        index = json.dumps({"weight_map": {"w": "part.safetensors.v1"}})
        (folder / "model.safetensors.index.json").write_text(index)
    output = ckpt_ema.average(tmp_path / "run", device="cpu").output
    found = read_safetensors(output / "part.safetensors.v1")["w"]
    assert found.tolist() == [pytest.approx(119 / 44)] * 2
