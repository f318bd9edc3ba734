"""Whether checkpoints are states of one model: the same names, shapes and kinds of dtype."""

from collections.abc import Sequence
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
    # Configurations first: that ranks differ explains why shapes do.
    config_warnings = compare_configs(checkpoints, unity.specs, source.storage)
    return Compared(
        dict(zip(checkpoints, unity.specs, strict=True)),
        frozenset(c for c, one, other in pairs if one.tensors.keys() != other.tensors.keys()),
        unity.dropped,
        (
            *unity.warnings,
            *compare_tensors(names, unity.specs),
            *config_warnings,
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


def compare_tensors(names: Sequence[str], checkpoints: Sequence[Specs]) -> list[Notice]:
    """Compare every checkpoint with the last; `names` are theirs, for messages.

    Raises `RefusedError` if tensors are missing, added or of another shape, or if a tensor is
    floating point in one checkpoint only. Returns warnings about dtypes that differ.
    """
    newest = checkpoints[-1].tensors
    warnings = []
    for name, specs in zip(names, checkpoints, strict=True):
        if specs.tensors is newest:
            continue
        _check_names(name, specs, names[-1], checkpoints[-1])
        changed = []
        for tensor, spec in newest.items():
            other = specs.tensors[tensor]
            if other.shape != spec.shape:
                what = f"has shape {list(other.shape)} in {name} and {list(spec.shape)}"
                raise _different(f"Tensor {tensor} {what} in {names[-1]}.", tensor)
            if other.dtype == spec.dtype:
                continue
            if (other.dtype in AVERAGED) != (spec.dtype in AVERAGED):
                raise _different(
                    f"Tensor {tensor} is {other.dtype} in {name} and {spec.dtype} in {names[-1]};"
                    " float and non-float tensors cannot be averaged.",
                    tensor,
                    Code.DIFFERENT_DTYPES,
                )
            changed.append(f"{tensor}: {other.dtype}, {spec.dtype}")
        if changed:
            warnings.append(
                Notice(
                    Code.DIFFERENT_DTYPES,
                    f"{name} holds {len(changed)} tensors in another dtype than {names[-1]}"
                    f" ({changed[0]}); the output takes those of {names[-1]}.",
                )
            )
    return warnings


def _check_names(name: str, specs: Specs, newest_name: str, newest: Specs) -> None:
    if specs.tensors.keys() == newest.tensors.keys():
        return
    extra = sorted(specs.tensors.keys() - newest.tensors.keys())
    missing = sorted(newest.tensors.keys() - specs.tensors.keys())
    differences = [f"{name} also has {some(extra)}"] * bool(extra)
    differences += [f"{name} lacks {some(missing)}"] * bool(missing)
    raise _different(
        f"{name} has {len(specs.tensors)} tensors and {newest_name} has {len(newest.tensors)}:"
        f" {' and '.join(differences)}.",
        (extra or missing)[0],
    )


def _different(message: str, tensor: str, code: Code = Code.DIFFERENT_MODELS) -> RefusedError:
    hint = "Pass only the checkpoints that belong together."
    return RefusedError(message, hint, code=code, tensor=tensor)
