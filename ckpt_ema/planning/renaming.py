"""Tensor names changed to the newest checkpoint's, where only a wrapper or a tied name differs.

A run resumed without torch.compile, or in another process group, changes the prefix of every name;
one that changed its file format drops or gains the second name of a tied tensor.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ckpt_ema.containers.specs import Specs, TensorSpec
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.notices import Notice

# What wrappers put before every name: torch.compile, DistributedDataParallel, FSDP.
_WRAPPERS = re.compile(r"(_orig_mod\.|module\.|_fsdp_wrapped_module\.)*")

_Tensors = Mapping[str, TensorSpec]


class Unified(NamedTuple):
    """Checkpoints whose tensors have common names."""

    specs: list[Specs]
    dropped: frozenset[str]  # second names of tied tensors that the newest lacks
    warnings: list[Notice]


def without_prefix(checkpoints: Sequence[Specs], prefix: str) -> list[Specs]:
    """Remove `prefix` from the names of the tensors that have it.

    Raises `RefusedError` if none has it, or if two tensors of a checkpoint would share a name.
    """
    result = []
    for specs in checkpoints:
        tensors = {name.removeprefix(prefix): spec for name, spec in specs.tensors.items()}
        if len(tensors) != len(specs.tensors) or "" in tensors:
            problem = f"--strip-prefix {prefix} would give two tensors one name, or one no name."
            raise RefusedError(problem, code=Code.DIFFERENT_NAMES)
        result.append(replace(specs, tensors=tensors))
    if all(a.tensors.keys() == b.tensors.keys() for a, b in zip(result, checkpoints, strict=True)):
        names = some(list(checkpoints[-1].tensors), 3)
        message = f"--strip-prefix {prefix} matches no tensor; names are {names}."
        raise RefusedError(message, code=Code.DIFFERENT_NAMES)
    return result


def unified(names: Sequence[str], checkpoints: Sequence[Specs]) -> Unified:
    """Give all tensors the newest checkpoint's names; `names` are the checkpoints', for messages.

    Checkpoints that differ in more than wrappers and tied names are returned unchanged.
    """
    newest = checkpoints[-1].tensors
    known: dict[int, _Tensors] = {}  # by identity: checkpoints of one layout keep sharing it
    warnings: list[Notice] = []
    specs: list[Specs] = []
    dropped: set[str] = set()
    for name, one in zip(names, checkpoints, strict=True):
        if id(one.tensors) not in known:
            known[id(one.tensors)], wrapper, left = _like(one.tensors, newest)
            dropped |= left
            if wrapper:
                how = f"{name} and {names[-1]} differ in the tensor prefix {wrapper}, which"
                message = f"{how} a wrapper adds; the output has the names of {names[-1]}."
                warnings.append(Notice(Code.DIFFERENT_NAMES, message))
        tensors = known[id(one.tensors)]
        specs.append(one if tensors is one.tensors else replace(one, tensors=tensors))
    return Unified(specs, frozenset(dropped), warnings)


def _like(tensors: _Tensors, newest: _Tensors) -> tuple[_Tensors, str, set[str]]:
    """Return the tensors by the newest's names, the prefix that differed, and dropped names.

    Tensors that differ in more are returned unchanged.
    """
    if tensors.keys() == newest.keys():
        return tensors, "", set()
    own, other = _wrapper(tensors), _wrapper(newest)
    renamed = {other + name.removeprefix(own): spec for name, spec in tensors.items()}
    matched = _with_tied_names(renamed, newest)
    if matched.keys() != newest.keys():
        return tensors, "", set()
    return matched, (own or other) if own != other else "", renamed.keys() - newest.keys()


def _wrapper(tensors: _Tensors) -> str:
    """Return the prefix that wrappers put before all names."""
    common = os.path.commonprefix(list(tensors))  # noqa: RUF071 - of characters, as is meant here
    match = _WRAPPERS.match(common)
    return match[0] if match else ""


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
