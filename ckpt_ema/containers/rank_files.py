"""Files of ranks: torch.save wrote one on each rank, with its part of every tensor.

Parts are DTensors (FSDP2, verl) or ShardedTensors (FSDP1). They become pieces of the tensors, which
are never whole in memory. A plain tensor is taken from the first rank; written back, each rank's is
averaged by itself.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from ckpt_ema.containers import pickles, torch_file
from ckpt_ema.containers.checks import AS_IT_IS, refused
from ckpt_ema.containers.chunks import cover_once, in_pieces
from ckpt_ema.containers.pickles import attribute
from ckpt_ema.containers.specs import (
    DTYPE_BITS,
    Copy,
    Piece,
    Specs,
    TensorSpec,
    packed_strides,
    pieces_of,
)
from ckpt_ema.errors import Code, IncompleteError, RefusedError, some
from ckpt_ema.options import Reading
from ckpt_ema.storage.protocol import Storage
from ckpt_ema.trainers.conventions import FLAT_PARAMETER, RANK, WORLD_SIZE

_WHOLE = "Load each step in the trainer, and save the full state dict on the first rank."
_RESTORE = "Restore the files of one save, or leave the checkpoint out."

_Place = tuple[int | None, ...]  # a number for each axis of a mesh of ranks
_Refuse = Callable[..., RefusedError]


class _Part(NamedTuple):
    """What one rank has of one tensor."""

    dtype: str
    shape: tuple[int, ...]  # of the whole tensor
    locals: tuple[TensorSpec, ...]
    starts: tuple[tuple[int, ...], ...] = ()  # of each local tensor, where the file has them
    dims: _Place = ()  # the dimension that each axis of the mesh splits, None for copies
    at: tuple[int, ...] = ()  # the rank's place on the mesh


_Parts = Mapping[str, _Part]


def claims(name: str) -> bool:
    """Return whether a file of this name is read here: that of one rank."""
    return RANK.search(name) is not None


def split_by_rank(name: str) -> tuple[str, str, str]:
    """Return what stands before and after the number of a rank in a name, and the number.

    >>> split_by_rank("model_0000100.rank_0.pth"), split_by_rank("model.pth")
    (('model_0000100.rank_', '.pth', '0'), ('model.pth', '', ''))
    """
    match = RANK.search(name)
    if not match:
        return name, "", ""
    return name[: match.start("rank")], name[match.end("rank") :], match["rank"]


def read_specs(path: str, storage: Storage, reading: Reading = AS_IT_IS) -> Specs:
    """See `Container.read_specs`; `path` is that of the first rank's file.

    If that has no parts of tensors, it is read by itself as any file of torch.save.
    """
    parts, specs = _read(path, storage, reading)
    if flat := next(filter(FLAT_PARAMETER.search, specs.tensors), None):
        why = "is a flat parameter (LOCAL_STATE_DICT), which only the ranks that saved it can load"
        hint = "Load each step in the trainer, and save it with StateDictType.FULL_STATE_DICT."
        raise refused(path, why, hint, Code.UNREADABLE_TENSOR, tensor=flat)
    if not parts:
        return specs
    paths = _paths_of_ranks(path, storage)
    others = [_read(other, storage, reading) for other in paths[1:]]
    ranks = [(parts, specs), *others]
    _check_together(paths, ranks)
    tensors = {name: _joined(paths, name, ranks) for name in specs.tensors}
    return replace(
        specs,
        tensors=tensors,
        files=tuple(file for _, one in ranks for file in one.files),
        metadata=({},) * len(ranks),
        holes={name: hole for _, one in ranks for name, hole in one.holes.items()},
    )


def _read(path: str, storage: Storage, reading: Reading) -> tuple[_Parts, Specs]:
    """Return the parts of tensors in one rank's file, and its specs as if they were whole."""
    parts: dict[str, _Part] = {}

    def read_part(
        name: str, value: pickles.Part, locate: Callable[[pickles.PickledTensor], TensorSpec]
    ) -> TensorSpec:
        refuse = partial(refused, path, tensor=name)
        read = _sharded_tensor if value.name.endswith("ShardedTensor") else _dtensor
        parts[name] = part = read(value, locate, refuse)
        if any((one.dtype, len(one.shape)) != (part.dtype, len(part.shape)) for one in part.locals):
            raise refuse("has a part of another dtype or rank than the whole")
        return TensorSpec(part.dtype, part.shape, 0, 0)

    return parts, torch_file.read_specs(path, storage, reading, read_part)


def _declared(value: pickles.Part, refuse: _Refuse) -> tuple[str, tuple[int, ...]]:
    """Return the dtype and the shape of the whole tensor."""
    if value.dtype not in DTYPE_BITS or not _are_sizes(value.shape):
        raise refuse("has no shape, or a dtype that safetensors cannot hold")
    return value.dtype, tuple(value.shape)


def _are_sizes(values: Any, count: int | None = None) -> bool:
    """Return whether these are sizes or offsets of so many dimensions."""
    is_list = isinstance(values, tuple | list) and all(map(pickles.is_size, values))
    return is_list and len(values) <= pickles.MAX_DIMENSIONS and count in (None, len(values))


def _sharded_tensor(value: pickles.Part, locate: torch_file.Locate, refuse: _Refuse) -> _Part:
    """Return what a ShardedTensor has: its shards on this rank, each with its offsets."""
    dtype, shape = _declared(value, refuse)
    shards = value.state[0] if isinstance(value.state, tuple) and value.state else None
    located, starts = [], []
    for shard in shards if isinstance(shards, list) else [None]:
        tensor, place = attribute(shard, "tensor"), attribute(shard, "metadata")
        offsets, sizes = attribute(place, "shard_offsets"), attribute(place, "shard_sizes")
        if not isinstance(tensor, pickles.PickledTensor) or not _are_sizes(offsets, len(shape)):
            raise refuse("has a shard without a plain tensor or without a place")
        if not _are_sizes(sizes, len(shape)) or tuple(sizes) != tensor.shape:
            raise refuse("has a shard of another shape than it says")
        located.append(locate(tensor))
        starts.append(tuple(offsets))
    return _Part(dtype, shape, tuple(located), tuple(starts))


def _dtensor(value: pickles.Part, locate: torch_file.Locate, refuse: _Refuse) -> _Part:
    """Return what a DTensor has: its local tensor, and how the mesh of ranks divides the whole."""
    dtype, shape = _declared(value, refuse)
    tensor, spec = attribute(value, "_local_tensor"), attribute(value, "_spec")
    placements, at = attribute(spec, "placements"), attribute(spec, "mesh")
    at = attribute(at, "_coordinate_on_dim")
    if not isinstance(placements, tuple | list) or not isinstance(tensor, pickles.PickledTensor):
        raise refuse("has no placements, or no plain tensor as its part")
    if not _are_sizes(at, len(placements)):
        raise refuse("is on a mesh of ranks to which the rank of the file does not belong")
    dims = tuple(_split_dim(placement, len(shape), refuse) for placement in placements)
    split = [dim for dim in dims if dim is not None]
    if len(set(split)) < len(split):
        why = "is split twice along one dimension (tensor parallelism with FSDP)"
        raise refuse(why, _WHOLE, code=Code.UNREADABLE_TENSOR)
    return _Part(dtype, shape, (locate(tensor),), (), dims, tuple(at))


def _split_dim(placement: Any, count: int, refuse: _Refuse) -> int | None:
    """Return the dimension that a placement splits, None for copies."""
    name = getattr(placement, "name", "?").rpartition(".")[2]
    dim = attribute(placement, "dim")
    if name == "Replicate":
        return None
    if name != "Shard":
        why = f"has the placement {name}, so its parts are not slices of it"
        raise refuse(why, _WHOLE, code=Code.UNREADABLE_TENSOR)
    if not pickles.is_size(dim) or dim >= count:
        raise refuse("is split along a dimension that it does not have")
    return int(dim)


def _paths_of_ranks(path: str, storage: Storage) -> list[str]:
    """Return the files of all ranks, the first one's first; raises if one is missing."""
    folder, name = os.path.split(path)
    before, after, number = split_by_rank(name)
    if int(number) != 0:
        hint = "Pass the folder, or the file of the first rank."
        raise refused(path, f"holds the part of rank {int(number)} of a model", hint)
    same = [(other, split_by_rank(other)) for other in sorted(storage.names(folder))]
    size = WORLD_SIZE.search(before)
    any_size = WORLD_SIZE.sub("", before)
    sizes = {
        match[0]: other
        for other, (start, end, _) in same
        if (match := WORLD_SIZE.search(start))
        and (WORLD_SIZE.sub("", start), end) == (any_size, after)
    }
    if len(sizes) > 1:
        why = f"holds a model of two numbers of ranks, {some(sizes.values())}"
        hint = "Remove the files of the earlier save."
        raise refused(folder, why, hint, Code.SEVERAL_MODELS)
    names = {int(parts[2]): other for other, parts in same if parts[:2] == (before, after)}
    count = int(size[0]) if size else max(names) + 1
    lacking = [f"{before}{rank}{after}" for rank in range(count) if rank not in names]
    if lacking:
        message = f"{folder} lacks {some(lacking)}, of {count} ranks."
        raise IncompleteError(message, _RESTORE, code=Code.INCOMPLETE, path=folder)
    if len(names) > count:
        raise refused(folder, f"holds files of more ranks than {count}, such as {names[count]}")
    return [os.path.join(folder, names[rank]) for rank in range(count)]


def _check_together(paths: Sequence[str], ranks: Sequence[tuple[_Parts, Specs]]) -> None:
    """Refuse ranks of two saves, or with other tensors than the first."""
    (_, first), name = ranks[0], os.path.basename(paths[0])
    for path, (_, specs) in zip(paths[1:], ranks[1:], strict=True):
        for unit in first.recorded.keys() & specs.recorded.keys():
            if specs.recorded[unit] != first.recorded[unit]:
                both = f"{unit} {specs.recorded[unit]}, and {name} {first.recorded[unit]}"
                raise refused(path, f"records {both}: they are of two saves", _RESTORE)
        if differing := sorted(specs.tensors.keys() ^ first.tensors.keys()):
            why = f"and {name} do not have the same tensors: {some(differing)}"
            raise refused(path, why, _WHOLE, Code.UNREADABLE_TENSOR)


def _joined(paths: Sequence[str], name: str, ranks: Sequence[tuple[_Parts, Specs]]) -> TensorSpec:
    """Return one tensor in the pieces of all ranks; of equal pieces, the first rank's."""
    whole = ranks[0][1].tensors[name]
    parts = [parts.get(name) for parts, _ in ranks]
    for path, part, (_, specs) in zip(paths, parts, ranks, strict=True):
        other = specs.tensors[name]
        is_same = (other.dtype, other.shape) == (whole.dtype, whole.shape)
        if not is_same or _layout(part) != _layout(parts[0]):
            why = f"differs in dtype, shape or layout from that of {os.path.basename(paths[0])}"
            raise refused(path, f"{why}: they are of two saves", _RESTORE, tensor=name)
    known = [part for part in parts if part is not None]
    if not known:
        others = [pieces_of(specs.tensors[name]) for _, specs in ranks[1:]]
        placed = [one._replace(file=rank) for rank, [one] in enumerate(others, start=1)]
        return whole._replace(of_ranks=tuple(Copy(whole.dtype, one) for one in placed))
    incomplete = partial(_incomplete, paths[0], name)
    pieces: dict[tuple[tuple[int, ...], tuple[int, ...]], Piece] = {}
    counts = [1 + max(places) for places in zip(*(part.at for part in known), strict=True)]
    copies = []
    for number, part in enumerate(known):
        for starts, local in _placed(part, counts, incomplete):
            strides = local.pieces[0].strides if local.pieces else packed_strides(local.shape)
            piece = Piece(number, local.offset, starts, local.shape, strides)
            is_copy = pieces.setdefault((starts, local.shape), piece) is not piece
            if is_copy and 0 not in local.shape:
                copies.append(Copy(whole.dtype, piece))
    joined = _covered(whole, pieces.values(), incomplete)
    return joined._replace(copies=tuple(copies))


def _incomplete(path: str, tensor: str, why: str) -> IncompleteError:
    """Return the error for ranks whose parts of a tensor are not the whole."""
    message = f"{path}: tensor {tensor} {why}: a rank is missing, or they are of two saves."
    return IncompleteError(message, _RESTORE, code=Code.INCOMPLETE, path=path, tensor=tensor)


def _layout(part: _Part | None) -> object:
    return None if part is None else (bool(part.at), part.dims)


def _placed(
    part: _Part, counts: Sequence[int], incomplete: _Refuse
) -> Iterable[tuple[tuple[int, ...], TensorSpec]]:
    """Return the local tensors of a part and where each begins, as torch.chunk divides."""
    if part.starts or not part.locals:
        return zip(part.starts, part.locals, strict=True)
    starts, sizes = [0] * len(part.shape), list(part.shape)
    for dim, at, count in zip(part.dims, part.at, counts, strict=True):
        if dim is not None:
            each = -(-part.shape[dim] // count)
            starts[dim] = min(at * each, part.shape[dim])
            sizes[dim] = min(each, part.shape[dim] - starts[dim])
    [local] = part.locals
    if local.shape != tuple(sizes):
        raise incomplete(f"has a part of shape {list(local.shape)} in place of {sizes}")
    return [(tuple(starts), local)]


def _covered(whole: TensorSpec, pieces: Iterable[Piece], incomplete: _Refuse) -> TensorSpec:
    """Return a tensor of these pieces; raises unless they cover it, each element once."""
    boxes = [(piece.starts, piece.sizes) for piece in pieces]
    is_inside = all(
        start + size <= length
        for box in boxes
        for start, size, length in zip(*box, whole.shape, strict=True)
    )
    if not is_inside or not cover_once(whole.shape, boxes):
        held = sum(math.prod(sizes) for _, sizes in boxes)
        raise incomplete(f"has {held} of its {math.prod(whole.shape)} elements in the ranks' files")
    return in_pieces(whole, pieces)
