"""What an output is made of, known before a tensor is read, and the protocol of its formats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from ckpt_ema.containers.checksums import Checksum
from ckpt_ema.containers.specs import Region, Role, Specs, TensorSpec, packed_bytes
from ckpt_ema.targets.companions import Companion


class OutputTensor(NamedTuple):
    """One tensor of the output and where its bytes go."""

    key: str  # in the specs of the checkpoints
    name: str  # in its file
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file, in bytes
    role: Role  # AVERAGED or KEPT; a tied name has the role of the one whose bytes it shares
    region: Region | None = None  # of the tensor, where this is not all of it as it is
    is_part: bool = False  # the tensor has more regions
    is_copy: bool = False  # the tensor is elsewhere in the output too

    @property
    def averaged(self) -> bool:
        """Whether it is averaged; else it is the newest checkpoint's, byte for byte."""
        return self.role is Role.AVERAGED

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return packed_bytes(self.dtype, self.shape)


class Chunk(NamedTuple):
    """Bytes of a file that belong to no tensor, such as its header."""

    offset: int
    content: bytes


class Copied(NamedTuple):
    """Bytes that are those of a file of the newest checkpoint, at the same place."""

    offset: int
    size_bytes: int
    file: int  # index into Specs.files


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One model file of the output: fixed chunks, and tensors at their offsets."""

    name: str  # relative to the output folder
    member: int  # number of the checkpoint's model file that it mirrors
    chunks: tuple[Chunk, ...]
    size_bytes: int
    tensors: tuple[OutputTensor, ...]  # in the order of their bytes
    copied: tuple[Copied, ...] = ()  # what lies between them
    checksums: tuple[Checksum, ...] = ()  # of what it holds, to be written last


Finish = tuple[str, bytes]  # the name and the content of a file that is written last


class Model(NamedTuple):
    """What a target lays out: the tensors of the newest checkpoint, and what becomes of each."""

    specs: Specs
    roles: Mapping[str, Role]  # AVERAGED or KEPT, by key
    dtype: str | None  # of averaged tensors; None: each its own
    provenance: Mapping[str, object]  # goes into every file as JSON
    is_file: bool  # the checkpoint is a file, whose name tells it from other steps
    layouts: Sequence[Mapping[str, TensorSpec]] = ()  # the tensors of every checkpoint


class Target(Protocol):
    """A format to write averages in, at one path."""

    @property
    def path(self) -> Path:
        """Where the output goes."""

    @property
    def is_single_file(self) -> bool:
        """Whether the output is one file, with its provenance inside, instead of a folder."""

    def lay_out(self, model: Model) -> tuple[OutputFile, ...]:
        """Lay out the files of a model; raises `RefusedError` for what the format cannot hold."""

    def finish(self, files: Sequence[OutputFile], members: Sequence[str]) -> tuple[Finish, ...]:
        """Return what is written last, such as the indexes of shards.

        `members` are the names of the newest checkpoint's weights files or indexes.
        """


@dataclass(frozen=True, slots=True)
class Output:
    """One average, laid out."""

    path: Path  # where it goes
    is_single_file: bool  # instead of a folder
    files: tuple[OutputFile, ...]
    indexes: tuple[Finish, ...]
    companions: tuple[Companion, ...]  # files copied beside the model
    fingerprint: str  # of everything that decides its bytes
    state: OutputFile | None = None  # its exact shadow, where that is kept
