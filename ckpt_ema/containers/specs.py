"""What a checkpoint's headers tell: names, dtypes, shapes, and where each tensor's bytes lie.

Every format is brought to this one form, elements at an offset in a regular file, so that all of
them are read by the same positioned reads. Nothing here reads a file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

# Bits of one element, for every dtype that a safetensors file can hold, by its name there.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# The dtypes that are averaged, and what torch calls them. All others keep their newest value.
AVERAGED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Role(Enum):
    """What becomes of a tensor. The values are stable and shown to people."""

    AVERAGED = "averaged"
    KEPT = "kept newest"  # the newest checkpoint's value, byte for byte
    TIED = "tied"  # shares the bytes of another name, and its role
    DROPPED = "dropped"  # in a checkpoint, but not in the output
    REFUSED = "refused"  # rules the average out


# Elements that one read of a piece may hold for each that is wanted; beyond, reads are split.
MOST_READ_PER_WANTED = 4


def is_safetensors(name: str) -> bool:
    """Whether a weights file or index of this name is (of) safetensors."""
    return ".safetensors" in name


def packed_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of the elements of a tensor, packed.

    >>> packed_bytes("BF16", (2, 3))
    12
    """
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


class Piece(NamedTuple):
    """A box of one tensor and where its elements are: a view's, or one chunk of a sharded tensor's.

    The element at `starts + i` of the tensor lies `sum(i * strides)` elements after `offset`.
    """

    file: int  # index into Specs.files
    offset: int  # of its first element in that file, in bytes
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


class TensorSpec(NamedTuple):
    """One tensor of one checkpoint and where its bytes are: in one place, or in pieces."""

    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]
    file: int  # index into Specs.files; of the first piece where there are pieces
    offset: int  # of its first element in that file, in bytes
    pieces: tuple[Piece, ...] = ()  # that cover the tensor, each element once

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements, packed."""
        return packed_bytes(self.dtype, self.shape)


def spanned(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a strided box, both counted; 0 for an empty one."""
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def packed_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of a row-major box without gaps.

    >>> packed_strides((4, 3, 2))
    (6, 2, 1)
    """
    strides = [1] * len(sizes)
    for axis in range(len(sizes) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * sizes[axis]
    return tuple(strides)


def is_packed(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a box is row-major without gaps; dimensions of size 1 may say anything."""
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in sizes
        expected *= size
    return True


class Member(NamedTuple):
    """One model of a checkpoint; nearly all checkpoints have one part."""

    name: str  # the weights file, the index of shards or DCP's .metadata, relative to the folder
    prefix: str = ""  # what tells its tensors from those of other parts


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The weights of one checkpoint: where they are, before anything of them is read."""

    folder: Path  # the model's folder: what lies beside the weights is here too
    members: tuple[Member, ...]
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file that leads to the first part."""
        return self.folder / self.members[0].name


class FileSpec(NamedTuple):
    """One file of a checkpoint as it was when its header was read."""

    name: str  # relative to the checkpoint's folder
    size_bytes: int
    mtime_ns: int
    digest: str  # SHA-256 of the header (or of the pickled structure), in hex
    part: int = 0  # index into Specs.prefixes


@dataclass(frozen=True, slots=True)
class Specs:
    """The tensors of one checkpoint, or of one of its files, in the order in which they lie.

    A tensor's key is its name, after the prefix of the part that its file belongs to.
    """

    tensors: Mapping[str, TensorSpec]
    files: tuple[FileSpec, ...]
    metadata: tuple[Mapping[str, str], ...]  # of each file: its header's own string-to-string map
    notes: tuple[str, ...] = ()  # what was ignored while reading, for the report
    warnings: tuple[str, ...] = ()
    holes: Mapping[str, int] = field(default_factory=dict)  # of each file that has any, the first
    recorded: Mapping[str, int] = field(default_factory=dict)  # "step", "epoch": what it says it is
    prefixes: tuple[str, ...] = ("",)
    numbers: Mapping[str, float] = field(default_factory=dict)  # beside the model, by dotted path
