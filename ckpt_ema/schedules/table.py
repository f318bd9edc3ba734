"""Every schedule that can be asked for: its formula, its options, and what people call it.

A new schedule is a formula and an entry here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from ckpt_ema.schedules import formulas
from ckpt_ema.schedules.formulas import Steps

DEFAULT_DECAY = 0.999
DEFAULT_SCHEDULE = "dynamic"
WEIGHTS = "weights"  # the rule whose weights a file states

# Other names that people know.
ALIASES = {"ema": "dynamic", "swa": "uniform", "lawa": "uniform", "karras": "power"}


class Setting(NamedTuple):
    """A further option of a schedule: what it is unless given, and how names tell it."""

    default: Any
    label: str  # "{}" stands for the value


@dataclass(frozen=True, slots=True)
class Schedule:
    """One schedule: its formula and the options that it takes."""

    formula: Callable[..., list[float]] | None  # of steps and its options; None: a file states all
    text: str  # for people; "{}" stands for the value of `varies`, units for what the run counts
    varies: str | None = None  # the option of which each value is an average of its own
    label: str = ""  # of the value of `varies`, in names
    settings: Mapping[str, Setting] = field(default_factory=dict)
    counts_steps: bool = False  # and not checkpoints

    @property
    def options(self) -> tuple[str, ...]:
        """All options that it takes."""
        return (*filter(None, [self.varies]), *self.settings)


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
        "decay",
        "dynamic",
        {"num_updates": Setting("index", "at {}s")},
    ),
    "constant": Schedule(
        _constant,
        "constant, decay {}",
        "decay",
        "constant",
        {"zero_debias": Setting(False, "debiased")},
    ),
    "uniform": Schedule(formulas.uniform, "uniform"),
    "linear": Schedule(formulas.linear, "linear"),
    "warmup": Schedule(
        formulas.warmup,
        "warmup, decay at most {}",
        "decay",
        "warmup",
        {"power": Setting(2 / 3, "power {}"), "inv_gamma": Setting(1.0, "inv gamma {}")},
    ),
    "power": Schedule(
        formulas.power, "power function, sigma_rel {}", "sigma_rel", "sigma-rel", counts_steps=True
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
        formulas.per_step, "decay {} per {unit}", "decay_per_step", "per-step", counts_steps=True
    ),
    "half-life": Schedule(
        formulas.half_life, "half-life {} {units}", "half_life", "half-life", counts_steps=True
    ),
    WEIGHTS: Schedule(None, "stated weights"),
}
ALL = {**SCHEDULES, **_IMPLIED}

# The options of which one may be given, or several that add up.
RULE_OPTIONS = (
    *("decay", "num_updates", "zero_debias", "power", "inv_gamma"),
    *("decay_per_step", "half_life", "sigma_rel", WEIGHTS),
)
