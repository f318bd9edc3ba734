"""What becomes of each tensor, and why: one role for each, from one ordered table of rules.

A tensor is averaged because it is a weight, not because it is a float. What belongs together keeps
the newest value together, or the average is refused.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import NamedTuple, Protocol

from ckpt_ema.containers.specs import AVERAGED, FOLDED, WRITTEN_AS, Role, Specs, TensorSpec
from ckpt_ema.errors import Code, OptionError, RefusedError, some
from ckpt_ema.options import Reading

# Dtypes of codes: small floats, and integers if they have scales, or are in rows and columns.
_CODE = re.compile(r"^([IU](8|16|32)|F(4|[68]_\w+))$")
_SCALE = re.compile(r"scale|absmax|amax|scb$|zero|^biases$|codebook|quant_", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![^\W_])\d+(?![^\W_])")
# Buffers of torch.nn.utils.parametrizations.spectral_norm and of torch.ao.pruning. The older
# torch.nn.utils.spectral_norm and prune have X_u, X_v and X_mask beside X_orig.
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.\w+\.\d+\.(_u|_v|mask)$")
_VECTORS = ("_u", "_v")
_MASK = re.compile(r"(?<![a-z])masks?(?![a-z])", re.IGNORECASE)
_FEWEST_CODES = 8  # in one dimension, where a few integers beside a scale are something else
# What torch.ao.quantization and others keep beside an integer zero point.
_ZERO_POINT = "zero_point"
_LEAST, _MOST = "min_val", "max_val"
_COUNTER = re.compile(
    r"(?:^|[._])(?:num|n|step|steps|count|counter|epoch|iter|updates|tracked)(?:$|_)"
)


class Reason(Enum):
    """Why a tensor has its role; the values are stable and shown to people."""

    ASKED = "tensors named by --average, --keep or --drop"
    FLOAT = "floating point"
    NOT_FLOAT = "not floating point"
    CHANGING = "integers that change in training"
    SHARED_BYTES = "another name of the same bytes"
    QUANTISED = "codes or scales of a quantised weight"
    EMPTIED = "a placeholder without elements"
    SINGULAR_VECTOR = "vectors of a power iteration"
    MASK = "masks of zeros and ones"
    OBSERVER = "scales and ranges of quantisers"
    RING_BUFFER = "buffers with a pointer into them"
    COUNTER = "counters"
    NOT_IN_NEWEST = "not in the newest checkpoint"


class Contents(Protocol):
    """Looks into tensors of the oldest and the newest checkpoint."""

    def changes(self, key: str) -> bool:
        """Return whether the tensor differs between the two."""

    def is_binary(self, key: str) -> bool:
        """Return whether the tensor holds only zeros and ones in both."""

    def is_whole_number(self, key: str) -> bool:
        """Return whether the tensor, of one element, is a whole number in both."""


class Rule(NamedTuple):
    """One rule: its name, and what becomes of the tensors that it takes."""

    name: str
    role: Role
    reason: Reason


class Ruling(NamedTuple):
    """What became of one tensor."""

    rule: Rule  # that decided
    made: Role  # how its value is made: that of a tied tensor is its other name's

    @property
    def is_asked(self) -> bool:
        """Whether a person has given its role."""
        return self.rule.reason is Reason.ASKED


_QUANTISED = Rule("quantised", Role.REFUSED, Reason.QUANTISED)
_EMPTIED = Rule("emptied", Role.REFUSED, Reason.EMPTIED)
_TIED = Rule("tied", Role.TIED, Reason.SHARED_BYTES)
_ASKED = {role: Rule("asked", role, Reason.ASKED) for role in Role}
# Of tensors that only checkpoints before the newest have.
_NEWEST_NAMES = Rule("newest-names", Role.DROPPED, Reason.NOT_IN_NEWEST)
DROPPED = Ruling(_NEWEST_NAMES, Role.DROPPED)
ASKED_TO_DROP = Ruling(_ASKED[Role.DROPPED], Role.DROPPED)
_REFUSALS = {
    _QUANTISED: (
        "codes that change with their scales, as of quantised weights",
        "codes cannot be averaged, and averaged scales would not match those of any checkpoint",
        "Average the checkpoints before they are quantised, or keep the newest of these tensors,"
        " codes and scales, with --keep GLOB.",
        Code.NOT_AVERAGEABLE,
    ),
    _EMPTIED: (
        "tensors without elements",
        "ZeRO-3 leaves them where the weights stay on their ranks, and the average would lack them",
        "Save with stage3_gather_16bit_weights_on_model_save, or gather the weights first; if they"
        " are empty in the model too, pass --keep GLOB.",
        Code.EMPTIED,
    ),
}


@dataclass(frozen=True, slots=True)
class TensorRole:
    """The role that all tensors of one pattern share; for `plan --explain`."""

    pattern: str  # names with their numbers left open: model.layers.*.weight
    role: Role
    rule: str  # the name of the rule that decided
    reason: Reason
    count: int  # of tensors


_Tensors = Mapping[str, TensorSpec]
_Take = Callable[[_Tensors, Contents], Iterable[str]]  # returns the keys that a rule takes


def judge(
    newest: Specs,
    layouts: Sequence[_Tensors],
    name: str,
    contents: Contents,
    asked: Mapping[str, Role] | None = None,
) -> dict[str, Ruling]:
    """Return what becomes of each tensor of `newest`, which is called `name` in messages.

    `layouts` has the tensors of every checkpoint that takes part, shared mappings once; `asked` is
    what `asked_roles` returns. Raises `RefusedError` if a tensor rules the average out, or if none
    is averaged.
    """
    asked = asked or {}
    rulings: dict[str, Ruling] = {}
    for rule, take in reversed(RULES):  # the last takes all, the others replace its ruling
        rulings.update(dict.fromkeys(take(newest.tensors, contents), Ruling(rule, rule.role)))
    rulings |= {key: Ruling(_ASKED[role], role) for key, role in asked.items()}
    for key, first in _tied(newest.tensors, layouts).items():
        if key not in asked and first not in asked:
            rulings[key] = Ruling(_TIED, rulings[first].made)
    _check(rulings, name)
    return rulings


def distinct(rulings: Mapping[str, Ruling]) -> list[Ruling]:
    """Return the rulings, each once; nearly all tensors share one."""
    return [*{id(ruling): ruling for ruling in rulings.values()}.values()]


def asked_roles(tensors: _Tensors, reading: Reading) -> dict[str, Role]:
    """Return the roles that --average and --keep give to tensors.

    Raises `RefusedError` for a glob that matches nothing or a tensor that cannot have the role,
    `OptionError` for a tensor with two roles.
    """
    roles = dict[str, Role]()
    options = ((reading.average, "average", Role.AVERAGED), (reading.keep, "keep", Role.KEPT))
    for globs, option, role in options:
        for name in (name for glob in globs for name in matching(tensors, option, glob)):
            dtype = tensors[name].dtype
            is_possible = dtype in AVERAGED if role is Role.AVERAGED else dtype not in WRITTEN_AS
            if not is_possible:
                text = f"--{option} matches {name}, which is {dtype}: it can only be"
                text = f"{text} {'averaged' if dtype in AVERAGED else 'kept or dropped'}."
                raise RefusedError(text, code=Code.NOT_AVERAGEABLE, tensor=name)
            if roles.setdefault(name, role) is not role:
                text = f"--average and --keep both match {name}."
                raise OptionError(text, code=Code.CONFLICTING_OPTIONS)
    return roles


def matching(names: Iterable[str], option: str, glob: str) -> list[str]:
    """Return the names that a glob matches; raises `RefusedError` if there are none."""
    found = [name for name in names if fnmatchcase(name, glob)]
    if not found:
        text = f"--{option} {glob} matches no tensor; the names are {some(names, 3)}."
        raise RefusedError(text, code=Code.NO_MATCH)
    return found


def _emptied(tensors: _Tensors, _contents: Contents) -> Iterator[str]:
    """Yield float tensors of shape (0,), which ZeRO-3 leaves of tensors of any shape."""
    return (key for key, one in tensors.items() if one.shape == (0,) and one.dtype in AVERAGED)


def _not_float(tensors: _Tensors, _contents: Contents) -> Iterator[str]:
    return (key for key, one in tensors.items() if one.dtype not in AVERAGED)


def _quantised(tensors: _Tensors, contents: Contents) -> Iterator[str]:
    """Yield codes and their scales if one of them changes; frozen ones do no harm."""
    dtypes = {dtype for dtype in {one.dtype for one in tensors.values()} if _CODE.search(dtype)}
    codes = [key for key, one in tensors.items() if one.dtype in dtypes] if dtypes else []
    if not codes:
        return
    scales: dict[str, list[str]] = {}  # by module
    for key, one in tensors.items():
        module, _, name = key.rpartition(".")
        if one.dtype in AVERAGED and _SCALE.search(name):
            scales.setdefault(module, []).append(key)
    for key in codes:
        beside = [*scales.get(key.rpartition(".")[0], ()), *scales.get(key, ())]
        dtype, shape = tensors[key].dtype, tensors[key].shape
        is_packed = bool(beside) and dtype in ("I8", "U8") and math.prod(shape) > _FEWEST_CODES
        is_code = is_packed or len(shape) > 1 or dtype.startswith("F")
        is_trained = is_code and contents.changes(key) and not contents.is_binary(key)
        if is_trained or (is_code and any(map(contents.changes, beside))):
            yield from (key, *beside)


def _changing(tensors: _Tensors, contents: Contents) -> Iterator[str]:
    """Yield matrices of integers that are trained, or a table that training fills."""
    for key, one in tensors.items():
        if one.dtype in ("I64", "U64") and len(one.shape) > 1 and contents.changes(key):
            yield key


def _singular_vectors(tensors: _Tensors, _contents: Contents) -> Iterator[str]:
    for key in _ending(tensors, *_VECTORS):
        if f"{key[:-2]}_orig" in tensors or _PARAMETRIZED.search(key):
            yield key


def _masks(tensors: _Tensors, contents: Contents) -> Iterator[str]:
    has_masks = "mask" in "\n".join(tensors).lower()
    for key in filter(lambda key: "mask" in key.lower(), tensors if has_masks else ()):
        is_pruning = f"{key.removesuffix('_mask')}_orig" in tensors or _PARAMETRIZED.search(key)
        is_named = _MASK.search(key.rpartition(".")[2]) and tensors[key].dtype in AVERAGED
        if is_pruning or (is_named and contents.changes(key) and contents.is_binary(key)):
            yield key


def _observers(tensors: _Tensors, _contents: Contents) -> Iterator[str]:
    """Yield scales beside integer zero points, and what modules with a range have observed."""
    for key in _ending(tensors, _ZERO_POINT):
        scale = f"{key.removesuffix(_ZERO_POINT)}scale"
        if tensors[key].dtype not in AVERAGED and scale in tensors:
            yield scale
    ranges = (key.removesuffix(_LEAST) for key in _ending(tensors, _LEAST))
    observers = {one.rpartition(".")[0] for one in ranges if f"{one}{_MOST}" in tensors}
    for key in tensors if observers else ():
        module, _, own = key.rpartition(".")
        if module in observers and own not in ("weight", "bias"):
            yield key


def _ring_buffers(tensors: _Tensors, _contents: Contents) -> Iterator[str]:
    """Yield buffers that an integer beside them points into, such as MoCo's queue."""
    for key in _ending(tensors, "_ptr"):
        if tensors[key].dtype not in AVERAGED and key.removesuffix("_ptr") in tensors:
            yield key.removesuffix("_ptr")


def _counters(tensors: _Tensors, contents: Contents) -> Iterator[str]:
    """Yield single floats that count, by name and content."""
    ones = (key for key, one in tensors.items() if math.prod(one.shape) == 1)
    for key in filter(_COUNTER.search, ones):
        is_folded = tensors[key].dtype in FOLDED
        if is_folded and contents.changes(key) and contents.is_whole_number(key):
            yield key


def _ending(tensors: _Tensors, *ends: str) -> list[str]:
    """Return the keys that end in one of these; most models have none, which is found out fast."""
    text = "\n".join([*tensors, ""])
    is_there = any(f"{end}\n" in text for end in ends)
    return [key for key in tensors if key.endswith(ends)] if is_there else []


# The first rule that takes a tensor decides; the last takes every tensor.
RULES: tuple[tuple[Rule, _Take], ...] = (
    (_QUANTISED, _quantised),
    (_EMPTIED, _emptied),
    (Rule("power-iteration", Role.KEPT, Reason.SINGULAR_VECTOR), _singular_vectors),
    (Rule("mask", Role.KEPT, Reason.MASK), _masks),
    (Rule("observer", Role.KEPT, Reason.OBSERVER), _observers),
    (Rule("ring-buffer", Role.KEPT, Reason.RING_BUFFER), _ring_buffers),
    (Rule("counter", Role.KEPT, Reason.COUNTER), _counters),
    (Rule("changing", Role.KEPT, Reason.CHANGING), _changing),
    (Rule("not-float", Role.KEPT, Reason.NOT_FLOAT), _not_float),
    (Rule("float", Role.AVERAGED, Reason.FLOAT), lambda tensors, _: tensors),
)


def _check(rulings: Mapping[str, Ruling], name: str) -> None:
    """Raise `RefusedError` if a tensor rules the average out, or if none is averaged."""
    found = distinct(rulings)
    for rule, (what, why, hint, code) in _REFUSALS.items():
        if any(one.rule is rule for one in found):
            refused = [key for key, one in rulings.items() if one.rule is rule]
            message = f"{name} holds {what} ({some(refused, 3)}): {why}."
            raise RefusedError(message, hint, code=code, tensor=refused[0])
    if all(one.made is not Role.AVERAGED for one in found):
        message = f"{name} holds no floating-point tensor to average."
        raise RefusedError(message, code=Code.NOT_AVERAGEABLE)


def _tied(newest: _Tensors, layouts: Sequence[_Tensors]) -> dict[str, str]:
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
    counts = Counter((pattern_of(name), one.rule) for name, one in rulings.items())
    return tuple(
        TensorRole(pattern, rule.role, rule.name, rule.reason, count)
        for (pattern, rule), count in counts.items()
    )


def pattern_of(name: str) -> str:
    """Return the name of a tensor with its numbers left open.

    >>> pattern_of("model.layers.11.mlp.weight")
    'model.layers.*.mlp.weight'
    """
    return _NUMBER.sub("*", name)
