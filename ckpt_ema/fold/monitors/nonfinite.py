"""Finding the NaN or infinity behind a tile that came out non-finite: tensor, checkpoint, count.

It runs only when a finished tile holds such a value, so it may read again what it needs.
"""

import torch

from ckpt_ema.errors import RefusedError, printable
from ckpt_ema.fold.sources import Sources
from ckpt_ema.fold.tile_fold import Staging
from ckpt_ema.fold.tiles import tensor_at
from ckpt_ema.planning.plan import Plan
from ckpt_ema.planning.work import Span
from ckpt_ema.targets.target import OutputTensor

_CHUNK_ELEMENTS = 1 << 18


def check_nonfinite(
    plan: Plan, sources: Sources, span: Span, start: int, number: int, average: torch.Tensor
) -> None:
    """Raise `RefusedError` unless every non-finite element is an infinity that never changes.

    `average` holds the elements of `span` from `start` on of average `number`, rounded to the
    output's dtype.
    """
    staging = Staging(len(average) * 8)
    layout_of = plan.work.layout_of

    def values(index: int) -> torch.Tensor:
        return sources.values(index, span.sources[layout_of[index]], start, len(average), staging)

    indices = plan.averages[number].members
    unchanged = average.isinf()
    for index in indices:
        unchanged &= values(index) == average
    problem = ~average.isfinite() & ~unchanged
    if not bool(problem.any()):
        return
    for index in indices:
        guilty = problem & ~values(index).isfinite()
        if bool(guilty.any()):
            tensor = tensor_at(plan, span, number, start + int(guilty.int().argmax()))
            raise _nonfinite(plan, sources, index, tensor)
    raise _overflow(tensor_at(plan, span, number, start + int(problem.int().argmax())))


def _numel(tensor: OutputTensor) -> int:
    return int(torch.Size(tensor.shape).numel())


def _overflow(tensor: OutputTensor) -> RefusedError:
    return RefusedError(
        f"The average of tensor {printable(tensor.name)} has values beyond the range of"
        f" {tensor.dtype}.",
        "Choose another --dtype (bfloat16 has the range of float32), or --allow-nonfinite.",
    )


def _nonfinite(plan: Plan, sources: Sources, index: int, tensor: OutputTensor) -> RefusedError:
    checkpoint = plan.checkpoints[index]
    source = checkpoint.specs.tensors[tensor.key]
    total = _numel(tensor)
    staging = Staging(min(_CHUNK_ELEMENTS, total) * 8)
    nans = infinities = 0
    for start in range(0, total, _CHUNK_ELEMENTS):
        count = min(_CHUNK_ELEMENTS, total - start)
        value = sources.values(index, source, start, count, staging)
        nans += int(value.isnan().sum())
        infinities += int(value.isinf().sum())
    found = [f"{nans} NaN"] * bool(nans) + [f"{infinities} infinite"] * bool(infinities)
    return RefusedError(
        f"{printable(checkpoint.path)}: tensor {printable(tensor.name)} holds"
        f" {' and '.join(found)} values (of {total}).",
        "Leave that checkpoint out, or pass --allow-nonfinite to average it as it is.",
    )
