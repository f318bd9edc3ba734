"""From the options that a person gives to the schedules that they mean, each with its numbers.

Each value of an option that takes several is a rule of its own, and several such options add up.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_ema.errors import OptionError, flag, printable
from ckpt_ema.schedules.formulas import MOST_SIGMA_REL, Steps
from ckpt_ema.schedules.table import (
    ALIASES,
    ALL,
    DEFAULT_DECAY,
    DEFAULT_SCHEDULE,
    SCHEDULES,
    WEIGHTS,
)

_LEAST_SIGMA_REL = 1e-6  # far below, its exponent overflows
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "decay": (lambda x: 0 <= x <= 1, "lie between 0 and 1"),
    "decay_per_step": (lambda x: 0 <= x <= 1, "lie between 0 and 1"),
    "half_life": (lambda x: 0 < x < math.inf, "be above 0 and finite"),
    "sigma_rel": (
        lambda x: _LEAST_SIGMA_REL <= x < MOST_SIGMA_REL,
        f"lie between {_LEAST_SIGMA_REL:g} and 1 / sqrt(12) = {MOST_SIGMA_REL:.6f}, which is the"
        " uniform mean",
    ),
    "power": (lambda x: 0 < x < math.inf, "be above 0 and finite"),
    "inv_gamma": (lambda x: 0 < x < math.inf, "be above 0 and finite"),
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
        schedule = ALL[self.schedule]
        parts = [schedule.label or self.schedule]
        if schedule.varies:
            parts.append(short(self.numbers[schedule.varies]))
        return "-".join([*parts, *self._settings("-")])

    def told(self, units: str = "steps") -> str:
        """What people read; `units` is what the run counts, "steps" or "epochs".

        >>> Rule("half-life", {"half_life": 2000.0}).told()
        'half-life 2000 steps'
        >>> Rule("dynamic", {"decay": 0.999, "num_updates": "step"}).told()
        'dynamic, decay 0.999, at steps'
        """
        schedule = ALL[self.schedule]
        value = short(self.numbers[schedule.varies]) if schedule.varies else ""
        text = schedule.text.format(value, units=units, unit=units.removesuffix("s"))
        return ", ".join([text, *self._settings(" ")])

    @property
    def counts_steps(self) -> bool:
        """Whether the weights depend on the training steps of the checkpoints."""
        return ALL[self.schedule].counts_steps or self.numbers.get("num_updates") == "step"

    @property
    def asked_by(self) -> str:
        """The option that asks for it, as it is written on the command line."""
        varies = ALL[self.schedule].varies
        if varies and varies != "decay":
            return flag(varies)
        if self.numbers.get("num_updates") == "step":
            return "--num-updates step"
        return f"--schedule {self.schedule}"

    def decays(self, steps: Steps) -> list[float]:
        """The decays d_2 .. d_N for checkpoints at these steps, oldest first."""
        formula = ALL[self.schedule].formula
        assert formula is not None, "stated weights are no formula"
        return formula(steps, **self.numbers)

    def _settings(self, blank: str) -> list[str]:
        """The labels of what is not at its default, with `blank` between their words."""
        return [
            setting.label.replace(" ", blank).format(short(self.numbers[option]))
            for option, setting in ALL[self.schedule].settings.items()
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
            raise OptionError(f"{rule.told()} is asked for twice.")
    return tuple(rules)


def _chosen(schedule: str, given: Mapping[str, Any]) -> str:
    name = ALIASES.get(schedule, schedule)
    if name not in SCHEDULES:
        known = ", ".join([*SCHEDULES, *ALIASES])
        raise OptionError(f"--schedule is {printable(schedule)!r}; it must be one of {known}.")
    for option in given:
        if option not in ALL[name].options:
            homes = [name for name, other in SCHEDULES.items() if option in other.options]
            belongs = f"belongs to {' and '.join(homes)}" if homes else "is a schedule of its own"
            raise OptionError(
                f"--schedule {schedule} takes no {flag(option)}, which {belongs}.",
                "Leave out one of the two.",
            )
    varies = SCHEDULES[name].varies
    if varies is not None and varies != "decay" and varies not in given:
        raise OptionError(f"--schedule {schedule} needs {flag(varies)}, such as 0.1.")
    return name


def _implied(given: Mapping[str, Any]) -> list[str]:
    """The schedules that options select where none is named."""
    # The value of --decay goes to one schedule, which a setting of its own selects.
    of_decay = {
        name: setting
        for name, schedule in ALL.items()
        if schedule.varies == "decay"
        for setting in schedule.settings
        if setting in given
    }
    if len(of_decay) > 1:
        one, other = ((flag(setting), name) for name, setting in list(of_decay.items())[:2])
        raise OptionError(
            f"{one[0]} belongs to --schedule {one[1]} and {other[0]} to --schedule {other[1]}."
        )
    others = [
        name
        for name, schedule in ALL.items()
        if schedule.varies != "decay" and schedule.varies in given
    ]
    others += [WEIGHTS] * (WEIGHTS in given)
    if not of_decay and ("decay" in given or not others):
        return [DEFAULT_SCHEDULE, *others]
    return [*of_decay, *others]


def _rules_of(name: str, given: Mapping[str, Any]) -> list[Rule]:
    schedule = ALL[name]
    settings = {
        option: given.get(option, setting.default) for option, setting in schedule.settings.items()
    }
    if schedule.varies is None:
        return [Rule(name, settings)]
    values: Sequence[float] = given.get(schedule.varies, (DEFAULT_DECAY,))
    return [Rule(name, {schedule.varies: value, **settings}) for value in values]


def _check_range(option: str, given: Any) -> None:
    if option in _RANGES:
        is_within, range_text = _RANGES[option]
        for value in given if isinstance(given, Sequence) else [given]:
            if not is_within(value):  # NaN is within none
                raise OptionError(f"{flag(option)} is {short(value)}; it must {range_text}.")


def short(value: Any) -> str:
    """A number as briefly as it can be told without loss.

    >>> short(1000.0), short(0.9999999), short("step")
    ('1000', '0.9999999', 'step')
    """
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)
