"""Every schedule that can be asked for: its formula, its options, and what people call it.

A new schedule is a formula in `formulas`, an entry here, and a line in `options.Keywords` for each
new option, which gives it a type.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ckpt_ema.schedules import formulas
from ckpt_ema.schedules.formulas import MOST_SIGMA_REL, Steps
from ckpt_ema.schedules.option import ScheduleOption

DEFAULT_SCHEDULE = "dynamic"
EXPLICIT = "weights"  # the schedule whose weights a file gives

# Other names that people know.
SYNONYMS = {"ema": "dynamic", "swa": "uniform", "lawa": "uniform", "karras": "power"}


@dataclass(frozen=True, slots=True)
class Schedule:
    """One schedule: its formula and the options that it takes."""

    formula: Callable[..., list[float]] | None  # of steps and its options; None: a file has all
    text: str  # for people; "{}" is the value of `varies`, {unit} and {units} what the run counts
    varies: ScheduleOption | None = None  # each value makes an average of its own
    settings: tuple[ScheduleOption, ...] = ()
    counts_steps: bool = False  # training steps, not checkpoints
    label: str = ""  # in the names of averages; that of the schedule unless given

    @property
    def options(self) -> tuple[ScheduleOption, ...]:
        """All options that it takes."""
        return (*([self.varies] if self.varies else []), *self.settings)


def _is_share(x: float) -> bool:
    return 0 <= x <= 1


def _is_positive(x: float) -> bool:
    return 0 < x < math.inf


_BETWEEN_0_AND_1 = "lie between 0 and 1"
_POSITIVE = "be above 0 and finite"
_LEAST_SIGMA_REL = 1e-6  # far below, its exponent overflows

_DECAY = ScheduleOption(
    "decay",
    "decay per checkpoint (dynamic: cap); default: 0.999",
    several=True,
    default=0.999,
    is_valid=_is_share,
    limits=_BETWEEN_0_AND_1,
    short="-d",
)


def _dynamic(steps: Steps, decay: float, num_updates: str) -> list[float]:
    at_steps = num_updates == "step"
    return (formulas.dynamic_at_steps if at_steps else formulas.dynamic)(steps, decay)


def _constant(steps: Steps, decay: float, zero_debias: bool) -> list[float]:
    return (formulas.constant_debiased if zero_debias else formulas.constant)(steps, decay)


# What --schedule may name.
SCHEDULES = {
    "dynamic": Schedule(
        _dynamic,
        "dynamic, decay {}",
        _DECAY,
        (
            ScheduleOption(
                "num_updates",
                "counter for the dynamic decay: index or step",
                kind=str,
                default="index",
                choices=("index", "step"),
                label="at {}s",
            ),
        ),
    ),
    "constant": Schedule(
        _constant,
        "constant, decay {}",
        _DECAY,
        (
            ScheduleOption(
                "zero_debias",
                "start at zero and correct the bias, as Adam does",
                kind=bool,
                default=False,
                label="debiased",
            ),
        ),
    ),
    "uniform": Schedule(formulas.uniform, "uniform"),
    "linear": Schedule(formulas.linear, "linear"),
    "warmup": Schedule(
        formulas.warmup,
        "warmup, decay at most {}",
        _DECAY,
        (
            ScheduleOption(
                "power",
                "warmup exponent: decay 1 - (1 + n / inv_gamma)^-power",
                default=2 / 3,
                is_valid=_is_positive,
                limits=_POSITIVE,
                label="power {}",
            ),
            ScheduleOption(
                "inv_gamma",
                "warmup scale, see --power",
                default=1.0,
                is_valid=_is_positive,
                limits=_POSITIVE,
                label="inv gamma {}",
            ),
        ),
    ),
    "power": Schedule(
        formulas.power,
        "power function, sigma_rel {}",
        ScheduleOption(
            "sigma_rel",
            "relative width of Karras et al.'s power-function EMA",
            several=True,
            is_valid=lambda x: _LEAST_SIGMA_REL <= x < MOST_SIGMA_REL,
            limits=f"lie between {_LEAST_SIGMA_REL:g} and 1 / sqrt(12) = {MOST_SIGMA_REL:.6f}, the"
            " uniform mean",
        ),
        counts_steps=True,
        label="sigma-rel",
    ),
    "wsm-minus-sqrt": Schedule(
        partial(formulas.wsm, shape=formulas.minus_sqrt), "learning-rate decay 1 - sqrt(x)"
    ),
    "wsm-cosine": Schedule(
        partial(formulas.wsm, shape=formulas.cosine), "learning-rate decay (1 + cos(pi x)) / 2"
    ),
}
# What an option of its own selects.
_IMPLIED = {
    "per-step": Schedule(
        formulas.per_step,
        "decay {} per {unit}",
        ScheduleOption(
            "decay_per_step",
            "decay per training step",
            several=True,
            is_valid=_is_share,
            limits=_BETWEEN_0_AND_1,
        ),
        counts_steps=True,
    ),
    "half-life": Schedule(
        formulas.half_life,
        "half-life {} {units}",
        ScheduleOption(
            "half_life",
            "training steps in which a weight halves",
            several=True,
            is_valid=_is_positive,
            limits=_POSITIVE,
        ),
        counts_steps=True,
    ),
    EXPLICIT: Schedule(None, "explicit weights"),
}
ALL = {**SCHEDULES, **_IMPLIED}

# Every option of every schedule, by name.
OPTIONS = {option.name: option for schedule in ALL.values() for option in schedule.options}
