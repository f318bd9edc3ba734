"""Reading what a checkpoint holds, from headers alone: one function over every format."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_ema.errors import RefusedError, printable, some
from ckpt_ema.files import open_regular, read_exactly
from ckpt_ema.formats import safetensors, torch_file
from ckpt_ema.formats.specs import ReadSpecs, Specs, TensorSpec

_INDEX_SUFFIX = ".index.json"
_MAX_INDEX_BYTES = 1 << 28


def read_specs(weights: Path) -> Specs:
    """The tensors behind a weights file or an index of shards.

    File names in the result are relative to the folder of `weights`. Raises `RefusedError` for a
    file that breaks its format, and for an index and shards that do not agree.
    """
    if weights.name.endswith(_INDEX_SUFFIX):
        return _read_indexed(weights)
    specs = _reader(weights.name)(str(weights))
    return _renamed(specs, weights.name)


def is_safetensors(name: str) -> bool:
    """Whether a weights file or index of this name is (of) safetensors."""
    return ".safetensors" in name


def _reader(name: str) -> ReadSpecs:
    return safetensors.read_specs if is_safetensors(name) else torch_file.read_specs


def _renamed(specs: Specs, name: str) -> Specs:
    return Specs(specs.tensors, (specs.files[0]._replace(name=name),), specs.metadata, specs.notes)


def _read_indexed(index: Path) -> Specs:
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    _check_shard_names(index, shards)
    tensors: dict[str, TensorSpec] = {}
    parts = [_renamed(_reader(shard)(str(index.parent / shard)), shard) for shard in shards]
    for number, part in enumerate(parts):
        for name, tensor in part.tensors.items():
            if weight_map.get(name) != shards[number]:
                raise RefusedError(
                    f"{printable(index)} and {printable(shards[number])} disagree: the shard holds"
                    f" {printable(name)}, which the index has in"
                    f" {printable(weight_map.get(name, 'no shard'))}."
                )
            tensors[name] = tensor._replace(file=number)
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise RefusedError(
            f"{printable(index)} names {len(missing)} tensors that its shards lack:"
            f" {some(missing)}."
        )
    return Specs(
        tensors,
        tuple(part.files[0] for part in parts),
        tuple(part.metadata[0] for part in parts),
        tuple(note for part in parts for note in part.notes),
    )


def _weight_map(index: Path) -> Mapping[str, str]:
    content: Any
    with open_regular(str(index)) as file:
        if file.size_bytes > _MAX_INDEX_BYTES:
            raise RefusedError(f"{printable(index)} is too large to be an index of shards.")
        raw = read_exactly(str(index), file.fd, file.size_bytes, 0)
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{printable(index)} is not JSON.", "An interrupted save?") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise RefusedError(f"{printable(index)} has no weight_map.")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise RefusedError(f"{printable(index)} maps a tensor to something that is no file name.")
    return weight_map


def _check_shard_names(index: Path, shards: list[str]) -> None:
    for shard in shards:
        if shard in ("", ".", "..") or os.path.basename(shard) != shard or "\0" in shard:
            raise RefusedError(
                f"{printable(index)} names the shard {printable(shard)!r}, which is not a plain"
                " file name: a checkpoint may not reach outside its folder."
            )
        if not os.path.exists(index.parent / shard):  # Path.exists raises for long names
            raise RefusedError(
                f"{printable(index.parent)} is incomplete: {printable(index.name)} names"
                f" {printable(shard)}, and that file is missing.",
                "An interrupted save? Restore it or leave the checkpoint out.",
            )
