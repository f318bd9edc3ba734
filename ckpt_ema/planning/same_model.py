"""Whether checkpoints are states of one model: the same names, shapes and kinds of dtype.

Names are changed to the newest checkpoint's where only wrappers or tied names differ: a run resumed
without torch.compile, or in another process group, names its tensors differently; one that changed
its file format drops or gains the second name of a tied tensor.
"""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import NamedTuple

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import AVERAGED, Specs, TensorSpec
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.notices import Notice
from ckpt_ema.planning.configs import compare_configs
from ckpt_ema.trainers import conventions

# Words that torch.compile, FSDP, activation checkpointing, accelerate and Fabric put into names;
# kohya's names have underscores instead of dots.
_WRAPPER = (
    r"_(?:orig_mod|orig_module|original_module|fsdp_wrapped_module|fpw_module"
    r"|checkpoint_wrapped_module|forward_module)[._]"
)
_ADDED = re.compile(rf"(?<![A-Za-z0-9])(?:{_WRAPPER})+")
# Those of DistributedDataParallel and Opacus may also be a model's own, so they count only where
# checkpoints differ by them.
_ANY_ADDED = re.compile(rf"(?<![A-Za-z0-9])(?:{_WRAPPER}|(?<![^./])_?module\.)+")

_Tensors = Mapping[str, TensorSpec]


class Compared(NamedTuple):
    """The checkpoints of a plan as states of one model."""

    specs: dict[Checkpoint, Specs]  # oldest first, all with the newest's tensor names
    renamed: set[Checkpoint]  # which have other names themselves
    dropped: set[str]  # second names of tied tensors that the newest lacks
    warnings: list[Notice]


def compare(checkpoints: Sequence[Checkpoint], source: Source) -> Compared:
    """Read the headers of `checkpoints`, oldest first, and compare each with the last.

    Raises `RefusedError` if they are not the same model.
    """
    names = [checkpoint.name for checkpoint in checkpoints]
    own = [source.read(checkpoint.model) for checkpoint in checkpoints]
    if source.reading.strip_prefix:
        own = without_prefix(own, source.reading.strip_prefix)
    own = _shared(own)
    specs, dropped, warnings = unified(names, own)
    warnings += _left_by_wrappers(checkpoints[-1], own[-1])
    rows = zip(checkpoints, own, specs, strict=True)
    renamed = {c for c, one, other in rows if one.tensors.keys() != other.tensors.keys()}
    # Before shapes: adapters of another rank have other shapes, and this names the reason.
    configs = compare_configs(checkpoints, specs, source.storage)
    warnings += [*_compare_tensors(names, specs), *configs]
    return Compared(dict(zip(checkpoints, specs, strict=True)), renamed, dropped, warnings)


def _shared(checkpoints: Sequence[Specs]) -> list[Specs]:
    """Share one mapping of tensors among neighbours that have equal ones, to save memory."""
    shared = [*checkpoints[:1]]
    for specs in checkpoints[1:]:
        earlier = shared[-1].tensors
        same = specs.tensors is not earlier and specs.tensors == earlier
        shared.append(replace(specs, tensors=earlier) if same else specs)
    return shared


def without_prefix(checkpoints: Sequence[Specs], prefixes: str) -> list[Specs]:
    """Remove each of the `prefixes`, separated by commas, from the names of the tensors.

    A prefix is removed from the front of names. Where none begins with it, or where wrappers have
    put it there, it is removed wherever it stands in a name. Raises `RefusedError` if no name has
    it, or if two tensors of a checkpoint would share a name.
    """
    for prefix in filter(None, prefixes.split(",")):
        checkpoints = _without(checkpoints, prefix)
    return list(checkpoints)


def _without(checkpoints: Sequence[Specs], prefix: str) -> list[Specs]:
    names = [name for specs in checkpoints for name in specs.tensors]
    is_at_front = any(name.startswith(prefix) for name in names) and not _ADDED.fullmatch(prefix)
    whole = re.escape(prefix) + ("" if prefix[-1] in "._/" else r"\.")
    pattern = re.compile(f"^{whole}" if is_at_front else f"(?<![^._/]){whole}")
    if not any(map(pattern.search, names)):
        found = some(list(checkpoints[-1].tensors), 3)
        message = f"--strip-prefix {prefix} matches no tensor; names are {found}."
        raise RefusedError(message, code=Code.DIFFERENT_NAMES)
    result = []
    for specs in checkpoints:
        tensors = {pattern.sub("", name): spec for name, spec in specs.tensors.items()}
        if len(tensors) != len(specs.tensors) or "" in tensors:
            problem = "would leave two tensors with the same name, or one without a name"
            raise RefusedError(f"--strip-prefix {prefix} {problem}.", code=Code.DIFFERENT_NAMES)
        result.append(replace(specs, tensors=tensors))
    return result


def _left_by_wrappers(newest: Checkpoint, specs: Specs) -> list[Notice]:
    """Warn of wrappers' words in the names of the output, unless its own loader removes them."""
    is_removed = conventions.LOADS_COMPILED.search(newest.model.path.name)
    names = (name.removeprefix("_orig_mod." if is_removed else "") for name in specs.tensors)
    wrapped = {name: _ADDED.findall(name) for name in names if "_mod" in name}
    words = dict.fromkeys(word for found in wrapped.values() for word in found)
    if not words:
        return []
    name = next(name for name, found in wrapped.items() if found)
    holds = f"Tensor names such as {name} hold what a wrapper added, so a loader may ignore them"
    message = f"{holds}; --strip-prefix {','.join(words)} removes it."
    return [Notice(Code.DIFFERENT_NAMES, message)]


def unified(
    names: Sequence[str], checkpoints: Sequence[Specs]
) -> tuple[list[Specs], set[str], list[Notice]]:
    """Give all tensors the newest checkpoint's names; `names` are the checkpoints', for messages.

    Returns the checkpoints, second names of tied tensors that the newest lacks, and warnings.
    Checkpoints that differ in more than wrappers and tied names are returned unchanged.
    """
    newest = checkpoints[-1].tensors
    known: dict[int, _Tensors] = {}  # by identity: checkpoints of one layout keep sharing it
    specs, dropped, warnings = [], set(), []
    for name, one in zip(names, checkpoints, strict=True):
        if id(one.tensors) not in known:
            known[id(one.tensors)], wrapper, left = _like(one.tensors, newest)
            dropped |= left
            if wrapper:
                how = f"Tensor names of {name} and {names[-1]} differ by {wrapper}, which"
                message = f"{how} a wrapper adds; the output has the names of {names[-1]}."
                warnings.append(Notice(Code.DIFFERENT_NAMES, message))
        tensors = known[id(one.tensors)]
        specs.append(one if tensors is one.tensors else replace(one, tensors=tensors))
    return specs, dropped, warnings


def _like(tensors: _Tensors, newest: _Tensors) -> tuple[_Tensors, str, set[str]]:
    """Return the tensors by the newest's names if they match, the wrapper, and dropped names."""
    if tensors.keys() == newest.keys():
        return tensors, "", set()
    named = _unwrapped(newest)
    renamed = {named.get(plain, name): tensors[name] for plain, name in _unwrapped(tensors).items()}
    matched = _with_tied_names(renamed, newest)
    if len(renamed) != len(tensors) or matched.keys() != newest.keys():
        return tensors, "", set()
    own, other = _runs(tensors.keys() - newest.keys()), _runs(newest.keys() - tensors.keys())
    return matched, some(sorted(own ^ other or own)), renamed.keys() - newest.keys()


def _unwrapped(tensors: Iterable[str]) -> dict[str, str]:
    """Return each name by what is left of it without what wrappers add."""
    return {_ANY_ADDED.sub("", name): name for name in tensors}


def _runs(names: Iterable[str]) -> set[str]:
    return {run for name in names for run in _ANY_ADDED.findall(name)}


def _with_tied_names(tensors: _Tensors, newest: _Tensors) -> _Tensors:
    """Drop or add second names of tied tensors, where both names lead to the same bytes."""
    kept = {name: spec for name, spec in tensors.items() if name in newest}
    places = set(kept.values())
    if any(spec not in places for name, spec in tensors.items() if name not in newest):
        return tensors
    name_at = {spec: name for name, spec in newest.items() if name in kept}
    for name, spec in newest.items():
        if name not in kept and spec in name_at:
            kept[name] = kept[name_at[spec]]
    return kept


def _compare_tensors(names: Sequence[str], checkpoints: Sequence[Specs]) -> list[Notice]:
    """Refuse other tensors than the last checkpoint's; return warnings about their dtypes."""
    newest_name, newest = names[-1], checkpoints[-1].tensors
    warnings = []
    for name, specs in zip(names, checkpoints, strict=True):
        if specs.tensors is newest:
            continue
        _check_names(name, specs.tensors.keys(), newest_name, newest.keys())
        pairs = [(tensor, specs.tensors[tensor], spec) for tensor, spec in newest.items()]
        for tensor, one, other in pairs:
            if one.shape != other.shape:
                found = f"has shape {list(one.shape)} in {name} and {list(other.shape)}"
                message = f"Tensor {tensor} {found} in {newest_name}."
                raise _refused(message, Code.DIFFERENT_MODELS, tensor)
            if (one.dtype in AVERAGED) != (other.dtype in AVERAGED):
                found = f"is {one.dtype} in {name} and {other.dtype} in {newest_name}"
                why = "float and non-float tensors cannot be averaged"
                message = f"Tensor {tensor} {found}; {why}."
                raise _refused(message, Code.DIFFERENT_DTYPES, tensor)
        changed = [f"{key}: {a.dtype}, {b.dtype}" for key, a, b in pairs if a.dtype != b.dtype]
        if changed:
            message = f"{name} holds {len(changed)} tensors in another dtype than {newest_name}"
            taken = f"({changed[0]}); the output takes those of {newest_name}."
            warnings.append(Notice(Code.DIFFERENT_DTYPES, f"{message} {taken}"))
    return warnings


def _check_names(name: str, own: Set[str], newest_name: str, newest: Set[str]) -> None:
    if own == newest:
        return
    extra, missing = sorted(own - newest), sorted(newest - own)
    differences = [f"{name} also has {some(extra)}"] * bool(extra)
    differences += [f"{name} lacks {some(missing)}"] * bool(missing)
    counts = f"{name} has {len(own)} tensors and {newest_name} has {len(newest)}"
    message = f"{counts}: {' and '.join(differences)}."
    raise _refused(message, Code.DIFFERENT_MODELS, (extra or missing)[0])


def _refused(message: str, code: Code, tensor: str) -> RefusedError:
    hint = "Pass only the checkpoints that belong together."
    return RefusedError(message, hint, code=code, tensor=tensor)
