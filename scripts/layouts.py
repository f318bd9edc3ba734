"""Runs in the layouts of trainers, for the benchmark, written by the makers of the tests.

All weights are float32. Runs of safetensors files are made in `runs`.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

sys.path.append(str(Path(__file__).parent.parent))  # the makers are beside the tests

State = Mapping[str, "torch.Tensor"]


def make(layout: str, shapes: Mapping[str, list[int]], checkpoints: int, folder: Path) -> None:
    """Write checkpoints of a model in a layout of `LAYOUTS`."""
    import torch

    random = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=random) * 0.02 for name, shape in shapes.items()}
    for step in range(1, checkpoints + 1):
        for tensor in state.values():
            tensor.mul_(1.001)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a checkpoint is saved by one process
            LAYOUTS[layout](folder, state, step)


def _rank_files(folder: Path, state: State, step: int, ranks: int) -> None:
    """Save what verl saves with FSDP2: a DTensor of each weight on each rank."""
    from tests.makers import rank_files

    rank_files.save(
        folder / f"global_step_{step}" / "actor", state, dict.fromkeys(state, (0,)), (ranks,)
    )


def _zero(folder: Path, state: State, step: int, stage: int, ranks: int) -> None:
    """Save what DeepSpeed saves, trained in bfloat16."""
    import torch

    from tests.makers import deepspeed_folders

    place = folder / f"global_step{step}"
    deepspeed_folders.save(place, state, stage=stage, ranks=ranks, step=step, dtype=torch.bfloat16)


def _torch_file(folder: Path, state: State, step: int) -> None:
    """Save the model with Adam's two moments in one file, three times its size."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"step": step, **_training_state(state)}, folder / f"checkpoint-{step}.pt")


def _distributed(folder: Path, state: State, step: int) -> None:
    """Save the same by torch.distributed.checkpoint."""
    from tests.makers import dcp_folders

    dcp_folders.save(folder / f"step-{step}", _training_state(state))


def _training_state(state: State) -> dict[str, object]:
    moments = {
        name: {"exp_avg": tensor * 0.1, "exp_avg_sq": tensor.square()}
        for name, tensor in state.items()
    }
    return {"model": dict(state), "optimizer": {"state": moments}}


_Save = Callable[[Path, State, int], None]
OF_RANKS: dict[str, _Save] = {
    "FSDP2, 2 ranks": partial(_rank_files, ranks=2),
    "FSDP2, 8 ranks": partial(_rank_files, ranks=8),
    "ZeRO-2, 2 ranks": partial(_zero, stage=2, ranks=2),
    "ZeRO-3, 8 ranks": partial(_zero, stage=3, ranks=8),
}
WITH_MOMENTS: dict[str, _Save] = {"torch file": _torch_file, "DCP": _distributed}
LAYOUTS = {**OF_RANKS, **WITH_MOMENTS}
