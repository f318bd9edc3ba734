"""Judging tensors, with a look into the few whose role neither name nor dtype settles."""

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import DTYPE_BITS, Specs, as_real
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.options import Reading
from ckpt_ema.planning.average import Weighted
from ckpt_ema.planning.roles import Ruling, asked_roles, judge
from ckpt_ema.storage import Storage

_HEAD_BYTES = 1 << 16  # of each tensor; trained codes differ long before
_FEW_BYTES = 256  # which nearly always show that a tensor is not binary
_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}  # of struct


class Facts(NamedTuple):
    """What the first bytes of a tensor of one checkpoint say."""

    dtype: str
    digest: str  # SHA-256 of these bytes, in hex
    is_binary: bool  # zeros and ones only
    is_whole_number: bool  # one element, without a fraction


FactsOf = Callable[[str], Facts]  # by the key of a tensor


class Judged(NamedTuple):
    """What becomes of the tensors of the checkpoints at which averages end."""

    rulings: dict[Checkpoint, dict[str, Ruling]]
    of_oldest: dict[str, Facts]  # the facts of the oldest checkpoint that were asked for


def judge_newest(
    averages: Iterable[Weighted],
    specs_of: Mapping[Checkpoint, Specs],
    reading: Reading,
    storage: Storage,
    of_oldest: FactsOf | None = None,
) -> Judged:
    """Judge each tensor of each checkpoint at which an average ends.

    `specs_of` maps every checkpoint that is read, oldest first. `of_oldest` gives the facts of the
    oldest checkpoint if it was folded before and is not read. Raises what `roles.judge` raises.
    """
    layouts = list({id(specs.tensors): specs.tensors for specs in specs_of.values()}.values())
    last = {average.checkpoints[-1] for average in averages}
    rulings: dict[Checkpoint, dict[str, Ruling]] = {}
    asked_for: dict[str, Facts] = {}
    with ExitStack() as stack:

        def reader_of(checkpoint: Checkpoint) -> FactsOf:
            specs = specs_of[checkpoint]
            reader = stack.enter_context(Reader(storage, [(checkpoint.model.folder, specs)]))
            return partial(_facts, reader, specs)

        oldest = of_oldest or reader_of(next(iter(specs_of)))
        for newest in (checkpoint for checkpoint in specs_of if checkpoint in last):
            specs = specs_of[newest]
            contents = Contents(oldest, reader_of(newest), asked_for)
            asked = asked_roles(specs.tensors, reading)
            rulings[newest] = judge(specs, layouts, newest.name, contents, asked)
    return Judged(rulings, asked_for)


class Contents:
    """Compares tensors of the oldest and the newest of some checkpoints."""

    def __init__(self, oldest: FactsOf, newest: FactsOf, of_oldest: dict[str, Facts]) -> None:
        """Facts of the oldest are kept in `of_oldest` once they were asked for."""
        self._oldest, self._newest = oldest, newest
        self._of_oldest = of_oldest
        self._of_newest: dict[str, Facts] = {}

    def changes(self, key: str) -> bool:
        """See `roles.Contents.changes`."""
        one, other = self._pair(key)
        return (one.dtype, one.digest) != (other.dtype, other.digest)

    def is_binary(self, key: str) -> bool:
        """See `roles.Contents.is_binary`."""
        return all(facts.is_binary for facts in self._pair(key))

    def is_whole_number(self, key: str) -> bool:
        """See `roles.Contents.is_whole_number`."""
        return all(facts.is_whole_number for facts in self._pair(key))

    def _pair(self, key: str) -> tuple[Facts, Facts]:
        if key not in self._of_oldest:
            self._of_oldest[key] = self._oldest(key)
        if key not in self._of_newest:
            self._of_newest[key] = self._newest(key)
        return self._of_oldest[key], self._of_newest[key]


def _facts(reader: Reader, specs: Specs, key: str) -> Facts:
    """Read the facts of a tensor of the one checkpoint of a reader."""
    dtype, tensor = specs.tensors[key].dtype, as_real(specs.tensors[key])
    head = bytearray(min(tensor.size_bytes, _HEAD_BYTES))
    reader.read_into(0, tensor, 0, memoryview(head))
    is_one = dtype in _FORMATS and len(head) * 8 == DTYPE_BITS[dtype]
    return Facts(
        dtype,
        hashlib.sha256(head).hexdigest(),
        _is_binary(bytes(head[:_FEW_BYTES]), dtype) and _is_binary(bytes(head), dtype),
        is_one and _number(bytes(head), dtype).is_integer(),
    )


def _is_binary(head: bytes, dtype: str) -> bool:
    width = DTYPE_BITS[dtype] // 8
    held = {head[at : at + width] for at in range(0, len(head), max(width, 1))}
    if dtype in _FORMATS:
        return len(held) <= 3 and {_number(one, dtype) for one in held} <= {0.0, 1.0}
    return width > 0 and held <= {bytes(width), (1).to_bytes(width, "little")}


def _number(content: bytes, dtype: str) -> float:
    """Return one float; a bfloat16 is the upper half of a float32."""
    value: float = struct.unpack(_FORMATS[dtype], b"\0\0" * (dtype == "BF16") + content)[0]
    return value
