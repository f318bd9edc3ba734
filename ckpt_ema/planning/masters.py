"""Finds where checkpoints have their weights once more: masters of optimizers, and rounded copies.

A trainer that resumes takes the masters, so an average that is written back has to be in them too.
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
    found: list[str]  # the masters: a file and a dotted path
    kept: dict[Masters, list[str]]  # files with a sign of masters in which none were found
    copies: list[str]  # what a rank has of its own, for which the model has no name

    @property
    def apart(self) -> list[str]:
        """The masters that are tensors of their own, since no weight is known to be theirs."""
        return [key for key in self.found if key in self.specs.tensors]


def with_masters(
    checkpoint: Checkpoint, specs: Specs, dropped: Container[str], storage: Storage
) -> WithMasters:
    """Add the tensors in which a checkpoint has its weights once more to its specs.

    A weight that has a master of its name is read from that, and becomes one of its copies; masters
    of weights that are `dropped` are not added. Those of an average that the trainer made are its
    raw weights, and are not found.
    """
    search = _Search(specs, os.fspath(checkpoint.model.folder), dropped, storage)
    root, names = files_of(checkpoint, storage)
    inside = os.path.join(os.path.normpath(checkpoint.model.folder), "")
    names = [name for name in names if os.path.normpath(root / name).startswith(inside)]
    is_folder = storage.is_folder(checkpoint.path)
    kept: dict[Masters, list[str]] = {}
    weights = _partitions(checkpoint, specs)
    for name in (name for name in names if os.path.normpath(root / name) not in weights):
        path, label = os.path.join(root, name), _label(name) if is_folder else ""
        for masters in _signed(path, storage):
            if specs.is_average or not search.add(path, label, masters):
                kept.setdefault(masters, []).append(name)
    return WithMasters(search.specs(), search.found, kept, search.copies)


def _partitions(checkpoint: Checkpoint, specs: Specs) -> set[str]:
    """Return the paths of ZeRO's partitions of which the weights are read, or left out if asked."""
    ranks = (f.name for f in specs.files if deepspeed.is_one_of(os.path.basename(f.name)))
    parts = (name for name in ranks if os.path.basename(name) != deepspeed.WHOLE)
    is_whole = deepspeed.claims(os.path.basename(checkpoint.model.members[0].name))
    folder = checkpoint.model.folder
    return {os.path.normpath(folder / name) for name in parts} if is_whole else set()


def _signed(path: str, storage: Storage) -> Iterator[Masters]:
    """Yield the masters of which a file has a sign."""
    known = b"\n".join([os.fsencode(path), _structure(path, storage)])
    for masters in conventions.MASTERS:
        if re.search(masters.sign.encode(), known, re.MULTILINE):
            yield masters


def _structure(path: str, storage: Storage) -> bytes:
    """Return the pickled structure of a file, unparsed; nothing where there is none."""
    try:
        structure: bytes = _container(path).structure(path, storage)
    except CkptEmaError:  # of what is only copied, nothing has to be readable
        return b""
    return structure


def _container(path: str) -> ModuleType:
    return dcp if dcp.claims(os.path.basename(path)) else torch_file


def _label(name: str) -> str:
    """Return the name of a file without the number of its step.

    >>> _label("global_step500/mp_rank_00_model_states.pt")
    'global_step/mp_rank_00_model_states.pt'
    """
    folders = name.split("/")
    return "/".join("global_step" if conventions.DEEPSPEED_STEP.search(f) else f for f in folders)


def _match(masters: Masters, label: str, path: str) -> re.Match[str] | None:
    return re.search(masters.place, f"{label}:{path}")


class _Search:
    """The specs of one checkpoint, to which masters are added."""

    def __init__(
        self, specs: Specs, folder: str, dropped: Container[str], storage: Storage
    ) -> None:
        self._specs, self._folder, self._storage = specs, folder, storage
        self._dropped = dropped
        self._tensors, self._files = _with_copies_apart(specs), [*specs.files]
        self.copies = [key for key in self._tensors if key not in specs.tensors]
        self._numbers = {os.path.normpath(f.name): n for n, f in enumerate(specs.files)}
        self._holes = {**specs.holes}
        self._taken = _Taken(self._tensors.values())
        self.found: list[str] = []

    def specs(self) -> Specs:
        """Return the specs with all that was found."""
        own = self._specs
        if not self.found and len(self._tensors) == len(own.tensors):
            return own
        added = len(self._files) - len(own.files)
        metadata = (*own.metadata, *({} for _ in range(added)))
        files = tuple(self._files)
        return replace(
            own, tensors=self._tensors, files=files, metadata=metadata, holes=self._holes
        )

    def add(self, path: str, label: str, masters: Masters) -> bool:
        """Add the masters in one file; return whether it has some of the averaged model."""
        named: dict[str, str] = {}  # the name of the weight of each master, as far as it tells

        def choose(names: Collection[str]) -> set[str]:
            matches = ((name, _match(masters, label, name)) for name in names)
            named.update(
                {n: match.groupdict().get("weight") or "" for n, match in matches if match}
            )
            known = (one for one in named.values() if one in names and not self._is_dropped(one))
            return {*named, *islice(known, 1)}

        try:
            read: Specs = _container(path).read_all(path, self._storage, choose)
        except CkptEmaError:
            return False
        numbers = [self._number_of(file) for file in read.files]
        placed = {one: renumbered(tensor, numbers) for one, tensor in read.tensors.items()}
        weights = self._weights(placed, [*named.values()])
        if weights is None or not named:
            return False
        self._holes |= read.holes
        for one, name in named.items():
            if not self._is_dropped(name):
                self._add(f"{label}:{one}", placed[one], weights.get(name, ""))
        return True

    def _add(self, key: str, master: TensorSpec, name: str) -> None:
        """Add one master, to the weight of a name if there is one."""
        if master.dtype not in AVERAGED or self._taken.holds(master):
            return
        self.found.append(key)
        weight = self._tensors.get(name)
        if weight and weight.shape == master.shape and _is_rounded(weight, master):
            copies = (Copy(weight.dtype, piece) for piece in pieces_of(weight))
            self._tensors[name] = master._replace(copies=(*copies, *weight.copies))
        else:
            self._tensors[key] = master

    def _weights(
        self, placed: Mapping[str, TensorSpec], names: Sequence[str]
    ) -> Mapping[str, str] | None:
        """Return the key of each weight by its name in a file, if that can be told.

        None if the model in that file is not the one that is averaged: the place of one weight, not
        its name, tells one model from another.
        """
        name = next((name for name in names if name in placed), None)
        if name is None:
            return {}
        own = {key: one._replace(copies=()) for key, one in self._specs.tensors.items()}
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
    """Return whether a weight may be made of its master; one in float16 would spoil float32."""
    is_wide = DTYPE_BITS[master.dtype] >= DTYPE_BITS[weight.dtype]
    return is_wide and weight.dtype in AVERAGED


def _ends(name: str) -> Iterator[str]:
    """Yield a dotted name, and what is left of it without its first parts.

    >>> [*_ends("module.layer.weight")]
    ['module.layer.weight', 'layer.weight', 'weight']
    """
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _with_copies_apart(specs: Specs) -> dict[str, TensorSpec]:
    """Return tensors with those copies as tensors of their own that a rank may have changed."""
    tensors = {}
    for key, tensor in specs.tensors.items():
        apart = [piece for _, piece, is_same in tensor.copies if not is_same]
        same = tuple(copy for copy in tensor.copies if copy.is_same)
        tensors[key] = tensor._replace(copies=same) if apart else tensor
        for piece in apart:
            is_whole = is_packed(piece.sizes, piece.strides)
            own = TensorSpec(
                *(tensor.dtype, tensor.shape, piece.file, piece.offset),
                () if is_whole else (piece,),
            )
            tensors[f"file {piece.file + 1}:{key}"] = own
    return tensors


class _Taken:
    """The bytes that tensors have."""

    def __init__(self, tensors: Iterable[TensorSpec]) -> None:
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        for tensor in tensors:
            for file, start, stop in _ranges(tensor):
                self._ranges.setdefault(file, []).append((start, stop))
        for ranges in self._ranges.values():
            ranges.sort()

    def holds(self, tensor: TensorSpec) -> bool:
        """Return whether a tensor has some of these bytes, or none at all."""
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
