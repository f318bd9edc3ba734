"""One set of tensor names for all checkpoints: those of the newest, or those that options ask for.

Names differ without another model where a run was resumed without torch.compile or in another
process group, and where a change of the file format drops or adds the second name of a tied tensor.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import eq
from typing import NamedTuple

from ckpt_ema.containers.specs import Specs, TensorSpec
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.notices import Notice
from ckpt_ema.trainers import conventions

# One of two tied matrices is an embedding; others may be equal by chance, as zeros are.
_EMBEDDING = re.compile(r"emb|wte|shared|token|tok_|vocab|lookup", re.IGNORECASE)

_Tensors = Mapping[str, TensorSpec]
Equal = Callable[[TensorSpec, TensorSpec], bool]  # whether two tensors have the same bytes


class Match(NamedTuple):
    """Tensors by the newest's names if they match, and how these differ from their own."""

    tensors: _Tensors
    wrapper: str = ""
    dropped: Mapping[str, str] = {}  # each second name that the newest lacks -> the first name
    added: Mapping[str, str] = {}  # each second name of the newest's -> the first name
    equal: Sequence[tuple[TensorSpec, TensorSpec]] = ()  # what must have the same bytes


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
    is_at_front = any(name.startswith(prefix) for name in names) and not conventions.ADDED.match(
        prefix
    )
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


def left_by_wrappers(file: str, specs: Specs) -> list[Notice]:
    """Warn of wrappers' words in the output's names, unless whoever loads `file` removes them."""
    is_removed = conventions.LOADS_COMPILED.search(file)
    names = (name.removeprefix("_orig_mod." if is_removed else "") for name in specs.tensors)
    wrapped = {name: conventions.ADDED.findall(name) for name in names if "_mod" in name}
    words = dict.fromkeys(word for found in wrapped.values() for word in found)
    if not words:
        return []
    name = next(name for name, found in wrapped.items() if found)
    holds = f"Tensor names such as {name} hold what a wrapper added, so a loader may ignore them"
    message = f"{holds}; --strip-prefix {','.join(words)} removes it."
    return [Notice(Code.DIFFERENT_NAMES, message)]


def unified(
    names: Sequence[str], checkpoints: Sequence[Specs], equal: Sequence[Equal] = ()
) -> tuple[list[Specs], list[Match], list[Notice]]:
    """Give all tensors the newest checkpoint's names; `names` are the checkpoints', for messages.

    `equal` compares the bytes of two tensors of each checkpoint. Returns the checkpoints, what was
    done to each, and warnings. Checkpoints that differ in more than wrappers and tied names are
    returned unchanged.
    """
    newest = checkpoints[-1].tensors
    equal = equal or [eq] * len(checkpoints)
    known: dict[int, Match] = {}  # by identity: checkpoints of one layout keep sharing it
    specs, matches, warnings = [], [], []
    for name, one, is_equal in zip(names, checkpoints, equal, strict=True):
        match = known.get(id(one.tensors))
        if match is None or not all(is_equal(*pair) for pair in match.equal):
            is_new = match is None
            match = known[id(one.tensors)] = _like(one.tensors, newest, is_equal, equal[-1])
            if match.wrapper and is_new:
                how = f"Tensor names of {name} and {names[-1]} differ by {match.wrapper}, which"
                message = f"{how} a wrapper adds; the output has the names of {names[-1]}."
                warnings.append(Notice(Code.DIFFERENT_NAMES, message))
        matches.append(match)
        same = match.tensors is one.tensors
        specs.append(one if same else replace(one, tensors=match.tensors))
    return specs, matches, warnings


def _like(tensors: _Tensors, newest: _Tensors, is_equal: Equal, is_equal_there: Equal) -> Match:
    """Match tensors with the newest's; `is_equal_there` compares two tensors of the newest."""
    if tensors is newest or tensors.keys() == newest.keys():
        return Match(tensors)
    named = unwrapped(newest)
    new_name = {name: named.get(plain, name) for plain, name in unwrapped(tensors).items()}
    renamed = {new: tensors[name] for name, new in new_name.items()}
    dropped = _second_names(renamed, newest, is_equal)
    added = _second_names(newest, renamed, is_equal_there)
    if len(renamed) != len(tensors) or dropped is None or added is None:
        return Match(tensors)
    kept = {name: spec for name, spec in renamed.items() if name not in dropped}
    kept |= {name: renamed[first] for name, first in added.items()}
    changed = [pair for pair in new_name.items() if pair[0] != pair[1]]
    own, other = (
        {w for pair in changed for w in conventions.MAYBE_ADDED.findall(pair[i])} for i in (0, 1)
    )
    equal = [(renamed[name], renamed[first]) for name, first in dropped.items()]
    return Match(kept, some(sorted(own ^ other or own), 3), dropped, added, equal)


def unwrapped(tensors: Iterable[str]) -> dict[str, str]:
    """Return each name by what is left of it without what wrappers add."""
    return {conventions.MAYBE_ADDED.sub("", name): name for name in tensors}


def _second_names(tensors: _Tensors, others: _Tensors, is_equal: Equal) -> dict[str, str] | None:
    """Return what `others` lack, with the name of the tensor that each is tied to.

    None if a tensor that they lack is not tied to one that they have.
    """
    found = {}
    both = [name for name in tensors if name in others]
    name_at = {tensors[name]: name for name in reversed(both)}
    for name in (name for name in tensors if name not in others):
        first = name_at.get(tensors[name])
        if first is None:
            may_be = (one for one in both if _may_be_tied(name, one, tensors))
            first = next((one for one in may_be if is_equal(tensors[name], tensors[one])), None)
        if first is None:
            return None
        found[name] = first
    return found


def _may_be_tied(name: str, other: str, tensors: _Tensors) -> bool:
    """Return whether two tensors are tied, going by their names, if they have the same bytes."""
    one, two = tensors[name], tensors[other]
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    if len(one.shape) > 1:
        return bool(_EMBEDDING.search(name) or _EMBEDDING.search(other))
    # The bias of a head, which its decoder has again (BERT).
    outer, inner = sorted((f"{each.rpartition('.')[0]}." for each in (name, other)), key=len)
    return inner.startswith(outer) and outer != inner != "."


def tied_notes(names: Sequence[str], matches: Sequence[Match]) -> list[Notice]:
    """Return a note on each second name that some checkpoints have and others lack."""
    newest = names[-1]
    found: dict[str, str] = {}
    for name, match in zip(names, matches, strict=True):
        for second, first in match.dropped.items():
            what = f"{newest} lacks {second}, which is left out: in {name} it equals {first}."
            found.setdefault(second, what)
        for second, first in match.added.items():
            what = f"{name} lacks {second}; its {first} is used, which {newest} ties to it."
            found.setdefault(second, what)
    return [Notice(Code.DECIDED, message) for message in found.values()]
