"""Finds where checkpoints have their weights once more: masters of optimizers, and rounded copies.

A trainer that resumes takes the masters, so an average that is written back has to be in them too.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import NamedTuple

from ckpt_ema.containers import dcp, torch_file
from ckpt_ema.containers.specs import (
    AVERAGED,
    DTYPE_BITS,
    Copy,
    FileSpec,
    Specs,
    TensorSpec,
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


def with_masters(checkpoint: Checkpoint, specs: Specs, storage: Storage) -> WithMasters:
    """Add the tensors in which a checkpoint has its weights once more to its specs.

    A weight that has a master of its name is read from that, and becomes one of its copies.
    """
    search = _Search(specs, os.fspath(checkpoint.model.folder))
    root, names = files_of(checkpoint, storage)
    is_folder = storage.is_folder(checkpoint.path)
    kept: dict[Masters, list[str]] = {}
    for name in names:
        path, label = os.path.join(root, name), _label(name) if is_folder else ""
        for masters in _signed(path, storage):
            read = _read(path, storage, label, masters)
            if read and read.tensors:
                search.add(read, label, masters)
            else:
                kept.setdefault(masters, []).append(name)
    return WithMasters(search.specs(), search.found, kept)


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


def _read(path: str, storage: Storage, label: str, masters: Masters) -> Specs | None:
    """Return the masters in a file by dotted path; None if it cannot be read."""
    try:
        read: Specs = _container(path).read_all(path, storage, partial(_match, masters, label))
    except CkptEmaError:
        return None
    return read


def _match(masters: Masters, label: str, path: str) -> re.Match[str] | None:
    return re.search(masters.place, f"{label}:{path}")


class _Search:
    """The specs of one checkpoint, to which masters are added."""

    def __init__(self, specs: Specs, folder: str) -> None:
        self._specs, self._folder = specs, folder
        self._tensors, self._files = {**specs.tensors}, [*specs.files]
        self._numbers = {os.path.normpath(f.name): n for n, f in enumerate(specs.files)}
        self._holes = {**specs.holes}
        self._taken = _Taken(specs.tensors.values())
        self.found: list[str] = []

    def specs(self) -> Specs:
        """Return the specs with all that was found."""
        own = self._specs
        if not self.found:
            return own
        added = len(self._files) - len(own.files)
        metadata = (*own.metadata, *({} for _ in range(added)))
        files = tuple(self._files)
        return replace(
            own, tensors=self._tensors, files=files, metadata=metadata, holes=self._holes
        )

    def add(self, read: Specs, label: str, masters: Masters) -> None:
        """Add the masters in one file."""
        numbers = [self._number_of(file) for file in read.files]
        self._holes |= read.holes
        for path, tensor in read.tensors.items():
            placed = renumbered(tensor, numbers)
            if tensor.dtype not in AVERAGED or self._taken.holds(placed):
                continue
            key = f"{label}:{path}"
            self.found.append(key)
            match = _match(masters, label, path)
            name = match.groupdict().get("weight") if match else None
            weight = self._tensors.get(name or "")
            if name and weight and weight.shape == tensor.shape and weight.dtype in AVERAGED:
                copies = (Copy(weight.dtype, piece) for piece in pieces_of(weight))
                self._tensors[name] = placed._replace(copies=(*copies, *weight.copies))
            else:
                self._tensors[key] = placed

    def _number_of(self, file: FileSpec) -> int:
        name = os.path.relpath(file.name, self._folder)
        if name not in self._numbers:
            self._numbers[name] = len(self._files)
            self._files.append(file._replace(name=name))
        return self._numbers[name]


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
    for dtype, piece in (*own, *tensor.copies):
        count = spanned(piece.sizes, piece.strides)
        if count:
            yield piece.file, piece.offset, piece.offset + count * DTYPE_BITS[dtype] // 8
