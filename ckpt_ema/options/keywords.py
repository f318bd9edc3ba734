"""The keyword arguments of `average`, `plan` and the rest, typed for mypy and editors."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from ckpt_ema.options.values import PathLike, StepRange

Numbers = float | Sequence[float] | str
Counts = int | Sequence[int] | str


class Keywords(TypedDict, total=False):
    """One keyword for each row of the table.

    A value may be given as on the command line, as a text; None is the default.
    """

    decay: Numbers | None
    num_updates: str | None
    zero_debias: bool
    power: float | str | None
    inv_gamma: float | str | None
    sigma_rel: Numbers | None
    decay_per_step: Numbers | None
    half_life: Numbers | None
    schedule: str | None
    weights: PathLike | Mapping[str, float] | None
    normalize: bool
    last: Counts | None
    best: Counts | None
    metric: str | None
    metric_mode: str
    from_step: int | str | None
    to_step: int | str | None
    steps: str | Sequence[int | StepRange] | int | None
    every: int | str | None
    min_gap: int | str | None
    include: Sequence[str]
    exclude: Sequence[str]
    pattern: str | None
    order: str
    append: Sequence[PathLike]
    aliases: bool
    skip_incomplete: bool
    form: str
    component: str | None
    key: str | None
    strip_prefix: str | None
    allow_nonfinite: bool
    allow_duplicates: bool
    output: PathLike | None
    dtype: str
    config_from: PathLike | None
    card: bool
    device: str
    threads: int | str | None
    accumulate: str
    tile_size: int | str | None
    max_memory: int | str | None
