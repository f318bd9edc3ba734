"""Files of ranks as torch saves them: one process plays the ranks in turn, in a group that is fake.

A state is whole tensors by name; a layout says for each of them how the mesh of ranks divides it:
a dimension or None for each axis of the mesh, `SHARDED` for a ShardedTensor along the first
dimension, nothing for a plain tensor.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

State = Mapping[str, torch.Tensor]
SHARDED = "ShardedTensor"
VERL = "model_world_size_{ranks}_rank_{rank}.pt"


@contextmanager
def playing(rank: int, ranks: int) -> Iterator[None]:
    """Be one rank of a group that exchanges nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that ShardedTensor is deprecated
            yield
    finally:
        dist.destroy_process_group()


def save(
    folder: Path,
    state: State,
    layout: Mapping[str, Any],
    mesh: Sequence[int] = (2,),
    name: str = VERL,
    root: Mapping[str, Any] | None = None,
    form: str = "zip",
) -> Path:
    """Save what each rank has of a state, at the top or beside `root` under "model"."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = math.prod(mesh)
    for rank in range(ranks):
        with playing(rank, ranks):
            grid = mesh_of(mesh)  # which all tensors share, as in a trainer
            parts = {key: part(one, layout.get(key), grid) for key, one in state.items()}
            content = parts if root is None else {"model": parts, **root}
            path = folder / name.format(rank=rank, ranks=ranks)
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return folder


def mesh_of(sizes: Sequence[int]) -> DeviceMesh:
    """The mesh of all ranks, in one or two axes."""
    names = ("ddp", "fsdp")[-len(sizes) :]
    return init_device_mesh("cpu", tuple(sizes), mesh_dim_names=names)


def part(tensor: torch.Tensor, layout: Any, mesh: DeviceMesh) -> Any:
    """What the rank that is played has of a tensor."""
    if layout is None:
        return tensor
    return _sharded(tensor, mesh) if layout == SHARDED else _dtensor(tensor, layout, mesh)


def chunk(tensor: torch.Tensor, dim: int, count: int, at: int) -> torch.Tensor:
    """One of `count` chunks as torch cuts them, the last ones empty where there are fewer."""
    chunks = tensor.chunk(count, dim)
    return (chunks[at] if at < len(chunks) else tensor.narrow(dim, 0, 0)).clone()


def _dtensor(tensor: torch.Tensor, dims: Sequence[int | None], mesh: DeviceMesh) -> Any:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    local, coordinates = tensor, mesh.get_coordinate()
    assert coordinates is not None
    for dim, count, at in zip(dims, mesh.shape, coordinates, strict=True):
        local = local if dim is None else chunk(local, dim, count, at)
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _sharded(tensor: torch.Tensor, mesh: DeviceMesh) -> Any:
    """What FSDP1 saves; with two axes, each row of ranks has the whole."""
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
    from torch.distributed._shard.sharded_tensor.metadata import (
        ShardedTensorMetadata,
        TensorProperties,
    )
    from torch.distributed._shard.sharded_tensor.shard import Shard

    count, rank, begin, places, shards = mesh.shape[-1], mesh.get_rank(), 0, [], []
    for at in range(count):
        local, owner = chunk(tensor, 0, count, at), rank - rank % count + at
        offsets = [begin, *[0] * (tensor.dim() - 1)]
        begin += len(local)
        if len(local):
            places.append(ShardMetadata(offsets, list(local.shape), f"rank:{owner}/cpu"))
            shards += [Shard(local, places[-1])] if owner == rank else []
    metadata = ShardedTensorMetadata(places, tensor.shape, TensorProperties(dtype=tensor.dtype))
    make = vars(ShardedTensor)["_init_from_local_shards_and_global_metadata"].__func__
    return make(ShardedTensor, shards, metadata)
