"""Reading and comparing the tensors of checkpoints, whatever the containers and layouts."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

from ckpt_ema.containers.gather import covering, gather
from ckpt_ema.containers.specs import DTYPE_BITS, ModelFiles, Specs, TensorSpec, as_real
from ckpt_ema.errors import CkptEmaError, Code, FailedError, RefusedError
from ckpt_ema.storage.pools import pool_of
from ckpt_ema.storage.protocol import Range, Storage

_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 12


class Reader(AbstractContextManager["Reader"]):
    """The tensor data of one or several checkpoints; for many threads.

    Files are opened as they are needed, a bounded number at a time. Each must be the one whose
    header was read: a file that has changed raises `FailedError`.
    """

    def __init__(self, storage: Storage, checkpoints: Sequence[tuple[Path, Specs]]) -> None:
        """`checkpoints` are the model's folder and the specs of each; reads name them by number."""
        self._paths = [
            [os.path.join(folder, file.name) for file in specs.files]
            for folder, specs in checkpoints
        ]
        files = [file for _, specs in checkpoints for file in specs.files]
        paths = [path for paths in self._paths for path in paths]
        expected = {path: file.identity for path, file in zip(paths, files, strict=True)}
        self._pool = pool_of(storage, expected, read_in_turn=len(checkpoints))

    def __exit__(self, *_error: object) -> None:
        self.close()

    def read_into(
        self, checkpoint: int, tensor: TensorSpec, start_byte: int, buffer: memoryview
    ) -> None:
        """Fill `buffer` with bytes of a tensor of checkpoint number `checkpoint`.

        They count from `start_byte` of the tensor's elements, row-major without gaps. Raises
        `FailedError` if a file has changed or cannot be read.
        """
        if tensor.pieces:
            start = start_byte * 8 // DTYPE_BITS[tensor.dtype]
            gather(tensor, start, buffer, partial(self._read_file, checkpoint))
        else:
            self._read_file(checkpoint, tensor.file, buffer, tensor.offset + start_byte)

    def _read_file(self, checkpoint: int, file: int, buffer: memoryview, offset: int) -> None:
        self._pool.read_into(self._paths[checkpoint][file], buffer, offset)

    def ranges(
        self, checkpoint: int, tensor: TensorSpec, start_byte: int, size_bytes: int
    ) -> Iterator[Range]:
        """Yield ranges of files that have all of these bytes of a tensor, as `read_into` counts."""
        for file, offset, count in covering(tensor, start_byte, size_bytes):
            yield Range(self._paths[checkpoint][file], offset, count)

    def request(self, ranges: Iterable[Range]) -> None:
        """Start fetching bytes that will be read soon, in this order."""
        self._pool.request(ranges)

    def held(self, ranges: Iterable[Range]) -> AbstractContextManager[None]:
        """Hold requested bytes inside the block, for reads by descriptor too."""
        return self._pool.held(ranges)

    @property
    def most_open(self) -> int:
        """How many files may be open at a time."""
        return self._pool.most_open

    @property
    def ahead_bytes(self) -> int:
        """How far ahead of a read the bytes of an uncached file should be requested."""
        return self._pool.ahead_bytes

    def descriptors(self, files: Iterable[tuple[int, int]]) -> AbstractContextManager[list[int]]:
        """Yield descriptors of files, each given by a checkpoint and a number in its specs."""
        return self._pool.descriptors(map(self._path, files))

    def failure(self, file: tuple[int, int], code: int, offset: int) -> FailedError:
        """Return the error of a read by descriptor; `code` is its errno, 0 where the file ends."""
        return self._pool.failure(self._path(file), code, offset)

    def _path(self, file: tuple[int, int]) -> str:
        checkpoint, number = file
        return self._paths[checkpoint][number]

    def verify(self) -> None:
        """Raise `FailedError` if a file has changed since its header was read."""
        self._pool.verify()

    def cancel(self) -> None:
        """Make reads that wait for a network fail soon."""
        self._pool.cancel()

    def close(self) -> None:
        """Close the files; no thread may be reading."""
        self._pool.close()


def hold_the_same(
    one: tuple[ModelFiles, Specs],
    other: tuple[ModelFiles, Specs],
    storage: Storage,
    *,
    heads_only: bool = False,
) -> bool:
    """Return whether all tensors are equal in name, dtype, shape and bytes.

    The heads of all tensors are compared before the rest of any, since frozen tensors may come
    first; with `heads_only`, nothing else is. Checkpoints that cannot be read count as different.
    """
    (model, specs), (other_model, other_specs) = one, other
    if specs.tensors.keys() != other_specs.tensors.keys():
        return False
    pairs = [(tensor, other_specs.tensors[name]) for name, tensor in specs.tensors.items()]
    if any((a.dtype, a.shape) != (b.dtype, b.shape) for a, b in pairs):
        return False
    pairs = [(as_real(a), as_real(b)) for a, b in pairs]
    opened = [(model.folder, specs), (other_model.folder, other_specs)]
    with suppress(CkptEmaError), Reader(storage, opened) as reader:
        heads = [(*pair, min(_HEAD_BYTES, pair[0].size_bytes)) for pair in pairs]
        wholes = [] if heads_only else [(*pair, pair[0].size_bytes) for pair in pairs]
        return all(_equal(reader, *each) for each in (*heads, *wholes))
    return False


def are_equal(
    one: TensorSpec, other: TensorSpec, of: tuple[ModelFiles, Specs], storage: Storage
) -> bool:
    """Return whether two tensors of one checkpoint are equal in dtype, shape and bytes.

    Tensors that cannot be read count as different.
    """
    if one == other or (one.dtype, one.shape) != (other.dtype, other.shape):
        return one == other
    model, specs = of
    with suppress(CkptEmaError), Reader(storage, [(model.folder, specs)] * 2) as reader:
        return _equal(reader, one, other, one.size_bytes)
    return False


def same_values(earlier: str, later: str) -> RefusedError:
    """Return the refusal of two steps that hold the same model."""
    why = "one of them is mislabelled, and an average would count it twice"
    message = f"{earlier} and {later} hold the same model weights; {why}."
    hint = "Leave one out, or pass --allow-duplicates."
    return RefusedError(message, hint, code=Code.DUPLICATES)


def _equal(reader: Reader, mine: TensorSpec, theirs: TensorSpec, size_bytes: int) -> bool:
    """Return whether two tensors start with the same `size_bytes` bytes."""
    here, there = (memoryview(bytearray(min(_CHUNK_BYTES, size_bytes))) for _ in range(2))
    for start in range(0, size_bytes, _CHUNK_BYTES):
        count = min(_CHUNK_BYTES, size_bytes - start)
        reader.read_into(0, mine, start, here[:count])
        reader.read_into(1, theirs, start, there[:count])
        if here[:count] != there[:count]:
            return False
    return True
