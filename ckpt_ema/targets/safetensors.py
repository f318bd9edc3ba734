"""Outputs of safetensors: a folder that mirrors the newest checkpoint, or one file.

A folder has the newest checkpoint's file names, tensor order, shard split, dtypes and metadata, so
that whatever loads the run's own checkpoints loads the average. Torch files become safetensors.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from operator import mod
from pathlib import Path

from ckpt_ema.containers.safetensors import MAX_HEADER_BYTES, make_header
from ckpt_ema.containers.specs import (
    COMPLEX,
    DTYPE_BITS,
    WRITTEN_AS,
    Role,
    is_safetensors,
)
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.targets.target import Chunk, Finish, Model, OutputFile, OutputTensor, Target
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.conventions import SHARD_NUMBER

# Words for any model or step; a torch file whose name has no others becomes `model`. A part of a
# model (mm_projector, value_head) keeps its name unless that has a step.
_ANY_MODEL = re.compile(
    r"(model|pytorch|lit|net|network|module|states?|dict|weights?|params?|parameters|raw|full|fsdp"
    r"|checkpoint|ckpt|snapshot|saved?|pre|trained|pretrained|consolidated|best|last|latest|final"
    r"|v|ema|swa|avg|averaged?|global|step|iter|iteration|epoch|ep|ba|rank)?"
)
_WORD = re.compile(r"(?=[a-z\d])([a-z]*)(\d*)")

# Bytes of one element, 1 where several share a byte.
_ELEMENT_BYTES = {dtype: max(1, bits // 8) for dtype, bits in DTYPE_BITS.items()}

# Hashes of the tensors that training UIs put into the header; for an average they would be wrong.
_STALE_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def target_for(path: Path) -> Target:
    """Return the target that an output path asks for.

    >>> target_for(Path("averaged.safetensors")).is_single_file
    True
    """
    return SafetensorsTarget(path)


@dataclass(frozen=True, slots=True)
class SafetensorsTarget:
    """A `Target` that mirrors the files of the newest checkpoint, or gathers all in one file."""

    path: Path

    @property
    def is_single_file(self) -> bool:
        """See `Target.is_single_file`."""
        return self.path.suffix == ".safetensors"

    def lay_out(self, model: Model) -> tuple[OutputFile, ...]:
        """See `Target.lay_out`; one file is refused for several models, which may share names."""
        count = len(model.specs.prefixes)
        if self.is_single_file and count > 1:
            raise RefusedError(
                f"{self.path} is one file, which cannot hold the {count} models of a checkpoint.",
                "Choose one with --component, or write a folder.",
                code=Code.SEVERAL_MODELS,
                path=self.path,
            )
        if self.is_single_file:
            return (_file(self.path.name, 0, list(model.specs.tensors), model),)
        files = [_file(name, member, keys, model) for name, member, keys in _groups(model)]
        written = Counter(file.name for file in files)
        twice = sorted(name for name, number in written.items() if number > 1)
        if twice:
            message = f"{self.path} would hold several files named {some(twice)}."
            raise RefusedError(message, code=Code.INVALID_OUTPUT, path=self.path)
        return tuple(files)

    def finish(self, files: Sequence[OutputFile], members: Sequence[str]) -> tuple[Finish, ...]:
        """See `Target.finish`; an index for each member in shards."""
        indexes = []
        for member in sorted({file.member for file in files}):
            shards = [file for file in files if file.member == member]
            # Loaders need one also for a shard that is the only one.
            if len(shards) > 1 or (SHARD_NUMBER.search(shards[0].name) and not self.is_single_file):
                indexes.append(_index(shards, members[member]))
        return tuple(indexes)


def _groups(model: Model) -> Iterator[tuple[str, int, list[str]]]:
    """Yield the name of each output file, its member, and the keys of its tensors."""
    newest, prefixes = model.specs, model.specs.prefixes
    names = [(file.member, _output_name(file.name, prefixes[file.member])) for file in newest.files]
    if model.is_file and not is_safetensors(newest.files[0].name):
        names = [(0, "model.safetensors")]
    groups: dict[tuple[int, str], list[str]] = {}
    for key, tensor in newest.tensors.items():
        groups.setdefault(names[tensor.file], []).append(key)
    files_of = Counter(member for member, _ in groups)
    for keys in sorted(groups.values(), key=lambda keys: newest.tensors[keys[0]].file):
        file = newest.files[newest.tensors[keys[0]].file]
        _, name = names[newest.tensors[keys[0]].file]
        if files_of[file.member] == 1 and not is_safetensors(file.name):
            name = SHARD_NUMBER.sub("", name)  # a shard that is all there is
        yield name, file.member, keys


def _index(shards: Sequence[OutputFile], member: str) -> Finish:
    """Return the name and the content of the index over `shards`."""
    folder, name = _split(member)
    stem = SHARD_NUMBER.sub("", os.path.basename(shards[0].name).split(".safetensors")[0])
    if is_safetensors(name):
        stem = name.split(".safetensors")[0]
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    shard_of = {one.name: os.path.basename(shard.name) for shard in shards for one in shard.tensors}
    content = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.size_bytes for tensor in tensors),
        },
        "weight_map": dict(sorted(shard_of.items())),
    }
    text = json.dumps(content, indent=2) + "\n"
    return os.path.join(folder, f"{stem}.safetensors.index.json"), text.encode()


def _output_name(name: str, prefix: str = "") -> str:
    """Name the output file for the tensors of an input file; several inputs may share one.

    `prefix` is that of its model: a further file of a checkpoint has its own name in it.

    >>> _output_name("2_Dense/pytorch_model.bin"), _output_name("epoch=1-step=100.ckpt")
    ('2_Dense/model.safetensors', 'model.safetensors')
    >>> _output_name("mm_projector.bin"), _output_name("pytorch_model_1.bin")
    ('mm_projector.safetensors', 'model_1.safetensors')
    """
    folder, base = _split(name)
    if is_safetensors(base):
        return os.path.join(folder, base)
    if base.endswith((".distcp", conventions.DCP_METADATA, "_states.pt")):
        return "model.safetensors"  # the folder of the data files is not the model's
    stem = conventions.WEIGHTS_EXTENSION.sub("", conventions.OTHER_EXTENSION.sub("", base))
    shard = SHARD_NUMBER.search(stem)
    number = shard.group() if shard else ""
    own = stem.removesuffix(number)
    if prefix == f"{own}/":
        return f"{stem}.safetensors"
    if conventions.FURTHER_MODEL.search(base):
        new = stem.removeprefix("pytorch_")
    elif _is_any_model(own) or (number and f"{own}.bin" not in conventions.FOLDER_WEIGHTS):
        new = f"model{number}"  # shards of any name are those of an index, which names the model
    else:
        new = stem
    return os.path.join(folder, f"{new}.safetensors")


def _is_any_model(stem: str) -> bool:
    """Return whether a name may be that of any model, or of any step.

    >>> [_is_any_model(name) for name in ("epoch12", "12epoch", "net_g-100", "t5_encoder", "lora")]
    [True, True, True, False, False]
    """
    words = [
        (_ANY_MODEL.fullmatch(word), len(digits)) for word, digits in _WORD.findall(stem.lower())
    ]
    is_step = any(digits > 2 or (is_any and digits) for is_any, digits in words)
    return is_step or all(is_any for is_any, _ in words)


def _split(name: str) -> tuple[str, str]:
    """Return the folder and the base name of an output; a folder called as a file is left out.

    >>> _split("pytorch_model.bin/model.safetensors"), _split("2_Dense/model.safetensors")
    (('', 'model.safetensors'), ('2_Dense', 'model.safetensors'))
    """
    folder, base = os.path.split(name)
    return ("" if conventions.WEIGHTS_EXTENSION.search(folder) else folder), base


def _file(name: str, member: int, keys: Sequence[str], model: Model) -> OutputFile:
    """Lay out one safetensors file that holds the tensors `keys` of a model."""
    newest = model.specs
    prefix = newest.prefixes[member]
    if f"{prefix}__metadata__" in keys:
        message = "Tensor __metadata__ has a name that safetensors reserves."
        raise RefusedError(message, code=Code.INVALID_OUTPUT, tensor="__metadata__")
    written = cache(partial(_written_as, model.dtype))
    tensors, roles = [newest.tensors[key] for key in keys], [model.roles[key] for key in keys]
    typed = [
        (key.removeprefix(prefix), written(role is Role.AVERAGED, spec.dtype), spec.shape)
        for key, role, spec in zip(keys, roles, tensors, strict=True)
    ]
    old = newest.metadata[tensors[0].file]
    metadata = {
        **{key: value for key, value in old.items() if key not in _STALE_HASHES},
        "format": "pt",  # loaders of the Hugging Face family refuse a file without it
        conventions.PROVENANCE_KEY: json.dumps(model.provenance, separators=(",", ":")),
    }
    header, offsets = make_header(typed, metadata)
    # Readers view the bytes as numbers, so each tensor must start at a multiple of its element;
    # wide before narrow, as the safetensors library orders them, keeps that true.
    widths = [_ELEMENT_BYTES[dtype] for _, dtype, _ in typed]
    if any(map(mod, offsets, widths)):
        order = sorted(range(len(keys)), key=lambda number: -widths[number])
        keys, roles = [keys[number] for number in order], [roles[number] for number in order]
        typed = [typed[number] for number in order]
        header, offsets = make_header(typed, metadata)
    if len(header) - 8 > MAX_HEADER_BYTES:
        message = f"{name} would need a header of {len(header)} bytes, more than the format allows."
        raise RefusedError(message, code=Code.INVALID_OUTPUT, path=name)
    laid_out = tuple(map(OutputTensor, keys, *zip(*typed, strict=True), offsets, roles))
    size_bytes = laid_out[-1].offset + laid_out[-1].size_bytes
    return OutputFile(name, member, (Chunk(0, header),), size_bytes, laid_out)


def _written_as(asked: str | None, is_averaged: bool, dtype: str) -> str:
    """Return the dtype of a tensor in the output, where real averages have the dtype asked for."""
    is_real = is_averaged and dtype not in COMPLEX
    found = (asked if is_real else None) or dtype
    return WRITTEN_AS.get(found, found)
