"""Options: one table of them, the values they take, and the groups that the stages take."""

from ckpt_ema.options.keywords import Keywords
from ckpt_ema.options.table import (
    Engine,
    Options,
    Output,
    Reading,
    Row,
    Selection,
    Weighting,
    make_options,
    table,
)
from ckpt_ema.options.values import DTYPES, PathLike

__all__ = [
    "DTYPES",
    "Engine",
    "Keywords",
    "Options",
    "Output",
    "PathLike",
    "Reading",
    "Row",
    "Selection",
    "Weighting",
    "make_options",
    "table",
]
