"""From the options that a person gives to the schedules that they mean, each with its numbers.

Each value of an option that takes several is a rule of its own, and several such options add up.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from ckpt_ema.errors import OptionError, flag, printable
from ckpt_ema.schedules import formulas
from ckpt_ema.schedules.formulas import MOST_SIGMA_REL, Steps

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
    text: str  # for people; "{}" stands for the value of `varies`
    varies: str | None = None  # the option of which each value is an average of its own
    label: str = ""  # of the value of `varies`, in names
    settings: Mapping[str, Setting] = field(default_factory=dict)
    counts_steps: bool = False  # and not checkpoints


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
        {"num_updates": Setting("index", "at-{}s")},
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
        {"power": Setting(2 / 3, "power-{}"), "inv_gamma": Setting(1.0, "inv-gamma-{}")},
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
        formulas.per_step, "decay {} per step", "decay_per_step", "per-step", counts_steps=True
    ),
    "half-life": Schedule(
        formulas.half_life, "half-life {} steps", "half_life", "half-life", counts_steps=True
    ),
    WEIGHTS: Schedule(None, "stated weights"),
}
_ALL = {**SCHEDULES, **_IMPLIED}
# In which one of the schedules whose value is --decay must be meant.
_OF_DECAY = [name for name, schedule in SCHEDULES.items() if schedule.varies == "decay"]

# The options of which one may be given, or several that add up.
RULE_OPTIONS = (
    *("decay", "num_updates", "zero_debias", "power", "inv_gamma"),
    *("decay_per_step", "half_life", "sigma_rel", WEIGHTS),
)

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "decay": (lambda x: 0 <= x <= 1, "lie between 0 and 1"),
    "decay_per_step": (lambda x: 0 <= x <= 1, "lie between 0 and 1"),
    "half_life": (lambda x: 0 < x < math.inf, "be above 0"),
    "sigma_rel": (
        lambda x: 0 < x < MOST_SIGMA_REL,
        f"lie between 0 and {MOST_SIGMA_REL:.4f}, which is the uniform mean",
    ),
    "power": (lambda x: 0 < x < math.inf, "be above 0"),
    "inv_gamma": (lambda x: 0 < x < math.inf, "be above 0"),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to weight checkpoints: a schedule and its numbers, by the names of the options."""

    schedule: str
    numbers: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What an output is called by, such as half-life-2000.

        >>> Rule("constant", {"decay": 0.9, "zero_debias": True}).name
        'constant-0.9-debiased'
        """
        schedule = _ALL[self.schedule]
        parts = [schedule.label or self.schedule]
        if schedule.varies:
            parts.append(_short(self.numbers[schedule.varies]))
        return "-".join([*parts, *self._settings()])

    @property
    def text(self) -> str:
        """What people read, such as "half-life 2000 steps".

        >>> Rule("dynamic", {"decay": 0.999, "num_updates": "step"}).text
        'dynamic, decay 0.999, at steps'
        """
        schedule = _ALL[self.schedule]
        value = _short(self.numbers[schedule.varies]) if schedule.varies else ""
        settings = [label.replace("-", " ") for label in self._settings()]
        return ", ".join([schedule.text.format(value), *settings])

    @property
    def counts_steps(self) -> bool:
        """Whether the weights depend on the training steps of the checkpoints."""
        return _ALL[self.schedule].counts_steps or self.numbers.get("num_updates") == "step"

    @property
    def asked_by(self) -> str:
        """The option that asks for it, as it is written on the command line."""
        varies = _ALL[self.schedule].varies
        if varies and varies != "decay":
            return flag(varies)
        if self.numbers.get("num_updates") == "step":
            return "--num-updates step"
        return f"--schedule {self.schedule}"

    def decays(self, steps: Steps) -> list[float]:
        """The decays d_2 .. d_N for checkpoints at these steps, oldest first."""
        formula = _ALL[self.schedule].formula
        assert formula is not None, "stated weights are no formula"
        return formula(steps, **self.numbers)

    def _settings(self) -> list[str]:
        """The labels of what is not at its default."""
        return [
            setting.label.format(_short(self.numbers[option]))
            for option, setting in _ALL[self.schedule].settings.items()
            if self.numbers[option] != setting.default
        ]


def make_rules(schedule: str | None, given: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules that options mean; `given` are those of RULE_OPTIONS that were given.

    `schedule` is None unless it was given too. Options of which each value is a rule of its own
    are sequences. Raises `OptionError` for values out of range and for options that contradict
    each other.

    >>> [rule.name for rule in make_rules(None, {"half_life": [500, 1000]})]
    ['half-life-500', 'half-life-1000']
    """
    for option, value in given.items():
        _check_range(option, value)
    names = [_chosen(schedule, given)] if schedule is not None else _implied(given)
    rules = [rule for name in names for rule in _rules_of(name, given)]
    for rule in rules:
        if rules.count(rule) > 1:
            raise OptionError(f"{rule.text} is asked for twice.")
    return tuple(rules)


def _chosen(schedule: str, given: Mapping[str, Any]) -> str:
    name = ALIASES.get(schedule, schedule)
    if name not in SCHEDULES:
        known = ", ".join([*SCHEDULES, *ALIASES])
        raise OptionError(f"--schedule is {printable(schedule)!r}; it must be one of {known}.")
    takes = _options_of(name)
    for option in given:
        if option not in takes:
            homes = [other for other in _ALL if option in _options_of(other)]
            raise OptionError(
                f"--schedule {schedule} takes no {flag(option)}, which belongs to"
                f" {' and '.join(homes)}.",
                "Leave out one of the two.",
            )
    varies = SCHEDULES[name].varies
    if varies is not None and varies != "decay" and varies not in given:
        raise OptionError(f"--schedule {schedule} needs {flag(varies)}, such as 0.1.")
    return name


def _implied(given: Mapping[str, Any]) -> list[str]:
    """The schedules that options select where none is named."""
    by_settings = {
        name: [option for option in schedule.settings if option in given]
        for name, schedule in _ALL.items()
    }
    of_decay = [name for name in _OF_DECAY if by_settings[name]]
    if len(of_decay) > 1:
        first, second = (flag(by_settings[name][0]) for name in of_decay[:2])
        raise OptionError(
            f"{first} belongs to --schedule {of_decay[0]} and {second} to --schedule {of_decay[1]}."
        )
    others = [
        name
        for name, schedule in _ALL.items()
        if name not in _OF_DECAY and schedule.varies in given
    ]
    others += [WEIGHTS] * (WEIGHTS in given)
    if not of_decay and ("decay" in given or not others):
        of_decay = [DEFAULT_SCHEDULE]
    return of_decay + others


def _rules_of(name: str, given: Mapping[str, Any]) -> list[Rule]:
    schedule = _ALL[name]
    settings = {
        option: given.get(option, setting.default) for option, setting in schedule.settings.items()
    }
    if schedule.varies is None:
        return [Rule(name, settings)]
    values: Sequence[float] = given.get(schedule.varies, (DEFAULT_DECAY,))
    return [Rule(name, {schedule.varies: value, **settings}) for value in values]


def _options_of(name: str) -> set[str]:
    schedule = _ALL[name]
    return {schedule.varies or name, *schedule.settings}


def _check_range(option: str, given: Any) -> None:
    if option in _RANGES:
        is_within, range_text = _RANGES[option]
        for value in given if isinstance(given, Sequence) else [given]:
            if not is_within(value):  # NaN is within none
                raise OptionError(f"{flag(option)} is {_short(value)}; it must {range_text}.")


def _short(value: Any) -> str:
    """A number as briefly as it can be told without loss.

    >>> _short(1000.0), _short(0.9999999), _short("step")
    ('1000', '0.9999999', 'step')
    """
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)
