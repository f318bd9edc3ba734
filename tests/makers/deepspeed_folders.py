"""Folders of DeepSpeed, with the names, keys and objects that release 0.19.8 saves."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.makers.trainer_values import Tensors, build, importable

CONFIG = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}


class _Stage:
    """Pickled as a member of DeepSpeed's enumeration."""

    def __init__(self, number: int) -> None:
        self._reduced = type(_object("zero.config.ZeroStageEnum", "0")), (number,)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


def _object(name: str, text: str | None = None) -> Any:
    return build(f"object:deepspeed.runtime.{name}", text, {})


def save(
    folder: Path,
    model: Mapping[str, torch.Tensor],
    *,
    stage: int = 2,
    ranks: int = 2,
    step: int = 1,
    dtype: torch.dtype = torch.float32,
    buffers: Collection[str] = (),
    frozen: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
    sub_group: int | None = None,
    alignment: int = 1,
    keeps_padding: bool = False,
    state: Mapping[str, Any] | None = None,
) -> Path:
    """Save a model as its ranks do: `dtype` is that of training, the model's that of the masters.

    `tied` maps further names to weights; ZeRO-3 has groups of `sub_group` elements; ZeRO-1 and 2
    begin each weight at a multiple of `alignment`, and older releases keep the padding at the end.
    `state` is what a client saves beside the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tied = tied or {}
    trained = {n: t for n, t in model.items() if n not in (*buffers, *frozen, *tied)}
    matrices = {name: tensor for name, tensor in trained.items() if tensor.dim() > 1}
    rest = {name: tensor for name, tensor in trained.items() if name not in matrices}
    groups = [group for group in (matrices, rest) if group]
    kept = {n: model[n] if n in buffers else model[n].to(dtype) for n in model if n not in tied}
    common = {
        "buffer_names": [*buffers],
        "optimizer": None if stage else {"state": {}, "param_groups": []},
        "param_shapes": [{n: t.shape for n, t in group.items()} for group in groups]
        if stage
        else None,
        "frozen_param_shapes": {n: model[n].shape for n in frozen} if stage > 1 else None,
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": step,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_config": CONFIG,
        "ds_version": "0.19.8",
        **(state or {}),
    }
    for rank in range(ranks if stage == 3 else 1):
        module = {n: kept[tied.get(n, n)] for n in model}
        fragments = {name: kept[name] for name in frozen}
        if stage == 3:
            empty = torch.empty(0, dtype=dtype)
            module = {name: module[name] if name in buffers else empty for name in model}
            fragments = {name: _part(kept[name], rank, ranks) for name in frozen}
        content = {
            "module": module,
            "frozen_param_fragments": fragments if stage > 1 else None,
            "shared_params": tied if stage and not rank else {},
            **common,
        }
        prefix = f"zero_pp_rank_{rank}_" * (stage == 3)
        torch.save(content, folder / f"{prefix}mp_rank_00_model_states.pt")
    for rank in range(ranks if stage else 0):
        if stage == 3:
            optimizer = _of_zero_3(groups, rank, ranks, sub_group)
        else:
            optimizer = _of_zero_1_and_2(groups, rank, ranks, alignment, keeps_padding)
        base = {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": []}
        optimizer |= {
            ("optimizer_state_dict" if stage == 3 else "base_optimizer_state"): base,
            "zero_stage": _Stage(stage),
            "loss_scaler": _object("fp16.loss_scaler.LossScaler"),
            "overflow": False,
        }
        prefix = "bf16_" * (dtype is torch.bfloat16)
        name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        content = {"optimizer_state_dict": optimizer, "ds_config": CONFIG, "ds_version": "0.19.8"}
        with importable():
            torch.save(content, folder / name)
    return folder


def partitions(folder: Path, rank: int) -> list[torch.Tensor]:
    """The float32 weights of one rank of ZeRO-1 or 2; of our own checkpoints only."""
    [path] = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    found: list[torch.Tensor] = optimizer(path)["single_partition_of_fp32_groups"]
    return found


def optimizer(path: Path) -> dict[str, Any]:
    """What the optimizer's file of one rank holds; of our own checkpoints only."""
    with importable():
        found: dict[str, Any] = torch.load(path, weights_only=False)["optimizer_state_dict"]
    return found


def _part(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """Return one rank's part of a weight of ZeRO-3, padded so that all are equal."""
    size = math.ceil(tensor.numel() / ranks)
    return _padded(tensor.flatten(), size * ranks)[rank * size : (rank + 1) * size].clone()


def _padded(flat: torch.Tensor, size: int) -> torch.Tensor:
    """Return more elements, of a value that would be seen in a model."""
    return torch.cat([flat, torch.full((size - flat.numel(),), 1e9, dtype=flat.dtype)])


def _of_zero_3(
    groups: Sequence[Tensors], rank: int, ranks: int, sub_group: int | None
) -> dict[str, Any]:
    flats = [
        torch.cat([_part(tensor, rank, ranks) for tensor in group.values()]) for group in groups
    ]
    if sub_group:
        flats = [part.clone() for flat in flats for part in torch.split(flat, sub_group)]
    for flat in flats:
        setattr(flat, "ds_id", 0)  # noqa: B010 - with an attribute, torch pickles another call
    return {"fp32_flat_groups": flats, "partition_count": ranks}


def _of_zero_1_and_2(
    groups: Sequence[Tensors], rank: int, ranks: int, alignment: int, keeps_padding: bool
) -> dict[str, Any]:
    flats, paddings, tails = [], [], []
    for group in groups:
        flat, padded = torch.empty(0), []
        for number, tensor in enumerate(group.values(), start=1):
            flat = torch.cat([flat, tensor.flatten()])
            padded.append(-flat.numel() % alignment if number < len(group) else 0)
            flat = _padded(flat, flat.numel() + padded[-1])
        tail = -flat.numel() % (2 * ranks)
        size = (flat.numel() + tail) // ranks
        part = _padded(flat, ranks * size)[rank * size : (rank + 1) * size].clone()
        tails.append(tail if rank == ranks - 1 else 0)
        flats.append(part if keeps_padding else part[: size - tails[-1]])
        paddings.append(padded)
    found = {"single_partition_of_fp32_groups": flats, "partition_count": [ranks] * len(groups)}
    return {**found, "group_paddings": tails, "param_alignment_paddings": paddings}
