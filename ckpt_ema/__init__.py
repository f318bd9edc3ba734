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
    "finish",
    "plan",
    "plot",
    "select",
]

if TYPE_CHECKING:
    from ckpt_ema.fold.shadow import Shadow
    from ckpt_ema.planning.plan import plan
    from ckpt_ema.report.figure import plot
    from ckpt_ema.run import average, average_part, finish
    from ckpt_ema.selection.select import select

_HOMES = {
    "Shadow": "ckpt_ema.fold.shadow",
    "average": "ckpt_ema.run",
    "average_part": "ckpt_ema.run",
    "finish": "ckpt_ema.run",
    "plan": "ckpt_ema.planning.plan",
    "plot": "ckpt_ema.report.figure",
    "select": "ckpt_ema.selection.select",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
