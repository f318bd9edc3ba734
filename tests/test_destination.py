"""What is at the output path: up to date, replaced, or refused and kept."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema import FailedError, RefusedError
from ckpt_ema.errors import Code
from ckpt_ema.report import lines
from tests.conftest import MakeRun, noise, read_safetensors, series
from tests.makers.faulty_os import faulty

MADE = {"model.safetensors", "config.json", "ckpt_ema.json", "README.md"}


def entries(folder: Path) -> set[str]:
    """Everything in a folder, hidden names too."""
    return {path.name for path in folder.iterdir()}


def refusal(run: Path, **options: Any) -> RefusedError:
    """The error of an average that is refused."""
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.average(run, device="cpu", **options)
    return caught.value


def test_a_second_run_is_up_to_date_until_something_changes(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    output = ckpt_ema.average(run, device="cpu").output
    before = (output / "ckpt_ema.json").stat().st_mtime_ns
    again = ckpt_ema.average(run, device="cpu")
    assert (again.is_up_to_date, again.output, again.bytes_read) == (True, output, 0)
    assert (output / "ckpt_ema.json").stat().st_mtime_ns == before
    assert refusal(run, decay=0.1).code is Code.OUTPUT_EXISTS
    (output / "model.safetensors").unlink()
    assert not ckpt_ema.average(run, device="cpu", overwrite=True).is_up_to_date
    os.utime(run / "checkpoint-2/model.safetensors", (1, 1))
    assert not ckpt_ema.average(run, device="cpu", overwrite=True).is_up_to_date
    (run / "checkpoint-3" / "config.json").write_text('{"architectures": ["Tina"]}')
    assert not ckpt_ema.average(run, device="cpu", overwrite=True).is_up_to_date


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


def test_another_decay_is_another_average_even_with_equal_weights(make_run: MakeRun) -> None:
    """The header names the decay, so the bytes differ."""
    run = make_run(series(2, w=noise(2, 4)))
    ckpt_ema.average(run, device="cpu", decay=0.999)
    assert refusal(run, decay=0.9).code is Code.OUTPUT_EXISTS


def test_one_file_can_be_the_output(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(3, a=noise(3, 4), b=noise(3, 5)), shards=2)
    target = tmp_path / "average.safetensors"
    first = ckpt_ema.average(run, output=target, device="cpu")
    assert read_safetensors(target).keys() == {"a", "b"}
    assert entries(tmp_path) == {"run", "average.safetensors"}
    again = ckpt_ema.average(run, output=target, device="cpu")
    assert (first.is_up_to_date, again.is_up_to_date) == (False, True)
    for name in ("checkpoints", "warnings"):
        assert first.manifests[0][name] == again.manifests[0][name]


@pytest.mark.parametrize("value", [5, None, "abc", {"a": 1}, ["\x1b[31mred", {"code": ["x"]}, 7]])
def test_a_manifest_that_somebody_has_changed_does_no_harm(make_run: MakeRun, value: Any) -> None:
    result = ckpt_ema.average(make_run(series(2, w=noise(2, 4))), device="cpu")
    path = result.output / "ckpt_ema.json"
    changed = {**json.loads(path.read_bytes()), "warnings_of_reading": value, "device": "\x1b[2J"}
    path.write_text(json.dumps(changed))
    finished = ckpt_ema.finish(result.output)
    assert finished.warnings == ()
    assert "\x1b" not in lines.result_line(finished)


@pytest.mark.parametrize("value", [5, None, "abc", {"a": 1}, [5, {}, {"name": None}]])
@pytest.mark.parametrize("key", ["files", "companions"])
def test_a_changed_manifest_keeps_what_it_does_not_name(
    make_run: MakeRun, key: str, value: Any
) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    output = ckpt_ema.average(run, device="cpu").output
    path = output / "ckpt_ema.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    name = {"files": "model.safetensors", "companions": "config.json"}[key]
    error = refusal(run, decay=0.1, overwrite=True)
    assert (error.code, name in str(error)) == (Code.OUTPUT_EXISTS, True)
    assert entries(output) == MADE


def test_overwrite_replaces_a_model_and_nothing_else(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "model.safetensors").write_text("a model")
    (mixed / "train.py").write_text("...")
    error = refusal(run, output=mixed, overwrite=True)
    assert (error.code, error.path) == (Code.OUTPUT_EXISTS, str(mixed))
    assert "--overwrite would delete train.py." in error.message
    old = tmp_path / "old"
    old.mkdir()
    (old / "model.safetensors").write_text("an old model")
    (old / "vocabulary.txt").write_text("of the old model")
    ckpt_ema.average(run, output=old, overwrite=True, device="cpu")
    assert entries(old) == MADE
    assert entries(tmp_path) == {"run", "mixed", "old"}


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("notes"),
        lambda path: [(path / "src").mkdir(parents=True), (path / "data.tar").touch()],
        lambda path: [path.mkdir(), (path / "thesis.tex").touch()],
        lambda path: [path.mkdir(), (path / "step_1.safetensors").touch()],
        lambda path: [
            (path / "checkpoint-1").mkdir(parents=True),
            (path / "model.safetensors").touch(),
        ],
    ],
    ids=["a text file", "a project", "a thesis", "a flat run", "a run"],
)
def test_overwrite_never_deletes_what_is_more_than_a_model(
    make_run: MakeRun, tmp_path: Path, make: Any
) -> None:
    run = make_run(series(2, w=noise(2, 3)))
    make(tmp_path / "precious")
    before = sorted(tmp_path.rglob("*"))
    error = refusal(run, output=tmp_path / "precious", overwrite=True)
    assert "--overwrite would delete" in error.message
    without = refusal(run, output=tmp_path / "precious")
    assert (without.code, str(without)) == (error.code, str(error))
    assert sorted(tmp_path.rglob("*")) == before


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
    error = refusal(run, decay=0.15, overwrite=True, output=folder)
    assert "--overwrite would delete logs/eval.json." in error.message
    (folder / "logs/eval.json").rename(folder.parent / "eval.json")
    made = ckpt_ema.average(run, decay=0.15, device="cpu", overwrite=True, output=folder)
    assert (made.output / "tokenizer/vocab.txt").is_file()
    assert not (made.output / "logs").exists()


def test_an_empty_folder_is_free_to_be_the_output(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    (tmp_path / "made").mkdir()
    assert ckpt_ema.average(run, output=tmp_path / "made", device="cpu").output.is_dir()


def test_an_output_that_touches_the_inputs_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    farm = tmp_path / "farm"
    farm.mkdir()
    for step in (1, 2):
        (farm / f"checkpoint-{step}").symlink_to(run / f"checkpoint-{step}")
    cases = [(run, path) for path in (run, run / "checkpoint-1", run / "inside", tmp_path)]
    for given, output in [*cases, (farm, run / "checkpoint-1")]:  # an input behind a link
        for overwrite in (False, True):
            error = refusal(given, output=output, overwrite=overwrite)
            assert error.code is Code.OUTPUT_OVERLAPS_INPUT
            assert error.path == str(output)


def test_an_output_that_is_a_link_is_followed(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(2, w=noise(2, 3)))
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for decay in (0.1, 0.2):
        ckpt_ema.average(run, output=tmp_path / "link", decay=decay, overwrite=True, device="cpu")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()
    assert entries(tmp_path) == {"run", "disk", "link"}


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C library has no renameat2, as on macOS."""
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_is_replaced_is_gone_and_what_fails_leaves_the_old(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    output = ckpt_ema.average(run, device="cpu", decay=0.1).output
    old = (output / "model.safetensors").read_bytes()
    if not can_exchange:
        without_exchange(monkeypatch)
        for k in (1, 2, 3):
            with faulty("rename", k, errno.EIO), pytest.raises(FailedError) as caught:
                ckpt_ema.average(run, device="cpu", decay=0.2, overwrite=True)
            assert caught.value.code is Code.WRITE_FAILED
            assert (output / "model.safetensors").read_bytes() == old
    ckpt_ema.average(run, device="cpu", decay=0.2, overwrite=True)
    assert (output / "model.safetensors").read_bytes() != old
    assert entries(run.parent) == {"run", "run-ema"}


def test_the_last_output_is_kept_when_a_run_was_killed_between_two_renames(
    make_run: MakeRun,
) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    output = ckpt_ema.average(run, device="cpu").output
    hidden = output.with_name(".run-ema.ckpt-ema-00112233")
    output.rename(hidden)
    broken = make_run(series(2, w=torch.tensor([math.nan])), name="broken")
    refusal(broken, output=output)
    assert (hidden / "model.safetensors").exists()


def test_what_a_killed_run_left_is_removed_by_the_next(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    left = run.parent / ".run-ema.ckpt-ema-0123abcd"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    ckpt_ema.average(run, device="cpu")
    assert entries(run.parent) == {"run", "run-ema"}


def test_two_runs_to_one_output_leave_one_whole(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(3, w=noise(3, 4)))
    for output in (tmp_path / "out", tmp_path / "out.safetensors"):
        todo = [0.1]

        def overtake(*_: int, output: Path = output, todo: list[float] = todo) -> None:
            if todo:
                ckpt_ema.average(run, device="cpu", decay=todo.pop(), output=output)

        assert refusal(run, output=output, progress=overtake).code is Code.OUTPUT_EXISTS
        assert ckpt_ema.average(run, device="cpu", decay=0.1, output=output).is_up_to_date
    assert entries(tmp_path) == {"run", "out", "out.safetensors"}
