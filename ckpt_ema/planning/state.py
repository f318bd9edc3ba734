"""The state of an average: its exact shadow in a file, with what folding on needs to know.

A safetensors file of float64 tensors, whose header holds the record of what was folded. Its name
keeps loaders from taking it for weights.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.containers import safetensors
from ckpt_ema.containers.specs import (
    COMPLEX,
    FileSpec,
    ModelFiles,
    Piece,
    Region,
    Role,
    Specs,
    TensorSpec,
    packed_strides,
)
from ckpt_ema.errors import CkptEmaError, Code, RefusedError, counted
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.planning.average import Weighted
from ckpt_ema.planning.contents import Facts
from ckpt_ema.planning.fingerprint import FOLD_VERSION
from ckpt_ema.planning.roles import Ruling
from ckpt_ema.storage.local import Local
from ckpt_ema.storage.uri import absolute, path_of
from ckpt_ema.targets.target import Chunk, Output, OutputFile, OutputTensor
from ckpt_ema.trainers.conventions import STATE_FILE

VERSION = 1
_RECORD = "ckpt_ema_state"  # in the header's metadata
# What a record says of the values; the rest says where they came from.
_OF_VALUES = ("version", "fold", "accumulate", "decays", "kept", "facts", "regions", "complex")


class Asked(NamedTuple):
    """What averages were asked for, as plain values that make the same options again."""

    paths: Sequence[str]  # the run, or checkpoints; absolute
    options: Mapping[str, Any]
    accumulate: str  # the dtype of the fold


class Folded(NamedTuple):
    """One checkpoint that is in the shadow; its files may be gone."""

    checkpoint: Checkpoint
    files: tuple[FileSpec, ...]


@dataclass(frozen=True, slots=True)
class State:
    """The shadow of one average, and what was folded into it."""

    path: Path
    specs: Specs  # float64 tensors, by the keys of the checkpoints; complex ones are complex128
    name: str  # of the average
    asked: Asked
    fingerprint: str  # of the average
    folded: tuple[Folded, ...]  # oldest first
    decays: tuple[float, ...]  # of the second checkpoint and those after it
    kept: frozenset[str]  # keys of the tensors that are not averaged
    facts: Mapping[str, Facts]  # of the oldest checkpoint, for judging tensors
    checksum: int  # of the tensors, as the manifest has it

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that were folded, oldest first."""
        return tuple(one.checkpoint for one in self.folded)

    @property
    def label(self) -> str:
        """What to call it, as one of the inputs."""
        return f"the average of {counted(len(self.folded), 'checkpoint')}"


def count_folded(states: Sequence[State]) -> int:
    """Return the number of checkpoints in the averages of one output, which all have the same."""
    return len(states[0].folded) if states else 0


def lay_out_state(
    average: Weighted,
    folded: Iterable[Folded],
    output: Output,
    rulings: Mapping[str, Ruling],
    facts: Mapping[str, Facts],
    asked: Asked,
) -> OutputFile:
    """Lay out the state of an average beside its model files."""
    tensors = _float64(output.files)
    regions = {one.name: [one.key, *one.region] for one in tensors if one.region}
    record = {
        "version": VERSION,
        "fold": FOLD_VERSION,
        "fingerprint": output.fingerprint,
        "name": average.name,
        **asked._asdict(),
        "checkpoints": [_described(*one) for one in folded],
        "decays": average.decays,
        "kept": [key for key, one in rulings.items() if one.made is not Role.AVERAGED],
        "facts": facts,
        "regions": regions,
        "complex": [one.name for one in tensors if one.dtype in COMPLEX],
    }
    typed = [(one.name, "F64", _real_shape(one)) for one in tensors]
    metadata = {_RECORD: json.dumps(record, separators=(",", ":"))}
    header, offsets = safetensors.make_header(typed, metadata)
    placed = [one._replace(offset=at) for one, at in zip(tensors, offsets, strict=True)]
    size_bytes = len(header) + sum(one.size_bytes for one in placed)
    return OutputFile(STATE_FILE, 0, (Chunk(0, header),), size_bytes, tuple(placed))


def _float64(files: Iterable[OutputFile]) -> list[OutputTensor]:
    """Return the averaged regions of some files as float64, each once, in the same order."""
    found: dict[tuple[str, Region | None], OutputTensor] = {}
    for one in (one for file in files for one in file.tensors):
        if one.averaged and 0 not in one.shape and (one.key, one.region) not in found:
            dtype = "C128" if one.dtype in COMPLEX else "F64"
            name = f"{one.key}#{len(found)}" if one.region else one.key
            found[one.key, one.region] = one._replace(name=name, dtype=dtype, is_copy=False)
    return list(found.values())


def _real_shape(tensor: OutputTensor) -> tuple[int, ...]:
    return (*tensor.shape, 2) if tensor.dtype in COMPLEX else tensor.shape


def _described(checkpoint: Checkpoint, files: Sequence[FileSpec]) -> dict[str, Any]:
    return {
        "path": absolute(checkpoint.path),  # an update may be made from another folder
        "name": checkpoint.name,
        "step": checkpoint.step,
        "unit": checkpoint.unit,
        "folder": absolute(checkpoint.model.folder),
        "files": files,
    }


def says_same(header: bytes, other: bytes) -> bool:
    """Return whether the headers of two states have the same tensors, of the same fold.

    The checkpoints may be elsewhere now, be copies, or be named relative to another folder.
    """
    try:
        return _said(header) == _said(other)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return False


def _said(header: bytes) -> tuple[dict[str, Any], list[Any]]:
    tensors = json.loads(header)
    record = json.loads(tensors.pop("__metadata__")[_RECORD])
    return tensors, [record[name] for name in _OF_VALUES]


def read_state(folder: Path, manifest: Mapping[str, Any]) -> State:
    """Read the state in an output folder; `manifest` is what the folder's manifest says.

    Raises `RefusedError` for an output without a state, and for a state that is damaged, cut short,
    of another version, or not of this output.
    """
    path = folder / STATE_FILE
    claimed = manifest.get("state")
    if not isinstance(claimed, dict):
        message = f"{folder} has no state, so no checkpoint can be folded into it."
        hint = "Make the average with --keep-state."
        raise RefusedError(message, hint, code=Code.NO_STATE, path=folder)
    try:
        specs = safetensors.read_specs(str(path), Local())
    except CkptEmaError as error:
        raise _unusable(path, error.message.rstrip("."), error.code) from error
    if claimed.get("header_sha256") != specs.files[0].digest:
        raise _unusable(path, f"{path} is damaged, or does not belong to the average beside it")
    try:
        record = json.loads(specs.metadata[0][_RECORD])
        if (record["version"], record["fold"]) != (VERSION, FOLD_VERSION):
            raise _unusable(path, f"{path} was written by another version of ckpt-ema")
        return _state(path, specs, record, int(claimed["checksum"], 16))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _unusable(path, f"{path} is not a state of ckpt-ema") from error


def _unusable(path: Path, why: str, code: Code = Code.DAMAGED) -> RefusedError:
    hint = "Average the run again with --keep-state and --overwrite."
    return RefusedError(f"{why}.", hint, code=code, path=path)


def _state(path: Path, specs: Specs, record: Mapping[str, Any], checksum: int) -> State:
    folded = []
    for one in record["checkpoints"]:
        model = ModelFiles(path_of(one["folder"]), ())
        checkpoint = Checkpoint(path_of(one["path"]), one["step"], model, one["unit"], one["name"])
        folded.append(Folded(checkpoint, tuple(FileSpec(*file) for file in one["files"])))
    tensors = dict(specs.tensors)
    for name in record["complex"]:
        tensors[name] = tensors[name]._replace(dtype="C128", shape=tensors[name].shape[:-1])
    file = specs.files[0]._replace(name=STATE_FILE)
    return State(
        path=path,
        specs=replace(specs, tensors=_joined(tensors, record["regions"]), files=(file,)),
        name=record["name"],
        asked=Asked(record["paths"], record["options"], record["accumulate"]),
        fingerprint=record["fingerprint"],
        folded=tuple(folded),
        decays=tuple(record["decays"]),
        kept=frozenset(record["kept"]),
        facts={key: Facts(*facts) for key, facts in record["facts"].items()},
        checksum=checksum,
    )


def _joined(
    tensors: Mapping[str, TensorSpec], regions: Mapping[str, Sequence[Any]]
) -> dict[str, TensorSpec]:
    """Return tensors by their keys; those that are stored by regions have pieces."""
    found: dict[str, TensorSpec] = {}
    for name, tensor in tensors.items():
        if name not in regions:
            found[name] = tensor
            continue
        key, *values = regions[name]
        piece = _piece(tensor, Region(*map(tuple, values)))
        known = found.get(key, tensor._replace(shape=(), pieces=()))
        ends = [s + n for s, n in zip(piece.starts, piece.sizes, strict=True)]
        shape = tuple(map(max, ends, known.shape or ends))
        found[key] = known._replace(shape=shape, pieces=(*known.pieces, piece))
    return found


def _piece(tensor: TensorSpec, region: Region) -> Piece:
    """Return where the box of a region is in a state, which has it in the region's order."""
    strides = dict(zip(region.axes, packed_strides(tensor.shape), strict=True))
    ordered = tuple(strides[axis] for axis in range(len(region.axes)))
    return Piece(tensor.file, tensor.offset, region.starts, region.sizes, ordered)
