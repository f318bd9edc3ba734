"""The files of the output, laid out before a byte of data exists.

They mirror the newest checkpoint: same file names, tensor order, shard split, dtypes and metadata,
so that whatever loads the run's own checkpoints loads the average. What came from torch files comes
out as safetensors.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ckpt_ema.containers.safetensors import MAX_HEADER_BYTES, make_header
from ckpt_ema.containers.specs import (
    AVERAGED,
    DTYPE_BITS,
    Specs,
    TensorSpec,
    is_safetensors,
    packed_bytes,
)
from ckpt_ema.errors import RefusedError, printable, some
from ckpt_ema.targets.companions import Companion
from ckpt_ema.trainers.conventions import (
    DCP_METADATA,
    PROVENANCE_KEY,
    SHARD_NUMBER,
    WEIGHTS_EXTENSION,
)

# Models whose loaders look for them by this name; any other torch file comes out as `model`.
_KEEPS_ITS_NAME = re.compile(
    r"^(pytorch_model_\d+|value_head|adapter_model|diffusion_pytorch_model|pytorch_lora_weights)$"
)

# Hashes of the tensors that training UIs put into the header; of an average they would be wrong.
_STALE_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


class OutputTensor(NamedTuple):
    """One tensor of the output and where its bytes go."""

    key: str  # in the specs of the checkpoints
    name: str  # in its file
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file, in bytes
    averaged: bool  # False: the newest checkpoint's value, byte for byte

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return packed_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of the output; `header` is all of it that comes before the data."""

    name: str  # relative to the output folder
    part: int  # of the checkpoint's parts, which have an index each
    header: bytes
    size_bytes: int
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """One averaged model, laid out: a folder, or one .safetensors file."""

    path: Path
    files: tuple[OutputFile, ...]
    indexes: tuple[tuple[str, bytes], ...]  # names and contents of the indexes of shards
    companions: tuple[Companion, ...]  # files that travel with the weights
    fingerprint: str  # of all that decides its bytes

    @property
    def is_single_file(self) -> bool:
        """Whether it is one .safetensors file and no folder."""
        return is_single_file(self.path)


def is_single_file(output: Path) -> bool:
    """Whether an output path asks for one .safetensors file.

    >>> is_single_file(Path("averaged.safetensors")), is_single_file(Path("averaged"))
    (True, False)
    """
    return output.suffix == ".safetensors"


def output_files(
    newest: Specs, dtype: str | None, single_name: str | None, provenance: Mapping[str, object]
) -> tuple[OutputFile, ...]:
    """Lay out the files that mirror `newest`.

    `dtype` is the one to write averaged tensors in (None: each in its own), `single_name` gathers
    everything in one file of that name; `provenance` goes into each header as one JSON string.
    """
    if single_name and len(newest.prefixes) > 1:
        raise RefusedError(
            f"The checkpoints hold {len(newest.prefixes)} models, whose tensors cannot share the"
            f" names of one file, {printable(single_name)}.",
            "Choose one with --component, or write a folder.",
        )
    groups: dict[tuple[int, str], list[tuple[str, TensorSpec]]] = {}
    places = [
        (0, single_name) if single_name else (file.member, _output_name(file.name))
        for file in newest.files
    ]
    for key, tensor in newest.tensors.items():
        groups.setdefault(places[tensor.file], []).append((key, tensor))
    files = []
    for (part, name), tensors in sorted(groups.items(), key=lambda group: group[1][0][1].file):
        metadata = {
            **{
                key: value
                for key, value in newest.metadata[tensors[0][1].file].items()
                if key not in _STALE_HASHES
            },
            "format": "pt",  # loaders of the Hugging Face family refuse a file without it
            PROVENANCE_KEY: json.dumps(provenance, separators=(",", ":")),
        }
        prefix = newest.prefixes[part]
        only = len([other for other in groups if other[0] == part]) == 1
        if only and not is_safetensors(newest.files[tensors[0][1].file].name):
            name = SHARD_NUMBER.sub("", name)  # a shard that is all there is
        files.append(_output_file(name, part, prefix, tensors, dtype, metadata))
    names = [file.name for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RefusedError(f"Several files would come out as {some(twice)}.")
    return tuple(files)


def make_indexes(files: Sequence[OutputFile], newest: Sequence[str]) -> list[tuple[str, bytes]]:
    """The names and contents of the indexes that loaders need, one for each part with shards.

    `newest` has the names of the newest checkpoint's weights files or indexes, part by part.
    """
    indexes = []
    for part in sorted({file.part for file in files}):
        members = [file for file in files if file.part == part]
        # Loaders need one also for a shard that is the only one.
        if len(members) > 1 or SHARD_NUMBER.search(members[0].name):
            indexes.append(_make_index(members, newest[part]))
    return indexes


def _make_index(files: Sequence[OutputFile], newest: str) -> tuple[str, bytes]:
    """The name and the content of the index over the shards `files`."""
    folder, name = os.path.split(newest)
    stem = SHARD_NUMBER.sub("", os.path.basename(files[0].name).split(".safetensors")[0])
    if is_safetensors(name):
        stem = name.split(".safetensors")[0]
    tensors = [(tensor, os.path.basename(f.name)) for f in files for tensor in f.tensors]
    content = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor, _ in tensors),
            "total_size": sum(tensor.size_bytes for tensor, _ in tensors),
        },
        "weight_map": {tensor.name: name for tensor, name in sorted(tensors, key=_by_name)},
    }
    return os.path.join(folder, f"{stem}.safetensors.index.json"), json.dumps(
        content, indent=2
    ).encode() + b"\n"


def _by_name(item: tuple[OutputTensor, str]) -> str:
    return item[0].name


def _output_name(name: str) -> str:
    """What the tensors of an input file are called in the output; several may share a file.

    >>> _output_name("2_Dense/pytorch_model.bin"), _output_name("epoch=1-step=100.ckpt")
    ('2_Dense/model.safetensors', 'model.safetensors')
    """
    folder, base = os.path.split(name)
    if is_safetensors(base):
        return name
    if base.endswith((".distcp", DCP_METADATA)):
        return "model.safetensors"  # the folder of the data files is no model's folder
    stem = WEIGHTS_EXTENSION.sub("", base)
    shard = SHARD_NUMBER.search(stem)
    known = "model"
    if shard and base.endswith(".bin"):
        known = re.sub("^pytorch_model", "model", stem)
        known = known if _KEEPS_ITS_NAME.search(stem[: shard.start()]) else f"model{shard.group()}"
    elif shard:
        known += shard.group()
    elif base.endswith(".bin") and _KEEPS_ITS_NAME.search(stem):
        known = re.sub("^pytorch_model", "model", stem)
    return os.path.join(folder, f"{known}.safetensors")


def _output_file(
    name: str,
    part: int,
    prefix: str,
    tensors: list[tuple[str, TensorSpec]],
    dtype: str | None,
    metadata: Mapping[str, str],
) -> OutputFile:
    keys = {key.removeprefix(prefix): key for key, _ in tensors}
    typed = [
        (
            key.removeprefix(prefix),
            dtype if dtype and spec.dtype in AVERAGED else spec.dtype,
            spec.shape,
        )
        for key, spec in tensors
    ]
    if "__metadata__" in keys:
        raise RefusedError("A tensor is named __metadata__, which safetensors reserves.")
    header, offsets = make_header(typed, metadata)
    if any(offsets[tensor_name] % _alignment(dtype) for tensor_name, dtype, _ in typed):
        # Readers view the bytes as numbers, so each tensor must start at a multiple of its element;
        # wide before narrow, as the safetensors library orders them, keeps that true.
        typed.sort(key=lambda item: -_alignment(item[1]))
        header, offsets = make_header(typed, metadata)
    if len(header) - 8 > MAX_HEADER_BYTES:
        raise RefusedError(
            f"The header of {printable(name)} would take {len(header)} bytes, and the format allows"
            f" {MAX_HEADER_BYTES}."
        )
    averaged = {key for key, spec in tensors if spec.dtype in AVERAGED}
    laid_out = tuple(
        OutputTensor(keys[name], name, dtype, shape, offsets[name], keys[name] in averaged)
        for name, dtype, shape in typed
    )
    size_bytes = len(header) + sum(tensor.size_bytes for tensor in laid_out)
    return OutputFile(name, part, header, size_bytes, laid_out)


def _alignment(dtype: str) -> int:
    return max(1, DTYPE_BITS[dtype] // 8)
