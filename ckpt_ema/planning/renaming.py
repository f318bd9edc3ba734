"""Tensor names changed to the newest checkpoint's, where only a wrapper or a tied name differs.

A run resumed without torch.compile, or in another process group, changes the prefix of every name;
one that changed its file format drops or gains the second name of a tied tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ckpt_ema.containers.specs import Specs, TensorSpec
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.notices import Notice

# What wrappers put before every name: torch.compile, DistributedDataParallel, FSDP.
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")

_Tensors = Mapping[str, TensorSpec]


class Unified(NamedTuple):
    """Checkpoints whose tensors have common names."""

    specs: list[Specs]
    dropped: frozenset[str]  # second names of tied tensors that the newest lacks
    warnings: list[Notice]


class _Alike(NamedTuple):
    tensors: _Tensors
    wrapper: str = ""  # the prefix that differed
    dropped: frozenset[str] = frozenset()


def without_prefix(checkpoints: Sequence[Specs], prefix: str) -> list[Specs]:
    """Remove `prefix` from the names of the tensors that have it.

    Raises `RefusedError` if none has it, or if two tensors of a checkpoint would share a name.
    """
    result = [_stripped(specs, prefix) for specs in checkpoints]
    if all(one is other for one, other in zip(result, checkpoints, strict=True)):
        raise RefusedError(
            f"--strip-prefix {prefix} matches no tensor; names are"
            f" {some(list(checkpoints[-1].tensors), 3)}.",
            code=Code.DIFFERENT_NAMES,
        )
    return result


def _stripped(specs: Specs, prefix: str) -> Specs:
    if not any(name.startswith(prefix) for name in specs.tensors):
        return specs
    tensors = {name.removeprefix(prefix): spec for name, spec in specs.tensors.items()}
    if len(tensors) != len(specs.tensors) or "" in tensors:
        raise RefusedError(
            f"--strip-prefix {prefix} would give two tensors one name, or one no name.",
            code=Code.DIFFERENT_NAMES,
        )
    return replace(specs, tensors=tensors)


def unified(names: Sequence[str], checkpoints: Sequence[Specs]) -> Unified:
    """Give all tensors the newest checkpoint's names; `names` are the checkpoints', for messages.

    Checkpoints that differ in more than wrappers and tied names are returned unchanged.
    """
    newest = checkpoints[-1].tensors
    known: dict[int, _Alike] = {}  # by identity: checkpoints of one layout keep sharing it
    warnings: list[Notice] = []
    specs: list[Specs] = []
    dropped: set[str] = set()
    for name, one in zip(names, checkpoints, strict=True):
        if id(one.tensors) not in known:
            alike = known[id(one.tensors)] = _like(one.tensors, newest)
            dropped |= alike.dropped
            if alike.wrapper:
                warnings.append(
                    Notice(
                        Code.DIFFERENT_NAMES,
                        f"{name} and {names[-1]} differ in the tensor prefix {alike.wrapper}, which"
                        f" a wrapper adds; the output has the names of {names[-1]}.",
                    )
                )
        tensors = known[id(one.tensors)].tensors
        specs.append(one if tensors is one.tensors else replace(one, tensors=tensors))
    return Unified(specs, frozenset(dropped), warnings)


def _like(tensors: _Tensors, newest: _Tensors) -> _Alike:
    """Return the tensors by the newest's names, unchanged if they differ in more."""
    if tensors.keys() == newest.keys():
        return _Alike(tensors)
    own, other = _wrapper(tensors), _wrapper(newest)
    renamed = {other + name.removeprefix(own): spec for name, spec in tensors.items()}
    matched = _with_tied_names(renamed, newest)
    if matched.keys() != newest.keys():
        return _Alike(tensors)
    dropped = frozenset(renamed.keys() - newest.keys())
    return _Alike(matched, (own or other) if own != other else "", dropped)


def _wrapper(tensors: _Tensors) -> str:
    """Return the prefix that wrappers put before all names."""
    prefix = ""
    while True:
        longer = [
            prefix + wrapper
            for wrapper in _WRAPPERS
            if tensors and all(name.startswith(prefix + wrapper) for name in tensors)
        ]
        if not longer:
            return prefix
        prefix = longer[0]


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
