"""The files of the output, laid out before a byte of data exists.

They mirror the newest checkpoint: same file names, tensor order, shard split, dtypes and metadata,
so that whatever loads the run's own checkpoints loads the average. What came from torch files comes
out as safetensors.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt_ema.errors import RefusedError, printable, some
from ckpt_ema.formats import is_safetensors
from ckpt_ema.formats.safetensors import MAX_HEADER_BYTES, make_header
from ckpt_ema.formats.specs import AVERAGED, DTYPE_BITS, Specs, TensorSpec
from ckpt_ema.layouts import SHARD_NUMBER

PROVENANCE_KEY = "ckpt_ema"

# Hashes of the tensors that training UIs put into the header; of an average they would be wrong.
_STALE_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output and where its bytes go."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file, in bytes
    averaged: bool  # False: the newest checkpoint's value, byte for byte

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return TensorSpec(self.dtype, self.shape, 0, 0).size_bytes


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of the output; `header` is all of it that comes before the data."""

    name: str
    header: bytes
    size_bytes: int
    tensors: tuple[OutputTensor, ...]


def output_files(
    newest: Specs, dtype: str | None, single_name: str | None, provenance: Mapping[str, object]
) -> tuple[OutputFile, ...]:
    """Lay out the files that mirror `newest`.

    `dtype` is the one to write averaged tensors in (None: each in its own), `single_name` gathers
    everything in one file of that name; `provenance` goes into each header as one JSON string.
    """
    groups: dict[int, list[tuple[str, TensorSpec]]] = {}
    for name, tensor in newest.tensors.items():
        groups.setdefault(0 if single_name else tensor.file, []).append((name, tensor))
    files = []
    for number, tensors in sorted(groups.items()):
        name = single_name or _safetensors_name(newest.files[number].name, len(groups))
        metadata = {
            **{k: v for k, v in newest.metadata[number].items() if k not in _STALE_HASHES},
            "format": "pt",  # loaders of the Hugging Face family refuse a file without it
            PROVENANCE_KEY: json.dumps(provenance, separators=(",", ":")),
        }
        files.append(_output_file(name, tensors, dtype, metadata))
    names = [file.name for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RefusedError(f"Several shards would come out as {some(twice)}.")
    return tuple(files)


def needs_index(files: Sequence[OutputFile]) -> bool:
    """Whether loaders need an index to find these files; also for a shard that is the only one."""
    return len(files) > 1 or bool(SHARD_NUMBER.search(files[0].name))


def make_index(files: tuple[OutputFile, ...], newest_index: str) -> tuple[str, bytes]:
    """The name and the content of the index over the shards `files`."""
    stem = "model" if not is_safetensors(newest_index) else newest_index.split(".safetensors")[0]
    tensors = [(tensor, file.name) for file in files for tensor in file.tensors]
    content = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor, _ in tensors),
            "total_size": sum(tensor.size_bytes for tensor, _ in tensors),
        },
        "weight_map": {tensor.name: name for tensor, name in sorted(tensors, key=_by_name)},
    }
    return f"{stem}.safetensors.index.json", json.dumps(content, indent=2).encode() + b"\n"


def _by_name(item: tuple[OutputTensor, str]) -> str:
    return item[0].name


def _safetensors_name(name: str, count: int) -> str:
    if is_safetensors(name):
        return name
    shard = SHARD_NUMBER.search(name)
    if count > 1 and not shard:
        raise RefusedError(f"The shard {printable(name)} has no number to name its output by.")
    return f"model{shard.group() if shard and count > 1 else ''}.safetensors"


def _output_file(
    name: str, tensors: list[tuple[str, TensorSpec]], dtype: str | None, metadata: Mapping[str, str]
) -> OutputFile:
    typed = [
        (tensor_name, dtype if dtype and spec.dtype in AVERAGED else spec.dtype, spec.shape)
        for tensor_name, spec in tensors
    ]
    reserved = [tensor_name for tensor_name, _ in tensors if tensor_name == "__metadata__"]
    if reserved:
        raise RefusedError(f"A tensor is named {some(reserved)}, which safetensors reserves.")
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
    averaged = {tensor_name: spec.dtype in AVERAGED for tensor_name, spec in tensors}
    laid_out = tuple(OutputTensor(n, d, s, offsets[n], averaged[n]) for n, d, s in typed)
    size_bytes = len(header) + sum(tensor.size_bytes for tensor in laid_out)
    return OutputFile(name, header, size_bytes, laid_out)


def _alignment(dtype: str) -> int:
    return max(1, DTYPE_BITS[dtype] // 8)
