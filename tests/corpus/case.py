"""What a case is, the good runs that cases begin with, and the words in which they are written."""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.state_dict_saver import save

from tests.conftest import noise, series, write_safetensors, write_shards

Form = Literal["safetensors", "shards", "zip", "legacy", "dcp"]
Make = Callable[[Path], object]

MIDDLE = "checkpoint-2"
FILE = f"{MIDDLE}/model.safetensors"


@dataclass(frozen=True)
class Case:
    """One bad input or one fault; what the user reads is in `messages.txt`."""

    name: str
    make: Make  # changes a good run in this folder
    says: str = ""  # a regular expression, where the sentence is not always the same
    code: int = 3
    form: Form = "safetensors"  # of the good run
    words: Sequence[str] = ()  # more arguments; RUN and OUT stand for the folders
    during: Make | None = None  # done in the process when the first values are read
    before: Callable[[], object] | None = None  # done in the process before all else
    names: str = MIDDLE  # what the error names
    run: str = "RUN"  # what is given as the run
    fails_after: bool = False  # when the output has been published
    is_slow: bool = False

    @property
    def publishes(self) -> bool:
        """Whether there is an output in the end."""
        return self.code == 0 or self.fails_after


def good_states() -> list[dict[str, torch.Tensor]]:
    """Three states of floats in two dtypes and of integers."""
    return series(3, w=noise(3, 5, 7), b=noise(3, 40, dtype=torch.bfloat16), n=torch.arange(9))


def good_run(run: Path, form: Form) -> None:
    """A run that nothing is wrong with."""
    rewrite(run, good_states(), form)


def rewrite(
    run: Path, states: Sequence[dict[str, torch.Tensor]], form: Form = "safetensors"
) -> None:
    """Write these states as the checkpoints of a run."""
    for step, state in enumerate(states, start=1):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "random_states_0.pkl").touch()  # accelerate's, which needs no config.json
        if form == "safetensors":
            write_safetensors(folder / "model.safetensors", state)
        elif form == "shards":
            write_shards(folder, state, 2)
        elif form == "dcp":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one process is what is wanted
                save({"model": dict(state)}, checkpoint_id=folder, no_dist=True)
        else:
            path = folder / "pytorch_model.bin"
            torch.save(state, path, _use_new_zipfile_serialization=form == "zip")


def holds(content: bytes, name: str = FILE) -> Make:
    """A file has this content."""
    return lambda run: (run / name).write_bytes(content)


def cut(size_bytes: int, name: str = FILE) -> Make:
    """A file is cut to its first bytes or, for a negative number, by so many."""
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:size_bytes])


def goes_on_with(content: bytes, name: str = FILE) -> Make:
    """A file has this after its end."""
    return lambda run: (run / name).write_bytes((run / name).read_bytes() + content)


def is_gone(name: str) -> Make:
    """A file is not there."""
    return lambda run: (run / name).unlink()


def becomes(make: Callable[[Path], object], name: str = FILE) -> Make:
    """Something else is in the place of a file."""

    def replace(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        make(run / name)

    return replace


def links_to(target: str) -> Callable[[Path], object]:
    """A symbolic link."""
    return lambda path: path.symlink_to(target)


def states_are(**tensors: Any) -> Make:
    """The three checkpoints hold these; each is a tensor for all, or a list with one for each."""
    return lambda run: rewrite(run, series(3, **tensors))


def in_all(change: Callable[[dict[str, torch.Tensor]], object], *steps: int) -> Make:
    """The states of these checkpoints are changed, from 1."""

    def make(run: Path) -> None:
        states = good_states()
        for step in steps:
            change(states[step - 1])
        rewrite(run, states)

    return make


def json_is(name: str, value: Any) -> Make:
    """A file holds this as JSON."""
    return lambda run: (run / name).write_text(json.dumps(value))


def several(*makes: Make) -> Make:
    """One after the other."""

    def make(run: Path) -> None:
        for one in makes:
            one(run)

    return make


def nothing(_run: Path) -> None:
    """The run is a good one."""


def fifo(path: Path) -> None:
    """Nobody ever writes to it."""
    os.mkfifo(path)
