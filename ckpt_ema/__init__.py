"""Averages the checkpoints of a training run into one model, by an exponential moving average.

Importing it does not import torch; what needs torch is imported when it is used.
"""

from typing import TYPE_CHECKING, Any

from ckpt_ema.errors import CkptEmaError, FailedError, OptionError, RefusedError

__version__ = "0.1.0"
__all__ = [
    "CkptEmaError",
    "FailedError",
    "OptionError",
    "RefusedError",
    "Shadow",
    "average",
    "average_part",
    "compare",
    "finish",
    "inspect",
    "plan",
    "plot",
    "select",
    "update",
    "verify",
    "watch",
]

if TYPE_CHECKING:
    from ckpt_ema.fold.shadow import Shadow
    from ckpt_ema.measure.comparison import compare
    from ckpt_ema.measure.inspection import inspect
    from ckpt_ema.planning.decide import plan
    from ckpt_ema.report.figure import plot
    from ckpt_ema.run import average, average_part, finish
    from ckpt_ema.selection.select import select
    from ckpt_ema.updating import update
    from ckpt_ema.verifying.verify import verify
    from ckpt_ema.watching.watch import watch

_HOMES = {
    "Shadow": "ckpt_ema.fold.shadow",
    "average": "ckpt_ema.run",
    "average_part": "ckpt_ema.run",
    "compare": "ckpt_ema.measure.comparison",
    "finish": "ckpt_ema.run",
    "inspect": "ckpt_ema.measure.inspection",
    "plan": "ckpt_ema.planning.decide",
    "plot": "ckpt_ema.report.figure",
    "select": "ckpt_ema.selection.select",
    "update": "ckpt_ema.updating",
    "verify": "ckpt_ema.verifying.verify",
    "watch": "ckpt_ema.watching.watch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
