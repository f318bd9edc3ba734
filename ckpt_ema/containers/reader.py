"""Reading elements of the tensors of checkpoints, whatever the containers and layouts."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from ckpt_ema.containers.gather import gather
from ckpt_ema.containers.specs import DTYPE_BITS, Specs, TensorSpec
from ckpt_ema.storage.protocol import Storage


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
        self._pool = storage.pool(expected, read_in_turn=len(checkpoints))

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

    def verify(self) -> None:
        """Raise `FailedError` if a file has changed since its header was read."""
        self._pool.verify()

    def close(self) -> None:
        """Close the files; no thread may be reading."""
        self._pool.close()
