"""Folders of torch.distributed.checkpoint: one .metadata, and .distcp files with chunks of tensors.

`.metadata` is a pickle, read with an allow-list. Chunks are found by position, whichever ranks
wrote them, so that no tensor is ever whole in memory; what is not a tensor is never opened.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeGuard

from ckpt_ema.containers import pickles
from ckpt_ema.containers.checks import (
    AS_IT_IS,
    cut_short,
    is_plain_name,
    present,
    read_listing,
    refused,
)
from ckpt_ema.containers.chunks import cover_once, in_pieces
from ckpt_ema.containers.model_key import find_model
from ckpt_ema.containers.pickles import Record, attribute
from ckpt_ema.containers.specs import (
    FileSpec,
    Piece,
    Specs,
    TensorSpec,
    packed_strides,
)
from ckpt_ema.containers.torch_file import Region, read_tensor
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.notices import Notice
from ckpt_ema.options import Reading
from ckpt_ema.storage.protocol import OpenFile, Storage
from ckpt_ema.trainers.conventions import DCP_METADATA, STATE_PREFIXES

_METADATA = "the metadata of a checkpoint"
_MAX_METADATA_BYTES = 1 << 30
# Modules of which a .metadata may name classes; they become `Record`s, which do nothing.
_ALLOWED = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
    "torch.distributed._shard.sharded_tensor.metadata",  # where older releases had some of them
    "megatron.core.dist_checkpointing.strategies.torch",  # up to release 0.15
    "torch.serialization",
    "pathlib",
    "pathlib._local",  # Python 3.13
)
# Dtypes, layouts and memory formats that safetensors has no name for.
_TORCH_NAMES = re.compile(r"^(complex|u?int|float|bits|q|sparse_|strided|jagged|\w+_format)\w*$")
# Early releases of Python 3.11 pickle the members of an enumeration as a call of it.
_GETATTR = (("builtins", "getattr"), ("__builtin__", "getattr"))


class _MetadataUnpickler(pickles.TensorUnpickler):
    """Unpickles to dicts, lists and records of the classes that metadata is made of."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global; raises for what no metadata names."""
        if (module, name) == ("collections", "OrderedDict"):
            raise _ForbiddenError(f"{module}.{name}")
        return super().find_class(module, name)

    def stand_in(self, module: str, name: str) -> type[pickles.Inert]:
        """Return a record for a class of the allow-list; raises for any other class."""
        is_allowed = module in _ALLOWED or (module, name) in _GETATTR
        if not is_allowed and not (module == "torch" and _TORCH_NAMES.search(name)):
            raise _ForbiddenError(f"{module}.{name}")
        return Record


class _ForbiddenError(Exception):
    """The metadata names something that no metadata needs."""


class _Chunk(NamedTuple):
    """One box of one tensor, and where it was saved."""

    tensor: str
    dtype: str
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    size_bytes: int


class _Announced(NamedTuple):
    """One tensor as the metadata has it, unchecked."""

    fqn: str
    entry: Record


def claims(name: str) -> bool:
    """Return whether a file of this name is read here."""
    return name == DCP_METADATA


def read_specs(path: str, storage: Storage, reading: Reading = AS_IT_IS) -> Specs:
    """See `Container.read_specs`; `path` is that of the .metadata."""
    metadata, root = _read_metadata(path, storage)
    tree, saved = _tree(path, root)
    model = find_model(path, tree, reading, _Announced)
    tensors = {
        name: _declared(path, announced, saved)
        for name, announced in model.values.items()
        if isinstance(announced, _Announced)
    }
    others = [name for name, value in model.values.items() if value is None]
    message = f"Not tensors, so not in the average: {some(others)}."
    notes = (*model.notes, Notice(Code.LEFT_OUT, message)) if others else model.notes
    return replace(
        _in_place(path, metadata, tensors, storage),
        notes=notes,
        warnings=model.warnings,
        other_models=model.others,
        is_average=model.is_average,
    )


def structure(path: str, storage: Storage) -> bytes:
    """Return the metadata as they are pickled; raises what `read_specs` raises."""
    return read_listing(path, storage, _MAX_METADATA_BYTES, _METADATA, "data files")[1]


def read_chosen(
    path: str, storage: Storage, choose: Callable[[Collection[str]], Container[str]]
) -> Specs:
    """Return the tensors whose names are chosen, of the model or not; `path` as for `read_specs`.

    Raises what `read_specs` raises.
    """
    metadata, root = _read_metadata(path, storage)
    entries = {
        name: entry
        for name, entry in attribute(root, "state_dict_metadata").items()
        if isinstance(name, str) and _is_tensor(entry)
    }
    chosen = choose(entries.keys())
    _, saved = _tree(path, root)
    tensors = {
        name: _declared(path, _Announced(name, entry), saved)
        for name, entry in entries.items()
        if name in chosen
    }
    return _in_place(path, metadata, tensors, storage)


def _read_metadata(path: str, storage: Storage) -> tuple[FileSpec, Record]:
    identity, raw = read_listing(path, storage, _MAX_METADATA_BYTES, _METADATA, "data files")
    return FileSpec(path, *identity, hashlib.sha256(raw).hexdigest()), _unpickled(path, raw)


def _in_place(
    path: str,
    metadata: FileSpec,
    tensors: Mapping[str, tuple[TensorSpec, list[_Chunk]]],
    storage: Storage,
) -> Specs:
    """Return tensors with the places of their chunks in the data files."""
    every_chunk = [chunk for _, chunks in tensors.values() for chunk in chunks]
    data_files, pieces, holes = _located(os.path.dirname(path), every_chunk, storage)
    files = (metadata, *data_files)
    joined = {
        name: in_pieces(tensor, [pieces[chunk] for chunk in chunks])
        for name, (tensor, chunks) in tensors.items()
    }
    return Specs(joined, files, ({},) * len(files), holes=holes)


def archives(path: str, storage: Storage) -> dict[str, list[tuple[int, int]]]:
    """Return where each data file has archives, offset and size; `path` is that of the .metadata.

    What was saved is an archive of its own, whether a tensor's chunk or not.
    """
    _, root = _read_metadata(path, storage)
    _, saved = _tree(path, root)
    found: dict[str, list[tuple[int, int]]] = {}
    for info in saved.values():
        with suppress(RefusedError):  # where the model's are was checked when these were read
            file, offset, size_bytes = _place(info, partial(refused, path))
            found.setdefault(file, []).append((offset, size_bytes))
    return found


def _unpickled(path: str, raw: bytes) -> Record:
    try:
        root = _MetadataUnpickler(io.BytesIO(raw)).load()
    except _ForbiddenError as error:
        why = "which no metadata of a checkpoint needs; torch would run it, ckpt-ema does not"
        raise refused(path, f"names {error}, {why}", code=Code.UNSAFE) from error
    except pickles.BROKEN_PICKLE as error:
        raise cut_short(path, pickles.what_broke(error), or_damaged=True) from error
    if not isinstance(root, Record) or not root.name.endswith(("torch.MCoreMetadata", ".Metadata")):
        raise refused(path, "is not the metadata of a checkpoint")
    return root


_Saved = Mapping[tuple[Any, Any], Any]  # (name, offsets) -> where a chunk was saved


def _tree(path: str, root: Record) -> tuple[dict[str, Any], _Saved]:
    """Return what was saved, nested as it was (None for what is not a tensor), and where."""
    entries, stored = attribute(root, "state_dict_metadata"), attribute(root, "storage_data")
    if not isinstance(entries, dict) or not isinstance(stored, dict):
        raise refused(path, "lists no tensors")
    paths = attribute(root, "planner_data")
    tree: dict[str, Any] = {}
    for fqn, entry in entries.items():
        if not isinstance(fqn, str):
            raise refused(path, "has a tensor without a name")
        steps: Any = paths.get(fqn) if isinstance(paths, dict) else None
        is_short = isinstance(steps, tuple) and 0 < len(steps) <= pickles.MAX_DIMENSIONS
        if not is_short or not all(type(step) is str or pickles.is_size(step) for step in steps):
            steps = (fqn,)
        if len(steps) == 1 and fqn.startswith(STATE_PREFIXES):
            continue
        branch: Any = tree
        for step in steps[:-1]:
            branch = branch.setdefault(str(step), {}) if isinstance(branch, dict) else None
        if not isinstance(branch, dict) or str(steps[-1]) in branch:
            raise refused(path, f"has two entries in the place of {fqn}")
        branch[str(steps[-1])] = _Announced(fqn, entry) if _is_tensor(entry) else None
    return tree, {_index(index): info for index, info in stored.items()}


def _is_tensor(entry: Any) -> TypeGuard[Record]:
    return isinstance(entry, Record) and entry.name.endswith(".TensorStorageMetadata")


def _index(index: Any) -> tuple[Any, Any]:
    fqn, offset = attribute(index, "fqn"), attribute(index, "offset")
    return (fqn, offset if _sizes(offset) else None) if isinstance(fqn, str) else (None, None)


def _declared(path: str, announced: _Announced, saved: _Saved) -> tuple[TensorSpec, list[_Chunk]]:
    """Return a tensor, not located yet, and its chunks, checked without the data files."""
    fqn, entry = announced
    refuse = partial(refused, path, tensor=fqn)
    properties, shape, boxes = (attribute(entry, name) for name in ("properties", "size", "chunks"))
    dtype = attribute(properties, "dtype")
    if isinstance(properties, Record) and isinstance(properties.state, tuple):
        dtype = next(iter(properties.state), None)
    if not isinstance(dtype, pickles.Dtype):
        raise refuse("has a dtype that safetensors cannot hold", code=Code.UNREADABLE_TENSOR)
    if not _sizes(shape) or not isinstance(boxes, list) or not boxes:
        raise refuse("has no shape or no chunks")
    chunks = []
    for box in boxes:
        starts, sizes = attribute(box, "offsets"), attribute(box, "sizes")
        if not _sizes(starts) or not _sizes(sizes) or not len(starts) == len(sizes) == len(shape):
            raise refuse("has a chunk without a place")
        if any(a + n > whole for a, n, whole in zip(starts, sizes, shape, strict=True)):
            raise refuse(f"has a chunk beyond its shape {list(shape)}")
        place = _place(saved.get((fqn, starts)) or saved.get((fqn, None)), refuse)
        chunks.append(_Chunk(fqn, dtype.name, starts, sizes, *place))
    if not cover_once(shape, [(chunk.starts, chunk.sizes) for chunk in chunks]):
        raise refuse(f"has chunks that do not cover its shape {list(shape)} exactly once")
    return TensorSpec(dtype.name, shape, 0, 0), chunks


def _place(info: Any, refuse: Callable[..., RefusedError]) -> tuple[str, int, int]:
    """Return the file, offset and size of a chunk."""
    if not isinstance(info, Record):
        raise refuse("has a chunk that was never saved")
    file, offset, length = (attribute(info, name) for name in ("relative_path", "offset", "length"))
    if not is_plain_name(file):
        name = file if isinstance(file, str) else "something"
        raise refuse(f"lies in {name!r}, which is not a plain file name", code=Code.UNSAFE)
    if not _sizes((offset, length)):
        raise refuse("has a chunk at an impossible position")
    if attribute(info, "transform_descriptors"):
        why = "was compressed when it was saved, and only stored chunks can be read"
        raise refuse(why, code=Code.UNREADABLE_TENSOR)
    return file, offset, length


def _sizes(values: Any) -> TypeGuard[tuple[int, ...]]:
    is_short = isinstance(values, tuple) and len(values) <= pickles.MAX_DIMENSIONS
    return is_short and all(map(pickles.is_size, values))


def _located(
    folder: str, every_chunk: Iterable[_Chunk], storage: Storage
) -> tuple[list[FileSpec], dict[_Chunk, Piece], dict[str, int]]:
    """Return the data files, where each chunk is in them, and their holes; each is opened once."""
    by_file: dict[str, list[_Chunk]] = {}
    for chunk in every_chunk:
        by_file.setdefault(chunk.file, []).append(chunk)
    files, pieces, holes = list[FileSpec](), dict[_Chunk, Piece](), dict[str, int]()
    for number, (name, chunks) in enumerate(sorted(by_file.items()), start=1):
        path = present(folder, "its metadata", name, storage)
        with storage.open(path) as file:
            files.append(FileSpec(path, *file.identity, ""))
            hole = file.first_hole()
            holes |= {} if hole is None else {path: hole}
            pieces |= {chunk: _piece(file, number, chunk) for chunk in chunks}
    return files, pieces, holes


def _piece(file: OpenFile, number: int, chunk: _Chunk) -> Piece:
    """Return where a chunk is in an open file, checked against the metadata."""
    end = chunk.offset + chunk.size_bytes
    if end > file.identity.size_bytes:
        why = f"tensor {chunk.tensor} would end at byte {end}, the file has"
        raise cut_short(file.path, f"{why} {file.identity.size_bytes}", chunk.tensor)
    if 0 in chunk.sizes:
        return Piece(number, 0, chunk.starts, chunk.sizes, packed_strides(chunk.sizes))
    spec = read_tensor(file.path, Region(file, chunk.offset, chunk.size_bytes))
    if (spec.dtype, spec.shape) != (chunk.dtype, chunk.sizes):
        found = f"{spec.dtype} {list(spec.shape)}"
        why = f"has a chunk of {found}, but the metadata has {chunk.dtype} {list(chunk.sizes)}"
        raise refused(file.path, why, tensor=chunk.tensor)
    strides = spec.pieces[0].strides if spec.pieces else packed_strides(chunk.sizes)
    return Piece(number, spec.offset, chunk.starts, chunk.sizes, strides)
