"""Outputs of safetensors: a folder that mirrors the newest checkpoint, or one file.

A folder has the newest checkpoint's file names, tensor order, shard split, dtypes and metadata, so
that whatever loads the run's own checkpoints loads the average. Torch files become safetensors.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ckpt_ema.containers.safetensors import MAX_HEADER_BYTES, make_header
from ckpt_ema.containers.specs import DTYPE_BITS, Role, is_safetensors
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.targets.target import Chunk, Finish, Model, OutputFile, OutputTensor, Target
from ckpt_ema.trainers.conventions import (
    DCP_METADATA,
    PROVENANCE_KEY,
    SHARD_NUMBER,
    WEIGHTS_EXTENSION,
)

# Models whose loaders look for them by this name; any other torch file becomes `model`.
_KEEPS_ITS_NAME = re.compile(
    r"^(pytorch_model_\d+|value_head|adapter_model|diffusion_pytorch_model|pytorch_lora_weights)$"
)

# Bytes of one element, 1 where several share a byte.
_ELEMENT_BYTES = {dtype: max(1, bits // 8) for dtype, bits in DTYPE_BITS.items()}

# Hashes of the tensors that training UIs put into the header; for an average they would be wrong.
_STALE_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def target_for(path: Path) -> Target:
    """Return the target that an output path asks for.

    >>> target_for(Path("averaged.safetensors")).is_single_file
    True
    """
    return SafetensorsFile(path) if path.suffix == ".safetensors" else SafetensorsFolder(path)


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A `Target` that gathers all tensors in one file."""

    path: Path
    is_single_file: ClassVar[bool] = True

    def lay_out(self, model: Model) -> tuple[OutputFile, ...]:
        """See `Target.lay_out`; refuses several models, whose tensors may share names."""
        count = len(model.specs.prefixes)
        if count > 1:
            raise RefusedError(
                f"{self.path} is one file, which cannot hold the {count} models of a checkpoint.",
                "Choose one with --component, or write a folder.",
                code=Code.SEVERAL_MODELS,
                path=self.path,
            )
        return (_file(self.path.name, 0, list(model.specs.tensors), model),)

    def finish(self, files: Sequence[OutputFile], members: Sequence[str]) -> tuple[Finish, ...]:
        """See `Target.finish`; nothing follows one file."""
        del files, members
        return ()


@dataclass(frozen=True, slots=True)
class SafetensorsFolder:
    """A `Target` that mirrors the files of the newest checkpoint."""

    path: Path
    is_single_file: ClassVar[bool] = False

    def lay_out(self, model: Model) -> tuple[OutputFile, ...]:
        """See `Target.lay_out`."""
        newest = model.specs
        names = [(file.member, _output_name(file.name)) for file in newest.files]
        groups: dict[tuple[int, str], list[str]] = {}
        for key, tensor in newest.tensors.items():
            groups.setdefault(names[tensor.file], []).append(key)
        files = []
        for (member, name), keys in sorted(
            groups.items(), key=lambda group: newest.tensors[group[1][0]].file
        ):
            only = sum(other == member for other, _ in groups) == 1
            if only and not is_safetensors(newest.files[newest.tensors[keys[0]].file].name):
                name = SHARD_NUMBER.sub("", name)  # a shard that is all there is
            files.append(_file(name, member, keys, model))
        written = [file.name for file in files]
        twice = sorted({name for name in written if written.count(name) > 1})
        if twice:
            raise RefusedError(
                f"{self.path} would hold several files named {some(twice)}.",
                code=Code.INVALID_OUTPUT,
                path=self.path,
            )
        return tuple(files)

    def finish(self, files: Sequence[OutputFile], members: Sequence[str]) -> tuple[Finish, ...]:
        """See `Target.finish`; an index for each member in shards."""
        indexes = []
        for member in sorted({file.member for file in files}):
            shards = [file for file in files if file.member == member]
            # Loaders need one also for a shard that is the only one.
            if len(shards) > 1 or SHARD_NUMBER.search(shards[0].name):
                indexes.append(_index(shards, members[member]))
        return tuple(indexes)


def _index(shards: Sequence[OutputFile], member: str) -> Finish:
    """Return the name and the content of the index over `shards`."""
    folder, name = os.path.split(member)
    stem = SHARD_NUMBER.sub("", os.path.basename(shards[0].name).split(".safetensors")[0])
    if is_safetensors(name):
        stem = name.split(".safetensors")[0]
    tensors = [
        (tensor, os.path.basename(shard.name)) for shard in shards for tensor in shard.tensors
    ]
    content = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor, _ in tensors),
            "total_size": sum(tensor.size_bytes for tensor, _ in tensors),
        },
        "weight_map": dict(sorted((tensor.name, shard) for tensor, shard in tensors)),
    }
    text = json.dumps(content, indent=2) + "\n"
    return os.path.join(folder, f"{stem}.safetensors.index.json"), text.encode()


def _output_name(name: str) -> str:
    """Name the output file for the tensors of an input file; several inputs may share one.

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
    known = base.endswith(".bin") and _KEEPS_ITS_NAME.search(
        stem[: shard.start()] if shard else stem
    )
    number = shard.group() if shard else ""
    new = re.sub("^pytorch_model", "model", stem) if known else f"model{number}"
    return os.path.join(folder, f"{new}.safetensors")


def _file(name: str, member: int, keys: Sequence[str], model: Model) -> OutputFile:
    """Lay out one safetensors file that holds the tensors `keys` of a model."""
    newest, roles = model.specs, model.roles
    prefix = newest.prefixes[member]
    key_of = {key.removeprefix(prefix): key for key in keys}
    if "__metadata__" in key_of:
        raise RefusedError(
            "Tensor __metadata__ has a name that safetensors reserves.",
            code=Code.INVALID_OUTPUT,
            tensor="__metadata__",
        )
    typed = []
    for tensor, key in key_of.items():
        spec = newest.tensors[key]
        averaged = roles[key] is Role.AVERAGED
        typed.append((tensor, (averaged and model.dtype) or spec.dtype, spec.shape))
    old = newest.metadata[newest.tensors[keys[0]].file]
    metadata = {
        **{key: value for key, value in old.items() if key not in _STALE_HASHES},
        "format": "pt",  # loaders of the Hugging Face family refuse a file without it
        PROVENANCE_KEY: json.dumps(model.provenance, separators=(",", ":")),
    }
    header, typed, offsets = _aligned(typed, metadata)
    if len(header) - 8 > MAX_HEADER_BYTES:
        raise RefusedError(
            f"{name} would need a header of {len(header)} bytes; the format allows"
            f" {MAX_HEADER_BYTES}.",
            code=Code.INVALID_OUTPUT,
            path=name,
        )
    laid_out = tuple(
        OutputTensor(key_of[one], one, dtype, shape, offsets[one], roles[key_of[one]])
        for one, dtype, shape in typed
    )
    size_bytes = laid_out[-1].offset + laid_out[-1].size_bytes
    return OutputFile(name, member, (Chunk(0, header),), size_bytes, laid_out)


_Typed = list[tuple[str, str, tuple[int, ...]]]  # names, dtypes, shapes


def _aligned(typed: _Typed, metadata: Mapping[str, str]) -> tuple[bytes, _Typed, dict[str, int]]:
    """Return the header, the tensors in the order of their bytes, and their offsets.

    Readers view the bytes as numbers, so each tensor must start at a multiple of its element; wide
    before narrow, as the safetensors library orders them, keeps that true.
    """
    header, offsets = make_header(typed, metadata)
    if any(offsets[name] % _ELEMENT_BYTES[dtype] for name, dtype, _ in typed):
        typed = sorted(typed, key=lambda tensor: -_ELEMENT_BYTES[tensor[1]])
        header, offsets = make_header(typed, metadata)
    return header, typed, offsets
