"""What a checkpoint's headers tell: names, dtypes, shapes, and where each tensor's bytes lie.

Every format is brought to this one form, elements at an offset in a regular file, so that all of
them are read by the same positioned reads. Nothing here reads a file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

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


class TensorSpec(NamedTuple):
    """One tensor of one checkpoint and where its bytes are."""

    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]
    file: int  # index into Specs.files
    offset: int  # of its first element in that file, in bytes
    strides: tuple[int, ...] | None = None  # in elements; None: row-major without gaps

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements, packed."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def span_bytes(self) -> int:
        """Bytes in the file from its first to its last element, more than its size for a view."""
        if self.strides is None or 0 in self.shape:
            return self.size_bytes
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * DTYPE_BITS[self.dtype] // 8


class FileSpec(NamedTuple):
    """One file of a checkpoint as it was when its header was read."""

    name: str  # relative to the checkpoint's folder
    size_bytes: int
    mtime_ns: int
    digest: str  # SHA-256 of the header (or of the pickled structure), in hex


@dataclass(frozen=True, slots=True)
class Specs:
    """The tensors of one checkpoint, or of one of its files, in the order in which they lie."""

    tensors: Mapping[str, TensorSpec]
    files: tuple[FileSpec, ...]
    metadata: tuple[Mapping[str, str], ...]  # of each file: its header's own string-to-string map
    notes: tuple[str, ...] = field(default=())  # what was ignored while reading, for the report


class ReadSpecs(Protocol):
    """A reader: the one thing a format must provide."""

    def __call__(self, path: str) -> Specs:
        """The specs of one file; raises `RefusedError` for a file that breaks its format."""
