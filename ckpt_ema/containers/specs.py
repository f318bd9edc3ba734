"""What the headers of a checkpoint hold: names, dtypes, shapes, and where each tensor's bytes lie.

Every container is brought to this form, so that the same positioned reads serve all of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import add, mul, sub
from pathlib import Path
from typing import NamedTuple

from ckpt_ema.notices import Notice
from ckpt_ema.storage.protocol import Identity

# Bits of one element, for every dtype that is read, by its name in safetensors.
_OF_BITS = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32 C32",
    64: "C64 F64 I64 U64",
    128: "C128",
}
DTYPE_BITS = {name: bits for bits, names in _OF_BITS.items() for name in names.split()}

# The dtypes that are folded, and what torch calls them.
FOLDED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Complex dtypes, and that of their real and imaginary parts, which are folded as two numbers.
COMPLEX = {"C32": "F16", "C64": "F32", "C128": "F64"}
# The dtypes that can be averaged. All others keep their newest value.
AVERAGED = {*FOLDED, *COMPLEX}
# Dtypes that safetensors has no name for, and the nearest that it has.
WRITTEN_AS = {"C32": "C64", "C128": "C64"}


class Role(Enum):
    """What becomes of a tensor. The values are stable and shown to people."""

    AVERAGED = "averaged"
    KEPT = "kept newest"  # the newest checkpoint's value, byte for byte
    TIED = "tied"  # shares the bytes of another name, and its role
    DROPPED = "dropped"  # in a checkpoint, but not in the output
    REFUSED = "refused"  # rules the average out


# Elements that a read of a piece may fetch for each one wanted; beyond that, reads are split.
MOST_READ_PER_WANTED = 4


def is_safetensors(name: str) -> bool:
    """Return whether the name is that of a safetensors file, or of an index of such files."""
    return ".safetensors" in name


def packed_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor takes without gaps.

    >>> packed_bytes("BF16", (2, 3))
    12
    """
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


Box = tuple[tuple[int, ...], tuple[int, ...]]  # starts, sizes


class Piece(NamedTuple):
    """A box of one tensor and where its elements are: a strided view, or a chunk of a shard.

    The element at `starts + i` of the tensor lies `sum(i * strides)` elements after `offset`.
    """

    file: int  # index into Specs.files
    offset: int  # of its first element in that file, in bytes
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


class Copy(NamedTuple):
    """Where a box of a tensor is stored once more, perhaps rounded to another dtype."""

    dtype: str
    piece: Piece


class TensorSpec(NamedTuple):
    """One tensor of one checkpoint and where its bytes are: in one place, or in pieces."""

    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]
    file: int  # index into Specs.files; of the first piece where there are pieces
    offset: int  # of its first element in that file, in bytes
    pieces: tuple[Piece, ...] = ()  # which cover the tensor, each element once
    copies: tuple[Copy, ...] = ()  # not read, but written back with it
    of_ranks: tuple[Copy, ...] = ()  # other ranks' own values of it: a buffer, an expert

    @property
    def size_bytes(self) -> int:
        """The bytes of its elements, without gaps."""
        return packed_bytes(self.dtype, self.shape)


def as_real(tensor: TensorSpec) -> TensorSpec:
    """Return a tensor as real numbers; a complex one gains a last axis of size 2.

    >>> as_real(TensorSpec("C64", (3,), 0, 8))
    TensorSpec(dtype='F32', shape=(3, 2), file=0, offset=8, pieces=(), copies=(), of_ranks=())
    """
    if tensor.dtype not in COMPLEX:
        return tensor
    pieces = tuple(
        piece._replace(
            starts=(*piece.starts, 0),
            sizes=(*piece.sizes, 2),
            strides=(*(2 * stride for stride in piece.strides), 1),
        )
        for piece in tensor.pieces
    )
    shape = (*tensor.shape, 2)
    return tensor._replace(dtype=COMPLEX[tensor.dtype], shape=shape, pieces=pieces)


def spanned(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Count the elements from the first of a strided box to its last; 0 for an empty box."""
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def packed_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a row-major box without gaps.

    >>> packed_strides((4, 3, 2))
    (6, 2, 1)
    """
    strides = [1] * len(sizes)
    for axis in range(len(sizes) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * sizes[axis]
    return tuple(strides)


def is_packed(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether a box is row-major without gaps; strides of dimensions of size 1 are free."""
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in sizes
        expected *= size
    return True


class Region(NamedTuple):
    """A box of a tensor, its elements in the order in which one checkpoint stores them."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    axes: tuple[int, ...]  # the axis whose stride is largest comes first

    def of(self, tensor: TensorSpec) -> TensorSpec:
        """Return the region of a tensor of any checkpoint as a tensor, which is row-major.

        >>> Region((1, 0), (1, 2), (0, 1)).of(TensorSpec("F32", (3, 2), 0, 80))
        TensorSpec(dtype='F32', shape=(1, 2), file=0, offset=88, pieces=(), copies=(), of_ranks=())
        """
        found = [box for piece in pieces_of(tensor) if (box := self._inside(piece, tensor.dtype))]
        shape = tuple(self.sizes[axis] for axis in self.axes)
        first = found[0]
        is_whole = len(found) == 1 and is_packed(first.sizes, first.strides)
        pieces = () if is_whole else tuple(found)
        return TensorSpec(tensor.dtype, shape, first.file, first.offset, pieces)

    def _inside(self, piece: Piece, dtype: str) -> Piece | None:
        """Return the elements of a piece that are in the region; None if there are none."""
        begins = [*map(max, self.starts, piece.starts)]
        ends = map(min, map(add, self.starts, self.sizes), map(add, piece.starts, piece.sizes))
        sizes = [*map(sub, ends, begins)]
        if any(size <= 0 for size in sizes):
            return None
        skipped = sum(map(mul, map(sub, begins, piece.starts), piece.strides))
        starts = [*map(sub, begins, self.starts)]
        return Piece(
            piece.file,
            piece.offset + skipped * DTYPE_BITS[dtype] // 8,
            *(tuple(each[axis] for axis in self.axes) for each in (starts, sizes, piece.strides)),
        )


def region_of(piece: Piece) -> Region | None:
    """Return the box of a piece, in the order in which it is stored.

    None if it is stored with gaps, or some of its elements share their bytes.
    """
    sizes, strides = piece.sizes, piece.strides
    axes = tuple(range(len(sizes)))
    if not is_packed(sizes, strides):
        axes = tuple(sorted(axes, key=lambda axis: (sizes[axis] > 1, -strides[axis])))
        ordered = ([each[axis] for axis in axes] for each in (sizes, strides))
        if not is_packed(*ordered):
            return None
    return Region(piece.starts, sizes, axes)


def pieces_of(tensor: TensorSpec) -> tuple[Piece, ...]:
    """Return the pieces of a tensor; one where it is stored in one place, or is one view."""
    shape = tensor.shape
    whole = Piece(tensor.file, tensor.offset, (0,) * len(shape), shape, packed_strides(shape))
    return tensor.pieces or (whole,)


def renumbered(tensor: TensorSpec, numbers: Sequence[int]) -> TensorSpec:
    """Return a tensor whose file number n is `numbers[n]` elsewhere.

    >>> renumbered(TensorSpec("F32", (3,), 1, 80), [4, 7]).file
    7
    """

    def moved(piece: Piece) -> Piece:
        return piece._replace(file=numbers[piece.file])

    return tensor._replace(
        file=numbers[tensor.file],
        pieces=tuple(map(moved, tensor.pieces)),
        copies=tuple(Copy(dtype, moved(piece)) for dtype, piece in tensor.copies),
        of_ranks=tuple(Copy(dtype, moved(piece)) for dtype, piece in tensor.of_ranks),
    )


class Member(NamedTuple):
    """One model file of a checkpoint; nearly all checkpoints have one."""

    name: str  # the file, the index of shards or DCP's .metadata, relative to the folder
    prefix: str = ""  # set before the names of its tensors, to tell them from other members'
    is_further: bool = False  # found beside the model by its content, not by its name
    is_part: bool = False  # of a model whose files are averaged one by one


class OnlyAsSaved(NamedTuple):
    """Why no other format of a model than its own would be loaded: what it is, and the way out."""

    what: str
    instead: str


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the model of a checkpoint is, before any of it is read."""

    folder: Path  # companions of the model, such as its configuration, lie here too
    members: tuple[Member, ...]
    notes: tuple[Notice, ...] = ()
    is_average: bool = False  # that the trainer made, by its name
    only_as_saved: OnlyAsSaved | None = None
    written_last: str = ""  # the file in the folder without which it is incomplete

    @property
    def path(self) -> Path:
        """The file of the first member."""
        return self.folder / self.members[0].name


COPIED = -1  # the member of files that are only copied, since no tensor is in them


class FileSpec(NamedTuple):
    """One file of a checkpoint as it was when its header was read."""

    name: str  # relative to the checkpoint's folder
    size_bytes: int
    mtime_ns: int
    tag: str  # of its content, where the storage has one
    digest: str  # SHA-256 of the header (or of the pickled structure), in hex
    member: int = 0  # index into Specs.prefixes, or COPIED

    @property
    def identity(self) -> Identity:
        """What tells it from a later file at the same path."""
        return Identity(self.size_bytes, self.mtime_ns, self.tag)


@dataclass(frozen=True, slots=True)
class Specs:
    """The tensors of one checkpoint, or of one of its members, in the order in which they lie.

    The key of a tensor is the prefix of its member followed by its name.
    """

    tensors: Mapping[str, TensorSpec]
    files: tuple[FileSpec, ...]
    metadata: tuple[Mapping[str, str], ...]  # of each file: its header's string-to-string map
    notes: tuple[Notice, ...] = ()
    warnings: tuple[Notice, ...] = ()
    holes: Mapping[str, int] = field(default_factory=dict)  # path -> offset of its first hole
    recorded: Mapping[str, int] = field(default_factory=dict)  # its own "step" and "epoch"
    prefixes: tuple[str, ...] = ("",)  # of the members
    numbers: Mapping[str, float] = field(default_factory=dict)  # beside the model, by dotted path
    other_models: tuple[str, ...] = ()  # averages beside raw weights, or the reverse, by place
    is_average: bool = False  # that the trainer made
