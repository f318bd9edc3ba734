"""Shards with an index: a JSON file that maps each tensor to the file that holds it."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckpt_ema.containers import safetensors, torch_file
from ckpt_ema.containers.checks import AS_IT_IS, is_plain_name, present, read_listing, refused
from ckpt_ema.containers.specs import Specs, TensorSpec, renumbered
from ckpt_ema.errors import Code, IncompleteError, RefusedError, some
from ckpt_ema.notices import Notice
from ckpt_ema.options import Reading
from ckpt_ema.storage.protocol import Kind, Storage
from ckpt_ema.trainers.conventions import INDEX_SUFFIX, SHARD_NUMBER

_MAX_INDEX_BYTES = 1 << 28


def claims(name: str) -> bool:
    """Return whether a file of this name is read here."""
    return name.endswith(INDEX_SUFFIX)


def read_specs(path: str, storage: Storage, reading: Reading = AS_IT_IS) -> Specs:
    """See `Container.read_specs`; `path` is that of the index.

    If there is none, or if none of its shards is there, the one complete set of shards of this name
    is read by its own headers.
    """
    folder = os.path.dirname(path)
    has_index = storage.kind(path) is not Kind.ABSENT
    shard_of = _weight_map(path, storage) if has_index else {}
    shards = sorted(set(shard_of.values()))
    if storage.names(folder).isdisjoint(shards) and (whole := complete_set(path, storage)):
        return _by_headers(path, shards, whole, storage, reading)
    if not has_index:
        raise _incomplete_set(path, storage)
    read = _read(path, shards, storage, reading)
    for shard, one in zip(shards, read, strict=True):
        for name in one.tensors:
            other = shard_of.get(name, "no shard")
            if other != shard:
                why = f"the shard holds {name}, which the index has in {other}"
                message = f"{path} and {shard} disagree: {why}."
                raise RefusedError(message, code=Code.DAMAGED, path=path, tensor=name)
    specs = joined(read)
    absent = sorted(shard_of.keys() - specs.tensors.keys())
    if absent:
        raise refused(path, f"names {len(absent)} tensors that its shards lack: {some(absent)}")
    return replace(specs, warnings=(*_strays(path, shards, storage), *specs.warnings))


def complete_set(index: str, storage: Storage) -> list[str]:
    """Return the names of the shards of an index that are all there; none if some are missing.

    Raises `RefusedError` if there are several such sets.
    """
    folder = os.path.dirname(index)
    sets = _sets(index, storage)
    complete = [
        list(shards.values())
        for count, shards in sets.items()
        if len(shards) == count and set(shards) in ({*range(count)}, {*range(1, count + 1)})
    ]
    if len(complete) > 1:
        both = " and ".join(some(shards, 2) for shards in complete)
        message = f"{folder} holds several complete sets of shards, {both}, and no index of them."
        hint = "Remove those of an earlier save."
        raise RefusedError(message, hint, code=Code.SEVERAL_MODELS, path=folder)
    return complete[0] if complete else []


def _sets(index: str, storage: Storage) -> dict[int, dict[int, str]]:
    """Return the shards in the folder of an index, by their count, then by their number."""
    folder, name = os.path.split(index)
    whole = name.removesuffix(INDEX_SUFFIX)
    sets: dict[int, dict[int, str]] = {}
    for one in sorted(storage.names(folder)):
        shard = SHARD_NUMBER.search(one)
        if shard and SHARD_NUMBER.sub("", one) == whole:
            sets.setdefault(int(shard["count"]), {})[int(shard["number"])] = one
    return sets


def _incomplete_set(index: str, storage: Storage) -> IncompleteError:
    """Return the error for shards without an index of which some are missing."""
    folder, name = os.path.split(index)
    lacking = ", ".join(
        f"number {number} of {count}"
        for count, shards in _sets(index, storage).items()
        for number in [next((n for n in range(1, count + 1) if n not in shards), count)]
    )
    message = f"{folder} has no {name}, which is written last, and lacks shards ({lacking})."
    return IncompleteError(message, code=Code.INCOMPLETE, path=folder)


def _by_headers(
    path: str, named: list[str], shards: list[str], storage: Storage, reading: Reading
) -> Specs:
    """Return the tensors of shards that no index lists; `named` are those of a stale index."""
    read = _read(path, shards, storage, reading)
    specs = joined(read)
    if len(specs.tensors) < sum(len(one.tensors) for one in read):
        why = f"and two of {some(shards, 2)} hold the same tensor"
        raise refused(path, f"is not there or stale, {why}", code=Code.SEVERAL_MODELS)
    index = os.path.basename(path)
    if named:
        text = f"{index} names shards that are not there ({some(named, 2)}); the complete set"
        warning = Notice(Code.LEFT_OUT, f"{text} {some(shards, 2)} is read instead.")
        return replace(specs, warnings=(warning, *specs.warnings))
    text = f"There is no {index}; its {len(shards)} shards are all there and read by their headers."
    return replace(specs, notes=(Notice(Code.DECIDED, text), *specs.notes))


def _read(index: str, shards: Sequence[str], storage: Storage, reading: Reading) -> list[Specs]:
    paths = [_shard_path(index, shard, storage) for shard in shards]
    return [
        (safetensors if safetensors.claims(shard) else torch_file).read_specs(
            each, storage, reading
        )
        for shard, each in zip(shards, paths, strict=True)
    ]


def joined(read: Sequence[Specs]) -> Specs:
    """Return the specs of several files as one; later tensors of one name replace earlier ones."""
    tensors: dict[str, TensorSpec] = {}
    count = 0
    for specs in read:
        numbers = range(count, count + len(specs.files))
        tensors |= {name: renumbered(tensor, numbers) for name, tensor in specs.tensors.items()}
        count += len(specs.files)
    return Specs(
        tensors,
        tuple(file for specs in read for file in specs.files),
        tuple(metadata for specs in read for metadata in specs.metadata),
        tuple(note for specs in read for note in specs.notes),
        tuple(warning for specs in read for warning in specs.warnings),
        {path: hole for specs in read for path, hole in specs.holes.items()},
    )


def _weight_map(path: str, storage: Storage) -> Mapping[str, str]:
    _, raw = read_listing(path, storage, _MAX_INDEX_BYTES, "an index of shards", "shards")
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        hint = "Was its save interrupted? Leave the checkpoint out."
        raise IncompleteError(f"{path} is not JSON.", hint, code=Code.DAMAGED, path=path) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise refused(path, "has no weight_map")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise refused(path, "maps a tensor to something that is not a file name")
    return weight_map


def _shard_path(index: str, shard: str, storage: Storage) -> str:
    if not is_plain_name(shard):
        name = f"the shard {shard!r}, which is not a plain file name"
        why = f"names {name}: a checkpoint may not reach outside its folder"
        raise refused(index, why, code=Code.UNSAFE)
    folder, name = os.path.split(index)
    return present(folder, name, shard, storage)


def _strays(index: str, shards: list[str], storage: Storage) -> list[Notice]:
    """Return a warning of shards in the folder that the index does not name."""
    folder, index_name = os.path.split(index)
    whole = index_name.removesuffix(INDEX_SUFFIX)
    unnamed = sorted(storage.names(folder) - set(shards))
    found = [n for n in unnamed if n != whole and SHARD_NUMBER.sub("", n) == whole]
    message = f"{index} does not name {some(found)}; their tensors are left out."
    return [Notice(Code.LEFT_OUT, message)] if found else []
