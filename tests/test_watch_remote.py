"""A run in an object store is updated and watched as one on a disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch

import ckpt_ema
from ckpt_ema.watching import watch as module
from ckpt_ema.watching.events import Event, Kind
from tests.conftest import MakeRun, noise, series
from tests.makers.fake_s3 import FakeS3, Fault, fake_s3
from tests.makers.fake_trainer import Clock, Trainer

assert obstore  # or conftest leaves this module out
STEPS = [100, 200, 300, 400]
STATES = series(4, a=noise(4, 5, 70), b=noise(4, 40, dtype=torch.bfloat16))
HALF: dict[str, Any] = {"schedule": "constant", "decay": 0.5}
RUN = "s3://bucket/run"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    """An empty bucket, and the environment that leads to it."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    with fake_s3(tmp_path / "s3") as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        yield found


@pytest.fixture
def trainer(make_run: MakeRun, store: FakeS3) -> Trainer:
    """A trainer that keeps two checkpoints in the bucket."""
    whole = make_run(STATES, STEPS, name="whole")
    return Trainer(whole, store.root / "bucket" / "run", 2)


def models(output: Path) -> dict[str, bytes]:
    """The files of an output that are the same each time it is made."""
    files = (path for path in sorted(output.rglob("*")) if path.is_file())
    told = ("ckpt_ema.json", "README.md")
    return {path.name: path.read_bytes() for path in files if path.name not in told}


def check_batch(trainer: Trainer, output: Path) -> None:
    """Check that an output is the batch average of all checkpoints in the bucket."""
    found = models(output)
    trainer.put(*(name for name in trainer.names if not (trainer.run / name).exists()))
    ckpt_ema.average(RUN, output=output, overwrite=True, keep_state=True, **HALF)
    made = models(output)
    # The state has tags of files, which the store makes anew for those that are written again.
    assert {n: c for n, c in made.items() if n != "ckpt_ema.state"} == {
        n: c for n, c in found.items() if n != "ckpt_ema.state"
    }


def test_an_average_is_updated_from_a_bucket(trainer: Trainer, tmp_path: Path) -> None:
    output = tmp_path / "out"
    trainer.put("checkpoint-100", "checkpoint-200")
    ckpt_ema.average(RUN, output=output, keep_state=True, **HALF)
    trainer.put("checkpoint-300")
    trainer.remove("checkpoint-100")
    assert [one.name for one in ckpt_ema.update(output).plan.inputs][1:] == ["checkpoint-300"]
    assert ckpt_ema.update(output).is_up_to_date
    shutil.rmtree(trainer.run)
    trainer.put("checkpoint-400")
    ckpt_ema.update(output)
    check_batch(trainer, output)


def test_a_run_in_a_bucket_is_watched(
    trainer: Trainer, store: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before its first object, through an hour in which the store refuses."""
    events: list[Event] = []

    def saves() -> Iterator[None]:
        yield from (None,) * 2
        yield from trainer.saves("checkpoint-100", "checkpoint-200")
        store.faults.append(Fault("403"))
        trainer.put("checkpoint-300")
        yield from (None,) * 3
        store.faults.clear()
        yield from trainer.saves("checkpoint-300", "checkpoint-400")

    monkeypatch.setattr(module, "time", Clock(saves()))
    output = tmp_path / "out"
    options: dict[str, Any] = {"until_step": 400, "event": events.append, **HALF}
    ckpt_ema.watch(RUN, output=output, **options)
    folded = [name for one in events if one.kind is Kind.FOLDED for name in one.checkpoints]
    assert folded == trainer.names
    check_batch(trainer, output)
