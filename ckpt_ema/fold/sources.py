"""Reading elements of the planned checkpoints' tensors into staging memory, whatever the format."""

import torch

from ckpt_ema.containers.specs import AVERAGED, DTYPE_BITS, TensorSpec
from ckpt_ema.fold.gather import gather
from ckpt_ema.fold.tile_fold import Staging
from ckpt_ema.planning.plan import Plan
from ckpt_ema.storage.protocol import Identity

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in AVERAGED.items()
}


class Sources:
    """The tensor data of a plan's checkpoints, read by position; for many threads."""

    def __init__(self, plan: Plan) -> None:
        self._paths = [
            [str(checkpoint.folder / file.name) for file in checkpoint.specs.files]
            for checkpoint in plan.checkpoints
        ]
        self._pool = plan.storage.pool(
            {
                path: Identity(file.size_bytes, file.mtime_ns)
                for checkpoint, paths in zip(plan.checkpoints, self._paths, strict=True)
                for path, file in zip(paths, checkpoint.specs.files, strict=True)
            },
            read_in_turn=len(plan.checkpoints),
        )

    def values(
        self, checkpoint: int, source: TensorSpec, start: int, count: int, staging: Staging
    ) -> torch.Tensor:
        """`count` elements from element `start` of an averaged tensor on: shape (count,)."""
        dtype = TORCH_DTYPES[source.dtype]
        self.read(checkpoint, source, start * dtype.itemsize, count * dtype.itemsize, staging)
        return staging.values(dtype, count)

    def read(
        self, checkpoint: int, source: TensorSpec, start: int, size_bytes: int, staging: Staging
    ) -> memoryview:
        """The same in bytes, for tensors of any dtype."""
        paths = self._paths[checkpoint]
        view = staging.bytes[:size_bytes]
        if source.pieces:

            def read_into(file: int, part: memoryview, offset: int) -> None:
                self._pool.read_into(paths[file], part, offset)

            gather(source, start * 8 // DTYPE_BITS[source.dtype], view, read_into)
        else:
            self._pool.read_into(paths[source.file], view, source.offset + start)
        return view

    def verify(self) -> None:
        """Raise `FailedError` if a file has changed since the plan was made."""
        self._pool.verify()

    def close(self) -> None:
        """Close the files."""
        self._pool.close()
