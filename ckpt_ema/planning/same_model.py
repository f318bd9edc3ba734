"""Whether checkpoints are states of one model: the same names, shapes and kinds of dtype."""

import re
from collections.abc import Sequence

from ckpt_ema.containers.specs import AVERAGED, Specs
from ckpt_ema.errors import RefusedError, printable, some

# What GPTQ, AWQ and bitsandbytes call the codes and scales of a quantised weight.
_QUANTISED = re.compile(r"(^|\.)(qweight|qzeros|absmax|quant_state\.\w+|weight\.absmax)$")


def check_alike(names: Sequence[str], checkpoints: Sequence[Specs]) -> tuple[str, ...]:
    """Compare every checkpoint with the last; `names` are theirs, for messages.

    Raises `RefusedError` if tensors are missing, added or of another shape, or if a tensor is a
    float in one checkpoint and none in another. Returns warnings, about dtypes that differ.
    """
    newest_name, newest = names[-1], checkpoints[-1]
    _check_form(newest_name, newest)
    if not any(tensor.dtype in AVERAGED for tensor in newest.tensors.values()):
        raise RefusedError(f"{printable(newest_name)} holds no floating-point tensor to average.")
    warnings = []
    for name, specs in zip(names, checkpoints, strict=True):
        if specs.tensors is newest.tensors:
            continue
        _check_names(name, specs, newest_name, newest)
        _check_shapes(name, specs, newest_name, newest)
        changed = [t for t, spec in specs.tensors.items() if spec.dtype != newest.tensors[t].dtype]
        if changed:
            _check_kinds(changed, name, specs, newest_name, newest)
            first = changed[0]
            warnings.append(
                f"{printable(name)} holds {len(changed)} tensors in another dtype than"
                f" {printable(newest_name)} ({printable(first)}: {specs.tensors[first].dtype},"
                f" {newest.tensors[first].dtype}); the output takes the newest's."
            )
    return tuple(warnings)


def _check_form(name: str, specs: Specs) -> None:
    """Refuse what has the form of weights and is none: quantised values, emptied placeholders."""
    quantised = [tensor for tensor in specs.tensors if _QUANTISED.search(tensor)]
    if quantised:
        raise RefusedError(
            f"{printable(name)} holds quantised weights ({some(quantised, 3)}), whose codes cannot"
            " be averaged.",
            "Average the checkpoints before they are quantised.",
        )
    floats = [spec for spec in specs.tensors.values() if spec.dtype in AVERAGED]
    empty = [spec for spec in floats if spec.shape == (0,)]
    if len(empty) * 2 > len(floats):
        raise RefusedError(
            f"{printable(name)} holds {len(empty)} tensors without elements, as ZeRO-3 leaves when"
            " the weights stay on their ranks.",
            "Gather each step first: `python zero_to_fp32.py RUN OUT -t global_stepN"
            " --safe_serialization`.",
        )


def _check_names(name: str, specs: Specs, newest_name: str, newest: Specs) -> None:
    if specs.tensors.keys() == newest.tensors.keys():
        return
    extra = sorted(specs.tensors.keys() - newest.tensors.keys())
    lacking = sorted(newest.tensors.keys() - specs.tensors.keys())
    more = f"has tensors that {printable(newest_name)} lacks ({some(extra)})"
    less = f"lacks tensors of {printable(newest_name)} ({some(lacking)})"
    raise RefusedError(
        f"The checkpoints are not the same model: {printable(name)} has {len(specs.tensors)}"
        f" tensors and {printable(newest_name)} has {len(newest.tensors)}; {printable(name)}"
        f" {' and '.join([more] * bool(extra) + [less] * bool(lacking))}.",
        "Pass only the checkpoints that belong together.",
    )


def _check_shapes(name: str, specs: Specs, newest_name: str, newest: Specs) -> None:
    for tensor, spec in newest.tensors.items():
        other = specs.tensors[tensor]
        if other.shape != spec.shape:
            raise RefusedError(
                f"The checkpoints are not the same model: tensor {printable(tensor)} has shape"
                f" {list(other.shape)} in {printable(name)} and {list(spec.shape)} in"
                f" {printable(newest_name)}.",
                "Pass only the checkpoints that belong together.",
            )


def _check_kinds(
    changed: Sequence[str], name: str, specs: Specs, newest_name: str, newest: Specs
) -> None:
    for tensor in changed:
        old, new = specs.tensors[tensor].dtype, newest.tensors[tensor].dtype
        if (old in AVERAGED) != (new in AVERAGED):
            raise RefusedError(
                f"Tensor {printable(tensor)} is {old} in {printable(name)} and {new} in"
                f" {printable(newest_name)}: a float and no float cannot be averaged.",
                "Pass only the checkpoints that belong together.",
            )
