"""The protocol of a storage: the names, identities and bytes of files, all that stages need."""

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from enum import Enum
from typing import NamedTuple, Protocol

from ckpt_ema.errors import FailedError

REQUEST_BYTES = 1 << 22  # the largest request to a remote storage
SMALL_REQUESTS = 32  # at a time, for headers and other small reads

Location = str | os.PathLike[str]


class Kind(Enum):
    """What a path leads to, links followed."""

    ABSENT = "absent"
    FILE = "file"
    FOLDER = "folder"
    OTHER = "other"  # a FIFO, a socket, a device


class Identity(NamedTuple):
    """Tells a file from a later one at the same path."""

    size_bytes: int
    mtime_ns: int
    tag: str = ""  # of its content, where the storage has one: an ETag, a digest


class OpenFile(Protocol):
    """A regular file open for positioned reads."""

    @property
    def path(self) -> str:
        """Its path, for messages."""

    @property
    def identity(self) -> Identity:
        """What it was when it was opened."""

    def read(self, count: int, offset: int) -> bytes:
        """Return `count` bytes from `offset`; raises `FailedError` if the file ends before."""

    def first_hole(self) -> int | None:
        """Return the first offset that was never written and reads as zeros, if there is one.

        An interrupted save that set the size first leaves holes; so does a sparse copy.
        """


class Range(NamedTuple):
    """A range of a file."""

    path: str
    offset: int
    size_bytes: int


class FilePool(Protocol):
    """Many files read by many threads, each checked to be the expected one."""

    @property
    def ahead_bytes(self) -> int:
        """How far ahead of a read the bytes of an uncached file should be requested."""

    @property
    def most_open(self) -> int:
        """How many files may be open at a time."""

    def read_into(self, path: str, view: memoryview, offset: int) -> None:
        """Fill `view` (bytes) from `offset` of a file; raises `FailedError` if that fails."""

    def descriptors(self, paths: Iterable[str]) -> AbstractContextManager[list[int]]:
        """Yield descriptors to read files with; raises `FailedError` if one cannot be opened."""

    def failure(self, path: str, code: int, offset: int) -> FailedError:
        """Return the error of a read by descriptor; `code` is its errno, 0 where the file ends."""

    def request(self, ranges: Iterable[Range]) -> None:
        """Start fetching bytes that will be read soon, in this order."""

    def held(self, ranges: Iterable[Range]) -> AbstractContextManager[None]:
        """Hold requested bytes inside the block, for reads by descriptor too; once per request."""

    def verify(self) -> None:
        """Raise `FailedError` if a file is no longer the expected one."""

    def cancel(self) -> None:
        """Make reads that wait for a network fail soon; their results are no longer needed."""

    def close(self) -> None:
        """Close every file; no reader may be active."""


class Storage(Protocol):
    """A place where checkpoints are kept; it is only ever read.

    Methods raise `RefusedError` for what cannot be accessed: a disk that fails for a moment must
    not look like an absent file, which would make another average.
    """

    @property
    def is_remote(self) -> bool:
        """Whether reads are requests over a network, worth making many at a time."""

    def kind(self, path: Location) -> Kind:
        """Return what `path` leads to; a broken link leads to nothing."""

    def is_folder(self, path: Location) -> bool:
        """Return whether `path` leads to a folder."""

    def names(self, folder: Location) -> set[str]:
        """List the names in a folder."""

    def can_list(self, folder: Location) -> bool:
        """Return whether this user may list a folder and enter it."""

    def is_link(self, path: Location) -> bool:
        """Return whether `path` itself is a symbolic link."""

    def exists(self, path: Location) -> bool:
        """Return whether anything is at `path`, even a broken link."""

    def files_below(self, folder: Location, most_depth: int | None = None) -> Iterable[str]:
        """Yield the names of files below a folder, relative to it, at most `most_depth` deep.

        With a depth, those that lead far enough to see what the folder is. Links to folders are not
        followed; without a depth, they are named like files.
        """

    def file_id(self, path: Location) -> object:
        """Return a value that is equal for two names of one file or folder."""

    def real_paths(self, paths: Iterable[Location]) -> list[str]:
        """Resolve the links in each path."""

    def identity(self, path: Location) -> Identity:
        """Return the size and time of what `path` leads to."""

    def read(self, path: Location, most_bytes: int | None = None) -> bytes | None:
        """Return the content of a small regular file, or its beginning; None if there is none."""

    def open(self, path: Location) -> AbstractContextManager[OpenFile]:
        """Open a regular file; raises `IncompleteError` if it does not exist."""

    def pool(self, expected: Mapping[str, Identity], read_in_turn: int = 1) -> FilePool:
        """Return a pool of the files in `expected`.

        `read_in_turn` is how many are read at a time; they share the memory for reading ahead.
        """
