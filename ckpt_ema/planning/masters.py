"""Finds further copies of a checkpoint's weights: an optimizer's masters, and rounded weights.

A trainer resumes from the masters, so an average that is written back must be in them too.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import ModuleType
from typing import NamedTuple

from ckpt_ema.containers import dcp, deepspeed, torch_file
from ckpt_ema.containers.specs import (
    AVERAGED,
    DTYPE_BITS,
    Copy,
    FileSpec,
    Specs,
    TensorSpec,
    is_packed,
    pieces_of,
    renumbered,
    spanned,
)
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.storage import Storage
from ckpt_ema.targets.checkpoint import files_of
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.table import Masters


class WithMasters(NamedTuple):
    """A checkpoint with its masters, which are averaged like weights."""

    specs: Specs
    masters: list[str]  # FILE:PATH.OF.A.TENSOR
    not_found: dict[Masters, list[str]]  # files with a sign of masters in which none were found
    of_ranks: list[str]  # tensors of single ranks, for which the model has no name

    @property
    def unnamed(self) -> list[str]:
        """The masters whose weights are not known; they are tensors of their own."""
        return [key for key in self.masters if key in self.specs.tensors]


def with_masters(
    checkpoint: Checkpoint, specs: Specs, dropped: Container[str], storage: Storage
) -> WithMasters:
    """Add further copies of a checkpoint's weights to its specs.

    A weight with a master of its name is read from the master, and becomes a copy of it. Masters of
    `dropped` weights are not added, nor are any if the model is the trainer's own average: masters
    are those of the raw weights.
    """
    search = _Search(specs, os.fspath(checkpoint.model.folder), dropped, storage)
    root, names = files_of(checkpoint, storage)
    inside = os.path.join(os.path.normpath(checkpoint.model.folder), "")
    names = [name for name in names if os.path.normpath(root / name).startswith(inside)]
    is_folder = storage.is_folder(checkpoint.path)
    not_found: dict[Masters, list[str]] = {}
    partitions = _partitions(checkpoint, specs)
    for name in (name for name in names if os.path.normpath(root / name) not in partitions):
        path, label = os.path.join(root, name), _without_step(name) if is_folder else ""
        for masters in _signed(path, storage):
            if specs.is_average or not search.add(path, label, masters):
                not_found.setdefault(masters, []).append(name)
    return WithMasters(search.specs(), search.masters, not_found, search.of_ranks)


def _partitions(checkpoint: Checkpoint, specs: Specs) -> set[str]:
    """Return the paths of ZeRO's partitions, whose masters are the weights of the model itself."""
    ranks = (f.name for f in specs.files if deepspeed.is_one_of(os.path.basename(f.name)))
    parts = (name for name in ranks if os.path.basename(name) != deepspeed.WHOLE)
    is_whole = deepspeed.claims(os.path.basename(checkpoint.model.members[0].name))
    folder = checkpoint.model.folder
    return {os.path.normpath(folder / name) for name in parts} if is_whole else set()


def _signed(path: str, storage: Storage) -> Iterator[Masters]:
    """Yield the kinds of masters whose sign is in a file's name or content."""
    known = b"\n".join([os.fsencode(path), _structure(path, storage)])
    for masters in conventions.MASTERS:
        if re.search(masters.sign.encode(), known, re.MULTILINE):
            yield masters


def _structure(path: str, storage: Storage) -> bytes:
    """Return the pickled structure of a file, unparsed; nothing where there is none."""
    try:
        structure: bytes = _container(path).structure(path, storage)
    except CkptEmaError:  # the file is copied, readable or not
        return b""
    return structure


def _container(path: str) -> ModuleType:
    return dcp if dcp.claims(os.path.basename(path)) else torch_file


def _without_step(name: str) -> str:
    """Return the name of a file without the number of its step.

    >>> _without_step("global_step500/mp_rank_00_model_states.pt")
    'global_step/mp_rank_00_model_states.pt'
    """
    folders = name.split("/")
    return "/".join("global_step" if conventions.DEEPSPEED_STEP.search(f) else f for f in folders)


def _weight_of(masters: Masters, label: str, names: Iterable[str]) -> dict[str, str]:
    """Return the masters among the tensors of a file, and the name of each weight if it has one."""
    matches = ((name, re.search(masters.place, f"{label}:{name}")) for name in names)
    return {name: match.groupdict().get("weight") or "" for name, match in matches if match}


class _Search:
    """The specs of one checkpoint, to which masters are added."""

    def __init__(
        self, specs: Specs, folder: str, dropped: Container[str], storage: Storage
    ) -> None:
        self._specs, self._folder, self._storage = specs, folder, storage
        self._dropped = dropped
        self._tensors, self._files = _with_tensors_of_ranks(specs), [*specs.files]
        self.of_ranks = [key for key in self._tensors if key not in specs.tensors]
        self._numbers = {os.path.normpath(f.name): n for n, f in enumerate(specs.files)}
        self._holes = {**specs.holes}
        self._taken = _Taken(self._tensors.values())
        self.masters: list[str] = []

    def specs(self) -> Specs:
        """Return the specs with all that was found."""
        own = self._specs
        if not self.masters and len(self._tensors) == len(own.tensors):
            return own
        added = len(self._files) - len(own.files)
        metadata = (*own.metadata, *({} for _ in range(added)))
        files = tuple(self._files)
        return replace(
            own, tensors=self._tensors, files=files, metadata=metadata, holes=self._holes
        )

    def add(self, path: str, label: str, masters: Masters) -> bool:
        """Add the masters in one file; return whether it has some of the averaged model."""

        def choose(names: Collection[str]) -> set[str]:
            weight_of = _weight_of(masters, label, names)
            weights = (n for n in weight_of.values() if n in names and not self._is_dropped(n))
            return {*weight_of, *islice(weights, 1)}  # one weight shows which model it is

        try:
            read: Specs = _container(path).read_chosen(path, self._storage, choose)
        except CkptEmaError:
            return False
        numbers = [self._number_of(file) for file in read.files]
        placed = {one: renumbered(tensor, numbers) for one, tensor in read.tensors.items()}
        weight_of = _weight_of(masters, label, placed)
        key_of = self._keys(placed, [*weight_of.values()])
        if key_of is None or not weight_of:
            return False
        self._holes |= read.holes
        for one, weight in weight_of.items():
            if not self._is_dropped(weight):
                self._add(f"{label}:{one}", placed[one], key_of.get(weight, ""))
        return True

    def _add(self, key: str, master: TensorSpec, name: str) -> None:
        """Add one master, in place of the weight of a name if there is one."""
        if master.dtype not in AVERAGED or self._taken.holds(master):
            return
        self.masters.append(key)
        weight = self._tensors.get(name)
        if weight and weight.shape == master.shape and _is_rounded(weight, master):
            copies = (Copy(weight.dtype, piece) for piece in pieces_of(weight))
            self._tensors[name] = master._replace(copies=(*copies, *weight.copies))
        else:
            self._tensors[key] = master

    def _keys(
        self, placed: Mapping[str, TensorSpec], names: Sequence[str]
    ) -> Mapping[str, str] | None:
        """Return the key of each weight by its name in a file; none if the file has no weights.

        None if the file holds another model than the averaged one: its weights lie elsewhere.
        """
        name = next((name for name in names if name in placed), None)
        if name is None:
            return {}
        own = {k: t._replace(copies=(), of_ranks=()) for k, t in self._specs.tensors.items()}
        key = next((end for end in _ends(name) if own.get(end) == placed[name]), None)
        if key is None:
            return {} if placed[name] in own.values() else None
        return {one: one.removeprefix(name.removesuffix(key)) for one in names}

    def _is_dropped(self, name: str) -> bool:
        return any(end in self._dropped for end in _ends(name))

    def _number_of(self, file: FileSpec) -> int:
        name = os.path.relpath(file.name, self._folder)
        if name not in self._numbers:
            self._numbers[name] = len(self._files)
            self._files.append(file._replace(name=name))
        return self._numbers[name]


def _is_rounded(weight: TensorSpec, master: TensorSpec) -> bool:
    """Return whether a weight can be rounded from its master, which must not have fewer bits."""
    is_wide = DTYPE_BITS[master.dtype] >= DTYPE_BITS[weight.dtype]
    return is_wide and weight.dtype in AVERAGED


def _ends(name: str) -> Iterator[str]:
    """Yield a dotted name, then without its first part, its first two parts, and so on.

    >>> [*_ends("module.layer.weight")]
    ['module.layer.weight', 'layer.weight', 'weight']
    """
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _with_tensors_of_ranks(specs: Specs) -> dict[str, TensorSpec]:
    """Return all tensors, and each other rank's own values as a tensor named after its file."""
    tensors = {}
    for key, tensor in specs.tensors.items():
        tensors[key] = tensor._replace(of_ranks=()) if tensor.of_ranks else tensor
        for dtype, piece in tensor.of_ranks:
            pieces = () if is_packed(piece.sizes, piece.strides) else (piece,)
            own = TensorSpec(dtype, tensor.shape, piece.file, piece.offset, pieces)
            tensors[f"file {piece.file + 1}:{key}"] = own
    return tensors


class _Taken:
    """The bytes that are already part of a tensor."""

    def __init__(self, tensors: Iterable[TensorSpec]) -> None:
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        for tensor in tensors:
            for file, start, stop in _ranges(tensor):
                self._ranges.setdefault(file, []).append((start, stop))
        for ranges in self._ranges.values():
            ranges.sort()

    def holds(self, tensor: TensorSpec) -> bool:
        """Return whether a tensor shares some of these bytes, or is empty."""
        own = [*_ranges(tensor)]
        return not own or any(self._meets(*one) for one in own)

    def _meets(self, file: int, start: int, stop: int) -> bool:
        ranges = self._ranges.get(file, [])
        after = bisect_right(ranges, (start, stop))
        return any(begin < stop and start < end for begin, end in ranges[max(after - 1, 0) :][:2])


def _ranges(tensor: TensorSpec) -> Iterator[tuple[int, int, int]]:
    """Yield the file, the first byte and the end of each piece of a tensor and of its copies."""
    own = [(tensor.dtype, piece) for piece in pieces_of(tensor)]
    copies = [(copy.dtype, copy.piece) for copy in tensor.copies]
    for dtype, piece in (*own, *copies):
        count = spanned(piece.sizes, piece.strides)
        if count:
            yield piece.file, piece.offset, piece.offset + count * DTYPE_BITS[dtype] // 8
