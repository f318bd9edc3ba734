"""What becomes of each tensor, and why: one role for each, from one ordered table of rules.

Codes and scales of quantised weights are known by name, everything else by dtype.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ckpt_ema.containers.specs import AVERAGED, Role, Specs, TensorSpec
from ckpt_ema.errors import Code, RefusedError, some

# What GPTQ, AWQ and bitsandbytes call the codes and scales of a quantised weight.
_QUANTISED = re.compile(r"(^|\.)(qweight|qzeros|absmax|quant_state\.\w+|weight\.absmax)$")
_NUMBER = re.compile(r"(?<![^\W_])\d+(?![^\W_])")


class Reason(Enum):
    """Why a tensor has its role; the values are stable and shown to people."""

    FLOAT = "floating point"
    NOT_FLOAT = "not floating point"
    SHARED_BYTES = "another name of the same bytes"
    QUANTISED = "codes or scales of a quantised weight"
    EMPTIED = "a placeholder without elements"
    NOT_IN_NEWEST = "not in the newest checkpoint"


class Tensor(NamedTuple):
    """What rules judge by."""

    name: str
    spec: TensorSpec
    is_tied: bool  # an earlier name has the same bytes in every checkpoint
    is_emptied: bool  # without elements, like most tensors of its checkpoint


class Rule(NamedTuple):
    """One rule: the tensors that it takes, and what becomes of them."""

    name: str
    role: Role
    reason: Reason
    takes: Callable[[Tensor], object]


# The first rule that takes a tensor decides.
RULES = (
    Rule("quantised", Role.REFUSED, Reason.QUANTISED, lambda t: _QUANTISED.search(t.name)),
    Rule("emptied", Role.REFUSED, Reason.EMPTIED, lambda t: t.is_emptied),
    Rule("tied", Role.TIED, Reason.SHARED_BYTES, lambda t: t.is_tied),
    Rule("not-float", Role.KEPT, Reason.NOT_FLOAT, lambda t: t.spec.dtype not in AVERAGED),
    Rule("float", Role.AVERAGED, Reason.FLOAT, lambda _: True),
)
_REFUSALS = {
    Reason.QUANTISED: (
        "quantised weights, whose codes cannot be averaged",
        "Average the checkpoints before they are quantised.",
    ),
    Reason.EMPTIED: (
        "tensors without elements, as ZeRO-3 leaves when the weights stay on their ranks",
        "Gather each step first: `python zero_to_fp32.py RUN OUT -t global_stepN"
        " --safe_serialization`.",
    ),
}
# Tensors that only checkpoints before the newest have.
DROPPED = Rule("newest-names", Role.DROPPED, Reason.NOT_IN_NEWEST, lambda _: False)


@dataclass(frozen=True, slots=True)
class TensorRole:
    """The role that all tensors of one pattern share; for `plan --explain`."""

    pattern: str  # names with their numbers left open: model.layers.*.weight
    role: Role
    rule: str  # the name of the rule that decided
    reason: Reason
    count: int  # of tensors


class Ruling(NamedTuple):
    """What became of one tensor."""

    rule: Rule  # that decided
    made: Role  # how its value is made: that of a tied tensor is its other name's


def judge(
    newest: Specs, layouts: Sequence[Mapping[str, TensorSpec]], name: str
) -> dict[str, Ruling]:
    """Return what becomes of each tensor of `newest`, which is called `name` in messages.

    `layouts` has the tensors of every checkpoint that takes part, equal ones once. Raises
    `RefusedError` if a tensor rules the average out, or if none is averaged.
    """
    floats = [spec for spec in newest.tensors.values() if spec.dtype in AVERAGED]
    mostly_empty = 2 * sum(spec.shape == (0,) for spec in floats) > len(floats)
    first_of = _tied(newest.tensors, layouts)
    rulings: dict[str, Ruling] = {}
    of_rule = {rule.name: Ruling(rule, rule.role) for rule in RULES}
    for key, spec in newest.tensors.items():
        is_emptied = mostly_empty and spec.shape == (0,) and spec.dtype in AVERAGED
        tensor = Tensor(key, spec, key in first_of, is_emptied)
        for rule in RULES:
            if rule.takes(tensor):
                break
        rulings[key] = of_rule[rule.name]
        if rule.role is Role.TIED:
            rulings[key] = Ruling(rule, rulings[first_of[key]].made)
    found = {id(ruling): ruling for ruling in rulings.values()}.values()
    for ruling in found:
        if ruling.rule.role is Role.REFUSED:
            refused = [key for key, one in rulings.items() if one is ruling]
            problem, hint = _REFUSALS[ruling.rule.reason]
            raise RefusedError(
                f"{name} holds {problem} ({some(refused, 3)}).",
                hint,
                code=Code.NOT_AVERAGEABLE,
                tensor=refused[0],
            )
    if Role.AVERAGED not in {ruling.made for ruling in found}:
        raise RefusedError(
            f"{name} holds no floating-point tensor to average.", code=Code.NOT_AVERAGEABLE
        )
    return rulings


def _tied(
    newest: Mapping[str, TensorSpec], layouts: Sequence[Mapping[str, TensorSpec]]
) -> dict[str, str]:
    """Return the first name of the same bytes, for each name that has one in every checkpoint."""
    if len(set(newest.values())) == len(newest):
        return {}
    first: dict[tuple[TensorSpec | None, ...], str] = {}
    tied = {}
    for name, spec in newest.items():
        if 0 not in spec.shape:
            place = tuple(tensors.get(name) for tensors in layouts)
            if first.setdefault(place, name) != name:
                tied[name] = first[place]
    return tied


def all_rules(rulings: Mapping[str, Ruling], dropped: Iterable[str]) -> dict[str, Rule]:
    """Return the rule that decided on each tensor, those that the newest lacks included."""
    rules = {name: ruling.rule for name, ruling in rulings.items()}
    return {**rules, **dict.fromkeys(dropped, DROPPED)}


def by_pattern(rules: Mapping[str, Rule]) -> tuple[TensorRole, ...]:
    """Return the roles of all tensors, those of one pattern and one rule as one."""
    counts = Counter((_NUMBER.sub("*", name), rule.name) for name, rule in rules.items())
    rule_of = {rule.name: rule for rule in rules.values()}
    return tuple(
        TensorRole(pattern, rule_of[name].role, name, rule_of[name].reason, count)
        for (pattern, name), count in counts.items()
    )
