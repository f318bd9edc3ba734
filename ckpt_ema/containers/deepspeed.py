"""DeepSpeed's folders: the model's file, and with ZeRO the files of all ranks with its weights.

ZeRO keeps the float32 weights in the optimizer's files: flat, in the order of `param_shapes`, and
cut into one part for each rank. Here they become pieces of files under the names of the model.
"""

import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ckpt_ema.containers import pickles, torch_file
from ckpt_ema.containers.checks import AS_IT_IS, present, refused
from ckpt_ema.containers.model_key import find_model, numbers
from ckpt_ema.containers.specs import (
    FOLDED,
    Copy,
    FileSpec,
    Specs,
    TensorSpec,
    pieces_of,
    renumbered,
)
from ckpt_ema.containers.torch_file import Structure
from ckpt_ema.containers.zero import (
    TWO_SAVES,
    Part,
    Partition,
    Shapes,
    cut,
    join_zero_1_and_2,
    join_zero_3,
    no_fit,
    part_size,
)
from ckpt_ema.errors import Code, IncompleteError, RefusedError, some
from ckpt_ema.notices import Notice
from ckpt_ema.options import Reading
from ckpt_ema.storage.protocol import OpenFile, Storage

WHOLE = "mp_rank_00_model_states.pt"  # the model's file, but with ZeRO-3
OF_RANK_0 = f"zero_pp_rank_0_{WHOLE}"  # with ZeRO-3, where each rank has one
_MODEL_OF_RANK = re.compile(rf"^zero_pp_rank_(\d+)_{re.escape(WHOLE)}$")
_OPTIMIZER_OF_RANK = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
_TENSOR = (pickles.PickledTensor, pickles.UnreadTensor)
_FRAGMENTS = "frozen_param_fragments"
_MOST_RANKS = 1_000_000  # that are counted for a message


def claims(name: str) -> bool:
    """Return whether a file of this name is read here."""
    return name in (WHOLE, OF_RANK_0)


def model_file(names: set[str]) -> str | None:
    """Return the name of the model's file in a folder that DeepSpeed wrote; None for any other.

    It may be missing from a save that was interrupted.

    >>> model_file({"zero_pp_rank_1_mp_rank_00_optim_states.pt"})
    'mp_rank_00_model_states.pt'
    """
    if any(map(_MODEL_OF_RANK.search, names)):
        return OF_RANK_0
    return WHOLE if any(map(is_one_of, names)) else None


def is_one_of(name: str) -> bool:
    """Return whether a file of this name is read together with its folder."""
    is_of_rank = _MODEL_OF_RANK.search(name) or _OPTIMIZER_OF_RANK.search(name)
    return name == WHOLE or bool(is_of_rank)


def recorded(path: str, storage: Storage) -> Mapping[str, int]:
    """Return the "step" recorded in the model's file, without reading the others."""
    folder, name = os.path.split(path)
    with _Folder(folder, storage).opened(name) as opened:
        return _recorded(opened.structure.root)


def read_specs(path: str, storage: Storage, reading: Reading = AS_IT_IS) -> Specs:
    """See `Container.read_specs`; `path` is that of the model's file.

    With `--key`, and without files of an optimizer, the model's file is read by itself.
    """
    folder, name = _Folder(os.path.dirname(path), storage), os.path.basename(path)
    present(folder.path, "DeepSpeed's checkpoint", name, storage)
    with folder.opened(name) as opened:
        structure, root = opened.structure, opened.structure.root
        # Fragments of frozen weights look like a second model.
        searched = {key: value for key, value in root.items() if key != _FRAGMENTS}
        model = find_model(path, searched, reading, _TENSOR)
        tensors = torch_file.placed(structure, model.values, reading.drop)
        main = _Model(structure, _placed(opened, _FRAGMENTS), tensors)
    others = [name for name in model.values if name not in tensors]
    text = f"Not tensors, so not in the average: {some(others)}."
    notes = (*model.notes, Notice(Code.LEFT_OUT, text)) if others else model.notes
    optimizers = folder.by_rank(_OPTIMIZER_OF_RANK)
    is_alone = reading.key is not None and not optimizers
    if model.values is root.get("module") and root.get("param_shapes") and not is_alone:
        tensors = _with_partitions(folder, main, optimizers)
    files = tuple(folder.files)
    return Specs(
        *(tensors, files, ({},) * len(files), notes, model.warnings, folder.holes),
        recorded=_recorded(root),
        numbers=numbers(root),
        is_average=model.is_average,
    )


class _Opened(NamedTuple):
    """One open file, and its number among those of the checkpoint."""

    structure: Structure
    file: OpenFile
    number: int


@dataclass
class _Folder:
    """A folder of DeepSpeed, and what was opened in it so far."""

    path: str
    storage: Storage
    files: list[FileSpec] = field(default_factory=list)
    holes: dict[str, int] = field(default_factory=dict)  # path -> offset of its first hole

    @contextmanager
    def opened(self, name: str) -> Iterator[_Opened]:
        """Open one file, whose root is a dict."""
        path = os.path.join(self.path, name)
        with self.storage.open(path) as file:
            structure = torch_file.read_structure(path, file)
            if not isinstance(structure.root, dict):
                raise refused(path, "does not hold a dict, as every DeepSpeed file does")
            yield _Opened(structure, file, len(self.files))
            self.files.append(FileSpec(path, *file.identity, structure.digest))
            if (hole := file.first_hole()) is not None:
                self.holes[path] = hole

    def by_rank(self, pattern: re.Pattern[str]) -> dict[int, str]:
        """Return the names of the files of one kind by rank; raises if a rank has two."""
        found: dict[int, str] = {}
        for name in sorted(self.storage.names(self.path)):
            if match := pattern.search(name):
                other = found.setdefault(int(match[1]), name)
                if other != name:
                    raise self.of_two_saves(other, name)
        return dict(sorted(found.items()))

    def of_two_saves(self, one: str, other: str) -> RefusedError:
        """Return the error for two files of which one is stale."""
        why = f"holds {one} and {other}, which are of two saves"
        return refused(self.path, why, "Remove the stale files.")


def _recorded(root: Mapping[Any, Any]) -> dict[str, int]:
    step = root.get("global_steps")
    return {"step": step} if isinstance(step, int) and pickles.is_size(step) else {}


class _Model(NamedTuple):
    """A file of the model; with ZeRO-3 that of one rank."""

    structure: Structure
    fragments: Mapping[str, TensorSpec]  # frozen weights; with ZeRO-3 the part of one rank
    tensors: Mapping[str, TensorSpec]  # weights are empty with ZeRO-3, and else may be rounded


def _with_partitions(
    folder: _Folder, main: _Model, optimizers: Mapping[int, str]
) -> dict[str, TensorSpec]:
    """Return the tensors of the model with the float32 weights of all ranks."""
    path, name = main.structure.path, os.path.basename(main.structure.path)
    if not optimizers:
        why = f"{folder.path} lacks the optimizer's files, which hold the weights in float32"
        hint = "Was its save interrupted? Restore them or leave the checkpoint out."
        if name == WHOLE:
            hint = f"{hint[:-1]}; or read the rounded weights in {name} with --key module."
        raise IncompleteError(f"{why}.", hint, code=Code.INCOMPLETE, path=folder.path)
    models = [main, *_models_of_other_ranks(folder, main)]
    ranks = _partitions(folder, optimizers)
    if name == OF_RANK_0 and len(models) != len(ranks):
        raise _of_other_ranks(folder, len(ranks), {*folder.by_rank(_MODEL_OF_RANK)})
    join = join_zero_3 if ranks[0].stage3 else join_zero_1_and_2
    joined = {**_frozen(models), **join(path, _shapes(main.structure), ranks)}
    found = {**main.tensors, **joined}
    for name, tensor in found.items():
        own = [model.tensors[name] for model in models if name in model.tensors]
        filled = [one for one in own if 0 not in one.shape]
        if other := next((one for one in filled if one.shape != tensor.shape), None):
            why = f"is {list(other.shape)}, and {list(tensor.shape)} in the ranks' files"
            raise refused(path, why, TWO_SAVES, tensor=name)
        places = {(piece.file, piece.offset) for piece in pieces_of(tensor)}
        others = tuple(
            Copy(one.dtype, piece)
            for one in filled
            for piece in pieces_of(one)
            if (piece.file, piece.offset) not in places
        )
        if name in joined:  # a weight, rounded to the dtype of the training
            found[name] = tensor._replace(copies=others)
        else:
            found[name] = tensor._replace(of_ranks=others)
    return _tied(main.structure.root, found, joined)


def _tied(
    root: Mapping[Any, Any], tensors: dict[str, TensorSpec], joined: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """Give each further name of a weight, which no rank stores, the place of the weight."""
    shared = root.get("shared_params")
    for name, other in shared.items() if isinstance(shared, dict) else ():
        is_known = isinstance(name, str) and isinstance(other, str) and other in tensors
        if is_known and name not in joined:
            own, weight = tensors.get(name), tensors[other]
            # Weights without elements count as shared, whatever their shapes.
            if own is None or own.shape in ((0,), weight.shape):
                tensors[name] = weight
    return tensors


def _models_of_other_ranks(folder: _Folder, main: _Model) -> list[_Model]:
    """Return ZeRO-3's files of the model of all ranks but the first, by rank."""
    name = os.path.basename(main.structure.path)
    others = folder.by_rank(_MODEL_OF_RANK)
    if name == OF_RANK_0 and WHOLE in folder.storage.names(folder.path):
        raise folder.of_two_saves(name, WHOLE)
    models = []
    for other in list(others.values())[1:]:
        with folder.opened(other) as opened:
            tensors = _placed(opened, "module")
            models.append(_Model(opened.structure, _placed(opened, _FRAGMENTS), tensors))
        steps = [one.structure.root.get("global_steps") for one in (main, models[-1])]
        if steps[0] != steps[1]:
            why = f"is of step {steps[1]}, and {name} of step {steps[0]}: of two saves"
            raise refused(opened.structure.path, why, TWO_SAVES)
    return models


def _placed(opened: _Opened, key: str) -> dict[str, TensorSpec]:
    """Return where the tensors of one dict of a file are."""
    found = opened.structure.root.get(key)
    named = found if isinstance(found, dict) else {}
    known = {name: one for name, one in named.items() if isinstance(name, str)}
    placed = torch_file.placed(opened.structure, known, ())
    return {name: renumbered(tensor, [opened.number]) for name, tensor in placed.items()}


def _partitions(folder: _Folder, names: Mapping[int, str]) -> list[Partition]:
    """Return the optimizer's files of all ranks, which must be of one save."""
    ranks = []
    for name in names.values():
        with folder.opened(name) as opened:
            ranks.append(_partition(opened))
    first, first_name = ranks[0], next(iter(names.values()))
    for one in ranks:
        if one.partitions != first.partitions:
            why = f"is of {one.partitions} ranks, and {first_name} of {first.partitions}"
            raise refused(one.path, f"{why}: of two saves", TWO_SAVES)
        if one.step != first.step and one.step is not None and first.step is not None:
            why = f"has done {one.step:g} updates, and {first_name} {first.step:g}"
            raise refused(one.path, f"{why}: of two saves", TWO_SAVES)
        kinds = [(each.stage3, len(each.groups), each.dtype) for each in (one, first)]
        if kinds[0] != kinds[1]:
            why = f"has other groups of weights than {first_name}"
            raise refused(one.path, why, TWO_SAVES)
    if len(names) != first.partitions or [*names] != [*range(len(names))]:
        raise _of_other_ranks(folder, first.partitions, {*names})
    return ranks


def _of_other_ranks(folder: _Folder, count: int, ranks: set[int]) -> RefusedError:
    """Return the error for the files of other ranks than a checkpoint was saved by."""
    lacking = [str(rank) for rank in range(min(count, _MOST_RANKS)) if rank not in ranks]
    if lacking:
        message = f"{folder.path} lacks files of {len(lacking)} of {count} ranks ({some(lacking)})."
        hint = "Was its save interrupted? Restore them or leave the checkpoint out."
        return IncompleteError(message, hint, code=Code.INCOMPLETE, path=folder.path)
    more = some([str(rank) for rank in sorted(ranks) if rank >= count])
    why = f"was saved by {count} ranks, but holds files of others ({more}), which are of two saves"
    return refused(folder.path, why, "Remove the stale files.")


def _partition(opened: _Opened) -> Partition:
    structure = opened.structure
    state = structure.root.get("optimizer_state_dict")
    state = state if isinstance(state, dict) else {}
    whole, stage3 = state.get("single_partition_of_fp32_groups"), state.get("fp32_flat_groups")
    flats = whole if whole is not None else stage3
    if not isinstance(flats, list) or not flats:
        raise refused(structure.path, "holds no weights in the layout of ZeRO")
    if state.get("ds_zero_partition_groups"):
        why = "has weights in partitions of several kinds, as for a mixture of experts"
        raise refused(structure.path, why, code=Code.UNSUPPORTED_FORMAT)
    specs = [_flat(structure, group, flat) for group, flat in enumerate(flats)]
    if len({spec.dtype for spec in specs}) > 1:
        raise refused(structure.path, "holds groups of weights of several dtypes")
    counts = state.get("partition_count")
    counts = counts if isinstance(counts, list) and counts else [counts]
    if not all(map(pickles.is_size, counts)):
        raise refused(structure.path, "has no number of partitions")
    paddings = state.get("param_alignment_paddings") or []
    are_lists = isinstance(paddings, list) and all(isinstance(one, list) for one in paddings)
    if not are_lists or not all(pickles.is_size(one) for padded in paddings for one in padded):
        raise refused(structure.path, "has paddings that are not element counts")
    return Partition(
        structure.path,
        whole is None,
        [Part(opened.number, spec.offset, math.prod(spec.shape)) for spec in specs],
        specs[0].dtype,
        paddings,
        max(counts),
        _step(structure, opened.file, state),
    )


def _flat(structure: Structure, group: int, flat: Any) -> TensorSpec:
    """Return where one rank's part of a group of weights is."""
    if not isinstance(flat, pickles.PickledTensor):
        raise refused(structure.path, "holds a group of weights that is not a tensor")
    spec = torch_file.place(structure, f"of group {group}", flat)
    if len(spec.shape) != 1 or spec.pieces or spec.dtype not in FOLDED:
        raise refused(structure.path, "holds a group of weights that is not flat")
    return spec


def _step(structure: Structure, file: OpenFile, state: Mapping[Any, Any]) -> float | None:
    """Return how many updates an optimizer has done, where it says so."""
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    of_weights = base.get("state") if isinstance(base, dict) else None
    for one in of_weights.values() if isinstance(of_weights, dict) else ():
        step = one.get("step") if isinstance(one, dict) else None
        if isinstance(step, int):
            return step
        if isinstance(step, pickles.PickledTensor) and (step.dtype, step.shape) == ("F32", ()):
            offset = torch_file.place(structure, "step", step).offset
            return float(struct.unpack("<f", file.read(4, offset))[0])
    return None


def _shapes(structure: Structure, key: str = "param_shapes") -> list[Shapes]:
    """Return the weights of each group."""
    found = structure.root.get(key)
    groups = found if isinstance(found, list) else [found]
    for group in groups:
        named = group.items() if isinstance(group, dict) else [(None, None)]
        for name, shape in named:
            sizes = shape if isinstance(shape, tuple) else (None,)
            is_shape = len(sizes) <= pickles.MAX_DIMENSIONS and all(map(pickles.is_size, sizes))
            if not isinstance(name, str) or not is_shape:
                raise refused(structure.path, f"has {key} that do not map names to shapes")
    return groups


def _frozen(models: Sequence[_Model]) -> dict[str, TensorSpec]:
    """Join the fragments of frozen weights; ZeRO-2 has each in one, ZeRO-1 has none."""
    path = models[0].structure.path
    if not models[0].structure.root.get("frozen_param_shapes"):
        return {}
    tensors = {}
    for name, shape in _shapes(models[0].structure, "frozen_param_shapes")[0].items():
        fragments = [model.fragments[name] for model in models if name in model.fragments]
        if len(fragments) < len(models):
            raise refused(path, "is frozen and not in the files of all ranks", tensor=name)
        if len(models) == 1 and fragments[0].shape == shape:  # ZeRO-2
            tensors[name] = fragments[0]
            continue
        size = part_size(shape, len(models))
        parts = [Part(one.file, one.offset, math.prod(one.shape)) for one in fragments]
        if any(part.length != size for part in parts):
            raise no_fit(path, f"the fragments of {name}", sum(p.length for p in parts), size)
        if len({one.dtype for one in fragments}) > 1 or any(one.pieces for one in fragments):
            raise refused(path, "has fragments that are not alike", TWO_SAVES, tensor=name)
        tensors[name] = cut(fragments[0].dtype, shape, [(parts, 0, size * len(parts))])
    return tensors
