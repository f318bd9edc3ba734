"""Judging tensors, with a look into the few whose role neither name nor dtype settles."""

import struct
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import DTYPE_BITS, Specs, as_real
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.options import Reading
from ckpt_ema.planning.average import Weighted
from ckpt_ema.planning.roles import Ruling, asked_roles, judge
from ckpt_ema.storage import Storage

_HEAD_BYTES = 1 << 16  # of each tensor; trained codes differ long before
_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}  # of struct


def judge_newest(
    averages: Iterable[Weighted],
    specs_of: Mapping[Checkpoint, Specs],
    reading: Reading,
    storage: Storage,
) -> dict[Checkpoint, dict[str, Ruling]]:
    """Return what becomes of each tensor of each checkpoint at which an average ends.

    `specs_of` has every checkpoint, oldest first. Raises what `roles.judge` raises.
    """
    layouts = list({id(specs.tensors): specs.tensors for specs in specs_of.values()}.values())
    last = {average.checkpoints[-1] for average in averages}
    oldest = next(iter(specs_of.items()))
    rulings = {}
    for newest in (checkpoint for checkpoint in specs_of if checkpoint in last):
        specs = specs_of[newest]
        asked = asked_roles(specs.tensors, reading)
        with Contents(oldest, (newest, specs), storage) as contents:
            rulings[newest] = judge(specs, layouts, newest.name, contents, asked)
    return rulings


class Contents(AbstractContextManager["Contents"]):
    """The first bytes of tensors in the oldest and the newest of some checkpoints."""

    def __init__(
        self, oldest: tuple[Checkpoint, Specs], newest: tuple[Checkpoint, Specs], storage: Storage
    ) -> None:
        self._specs = (oldest[1], newest[1])
        opened = [(checkpoint.model.folder, specs) for checkpoint, specs in (oldest, newest)]
        self._reader = Reader(storage, opened)

    def __exit__(self, *_error: object) -> None:
        self._reader.close()

    def changes(self, key: str) -> bool:
        """Return whether the tensor differs between the two checkpoints."""
        dtypes = {specs.tensors[key].dtype for specs in self._specs}
        return len(dtypes) > 1 or self._head(0, key) != self._head(1, key)

    def is_binary(self, key: str) -> bool:
        """Return whether the tensor holds only zeros and ones in both checkpoints."""
        return all(self._is_binary(number, key) for number in (0, 1))

    def is_whole_number(self, key: str) -> bool:
        """Return whether the tensor, of one float, is a whole number in both checkpoints."""
        dtypes = (specs.tensors[key].dtype for specs in self._specs)
        return all(_number(self._head(n, key), d).is_integer() for n, d in enumerate(dtypes))

    def _is_binary(self, number: int, key: str) -> bool:
        dtype = self._specs[number].tensors[key].dtype
        width, head = DTYPE_BITS[dtype] // 8, self._head(number, key)
        held = {head[at : at + width] for at in range(0, len(head), max(width, 1))}
        if dtype in _FORMATS:
            return len(held) <= 3 and {_number(one, dtype) for one in held} <= {0.0, 1.0}
        return width > 0 and held <= {bytes(width), (1).to_bytes(width, "little")}

    def _head(self, number: int, key: str) -> bytes:
        tensor = as_real(self._specs[number].tensors[key])
        head = bytearray(min(tensor.size_bytes, _HEAD_BYTES))
        self._reader.read_into(number, tensor, 0, memoryview(head))
        return bytes(head)


def _number(content: bytes, dtype: str) -> float:
    """Return one float; a bfloat16 is the upper half of a float32."""
    value: float = struct.unpack(_FORMATS[dtype], b"\0\0" * (dtype == "BF16") + content)[0]
    return value
