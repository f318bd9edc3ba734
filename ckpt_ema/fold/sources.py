"""The planned checkpoints as the fold reads them: into staging memory, as torch's tensors."""

import torch

from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import AVERAGED, TensorSpec
from ckpt_ema.fold.tile_fold import Staging
from ckpt_ema.planning.plan import Plan

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in AVERAGED.items()
}


class Sources(Reader):
    """A `Reader` of a plan's checkpoints; for many threads."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.storage, [(c.folder, c.specs) for c in plan.checkpoints])

    def values(
        self, checkpoint: int, source: TensorSpec, start: int, count: int, staging: Staging
    ) -> torch.Tensor:
        """Return `count` elements from element `start` of an averaged tensor on: shape (count,)."""
        dtype = TORCH_DTYPES[source.dtype]
        self.read(checkpoint, source, start * dtype.itemsize, count * dtype.itemsize, staging)
        return staging.values(dtype, count)

    def read(
        self, checkpoint: int, source: TensorSpec, start: int, size_bytes: int, staging: Staging
    ) -> memoryview:
        """Return the same in bytes, of a tensor of any dtype."""
        view = staging.bytes[:size_bytes]
        self.read_into(checkpoint, source, start, view)
        return view
