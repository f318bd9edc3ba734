"""A watched run: every checkpoint is folded once, in order, before the trainer deletes it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import Code, FailedError, OptionError, RefusedError
from ckpt_ema.output.manifest import Result
from ckpt_ema.run import carry_out
from ckpt_ema.storage import storage_for
from ckpt_ema.updating import publish_instead
from ckpt_ema.watching import held as publishing
from ckpt_ema.watching import watch as module
from ckpt_ema.watching.events import Event, Kind
from ckpt_ema.watching.sightings import Listing
from tests.command import run_together, wait_for
from tests.conftest import MakeRun, noise, read_safetensors, series, write_safetensors
from tests.makers import dcp_folders
from tests.makers.fake_trainer import Clock, Trainer
from tests.makers.faulty_os import faulty

COUNT = 5
STEPS = [100 * n for n in range(1, COUNT + 1)]
STATES = series(COUNT, a=noise(COUNT, 5, 70), b=noise(COUNT, 40, dtype=torch.bfloat16))
HALF: dict[str, Any] = {"schedule": "constant", "decay": 0.5}


@pytest.fixture
def whole(make_run: MakeRun) -> Path:
    """Five checkpoints of transformers' trainer."""
    run = make_run(STATES, STEPS, name="whole")
    for step in STEPS:
        state = json.dumps({"global_step": step})
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    return run


@pytest.fixture
def trainer(whole: Path) -> Trainer:
    """A trainer that keeps one checkpoint; it has saved nothing yet."""
    return Trainer(whole, whole.parent / "run", 1, last="trainer_state")


class Watch:
    """A watch on a clock of its own, and the events it had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self.clock = Clock()
        self._monkeypatch = monkeypatch

    def __call__(
        self, run: Path | str, doing: Iterator[object] | None = None, **options: Any
    ) -> Result:
        """Watch a run while others do something, with decay 1/2."""
        self.events.clear()
        self.clock = Clock(doing)
        self._monkeypatch.setattr(module, "time", self.clock)
        try:
            return ckpt_ema.watch(run, **{"event": self.events.append, **HALF, **options})
        finally:
            if isinstance(doing, Generator):
                doing.close()  # with its faults

    def texts(self, kind: Kind) -> list[str]:
        """What was said."""
        return [event.text for event in self.events if event.kind is kind]

    @property
    def folded(self) -> list[str]:
        """The checkpoints that were folded."""
        return [name for one in self.events if one.kind is Kind.FOLDED for name in one.checkpoints]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A function that watches a run."""
    return Watch(monkeypatch)


def contents(folder: Path) -> dict[str, bytes]:
    """What an output holds, but for how and when it was made."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: content for name, content in named.items() if "ckpt_ema.json" not in name}


def check_batch(output: Path, trainer: Trainer, run: Path | None = None, **options: Any) -> None:
    """Check that an output is the batch average of all checkpoints, byte for byte."""
    found = contents(output)
    shutil.rmtree(run or trainer.run)
    shutil.copytree(trainer.whole, trainer.run)
    shutil.rmtree(output)
    keywords: dict[str, Any] = {**HALF, **options, "output": output, "keep_state": True}
    ckpt_ema.average(run or trainer.run, **keywords)
    assert contents(output) == found
    assert [one.name for one in output.parent.iterdir() if one.name.startswith(".")] == []


# --- Every checkpoint, once, in order -------------------------------------------------------------


def make_files(folder: Path, pattern: str) -> None:
    """Files of torch.save side by side."""
    folder.mkdir()
    for step, state in zip(STEPS, STATES, strict=True):
        torch.save({"state_dict": dict(state), "global_step": step}, folder / pattern.format(step))


def make_dcp(folder: Path) -> None:
    """Folders of torch.distributed.checkpoint, which write `.metadata` last."""
    for step, state in zip(STEPS, STATES, strict=True):
        dcp_folders.save(folder / f"step-{step}", {"model": dict(state)})


FORMS: dict[str, Callable[[MakeRun, Path], object]] = {
    "safetensors": lambda make, _: make(STATES, STEPS, name="whole"),
    "index": lambda make, _: make(STATES, STEPS, name="whole", shards=2),
    "pytorch_model": lambda make, _: make(STATES, STEPS, name="whole", torch_files=True),
    "step_": lambda _, path: make_files(path / "whole", "step_{}.pt"),
    "ckpt": lambda _, path: make_files(path / "whole", "epoch=1-step={}.ckpt"),
    ".metadata": lambda _, path: make_dcp(path / "whole"),
}


@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_trainer_rotates_away_is_in_the_average(
    make_run: MakeRun, tmp_path: Path, watch: Watch, form: str, limit: int
) -> None:
    FORMS[form](make_run, tmp_path)
    trainer = Trainer(tmp_path / "whole", tmp_path / "run", limit, last=form)
    made = watch(trainer.run, trainer.saves(), until_step=500)
    assert watch.folded == [name.removesuffix(".pt") for name in trainer.names] or (
        watch.folded == trainer.names
    )
    assert len([*trainer.run.iterdir()]) == (limit or COUNT)
    check_batch(made.output, trainer)


def test_a_trainer_that_deletes_before_it_saves(watch: Watch, trainer: Trainer) -> None:
    """The folded checkpoint is incomplete while it is deleted; that is no news."""
    eager = Trainer(trainer.whole, trainer.run, 1, last="trainer_state", is_eager=True)
    made = watch(trainer.run, eager.saves(), until_step=500)
    assert watch.folded == trainer.names
    check_batch(made.output, trainer)


def test_the_last_checkpoint_is_not_missed_while_it_is_deleted_piece_by_piece(
    watch: Watch, trainer: Trainer
) -> None:
    """It was folded, and nothing else is there."""

    def saves() -> Iterator[None]:
        yield from trainer.saves("checkpoint-100")
        os.truncate(trainer.run / "checkpoint-100" / "model.safetensors", 900)
        (trainer.run / "checkpoint-100" / "config.json").unlink()
        yield from (None,) * 3
        trainer.remove("checkpoint-100")
        yield from (None,) * 3
        yield from trainer.saves("checkpoint-200")

    watch(trainer.run, saves(), until_step=200)
    assert watch.folded == ["checkpoint-100", "checkpoint-200"]
    assert watch.texts(Kind.MISSED) == []


def test_a_folder_that_waits_long_for_its_model_is_seen_when_it_comes(
    watch: Watch, trainer: Trainer
) -> None:
    """Nothing changes but what is in the folder of the newest checkpoint."""

    def saves() -> Iterator[None]:
        trainer.put("checkpoint-100")
        (trainer.run / "checkpoint-200").mkdir()
        yield from (None,) * 6
        assert watch.folded == ["checkpoint-100"]
        yield from trainer.save("checkpoint-200")

    watch(trainer.run, saves(), until_step=200)
    assert watch.folded == ["checkpoint-100", "checkpoint-200"]
    assert any("checkpoint-200 is not complete yet" in one for one in watch.texts(Kind.WAITING))


def test_what_a_marker_ends_is_not_folded_before_it(watch: Watch, trainer: Trainer) -> None:
    """Its model is whole and quiet for a while."""

    def saves() -> Iterator[None]:
        trainer.put("checkpoint-100", "checkpoint-200")
        yield from (None,) * 3
        trainer.put("checkpoint-300")
        (trainer.run / "checkpoint-300" / "trainer_state.json").unlink()
        yield from (None,) * 6
        assert watch.folded == ["checkpoint-100", "checkpoint-200"]
        trainer.put("checkpoint-300")

    watch(trainer.run, saves(), until_step=300)
    assert watch.folded[2:] == ["checkpoint-300"]


@pytest.mark.parametrize("inside", ["lightning_logs/version_0/checkpoints", "weights"])
def test_a_run_that_is_not_there_yet_is_waited_for(
    watch: Watch, tmp_path: Path, whole: Path, inside: str
) -> None:
    """Its folders come one by one, long before the first checkpoint."""
    run = tmp_path / "run"
    trainer = Trainer(whole, run / inside, 1, last="trainer_state")

    def saves() -> Iterator[None]:
        for folder in reversed([trainer.run, *trainer.run.parents[: inside.count("/") + 1]]):
            yield from (None,) * 3
            folder.mkdir()
        yield from (None,) * 3
        yield from trainer.saves()

    made = watch(run, saves(), until_step=500)
    assert watch.folded == trainer.names
    assert "does not exist" in watch.texts(Kind.WAITING)[0]
    assert made.output == tmp_path / "run-ema"


def test_logs_and_names_that_are_written_anew_are_no_checkpoints(
    watch: Watch, trainer: Trainer
) -> None:
    """`last` has a later step inside, but will be overwritten; that is said."""

    def saves() -> Iterator[None]:
        logs = trainer.run / "runs" / "Nov29_host"
        logs.mkdir(parents=True)
        for number, _ in enumerate(trainer.saves("checkpoint-100", "checkpoint-200")):
            (logs / "events.out.tfevents.1").write_bytes(bytes(number))
            last = trainer.run / "last"
            last.mkdir(exist_ok=True)
            write_safetensors(last / "model.safetensors", STATES[4])
            (last / "trainer_state.json").write_text('{"global_step": 999}')
            yield

    trainer = Trainer(trainer.whole, trainer.run, last="trainer_state")
    watch(trainer.run, saves(), until_step=200)
    assert watch.folded == ["checkpoint-100", "checkpoint-200"]
    assert [one for one in watch.texts(Kind.LEFT_OUT) if one.startswith("last ")]


def test_each_checkpoint_is_published_once(watch: Watch, trainer: Trainer) -> None:
    watch(trainer.run, trainer.saves(), until_step=500)
    kinds = [one.kind for one in watch.events if one.kind in (Kind.FOLDED, Kind.PUBLISHED)]
    assert kinds == [Kind.FOLDED, Kind.PUBLISHED] * COUNT


def test_every_third_is_published_and_the_rest_at_the_end(watch: Watch, trainer: Trainer) -> None:
    made = watch(trainer.run, trainer.saves(), until_step=500, publish_every=3)
    kinds = [one.kind for one in watch.events if one.kind in (Kind.FOLDED, Kind.PUBLISHED)]
    first, published = Kind.FOLDED, Kind.PUBLISHED
    assert kinds == [first, first, first, published, first, first, published]
    check_batch(made.output, trainer)


def test_checkpoints_that_are_there_already_are_folded_together(
    watch: Watch, trainer: Trainer
) -> None:
    trainer.put(*trainer.names)
    made = watch(trainer.run, idle=60)
    assert [one.checkpoints for one in watch.events if one.kind is Kind.FOLDED] == [
        tuple(trainer.names)
    ]
    check_batch(made.output, trainer)


def test_several_averages_of_one_run(watch: Watch, trainer: Trainer) -> None:
    """In whatever order their names come: half-life-1000 before half-life-200."""
    several: dict[str, Any] = {"half_life": [200, 1000], "schedule": None, "decay": None}
    made = watch(trainer.run, trainer.saves(), until_step=500, **several)
    assert len(made.outputs) == len(made.manifests) == 2
    assert watch.folded == trainer.names
    check_batch(made.output, trainer, **several)


def test_options_select_from_what_comes(watch: Watch, trainer: Trainer) -> None:
    """The first checkpoints do not match the glob."""
    trainer = Trainer(trainer.whole, trainer.run, last="trainer_state")
    made = watch(trainer.run, trainer.saves(), until_step=500, include=["checkpoint-[345]00"])
    assert watch.folded == trainer.names[2:]
    check_batch(made.output, trainer, include=["checkpoint-[345]00"])


def test_the_average_is_written_back_as_a_checkpoint(
    make_run: MakeRun, watch: Watch, tmp_path: Path
) -> None:
    make_run(STATES, STEPS, name="whole", torch_files=True)
    trainer = Trainer(tmp_path / "whole", tmp_path / "run", 2)
    made = watch(trainer.run, trainer.saves(), until_step=500, save_as="checkpoint")
    check_batch(made.output, trainer, save_as="checkpoint")


def test_by_hand_the_third_of_1_2_4_weighs_half(watch: Watch, tmp_path: Path) -> None:
    def saves() -> Iterator[None]:
        for step, value in enumerate((1.0, 2.0, 4.0), start=1):
            folder = tmp_path / "run" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            write_safetensors(folder / "model.safetensors", {"w": torch.tensor([value])})
            shutil.rmtree(tmp_path / "run" / f"checkpoint-{step - 1}", ignore_errors=True)
            yield from (None,) * 3

    made = watch(tmp_path / "run", saves(), until_step=3)
    assert read_safetensors(made.output / "model.safetensors")["w"].tolist() == [2.75]


# --- When it ends ---------------------------------------------------------------------------------


def test_it_ends_when_no_checkpoint_comes_for_a_while(watch: Watch, trainer: Trainer) -> None:
    """Counted from the last that came, however long the saves before took."""

    def saves() -> Iterator[None]:
        yield from trainer.saves("checkpoint-100")
        yield from (None,) * 5
        yield from trainer.saves("checkpoint-200")

    watch(trainer.run, saves(), idle="2min", interval=10)
    assert watch.folded == ["checkpoint-100", "checkpoint-200"]
    assert watch.clock.looks < 40


def test_a_checkpoint_that_is_being_saved_at_the_end_is_folded(
    watch: Watch, trainer: Trainer
) -> None:
    """It is seen when the time is over: something is going on."""

    def saves() -> Iterator[None]:
        yield from (None,) * 5
        trainer.put("checkpoint-100")

    watch(trainer.run, saves(), idle=60, interval=10)
    assert watch.folded == ["checkpoint-100"]


def test_no_time_at_all_takes_what_is_there(watch: Watch, trainer: Trainer) -> None:
    trainer.put("checkpoint-100", "checkpoint-200")
    watch(trainer.run, idle=0)
    assert watch.folded == ["checkpoint-100", "checkpoint-200"]
    assert watch.clock.looks == 1


def test_a_run_without_checkpoints_is_refused_at_the_end(watch: Watch, trainer: Trainer) -> None:
    trainer.run.mkdir()
    with pytest.raises(RefusedError, match="the folder is empty") as caught:
        watch(trainer.run, idle=60)
    assert caught.value.code is Code.NO_CHECKPOINTS
    trainer.run.rmdir()
    assert [*trainer.run.parent.iterdir()] == [trainer.whole]


def test_a_watch_that_has_reached_its_step_is_done(watch: Watch, trainer: Trainer) -> None:
    trainer.put("checkpoint-100", "checkpoint-200")
    first = watch(trainer.run, until_step=200)
    before = (first.output / "ckpt_ema.json").read_bytes()
    watch(trainer.run, until_step=200)
    assert watch.clock.looks == 0
    assert watch.folded == []
    assert (first.output / "ckpt_ema.json").read_bytes() == before


# --- Started again --------------------------------------------------------------------------------


@pytest.mark.parametrize("publish_every", [1, 3, 99])
def test_a_watch_that_is_interrupted_goes_on_where_it_stopped(
    watch: Watch, trainer: Trainer, publish_every: int
) -> None:
    """After each look in turn."""
    saves = trainer.saves()

    def interrupted() -> Iterator[None]:
        for number, _ in enumerate(saves):
            yield
            if number % 4 == 3:
                raise KeyboardInterrupt

    folded: list[str] = []
    for _ in range(100):
        try:
            made = watch(trainer.run, interrupted(), until_step=500, publish_every=publish_every)
        except KeyboardInterrupt:
            folded += watch.folded
        else:
            break
    assert folded + watch.folded == trainer.names
    check_batch(made.output, trainer)


def held_in(folder: Path) -> Path:
    """Where a watch of `run` holds what it has not published."""
    return folder / ".run-ema.ckpt-ema-watch" / "output"


class Killed(BaseException):
    """Ends a watch without letting it clean up."""


def die(watch: Watch, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """Fold the first two checkpoints, hold them, and leave everything as it is."""
    with monkeypatch.context() as patched:
        patched.setattr(publishing, "publish_instead", lambda *_: (_ for _ in ()).throw(Killed))

        def saves() -> Iterator[None]:
            yield from trainer.saves("checkpoint-100", "checkpoint-200")
            raise Killed

        with pytest.raises(Killed):
            watch(trainer.run, saves(), publish_every=9, **options)
    assert watch.folded == ["checkpoint-100", "checkpoint-200"]
    held = held_in(trainer.run.parent)
    assert held.is_dir()
    return held


def test_what_was_held_is_continued(
    watch: Watch, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(watch, trainer, monkeypatch)
    made = watch(trainer.run, trainer.saves(*trainer.names[2:]), until_step=500)
    assert "2 checkpoints so far" in watch.texts(Kind.STARTED)[0]
    check_batch(made.output, trainer)


@pytest.mark.parametrize("options", [{"decay": 0.7}, {"exclude": ["x"]}, {"accumulate": "float32"}])
def test_other_options_are_refused_and_what_was_held_stays(
    watch: Watch, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    held = die(watch, trainer, monkeypatch)
    before = contents(held)
    with pytest.raises(RefusedError, match="was made with other options") as caught:
        watch(trainer.run, idle=60, **options)
    assert caught.value.code is Code.STATE_DIFFERS
    assert contents(held) == before


def test_an_update_publishes_what_a_killed_watch_has_held(
    watch: Watch, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose checkpoints the trainer has deleted meanwhile."""
    trainer.put("checkpoint-100")
    watch(trainer.run, idle=60)
    with monkeypatch.context() as patched:
        patched.setattr(publishing, "publish_instead", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            watch(trainer.run, trainer.saves("checkpoint-200"), idle=60, publish_every=9)
    output = trainer.run.parent / "run-ema"
    trainer.put("checkpoint-300")
    trainer.remove("checkpoint-200")
    made = ckpt_ema.update(output)
    assert [one["step"] for one in made.manifests[0]["checkpoints"]] == [100, 200, 300]
    trainer.put("checkpoint-400", "checkpoint-500")
    ckpt_ema.update(output)
    check_batch(output, trainer)


def test_another_average_does_not_remove_what_is_held(
    watch: Watch, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = die(watch, trainer, monkeypatch)
    before = contents(held)
    trainer.put("checkpoint-100")
    ckpt_ema.average(trainer.run)
    assert contents(held) == before


def test_what_is_held_and_damaged_is_refused_and_left(
    watch: Watch, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = die(watch, trainer, monkeypatch)
    (held / "ckpt_ema.state").write_bytes(b"damaged")
    with pytest.raises(RefusedError) as caught:
        watch(trainer.run, idle=60)
    assert caught.value.path == str(held / "ckpt_ema.state")
    assert held.is_dir()


def test_a_signal_just_after_a_fold_loses_nothing(
    watch: Watch, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held, but the watch has not noted that yet."""

    def interrupted(*arguments: Any) -> None:
        carry_out(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(publishing, "carry_out", interrupted)
        with pytest.raises(KeyboardInterrupt):
            watch(trainer.run, trainer.saves("checkpoint-100"), publish_every=9)
    assert len(watch.texts(Kind.PUBLISHED)) == 1
    made = watch(trainer.run, trainer.saves(*trainer.names[1:]), until_step=500)
    assert "1 checkpoint so far" in watch.texts(Kind.STARTED)[0]
    check_batch(made.output, trainer)


@pytest.mark.parametrize("when", ["exchanged", "synced", "removed"])
def test_an_interrupted_publication_is_not_undone(
    watch: Watch, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """What is held then is the old output; to publish once more would bring it back."""
    trainer.put("checkpoint-100")
    made = watch(trainer.run, idle=60)

    def interrupted(*arguments: Any) -> None:
        kind = {"exchanged": "rename", "synced": "fsync", "removed": "rmdir"}[when]
        with faulty(kind, 1, KeyboardInterrupt):
            publish_instead(*arguments)

    monkeypatch.setattr(publishing, "publish_instead", interrupted)
    with pytest.raises(KeyboardInterrupt):
        watch(trainer.run, trainer.saves("checkpoint-200"), idle=60)
    manifest = json.loads((made.output / "ckpt_ema.json").read_text())
    assert [one["step"] for one in manifest["checkpoints"]] == [100, 200]
    monkeypatch.setattr(publishing, "publish_instead", publish_instead)
    watch(trainer.run, trainer.saves(*trainer.names[2:]), until_step=500)
    check_batch(made.output, trainer)


# --- Missed checkpoints, and what gets in the way -------------------------------------------------


def deleted_when_seen(trainer: Trainer) -> Iterator[None]:
    """The second checkpoint is there for one look only."""
    trainer.put("checkpoint-100")
    yield from (None,) * 3
    trainer.put("checkpoint-200")
    yield
    trainer.remove("checkpoint-200")
    trainer.put("checkpoint-300")


def test_a_checkpoint_that_is_deleted_too_early_ends_it(watch: Watch, trainer: Trainer) -> None:
    with pytest.raises(FailedError, match="was deleted before it was folded") as caught:
        watch(trainer.run, deleted_when_seen(trainer), idle=60, publish_every=9)
    assert caught.value.code is Code.MISSED
    assert caught.value.path == str(trainer.run / "checkpoint-200")
    assert watch.events[-1].kind is Kind.PUBLISHED  # what was folded before


def test_a_missed_checkpoint_is_skipped_if_that_was_asked(watch: Watch, trainer: Trainer) -> None:
    watch(trainer.run, deleted_when_seen(trainer), idle=60, skip_missed=True)
    assert watch.folded == ["checkpoint-100", "checkpoint-300"]
    assert "checkpoint-200 was deleted before it was folded; skipped" in watch.texts(Kind.MISSED)[0]


@pytest.mark.parametrize("skip_missed", [False, True])
def test_one_that_was_seen_incomplete_and_is_gone_was_missed(
    watch: Watch, trainer: Trainer, skip_missed: bool
) -> None:
    """It may have been complete between two looks."""

    def saves() -> Iterator[None]:
        trainer.put("checkpoint-100")
        yield from (None,) * 3
        saving = trainer.save("checkpoint-200")
        while not (trainer.run / "checkpoint-200" / "model.safetensors").exists():
            next(saving)
        yield from (None,) * 3
        trainer.remove("checkpoint-200")

    if skip_missed:
        watch(trainer.run, saves(), idle=60, skip_missed=True)
        assert len(watch.texts(Kind.MISSED)) == 1
    else:
        with pytest.raises(FailedError, match="checkpoint-200 was deleted before"):
            watch(trainer.run, saves(), idle=60)


@pytest.mark.parametrize("is_whole", [True, False])
def test_one_that_vanishes_while_it_is_read_was_missed(
    watch: Watch, trainer: Trainer, is_whole: bool
) -> None:
    """Whether its folder is gone at once, or is being deleted when the fold fails."""

    def vanish(_done: int, _total: int) -> None:
        path = trainer.run / "checkpoint-200"
        if path.exists():
            (path / "model.safetensors").write_bytes(b"")
            if is_whole:
                shutil.rmtree(path)

    def saves() -> Iterator[None]:
        trainer.put("checkpoint-100")
        yield from (None,) * 3
        trainer.put("checkpoint-200")
        yield from (None,) * 3
        if not is_whole:
            trainer.remove("checkpoint-200")
        yield
        trainer.put("checkpoint-300")

    options: dict[str, Any] = {"progress": vanish, "tile_size": 64, "threads": 1}
    watch(trainer.run, saves(), idle=60, skip_missed=True, publish_every=9, **options)
    assert watch.folded == ["checkpoint-100", "checkpoint-300"]
    assert len(watch.texts(Kind.MISSED)) == 1


def test_an_older_one_that_stays_incomplete_is_waited_for_and_told_at_the_end(
    watch: Watch, trainer: Trainer
) -> None:
    def saves() -> Iterator[None]:
        trainer.put("checkpoint-100")
        yield from (None,) * 3
        trainer.put("checkpoint-200", "checkpoint-300")
        os.truncate(trainer.run / "checkpoint-200" / "model.safetensors", 900)

    with pytest.raises(RefusedError, match="checkpoint-200 is incomplete, but later") as caught:
        watch(trainer.run, saves(), idle=60)
    assert caught.value.code is Code.INCOMPLETE
    assert any("checkpoint-200 is incomplete" in one for one in watch.texts(Kind.WAITING))
    trainer.put("checkpoint-200")
    watch(trainer.run, idle=60)
    assert watch.folded == ["checkpoint-200", "checkpoint-300"]


def test_a_disk_that_is_full_for_a_while_delays_the_fold(watch: Watch, trainer: Trainer) -> None:
    """Between two publications, so that what is published is not what is continued."""
    failing = faulty("pwrite", 1, 28, ever_after=True)

    def saves() -> Iterator[None]:
        yield from trainer.saves("checkpoint-100")
        with failing:
            trainer.put("checkpoint-200")
            yield from (None,) * 5
            assert watch.folded == ["checkpoint-100"]
        yield from trainer.saves(*trainer.names[2:])

    made = watch(trainer.run, saves(), until_step=500, publish_every=9)
    assert len(watch.texts(Kind.RETRYING)) == 1
    assert "No space left" in watch.texts(Kind.RETRYING)[0]
    check_batch(made.output, trainer)


def test_what_fails_until_the_end_is_told_then(watch: Watch, trainer: Trainer) -> None:
    trainer.put("checkpoint-100")
    with faulty("pwrite", 1, 28, ever_after=True), pytest.raises(FailedError, match="No space"):
        watch(trainer.run, idle=60)


def test_a_run_whose_disk_is_away_for_a_while_is_waited_for(watch: Watch, trainer: Trainer) -> None:
    """Its checkpoints are not taken for deleted."""

    def saves() -> Iterator[None]:
        trainer.put("checkpoint-100")
        yield from (None,) * 3
        trainer.put("checkpoint-200")
        yield
        trainer.run.rename(trainer.run.with_name("away"))
        yield from (None,) * 3
        trainer.run.with_name("away").rename(trainer.run)

    watch(trainer.run, saves(), until_step=200)
    assert watch.folded == ["checkpoint-100", "checkpoint-200"]


def test_a_folder_that_cannot_be_listed_for_a_while_is_looked_at_again(
    watch: Watch, trainer: Trainer
) -> None:
    def saves() -> Iterator[None]:
        trainer.put("checkpoint-100")
        yield from (None,) * 3
        trainer.put("checkpoint-200")
        with faulty("listdir", 1, 5, ever_after=True):
            yield from (None,) * 3

    watch(trainer.run, saves(), until_step=200)
    assert "Input/output error" in watch.texts(Kind.RETRYING)[0]


def test_a_run_that_is_out_of_reach_until_the_end_is_told_then(
    watch: Watch, trainer: Trainer
) -> None:
    """Although all that was there is folded: there may be more."""
    failing = faulty("listdir", 1, 5, ever_after=True)

    def saves() -> Iterator[None]:
        yield from trainer.saves("checkpoint-100")
        trainer.put("checkpoint-200")
        with failing:
            yield from (None,) * 99

    with pytest.raises(RefusedError, match="Input/output error"):
        watch(trainer.run, saves(), idle=60)


def test_times_of_files_decide_nothing(watch: Watch, trainer: Trainer) -> None:
    """Each checkpoint is older than the one before, by the clock of the trainer's machine."""

    def saves() -> Iterator[None]:
        for number, name in enumerate(trainer.names):
            yield from trainer.save(name)
            for path in (trainer.whole / name).iterdir():
                os.utime(path, (10**9 - number, 10**9 - number))
                os.utime(trainer.run / name / path.name, (10**9 - number, 10**9 - number))
            yield from (None,) * 3

    made = watch(trainer.run, saves(), until_step=500)
    assert watch.folded == trainer.names
    check_batch(made.output, trainer)


def test_a_checkpoint_of_another_model_ends_it(watch: Watch, trainer: Trainer) -> None:
    def saves() -> Iterator[None]:
        trainer.put("checkpoint-100")
        yield from (None,) * 3
        trainer.put("checkpoint-200")
        write_safetensors(
            trainer.run / "checkpoint-200" / "model.safetensors", {"c": STATES[0]["a"]}
        )

    with pytest.raises(RefusedError) as caught:
        watch(trainer.run, saves(), idle=60)
    assert caught.value.code in (Code.DIFFERENT_MODELS, Code.STATE_DIFFERS)


def test_a_run_that_was_restarted_ends_it(watch: Watch, trainer: Trainer) -> None:
    def saves() -> Iterator[None]:
        yield from trainer.saves("checkpoint-100", "checkpoint-300")
        trainer.put("checkpoint-200")

    with pytest.raises(
        RefusedError, match=r"checkpoint-200 is not in .* may have restarted"
    ) as caught:
        watch(trainer.run, saves(), idle=60)
    assert caught.value.code is Code.FOLDED_BEFORE


@pytest.mark.parametrize("is_strict", [False, True])
def test_warnings_are_told_once_and_refused_if_that_was_asked(
    watch: Watch, trainer: Trainer, is_strict: bool
) -> None:
    """One checkpoint alone is none to be warned of; the gap before 500 is."""
    names = ("checkpoint-100", "checkpoint-200", "checkpoint-300")

    def saves() -> Iterator[None]:
        yield from trainer.saves(*names)
        spare = trainer.whole / "checkpoint-9000"
        shutil.copytree(trainer.whole / "checkpoint-400", spare)
        (spare / "trainer_state.json").write_text('{"global_step": 9000}')
        yield from trainer.saves("checkpoint-9000")

    if is_strict:
        with pytest.raises(RefusedError, match="Without --strict this is a warning"):
            watch(trainer.run, saves(), until_step=9000, strict=True)
        assert watch.folded == [*names]
    else:
        watch(trainer.run, saves(), until_step=9000)
        assert len(watch.texts(Kind.WARNING)) == 1


# --- Outputs --------------------------------------------------------------------------------------


def test_files_of_others_in_the_output_delay_its_publication(
    watch: Watch, trainer: Trainer
) -> None:
    """An evaluation that writes there: everything is folded, and published once they are gone."""
    output = trainer.run.parent / "run-ema"

    def saves() -> Iterator[None]:
        yield from trainer.saves("checkpoint-100")
        (output / "eval.json").write_text("{}")
        yield from trainer.saves("checkpoint-200", "checkpoint-300")
        assert watch.folded == ["checkpoint-100", "checkpoint-200", "checkpoint-300"]
        assert len(watch.texts(Kind.PUBLISHED)) == 1
        (output / "eval.json").unlink()
        yield from trainer.saves("checkpoint-400", "checkpoint-500")

    watch(trainer.run, saves(), until_step=500)
    refusals = [one for one in watch.texts(Kind.WARNING) if "eval.json" in one]
    assert refusals[0].startswith("not published: ")
    check_batch(output, trainer)


def test_if_they_stay_what_was_folded_is_kept(watch: Watch, trainer: Trainer) -> None:
    output = trainer.run.parent / "run-ema"

    def saves() -> Iterator[None]:
        yield from trainer.saves("checkpoint-100")
        (output / "eval.json").write_text("{}")
        yield from trainer.saves("checkpoint-200")

    with pytest.raises(RefusedError, match=r"eval\.json"):
        watch(trainer.run, saves(), until_step=200)
    (output / "eval.json").unlink()
    watch(trainer.run, trainer.saves(*trainer.names[2:]), until_step=500)
    check_batch(output, trainer)


@pytest.mark.parametrize(
    ("publish_every", "how"), [(1, "was replaced meanwhile"), (9, "appeared meanwhile")]
)
def test_what_somebody_else_put_there_is_left(
    watch: Watch, trainer: Trainer, publish_every: int, how: str
) -> None:
    output = trainer.run.parent / "run-ema"

    def saves() -> Iterator[None]:
        yield from trainer.saves("checkpoint-100")
        ckpt_ema.average(trainer.run, output=output, overwrite=True, decay=0.2)
        yield from trainer.saves("checkpoint-200")

    with pytest.raises(RefusedError, match=how):
        watch(trainer.run, saves(), until_step=200, publish_every=publish_every)
    assert json.loads((output / "ckpt_ema.json").read_text())["decay"] == 0.2
    assert held_in(trainer.run.parent).is_dir() is (publish_every == 9)


def test_an_output_that_is_not_ours_is_refused_at_once(watch: Watch, trainer: Trainer) -> None:
    output = trainer.run.parent / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(RefusedError, match="is not an output of ckpt-ema"):
        watch(trainer.run, output=output, idle=60)
    assert contents(output) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ("run/out", Code.OUTPUT_OVERLAPS_INPUT),
        ("nowhere/out", Code.INVALID_OUTPUT),
        ("s3://bucket/out", Code.INVALID_OPTION),
        ("out.safetensors", Code.CONFLICTING_OPTIONS),
    ],
)
def test_an_output_that_cannot_be_is_refused_at_once(
    watch: Watch, trainer: Trainer, output: str, code: Code
) -> None:
    """Not when the first checkpoint comes."""
    trainer.run.mkdir()
    where = output if "://" in output else trainer.run.parent / output
    with pytest.raises((RefusedError, OptionError)) as caught:
        watch(trainer.run, output=where, idle=60)
    assert caught.value.code is code
    assert [*trainer.run.iterdir()] == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"interval": 0}, "--interval is '0'; it must be a time of more than 0 s"),
        ({"interval": "soon"}, "--interval is 'soon'; it must be a time"),
        ({"idle": "-1"}, "--idle is '-1'; it must be a time"),
        ({"publish_every": 0}, "--publish-every is '0'; it must be a whole number of at least 1"),
        ({"until_step": "soon"}, "--until-step is 'soon'; it must be a whole number"),
        ({"last": 3}, "--keep-state cannot be used with --last"),
        ({"schedule": "wsm-cosine", "decay": None}, "--keep-state cannot be used with"),
    ],
)
def test_impossible_options_are_refused_at_once(
    watch: Watch, trainer: Trainer, options: dict[str, Any], error: str
) -> None:
    with pytest.raises(OptionError, match=error):
        watch(trainer.run, **options)
    assert [*trainer.run.parent.iterdir()] == [trainer.whole]


def test_two_watches_of_one_output_are_refused(watch: Watch, trainer: Trainer) -> None:
    """So is an update while one is running."""

    def saves() -> Iterator[None]:
        yield from trainer.saves("checkpoint-100")
        output = trainer.run.parent / "run-ema"
        for is_watch in (True, False):
            with pytest.raises(RefusedError) as caught:
                ckpt_ema.watch(trainer.run, **HALF) if is_watch else ckpt_ema.update(output)
            assert caught.value.code is Code.OUTPUT_IN_USE
        yield from trainer.saves(*trainer.names[1:])

    made = watch(trainer.run, saves(), until_step=500)
    check_batch(made.output, trainer)


# --- The command that is run after each publication -----------------------------------------------


def has_lines(log: Path, count: int) -> bool:
    """Whether a file has so many lines."""
    return log.exists() and log.read_text().count("\n") == count


@pytest.mark.parametrize("command", ["echo {} >> %s", "f() { echo $1 >> %s; }; f"])
def test_a_command_gets_the_path_of_each_publication(
    watch: Watch, trainer: Trainer, tmp_path: Path, command: str
) -> None:
    """In place of {}, or as the last word; whatever letters the path has."""
    log = tmp_path / "log"

    def saves() -> Iterator[None]:
        for number, name in enumerate(trainer.names, start=1):
            yield from trainer.saves(name)
            wait_for(partial(has_lines, log, number))

    output = tmp_path / "it's here"
    watch(trainer.run, saves(), until_step=500, output=output, on_publish=command % log)
    assert log.read_text() == f"{output}\n" * COUNT


def test_a_command_that_hangs_holds_nothing_up(
    watch: Watch, trainer: Trainer, tmp_path: Path
) -> None:
    """It is waited for at the end, and runs once more for all that was published meanwhile."""
    done, log = tmp_path / "done", tmp_path / "log"
    command = f"while [ ! -e {done} ]; do sleep 0.01; done; echo {{}} >> {log}"
    told = []

    def event(one: Event) -> None:
        told.append(one.text)
        if one.text.startswith("waiting for the command"):
            assert watch.clock.looks > 3 * COUNT
            done.touch()

    watch(trainer.run, trainer.saves(), until_step=500, on_publish=command, event=event)
    assert len([one for one in told if one.startswith("published")]) == COUNT
    assert log.read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("command", "how"), [("exit 3 #", "exit code 3"), ("kill $$ #", "signal 15")]
)
def test_a_command_that_fails_is_told_and_no_more(
    watch: Watch, trainer: Trainer, command: str, how: str
) -> None:
    made = watch(trainer.run, trainer.saves(), until_step=500, on_publish=command)
    assert f"the command of --on-publish failed with {how}: {command}" in watch.texts(Kind.WARNING)
    check_batch(made.output, trainer)


def test_a_command_that_cannot_be_started_is_told(
    watch: Watch, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    watch(trainer.run, trainer.saves(), until_step=500, on_publish="true")
    failure = "the command of --on-publish cannot be started: No such file or directory"
    assert failure in watch.texts(Kind.WARNING)


def test_a_command_that_writes_into_the_output_delays_the_next_publication(
    watch: Watch, trainer: Trainer
) -> None:
    """Which is made when its file is gone; all is folded meanwhile."""
    output = trainer.run.parent / "run-ema"

    def saves() -> Iterator[None]:
        yield from trainer.saves("checkpoint-100")
        yield
        wait_for((output / "eval.json").exists)  # the command takes real time
        yield from trainer.saves(*trainer.names[1:4])
        assert watch.folded == trainer.names[:4]
        (output / "eval.json").unlink()
        yield
        assert len(watch.texts(Kind.PUBLISHED)) == 2
        yield
        wait_for((output / "eval.json").exists)
        (output / "eval.json").unlink()
        yield from trainer.saves("checkpoint-500")

    watch(trainer.run, saves(), idle=600, on_publish="echo 1 > {}/eval.json")
    assert len(watch.texts(Kind.PUBLISHED)) == 3


# --- For weeks ------------------------------------------------------------------------------------


def test_a_look_at_ten_thousand_checkpoints_costs_a_thousandth_of_a_core(tmp_path: Path) -> None:
    """At the default interval of 10 s, if no name has changed; the quickest of some looks."""
    for number in range(10_000):
        (tmp_path / f"step_{number}.pt").touch()
    listing, costs = Listing(tmp_path), []
    storage = storage_for(tmp_path)
    assert listing.has_changed(storage)
    for _ in range(20):
        start = time.process_time()
        assert not listing.has_changed(storage)
        costs.append(time.process_time() - start)
    assert min(costs) < 0.010


def folds_flat(folder: Path, count: int) -> None:
    """Fold checkpoints, of which one is kept: neither memory nor files may grow."""
    run, seen = folder / "run", []

    def saves() -> Iterator[None]:
        for step in range(1, count + 1):
            checkpoint = run / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            write_safetensors(checkpoint / "model.safetensors", {"w": torch.full((999,), step / 7)})
            yield from (None,) * 2
            shutil.rmtree(run / f"checkpoint-{step - 1}", ignore_errors=True)
            if step % (count // 3) == count // 3 - 1:
                gc.collect()
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                seen.append((pages * 4096, len(os.listdir("/proc/self/fd"))))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "time", Clock(saves()))
        ckpt_ema.watch(run, until_step=count, publish_every=10, sync=False, **HALF)
    (_, files), (early_bytes, _), (late_bytes, late_files) = seen
    assert late_files == files
    assert late_bytes - early_bytes < (1 << 20) + 10_000 * count, seen


@pytest.mark.parametrize("count", [120, pytest.param(600, marks=pytest.mark.sweep)])
def test_memory_and_open_files_stay_as_they_are(tmp_path: Path, count: int) -> None:
    """But for the list of what was folded, 10 kB for each checkpoint at most."""
    run_together(folds_flat, [(tmp_path, count)])
