"""Reading what a checkpoint holds, from headers alone: one function over every format."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_ema.containers import dcp, safetensors, torch_file
from ckpt_ema.containers.specs import (
    FileSpec,
    Member,
    ModelFiles,
    Specs,
    TensorSpec,
    is_safetensors,
)
from ckpt_ema.errors import IncompleteError, RefusedError, printable, some
from ckpt_ema.storage.protocol import Kind, Storage
from ckpt_ema.trainers.conventions import DCP_METADATA, INDEX_SUFFIX, SHARD_OF_SEVERAL

_MAX_INDEX_BYTES = 1 << 28


def read_specs(model: ModelFiles, storage: Storage, key: str | None = None) -> Specs:
    """The tensors of a checkpoint, of all its parts.

    `key` is where the model is in a torch file. File names in the result are relative to the folder
    of `weights`. Raises `IncompleteError` for a checkpoint that is not whole, `RefusedError` for a
    file that breaks its format, and for an index and shards that do not agree.
    """
    parts = [_read_part(model.folder, part, storage, key) for part in model.members]
    if len(parts) == 1 and model.members[0].prefix == "":
        return replace(parts[0], notes=model.notes + parts[0].notes) if model.notes else parts[0]
    tensors: dict[str, TensorSpec] = {}
    files: list[FileSpec] = []
    for number, (part, specs) in enumerate(zip(model.members, parts, strict=True)):
        for name, tensor in specs.tensors.items():
            if part.prefix + name in tensors:
                raise RefusedError(
                    f"{printable(model.folder)} has two tensors {printable(part.prefix + name)}."
                )
            tensors[part.prefix + name] = _moved(tensor, len(files))
        files += [file._replace(part=number) for file in specs.files]
    return Specs(
        tensors,
        tuple(files),
        tuple(metadata for specs in parts for metadata in specs.metadata),
        model.notes + tuple(note for specs in parts for note in specs.notes),
        tuple(warning for specs in parts for warning in specs.warnings),
        {path: hole for specs in parts for path, hole in specs.holes.items()},
        parts[0].recorded,
        tuple(part.prefix for part in model.members),
    )


def _read_part(folder: Path, part: Member, storage: Storage, key: str | None) -> Specs:
    path = os.path.join(folder, part.name)
    if part.name.endswith(INDEX_SUFFIX):
        specs = _read_indexed(Path(path), storage, key)
    elif os.path.basename(path) == DCP_METADATA:
        specs = dcp.read_specs(path, storage, key)
    else:
        specs = _read_file(path, storage, key)
    inside = len(os.path.join(folder, ""))
    files = tuple(file._replace(name=file.name[inside:]) for file in specs.files)
    return replace(specs, files=files)


def _read_file(path: str, storage: Storage, key: str | None) -> Specs:
    if is_safetensors(os.path.basename(path)):
        if key is not None:
            raise RefusedError(
                f"--key {printable(key)} names a place in a torch file, and {printable(path)} is a"
                " safetensors file, which has none."
            )
        return safetensors.read_specs(path, storage)
    return torch_file.read_specs(path, storage, key)


def _moved(tensor: TensorSpec, files: int) -> TensorSpec:
    """A tensor whose files are counted from `files` on."""
    pieces = tuple(piece._replace(file=piece.file + files) for piece in tensor.pieces)
    return tensor._replace(file=tensor.file + files, pieces=pieces)


def _read_indexed(index: Path, storage: Storage, key: str | None) -> Specs:
    weight_map = _weight_map(index, storage)
    shards = sorted(set(weight_map.values()))
    _check_shard_names(index, shards, storage)
    tensors: dict[str, TensorSpec] = {}
    parts = [_read_file(os.path.join(index.parent, shard), storage, key) for shard in shards]
    for number, part in enumerate(parts):
        for name, tensor in part.tensors.items():
            if weight_map.get(name) != shards[number]:
                raise RefusedError(
                    f"{printable(index)} and {printable(shards[number])} disagree: the shard holds"
                    f" {printable(name)}, which the index has in"
                    f" {printable(weight_map.get(name, 'no shard'))}."
                )
            tensors[name] = _moved(tensor, number)
    warnings = [
        *_strays(index, shards, storage),
        *(text for part in parts for text in part.warnings),
    ]
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
        tuple(warnings),
        {path: hole for part in parts for path, hole in part.holes.items()},
    )


def _strays(index: Path, shards: list[str], storage: Storage) -> list[str]:
    """A warning of shards beside an index that it does not name."""
    found = [
        name
        for name in sorted(storage.names(index.parent) - set(shards))
        if name + INDEX_SUFFIX != index.name
        and SHARD_OF_SEVERAL.sub("", name) + INDEX_SUFFIX == index.name
    ]
    if not found:
        return []
    return [f"{printable(index)} does not name {some(found)}; what it holds is left out."]


def _weight_map(index: Path, storage: Storage) -> Mapping[str, str]:
    content: Any
    if storage.kind(index) is Kind.ABSENT:
        raise IncompleteError(
            f"{printable(index.parent)} has shards but no {printable(index.name)}, which is"
            " written last."
        )
    with storage.open(index) as file:
        size_bytes = file.identity.size_bytes
        if size_bytes > _MAX_INDEX_BYTES:
            raise RefusedError(f"{printable(index)} is too large to be an index of shards.")
        raw = file.read(size_bytes, 0)
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise IncompleteError(f"{printable(index)} is not JSON.", "An interrupted save?") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise RefusedError(f"{printable(index)} has no weight_map.")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise RefusedError(f"{printable(index)} maps a tensor to something that is no file name.")
    return weight_map


def _check_shard_names(index: Path, shards: list[str], storage: Storage) -> None:
    for shard in shards:
        if shard in ("", ".", "..") or os.path.basename(shard) != shard or "\0" in shard:
            raise RefusedError(
                f"{printable(index)} names the shard {printable(shard)!r}, which is not a plain"
                " file name: a checkpoint may not reach outside its folder."
            )
        if storage.kind(index.parent / shard) is Kind.ABSENT:
            raise IncompleteError(
                f"{printable(index.parent)} is incomplete: {printable(index.name)} names"
                f" {printable(shard)}, and that file is missing.",
                "An interrupted save? Restore it or leave the checkpoint out.",
            )
