"""Finds the NaN or infinity behind an average that is not finite: tensor, checkpoint, count."""

import math
from functools import partial
from typing import TYPE_CHECKING

from ckpt_ema.containers.specs import as_real
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.fold.monitors.protocol import Monitor, TileView, Watched
from ckpt_ema.targets.target import OutputTensor

if TYPE_CHECKING:
    import torch

_CHUNK_ELEMENTS = 1 << 18


class NonFinite(Monitor):
    """A `Monitor` that refuses averages that are not finite; it has nothing to remember."""

    name = "nonfinite"

    def __init__(self, watched: Watched) -> None:
        self._is_allowed = watched.allow_nonfinite

    def see_nonfinite(self, view: TileView, average: int, values: "torch.Tensor") -> None:
        """Raise `RefusedError` unless all that is not finite is infinities that never change."""
        if self._is_allowed:
            return
        tile, plan = view.tile, view.plan
        read = partial(view.read_again, start=0, stop=len(values))

        def tensor_of(elements: "torch.Tensor") -> OutputTensor:
            first = int(elements.int().argmax())
            return next(one.tensor for one in view.segments if one.start <= first < one.stop)

        members = plan.averages[average].members
        unchanged = values.isinf()
        for checkpoint in members:
            unchanged &= read(checkpoint) == values
        problem = ~values.isfinite() & ~unchanged
        if not bool(problem.any()):
            return
        for checkpoint in members:
            guilty = problem & ~read(checkpoint).isfinite()
            if bool(guilty.any()):
                raise _nonfinite(view, checkpoint, tensor_of(guilty))
        tensor = tensor_of(problem)
        message = (
            f"The average of tensor {tensor.name} exceeds the range of {tile.span.dtypes[average]}."
        )
        hint = "Choose another --dtype (bfloat16 has float32's range), or pass --allow-nonfinite."
        raise RefusedError(message, hint, code=Code.OVERFLOW, tensor=tensor.name)


def _nonfinite(view: TileView, checkpoint: int, tensor: OutputTensor) -> RefusedError:
    planned = view.plan.checkpoints[checkpoint]
    source = as_real(planned.specs.tensors[tensor.key])
    total = math.prod(source.shape)
    nans = infinities = 0
    for start in range(0, total, _CHUNK_ELEMENTS):
        count = min(_CHUNK_ELEMENTS, total - start)
        value = view.read(checkpoint, source, start, count)
        nans += int(value.isnan().sum())
        infinities += int(value.isinf().sum())
    found = [f"{nans} NaN"] * bool(nans) + [f"{infinities} infinite"] * bool(infinities)
    path, name = planned.path, tensor.name
    message = f"{path}: tensor {name} holds {' and '.join(found)} values (of {total})."
    hint = "Leave that checkpoint out, or pass --allow-nonfinite to average it as it is."
    return RefusedError(message, hint, code=Code.NONFINITE, path=path, tensor=name)
