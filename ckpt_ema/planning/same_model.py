"""Whether checkpoints are states of one model: the same names, shapes and kinds of dtype."""

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import NamedTuple

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import AVERAGED, Specs
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.notices import Notice
from ckpt_ema.planning.configs import compare_configs
from ckpt_ema.planning.renaming import unified, without_prefix


class Compared(NamedTuple):
    """The checkpoints of a plan as states of one model."""

    specs: dict[Checkpoint, Specs]  # oldest first, all with the newest's tensor names
    renamed: frozenset[Checkpoint]  # which have other names themselves
    dropped: frozenset[str]  # second names of tied tensors that the newest lacks
    warnings: tuple[Notice, ...]


def compare(checkpoints: Sequence[Checkpoint], source: Source) -> Compared:
    """Read the headers of `checkpoints`, oldest first, and compare each with the last.

    Raises `RefusedError` if they are not the same model.
    """
    names = [checkpoint.name for checkpoint in checkpoints]
    own = [source.read(checkpoint.model) for checkpoint in checkpoints]
    if source.reading.strip_prefix:
        own = without_prefix(own, source.reading.strip_prefix)
    own = _shared(own)
    unity = unified(names, own)
    pairs = zip(checkpoints, own, unity.specs, strict=True)
    # Before shapes: adapters of another rank have other shapes, and this names the reason.
    warnings = compare_configs(checkpoints, unity.specs, source.storage)
    return Compared(
        dict(zip(checkpoints, unity.specs, strict=True)),
        frozenset(c for c, one, other in pairs if one.tensors.keys() != other.tensors.keys()),
        unity.dropped,
        (
            *unity.warnings,
            *_compare_tensors(names, unity.specs),
            *warnings,
        ),
    )


def _shared(checkpoints: Sequence[Specs]) -> list[Specs]:
    """Share one mapping of tensors among neighbours that have equal ones.

    Memory then does not grow with the number of checkpoints.
    """
    shared: list[Specs] = []
    for specs in checkpoints:
        earlier = shared[-1].tensors if shared else specs.tensors
        same = specs.tensors is not earlier and specs.tensors == earlier
        shared.append(replace(specs, tensors=earlier) if same else specs)
    return shared


def _compare_tensors(names: Sequence[str], checkpoints: Sequence[Specs]) -> list[Notice]:
    """Compare every checkpoint with the last; `names` are theirs, for messages.

    Raises `RefusedError` if tensors are missing, added or of another shape, or if a tensor is
    floating point in one checkpoint only. Returns warnings about dtypes that differ.
    """
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
                message = (
                    f"Tensor {tensor} {found}; float and non-float tensors cannot be averaged."
                )
                raise _refused(message, Code.DIFFERENT_DTYPES, tensor)
        changed = [
            f"{tensor}: {one.dtype}, {other.dtype}"
            for tensor, one, other in pairs
            if one.dtype != other.dtype
        ]
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
