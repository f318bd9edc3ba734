"""Tensor names brought to those of the newest checkpoint, where only a wrapper or an alias differs.

A run that was resumed without torch.compile, or in another process group, changes the front of
every name; one that changed its file format drops or gains the second name of a tied tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckpt_ema.containers.specs import Specs, TensorSpec
from ckpt_ema.errors import RefusedError, printable, some

# What wrappers put in front of every name: torch.compile, DistributedDataParallel, FSDP.
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")

_Tensors = Mapping[str, TensorSpec]


def without_prefix(checkpoints: Sequence[Specs], prefix: str) -> list[Specs]:
    """The checkpoints with `prefix` taken off the tensors that have it.

    Raises `RefusedError` if none has it, or if two tensors of one would come out with one name.
    """
    result = [_stripped(specs, prefix) for specs in checkpoints]
    if all(one is other for one, other in zip(result, checkpoints, strict=True)):
        raise RefusedError(
            f"--strip-prefix {printable(prefix)}: no tensor begins with it; they are called"
            f" {some(list(checkpoints[-1].tensors), 3)}."
        )
    return result


def _stripped(specs: Specs, prefix: str) -> Specs:
    if not any(name.startswith(prefix) for name in specs.tensors):
        return specs
    tensors = {name.removeprefix(prefix): spec for name, spec in specs.tensors.items()}
    if len(tensors) != len(specs.tensors) or "" in tensors:
        raise RefusedError(
            f"--strip-prefix {printable(prefix)}: two tensors would come out with one name."
        )
    return replace(specs, tensors=tensors)


def unified(names: Sequence[str], checkpoints: Sequence[Specs]) -> tuple[list[Specs], list[str]]:
    """The checkpoints with their tensors under the newest's names, and warnings about it.

    Those that differ in more are returned as they are.
    """
    newest = checkpoints[-1].tensors
    known: dict[int, _Tensors] = {}  # by identity: checkpoints of one layout go on sharing it
    warnings = []
    result = []
    for name, specs in zip(names, checkpoints, strict=True):
        tensors = known.get(id(specs.tensors))
        if tensors is None:
            tensors, wrapper = _like(specs.tensors, newest)
            known[id(specs.tensors)] = tensors
            if wrapper:
                warnings.append(
                    f"{printable(name)} and {printable(names[-1])} name their tensors alike but for"
                    f" {wrapper}, which a wrapper adds; the output has the newest's names."
                )
        result.append(specs if tensors is specs.tensors else replace(specs, tensors=tensors))
    return result, warnings


def _like(tensors: _Tensors, newest: _Tensors) -> tuple[_Tensors, str]:
    """The tensors by the newest's names, and the wrappers' prefix by which they differed."""
    if tensors.keys() == newest.keys():
        return tensors, ""
    own, other = _wrapper(tensors), _wrapper(newest)
    renamed = {other + name.removeprefix(own): spec for name, spec in tensors.items()}
    aliased = _with_aliases(renamed, newest)
    if aliased.keys() != newest.keys():
        return tensors, ""
    return aliased, own or other if own != other else ""


def _wrapper(tensors: _Tensors) -> str:
    """What wrappers put in front of all names."""
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


def _with_aliases(tensors: _Tensors, newest: _Tensors) -> _Tensors:
    """Second names of tied tensors dropped or added, where both names lead to the same bytes."""
    kept = {name: spec for name, spec in tensors.items() if name in newest}
    places = set(kept.values())
    if any(spec not in places for name, spec in tensors.items() if name not in newest):
        return tensors
    name_at = {spec: name for name, spec in newest.items() if name in kept}
    for name, spec in newest.items():
        if name not in kept and spec in name_at:
            kept[name] = kept[name_at[spec]]
    return kept
