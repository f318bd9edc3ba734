"""Finds the NaN or infinity behind an average that is not finite: tensor, checkpoint, count."""

import math

from ckpt_ema.containers.specs import as_real
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.fold.monitors.protocol import Monitor, Watched
from ckpt_ema.fold.views import TileView, describe
from ckpt_ema.targets.target import OutputTensor

_CHUNK_ELEMENTS = 1 << 18


class NonFinite(Monitor):
    """A `Monitor` that refuses averages that are not finite; it has nothing to remember."""

    name = "nonfinite"

    def __init__(self, watched: Watched) -> None:
        self._is_allowed = watched.allow_nonfinite

    def see_problem(self, view: TileView, average: int, element: int) -> None:
        """Raise `RefusedError` that names the tensor, and the checkpoint with such values."""
        if self._is_allowed:
            return
        one = next(one for one in view.segments if element < one.stop)
        for checkpoint in view.plan.averages[average].reads:
            found = describe(view.read_again(checkpoint, element, element + 1))
            if found.nans or found.infinities:
                raise _nonfinite(view, checkpoint, one.tensor)
        name, dtype = one.tensor.name, view.tile.span.dtypes[average]
        message = f"The average of tensor {name} exceeds the range of {dtype}."
        hint = "Choose another --dtype (bfloat16 has float32's range), or pass --allow-nonfinite."
        raise RefusedError(message, hint, code=Code.OVERFLOW, tensor=name)


def _nonfinite(view: TileView, checkpoint: int, tensor: OutputTensor) -> RefusedError:
    planned = view.plan.inputs[checkpoint]
    source = as_real(planned.specs.tensors[tensor.key])
    total = math.prod(source.shape)
    nans = infinities = 0
    for start in range(0, total, _CHUNK_ELEMENTS):
        count = min(_CHUNK_ELEMENTS, total - start)
        found = describe(view.read(checkpoint, source, start, count))
        nans, infinities = nans + found.nans, infinities + found.infinities
    kinds = [f"{nans} NaN"] * bool(nans) + [f"{infinities} infinite"] * bool(infinities)
    path, name = planned.path, tensor.name
    message = f"{path}: tensor {name} holds {' and '.join(kinds)} values (of {total})."
    hint = "Leave that checkpoint out, or pass --allow-nonfinite to average it as it is."
    return RefusedError(message, hint, code=Code.NONFINITE, path=path, tensor=name)
