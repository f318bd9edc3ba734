"""Shards with an index: a JSON file that maps each tensor to the file that holds it."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_ema.containers import safetensors, torch_file
from ckpt_ema.containers.refusals import is_plain_name, missing, refused
from ckpt_ema.containers.specs import Specs, TensorSpec
from ckpt_ema.errors import Code, IncompleteError, RefusedError, some
from ckpt_ema.notices import Notice
from ckpt_ema.storage.protocol import Kind, Storage
from ckpt_ema.trainers.conventions import INDEX_SUFFIX, SHARD_OF_SEVERAL

_MAX_INDEX_BYTES = 1 << 28


def claims(name: str) -> bool:
    """Return whether a file of this name is read here."""
    return name.endswith(INDEX_SUFFIX)


def read_specs(path: str, storage: Storage, key: str | None = None) -> Specs:
    """Return the tensors of the shards that the index at `path` names.

    Raises `IncompleteError` if the index or a shard is missing, `RefusedError` if the index is
    broken, names a file outside its folder, or disagrees with its shards.
    """
    index = Path(path)
    shard_of = _weight_map(index, storage)
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        _check_shard(index, shard, storage)
    read = [_read_shard(os.path.join(index.parent, shard), storage, key) for shard in shards]
    for shard, specs in zip(shards, read, strict=True):
        for name in specs.tensors:
            if shard_of.get(name) != shard:
                raise _disagreement(index, shard, name, shard_of.get(name, "no shard"))
    specs = joined(read)
    absent = sorted(shard_of.keys() - specs.tensors.keys())
    if absent:
        why = f"names {len(absent)} tensors that its shards lack: {some(absent)}"
        raise refused(path, why)
    return replace(specs, warnings=(*_strays(index, shards, storage), *specs.warnings))


def joined(read: Sequence[Specs]) -> Specs:
    """Return the specs of several files as one; later tensors of one name replace earlier ones."""
    tensors: dict[str, TensorSpec] = {}
    count = 0
    for specs in read:
        tensors |= {name: _moved(tensor, count) for name, tensor in specs.tensors.items()}
        count += len(specs.files)
    return Specs(
        tensors,
        tuple(file for specs in read for file in specs.files),
        tuple(metadata for specs in read for metadata in specs.metadata),
        tuple(note for specs in read for note in specs.notes),
        tuple(warning for specs in read for warning in specs.warnings),
        {path: hole for specs in read for path, hole in specs.holes.items()},
    )


def _moved(tensor: TensorSpec, files: int) -> TensorSpec:
    """Return a tensor whose files are counted from `files` on."""
    pieces = tuple(piece._replace(file=piece.file + files) for piece in tensor.pieces)
    return tensor._replace(file=tensor.file + files, pieces=pieces)


def _read_shard(path: str, storage: Storage, key: str | None) -> Specs:
    if safetensors.claims(os.path.basename(path)):
        return safetensors.read_specs(path, storage, key)
    return torch_file.read_specs(path, storage, key)


def _weight_map(index: Path, storage: Storage) -> Mapping[str, str]:
    if storage.kind(index) is Kind.ABSENT:
        raise IncompleteError(
            f"{index.parent} has shards but no {index.name}, which is written last.",
            code=Code.INCOMPLETE,
            path=index.parent,
        )
    with storage.open(index) as file:
        size_bytes = file.identity.size_bytes
        if size_bytes > _MAX_INDEX_BYTES:
            raise refused(file.path, "is too large to be an index of shards")
        raw = file.read(size_bytes, 0)
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise IncompleteError(
            f"{index} is not JSON.",
            "Was its save interrupted? Leave the checkpoint out.",
            code=Code.DAMAGED,
            path=index,
        ) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise refused(file.path, "has no weight_map")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise refused(file.path, "maps a tensor to something that is not a file name")
    return weight_map


def _check_shard(index: Path, shard: str, storage: Storage) -> None:
    if not is_plain_name(shard):
        why = (
            f"names the shard {shard!r}, which is not a plain file name: a checkpoint may not reach"
            " outside its folder"
        )
        raise refused(index, why, code=Code.UNSAFE)
    if storage.kind(index.parent / shard) is Kind.ABSENT:
        raise missing(index.parent, index.name, shard)


def _disagreement(index: Path, shard: str, tensor: str, other: str) -> RefusedError:
    return RefusedError(
        f"{index} and {shard} disagree: the shard holds {tensor}, which the index has in {other}.",
        code=Code.DAMAGED,
        path=index,
        tensor=tensor,
    )


def _strays(index: Path, shards: list[str], storage: Storage) -> list[Notice]:
    """Return a warning of shards in the folder that the index does not name."""
    found = [
        name
        for name in sorted(storage.names(index.parent) - set(shards))
        if name + INDEX_SUFFIX != index.name
        and SHARD_OF_SEVERAL.sub("", name) + INDEX_SUFFIX == index.name
    ]
    message = f"{index} does not name {some(found)}; their tensors are left out."
    return [Notice(Code.LEFT_OUT, message)] if found else []
