"""Whether checkpoints are states of one model: the same names, shapes and kinds of dtype.

Before that, all get the newest checkpoint's names where `renaming` can tell that they are the same.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ckpt_ema.containers.reader import are_equal
from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import AVERAGED, COMPLEX, Specs, TensorSpec
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.notices import Notice
from ckpt_ema.planning.configs import compare_configs
from ckpt_ema.planning.renaming import left_by_wrappers, tied_notes, unified, without_prefix
from ckpt_ema.planning.roles import ASKED_TO_DROP, DROPPED, Ruling, matching

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

_Tensors = Mapping[str, TensorSpec]


class Compared(NamedTuple):
    """The checkpoints of a plan as states of one model."""

    specs: dict[Checkpoint, Specs]  # oldest first, all with the newest's tensor names
    renamed: set[Checkpoint]  # which have other names themselves
    dropped: dict[str, Ruling]  # tensors of some checkpoint that are not in `specs`
    warnings: list[Notice]
    notes: list[Notice]


def compare(checkpoints: Sequence[Checkpoint], source: Source) -> Compared:
    """Read the headers of `checkpoints`, oldest first, and compare each with the last.

    Raises `RefusedError` if they are not the same model.
    """
    names = [checkpoint.name for checkpoint in checkpoints]
    source.read_ahead([checkpoint.model for checkpoint in checkpoints])
    own = [source.read(checkpoint.model) for checkpoint in checkpoints]
    if source.reading.strip_prefix:
        own = without_prefix(own, source.reading.strip_prefix)
    own, left_out = without_dropped(shared(own), source.reading.drop)
    models = [checkpoint.model for checkpoint in checkpoints]
    equal = [
        partial(are_equal, of=of, storage=source.storage) for of in zip(models, own, strict=True)
    ]
    specs, matches, warnings = unified(names, own, equal)
    warnings += left_by_wrappers(models[-1].path.name, own[-1])
    rows = zip(checkpoints, own, specs, strict=True)
    renamed = {c for c, one, other in rows if _have_other_names(one.tensors, other.tensors)}
    # Before shapes: adapters of another rank have other shapes, and this names the reason.
    configs = compare_configs(checkpoints, specs, source.storage)
    warnings += [*compare_tensors(names, specs), *configs]
    specs_of = dict(zip(checkpoints, specs, strict=True))
    second_names = {name for match in matches for name in match.dropped}
    dropped = {**dict.fromkeys(left_out, ASKED_TO_DROP), **dict.fromkeys(second_names, DROPPED)}
    return Compared(specs_of, renamed, dropped, warnings, tied_notes(names, matches))


def _have_other_names(one: _Tensors, other: _Tensors) -> bool:
    return one is not other and one.keys() != other.keys()


def shared(checkpoints: Sequence[Specs]) -> list[Specs]:
    """Share one mapping of tensors among neighbours that have equal ones, to save memory."""
    sharing = [*checkpoints[:1]]
    for specs in checkpoints[1:]:
        earlier = sharing[-1].tensors
        same = specs.tensors is not earlier and specs.tensors == earlier
        sharing.append(replace(specs, tensors=earlier) if same else specs)
    return sharing


def without_dropped(
    checkpoints: Sequence[Specs], globs: Sequence[str]
) -> tuple[list[Specs], set[str]]:
    """Return the checkpoints without tensors that --drop matches, and the names of these."""
    if not globs:
        return [*checkpoints], set()
    names = dict.fromkeys(name for specs in checkpoints for name in specs.tensors)
    dropped = {name for glob in globs for name in matching(names, "drop", glob)}
    kept: dict[int, _Tensors] = {}  # by identity: checkpoints of one layout keep sharing it
    for specs in checkpoints:
        tensors = {name: one for name, one in specs.tensors.items() if name not in dropped}
        kept.setdefault(id(specs.tensors), tensors)
    return [replace(one, tensors=kept[id(one.tensors)]) for one in checkpoints], dropped


def compare_tensors(names: Sequence[str], checkpoints: Sequence[Specs]) -> list[Notice]:
    """Refuse other tensors than the last checkpoint's; return warnings about their dtypes."""
    newest_name, newest = names[-1], checkpoints[-1].tensors
    warnings = []
    for name, specs in zip(names, checkpoints, strict=True):
        if specs.tensors is newest:
            continue
        _check_names(name, specs.tensors, newest_name, newest)
        pairs = [(tensor, specs.tensors[tensor], spec) for tensor, spec in newest.items()]
        for tensor, one, other in pairs:
            if one.shape != other.shape:
                found = f"has shape {list(one.shape)} in {name} and {list(other.shape)}"
                message = f"Tensor {tensor} {found} in {newest_name}."
                if 0 in one.shape and 0 not in other.shape:
                    hint = f"ZeRO-3 leaves empty ones; leave it out with --exclude {name}."
                    raise RefusedError(message, hint, code=Code.EMPTIED, tensor=tensor)
                raise _refused(message, Code.DIFFERENT_MODELS, tensor)
            if _kind(one) != _kind(other):
                found = f"is {one.dtype} in {name} and {other.dtype} in {newest_name}"
                why = "real, complex and integer tensors cannot be averaged with each other"
                message = f"Tensor {tensor} {found}; {why}."
                raise _refused(message, Code.DIFFERENT_DTYPES, tensor)
        changed = [f"{key}: {a.dtype}, {b.dtype}" for key, a, b in pairs if a.dtype != b.dtype]
        if changed:
            message = f"{name} holds {len(changed)} tensors in another dtype than {newest_name}"
            taken = f"({changed[0]}); the output takes those of {newest_name}."
            warnings.append(Notice(Code.DIFFERENT_DTYPES, f"{message} {taken}"))
    return warnings


def _kind(tensor: TensorSpec) -> tuple[bool, bool]:
    return tensor.dtype in AVERAGED, tensor.dtype in COMPLEX


def _check_names(name: str, own: _Tensors, newest_name: str, newest: _Tensors) -> None:
    if own.keys() == newest.keys():
        return
    extra, missing = sorted(own.keys() - newest.keys()), sorted(newest.keys() - own.keys())
    if _are_layouts([own[one] for one in extra], [newest[one] for one in missing], own, newest):
        here, there = (
            some(dict.fromkeys(_NUMBER.sub("*", n) for n in x), 3) for x in (extra, missing)
        )
        where = f"{name} has {here} where {newest_name} has {there}"
        message = f"{name} and {newest_name} store the model in two layouts: {where}."
        hint = (
            f"If another release renamed the tensors, load {name} with the one that wrote"
            f" {newest_name} and save it again (from_pretrained, save_pretrained); else pass the"
            " checkpoints of one layout."
        )
        raise RefusedError(message, hint, code=Code.DIFFERENT_MODELS, tensor=extra[0])
    differences = [f"{name} also has {some(extra)}"] * bool(extra)
    differences += [f"{name} lacks {some(missing)}"] * bool(missing)
    counts = f"{name} has {len(own)} tensors and {newest_name} has {len(newest)}"
    message = f"{counts}: {' and '.join(differences)}."
    if missing:
        raise _refused(message, Code.DIFFERENT_MODELS, missing[0])
    hint = f"Pass only the checkpoints that belong together, or leave it out: --drop {extra[0]}."
    raise RefusedError(message, hint, code=Code.DIFFERENT_MODELS, tensor=extra[0])


def _are_layouts(
    extra: Sequence[TensorSpec], missing: Sequence[TensorSpec], own: _Tensors, newest: _Tensors
) -> bool:
    """Return whether other names hold as many elements, or most names are others."""
    counts = [sum(math.prod(spec.shape) for spec in specs) for specs in (extra, missing)]
    are_most = 2 * len(extra) > len(own) or 2 * len(missing) > len(newest)
    return bool(extra and missing) and (counts[0] == counts[1] or are_most)


def _refused(message: str, code: Code, tensor: str) -> RefusedError:
    hint = "Pass only the checkpoints that belong together."
    return RefusedError(message, hint, code=code, tensor=tensor)
