"""Reading what a checkpoint holds, from headers alone, whatever its containers."""

import os
from dataclasses import replace
from pathlib import Path

from ckpt_ema.containers.registry import container_of
from ckpt_ema.containers.shards import joined
from ckpt_ema.containers.specs import Member, ModelFiles, Specs
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.storage.protocol import Storage


def read_specs(model: ModelFiles, storage: Storage, key: str | None = None) -> Specs:
    """Return the tensors of all members of a checkpoint.

    `key` is where the model is in a torch file. File names in the result are relative to the
    model's folder. Raises what `Container.read_specs` raises.
    """
    read = [
        _read_member(model.folder, number, member, storage, key)
        for number, member in enumerate(model.members)
    ]
    if len(read) == 1 and not model.members[0].prefix:
        return replace(read[0], notes=model.notes + read[0].notes)
    names = [name for specs in read for name in specs.tensors]
    specs = joined(read)
    if len(names) > len(specs.tensors):
        twice = next(name for name in specs.tensors if names.count(name) > 1)
        raise RefusedError(
            f"{model.folder} has two tensors {twice}.",
            code=Code.DAMAGED,
            path=model.folder,
            tensor=twice,
        )
    return replace(
        specs,
        notes=model.notes + specs.notes,
        recorded=read[0].recorded,
        prefixes=tuple(member.prefix for member in model.members),
    )


def _read_member(
    folder: Path, number: int, member: Member, storage: Storage, key: str | None
) -> Specs:
    """Read one member: names of files relative to the folder, names of tensors with its prefix."""
    path = os.path.join(folder, member.name)
    specs = container_of(os.path.basename(path)).read_specs(path, storage, key)
    inside = len(os.path.join(folder, ""))
    files = [file._replace(name=file.name[inside:], member=number) for file in specs.files]
    tensors = specs.tensors
    if member.prefix:
        tensors = {member.prefix + name: tensor for name, tensor in tensors.items()}
    return replace(specs, files=tuple(files), tensors=tensors)
