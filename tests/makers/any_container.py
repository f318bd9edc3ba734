"""One state of a model in every container that is read, under the names of a trainer's steps."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tests.makers import dcp_folders, deepspeed_folders, rank_files
from tests.makers.safetensors_files import write_safetensors, write_shards
from tests.makers.tensors import StateDict


def _plain(
    write: Callable[[Path, StateDict], object], run: Path, step: int, state: StateDict
) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    write(folder, state)
    return folder


def _dcp(run: Path, step: int, state: StateDict) -> Path:
    return dcp_folders.save(run / f"checkpoint-{step}", {"model": dict(state)})


def _zero(stage: int, run: Path, step: int, state: StateDict) -> Path:
    folder = run / f"global_step{step}"
    deepspeed_folders.save(folder, state, stage=stage, step=step)
    (run / "latest").write_text(folder.name)
    return folder


def _ranks(run: Path, step: int, state: StateDict) -> Path:
    layout = {name: (0,) for name, tensor in state.items() if tensor.dim() > 1}
    rank_files.save(run / f"global_step_{step}" / "actor", dict(state), layout)
    return run / f"global_step_{step}"


def _single(folder: Path, state: StateDict) -> None:
    write_safetensors(folder / "model.safetensors", state)


def _torch(folder: Path, state: StateDict) -> None:
    torch.save(dict(state), folder / "pytorch_model.bin")


# Each writes a state as a step of a run, and returns the path of the checkpoint.
CONTAINERS: dict[str, Callable[[Path, int, StateDict], Path]] = {
    "safetensors": partial(_plain, _single),
    "shards": partial(_plain, partial(write_shards, shards=2)),
    "torch.save": partial(_plain, _torch),
    "distributed": _dcp,
    "ZeRO-2": partial(_zero, 2),
    "ZeRO-3": partial(_zero, 3),
    "files of ranks": _ranks,
}
