"""What becomes of each tensor, and why: one role for each, from one ordered table of rules.

Codes and scales of quantised weights are known by name, everything else by dtype.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import NamedTuple

from ckpt_ema.containers.specs import AVERAGED, Role, Specs, TensorSpec
from ckpt_ema.errors import Code, RefusedError, some

# What GPTQ, AWQ and bitsandbytes call the codes and scales of a quantised weight.
_CODE = re.compile(r"(?:^|\.)(?:qweight|qzeros|absmax|quant_state\.\w+)$")
_NUMBER = re.compile(r"(?<![^\W_])\d+(?![^\W_])")


class Reason(Enum):
    """Why a tensor has its role; the values are stable and shown to people."""

    FLOAT = "floating point"
    NOT_FLOAT = "not floating point"
    SHARED_BYTES = "another name of the same bytes"
    QUANTISED = "codes or scales of a quantised weight"
    EMPTIED = "a placeholder without elements"
    NOT_IN_NEWEST = "not in the newest checkpoint"


class Facts(NamedTuple):
    """What rules judge by."""

    is_code: bool  # by its name
    is_emptied: bool  # without elements, like most tensors of its checkpoint
    is_tied: bool  # an earlier name has the same bytes in every checkpoint
    is_float: bool


class Rule(NamedTuple):
    """One rule: the tensors that it takes, and what becomes of them."""

    name: str
    role: Role
    reason: Reason
    takes: Callable[[Facts], bool]
    refusal: tuple[str, str] = ("", "")  # what a refused checkpoint holds, and what to do about it


_CODES = (
    "quantised weights, whose codes cannot be averaged",
    "Average the checkpoints before they are quantised.",
)
_PLACEHOLDERS = (
    "tensors without elements, as ZeRO-3 leaves when the weights stay on their ranks",
    "Gather them first: `python zero_to_fp32.py RUN OUT -t global_stepN --safe_serialization`.",
)
# The first rule that takes a tensor decides.
RULES = (
    Rule("quantised", Role.REFUSED, Reason.QUANTISED, lambda one: one.is_code, _CODES),
    Rule("emptied", Role.REFUSED, Reason.EMPTIED, lambda one: one.is_emptied, _PLACEHOLDERS),
    Rule("tied", Role.TIED, Reason.SHARED_BYTES, lambda one: one.is_tied),
    Rule("not-float", Role.KEPT, Reason.NOT_FLOAT, lambda one: not one.is_float),
    Rule("float", Role.AVERAGED, Reason.FLOAT, lambda _: True),
)


class Ruling(NamedTuple):
    """What became of one tensor."""

    rule: Rule  # that decided
    made: Role  # how its value is made: that of a tied tensor is its other name's


# Of tensors that only checkpoints before the newest have.
_NEWEST_NAMES = Rule("newest-names", Role.DROPPED, Reason.NOT_IN_NEWEST, lambda _: False)
DROPPED = Ruling(_NEWEST_NAMES, Role.DROPPED)


@dataclass(frozen=True, slots=True)
class TensorRole:
    """The role that all tensors of one pattern share; for `plan --explain`."""

    pattern: str  # names with their numbers left open: model.layers.*.weight
    role: Role
    rule: str  # the name of the rule that decided
    reason: Reason
    count: int  # of tensors


def judge(
    newest: Specs, layouts: Sequence[Mapping[str, TensorSpec]], name: str
) -> dict[str, Ruling]:
    """Return what becomes of each tensor of `newest`, which is called `name` in messages.

    `layouts` has the tensors of every checkpoint that takes part, shared mappings once. Raises
    `RefusedError` if a tensor rules the average out, or if none is averaged.
    """
    floats = [spec for spec in newest.tensors.values() if spec.dtype in AVERAGED]
    mostly_empty = 2 * sum(spec.shape == (0,) for spec in floats) > len(floats)
    codes, first_of = set(filter(_CODE.search, newest.tensors)), _tied(newest.tensors, layouts)
    rulings: dict[str, Ruling] = {}
    for key, spec in newest.tensors.items():
        is_float = spec.dtype in AVERAGED
        is_emptied = mostly_empty and is_float and spec.shape == (0,)
        ruling = _ruling(key in codes, is_emptied, key in first_of, is_float)
        if ruling.made is Role.TIED:
            ruling = Ruling(ruling.rule, rulings[first_of[key]].made)
        rulings[key] = ruling
    _check(rulings, name)
    return rulings


@cache  # a model may have 100 000 tensors, of few kinds
def _ruling(*facts: bool) -> Ruling:
    rule = next(rule for rule in RULES if rule.takes(Facts(*facts)))
    return Ruling(rule, rule.role)


def _check(rulings: Mapping[str, Ruling], name: str) -> None:
    """Raise `RefusedError` if a tensor rules the average out, or if none is averaged."""
    made = {ruling.made for ruling in rulings.values()}
    if Role.REFUSED in made:
        rule = next(one.rule for one in rulings.values() if one.rule.role is Role.REFUSED)
        refused = [key for key, one in rulings.items() if one.rule is rule]
        problem, hint = rule.refusal
        message = f"{name} holds {problem} ({some(refused, 3)})."
        raise RefusedError(message, hint, code=Code.NOT_AVERAGEABLE, tensor=refused[0])
    if Role.AVERAGED not in made:
        message = f"{name} holds no floating-point tensor to average."
        raise RefusedError(message, code=Code.NOT_AVERAGEABLE)


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


def by_pattern(rulings: Mapping[str, Ruling]) -> tuple[TensorRole, ...]:
    """Return the roles of all tensors, those of one pattern and one rule as one."""
    counts = Counter((_NUMBER.sub("*", name), one.rule) for name, one in rulings.items())
    return tuple(
        TensorRole(pattern, rule.role, rule.name, rule.reason, count)
        for (pattern, rule), count in counts.items()
    )
