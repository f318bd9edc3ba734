"""Reading what checkpoints hold, from headers alone, whatever their containers.

One more container is one more module, with the functions of `Container`, and one more entry here.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ckpt_ema.containers import dcp, deepspeed, rank_files, safetensors, shards, torch_file
from ckpt_ema.containers.checks import AS_IT_IS, refused
from ckpt_ema.containers.model_key import ALREADY_AVERAGED
from ckpt_ema.containers.specs import Member, ModelFiles, Specs, is_safetensors
from ckpt_ema.containers.twin import one_of_both
from ckpt_ema.errors import Code, some
from ckpt_ema.notices import Notice
from ckpt_ema.options import Reading
from ckpt_ema.storage import Storage
from ckpt_ema.storage.protocol import SMALL_REQUESTS


class Container(Protocol):
    """A way of storing tensors in files, entered by one of them."""

    def claims(self, name: str) -> bool:
        """Return whether a file of this name is read here."""

    def read_specs(self, path: str, storage: Storage, reading: Reading = AS_IT_IS) -> Specs:
        """Return the tensors of the model that is entered by the file at `path`, from headers.

        `reading` says which dict of several is the model. Names of files in the result are paths.
        Raises `IncompleteError` for what is missing or cut short, `RefusedError` for what
        breaks its format; and touches files only through `storage`.
        """


# The first to claim a name reads it; torch_file claims all that are left.
CONTAINERS: tuple[Container, ...] = (
    *(dcp, shards, safetensors),
    *(deepspeed, rank_files, torch_file),
)


@dataclass(slots=True)
class Source:
    """The headers of checkpoints in one storage, each read once."""

    storage: Storage
    reading: Reading
    _specs: dict[ModelFiles, Specs] = field(default_factory=dict)
    _plain: set[int] = field(default_factory=set)  # identities of tensors without an average

    def read_ahead(self, models: Sequence[ModelFiles]) -> None:
        """Read several at a time from a remote storage; what is wrong with one, `read` raises."""
        if self.storage.is_remote and len(models) > 1:
            from concurrent.futures import wait  # runs on a disk need no threads here

            from ckpt_ema.storage.waiting import requesting

            with requesting(SMALL_REQUESTS) as pool:
                wait([pool.submit(self.read, model) for model in models])

    def read(self, model: ModelFiles) -> Specs:
        """Return the specs of a checkpoint, which has tensors; raises what `read_specs` raises."""
        if model not in self._specs:
            specs = read_specs(model, self.storage, self.reading)
            if not specs.tensors:
                raise refused(model.path, "holds no tensors", code=Code.NO_MODEL)
            self._specs[model] = self._asked_for(model, specs)
        return self._specs[model]

    def _asked_for(self, model: ModelFiles, specs: Specs) -> Specs:
        """Return the raw weights or the average, whichever --which asks for."""
        wants_average = self.reading.which == "ema"
        if id(specs.tensors) not in self._plain:  # checkpoints of one layout share their tensors
            chosen = one_of_both(model.path, specs, wants_average=wants_average)
            if chosen is specs and not wants_average:  # these specs are kept, and so their identity
                self._plain.add(id(specs.tensors))
            specs = chosen
        if wants_average and not (specs.is_average or model.is_average):
            why = f"has no average by its trainer; its tensors are {some(specs.tensors, 3)}"
            raise refused(model.path, why, "Leave out --which ema.", Code.NO_MATCH)
        if model.is_average and not (wants_average or specs.is_average):
            text = f"The model weights in {model.members[0].name} {ALREADY_AVERAGED}."
            warning = Notice(Code.ALREADY_AVERAGED, text)
            return replace(specs, warnings=(*specs.warnings, warning), is_average=True)
        return replace(specs, is_average=specs.is_average or model.is_average)


def forget_headers() -> None:
    """Forget the headers that were read, which a process of weeks would pile up."""
    safetensors.forget_headers()
    torch_file.forget_structures()


def read_specs(model: ModelFiles, storage: Storage, reading: Reading = AS_IT_IS) -> Specs:
    """Return the tensors of all members of a checkpoint; files are named relative to its folder.

    `reading` and what is raised are as for `Container.read_specs`.
    """
    read = []
    inside = len(os.path.join(model.folder, ""))
    for number, member in enumerate(model.members):
        path = os.path.join(model.folder, member.name)
        if member.is_part and not is_safetensors(member.name):
            one = torch_file.read_part(path, storage, reading)
        else:
            container = next(one for one in CONTAINERS if one.claims(os.path.basename(path)))
            one = container.read_specs(path, storage, reading)
        files = tuple(f._replace(name=f.name[inside:], member=number) for f in one.files)
        tensors = one.tensors
        if member.prefix:
            tensors = {member.prefix + name: tensor for name, tensor in tensors.items()}
        read.append(replace(one, files=files, tensors=tensors))
    specs = read[0] if len(read) == 1 else shards.joined(read)
    if sum(len(one.tensors) for one in read) > len(specs.tensors):
        twice = next(n for n in specs.tensors if sum(n in one.tensors for one in read) > 1)
        raise refused(model.folder, "is in two of its model files", tensor=twice)
    for member, one in zip(model.members, read, strict=True):
        _check_of_one_save(model, member, one.recorded, read[0].recorded)
    prefixes = tuple(member.prefix for member in model.members)
    notes, recorded = model.notes + specs.notes, read[0].recorded
    is_average = read[0].is_average
    return replace(specs, notes=notes, recorded=recorded, prefixes=prefixes, is_average=is_average)


def _check_of_one_save(
    model: ModelFiles, member: Member, own: Mapping[str, int], first: Mapping[str, int]
) -> None:
    """Refuse a part that records another step than the first one."""
    for unit in own.keys() & first.keys() if member.is_part else ():
        if own[unit] != first[unit]:
            both = f"{unit} {own[unit]}, and {model.members[0].name} {first[unit]}"
            hint = "Restore the files of one save, or leave the checkpoint out."
            why = f"records {both}: they are of two saves"
            raise refused(os.path.join(model.folder, member.name), why, hint)
