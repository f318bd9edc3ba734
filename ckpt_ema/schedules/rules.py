"""Every schedule by name, and rules: the schedules that options ask for, each with its numbers.

A new schedule is a formula and an entry in one of the modules imported here, and a type for each
new option in `options.Keywords`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_ema.errors import Code, OptionError, flag
from ckpt_ema.schedules import by_checkpoint, by_step, dynamic
from ckpt_ema.schedules.schedule import Schedule, Steps

DEFAULT = "dynamic"  # the schedule where options select none
EXPLICIT = "weights"  # the schedule whose weights a file gives
ALONE = "alone"  # one checkpoint, to compare averages with

# Other names that people know.
SYNONYMS = {"ema": "dynamic", "swa": "uniform", "lawa": "uniform", "karras": "power"}

ALL = {
    **dynamic.SCHEDULES,
    **by_checkpoint.SCHEDULES,
    **by_step.SCHEDULES,
    EXPLICIT: Schedule(None, "explicit weights", is_implied=True, extends=False),
    ALONE: Schedule(None, "no averaging", is_implied=True, extends=False),
}
# Those that --schedule may name.
SCHEDULES = {name: schedule for name, schedule in ALL.items() if not schedule.is_implied}

# Every option of every schedule, by name.
OPTIONS = {option.name: option for schedule in ALL.values() for option in schedule.options}


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to weight checkpoints: a schedule and its numbers, by the names of the options."""

    schedule: str
    numbers: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name in paths, such as half-life-2000.

        >>> Rule("constant", {"decay": 0.9, "zero_debias": True}).name
        'constant-0.9-debiased'
        """
        label = ALL[self.schedule].label or self.schedule
        return "-".join(filter(None, [label, self._value, *self._settings("-")]))

    def text(self, units: str = "steps") -> str:
        """Describe it to people; `units` is what the run counts, "steps" or "epochs".

        >>> Rule("half-life", {"half_life": 2000.0}).text()
        'half-life 2000 steps'
        >>> Rule("dynamic", {"decay": 0.999, "num_updates": "step"}).text()
        'dynamic, decay 0.999, at steps'
        """
        unit = units.removesuffix("s")
        text = ALL[self.schedule].text.format(self._value, units=units, unit=unit)
        return ", ".join([text, *self._settings(" ")])

    @property
    def counts_steps(self) -> bool:
        """Whether the weights depend on the training steps of the checkpoints."""
        return ALL[self.schedule].counts_steps or self.numbers.get("num_updates") == "step"

    @property
    def extends(self) -> bool:
        """Whether further checkpoints can be folded into its averages."""
        return ALL[self.schedule].extends

    @property
    def asked_by(self) -> str:
        """The option that selects it, as written on the command line."""
        varies = ALL[self.schedule].varies
        if self.schedule == EXPLICIT or (varies and varies.name != "decay"):
            return flag(varies.name if varies else EXPLICIT)
        if self.numbers.get("num_updates") == "step":
            return "--num-updates step"
        return f"--schedule {self.schedule}"

    def decays(self, steps: Steps) -> list[float]:
        """Return the decays d_2 .. d_N for checkpoints at these steps, oldest first."""
        formula = ALL[self.schedule].formula
        assert formula is not None, "explicit weights have no formula"
        return formula(steps, **self.numbers)

    @property
    def _value(self) -> str:
        """The value of the option that varies; empty if there is none."""
        varies = ALL[self.schedule].varies
        return short(self.numbers[varies.name]) if varies else ""

    def _settings(self, blank: str) -> list[str]:
        """Return the labels of settings not at their defaults, with `blank` between words."""
        return [
            setting.label.replace(" ", blank).format(short(self.numbers[setting.name]))
            for setting in ALL[self.schedule].settings
            if self.numbers[setting.name] != setting.default
        ]


def make_rules(schedule: str | None, given: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Return the rules that options ask for; `given` has the options of schedules that were given.

    Options that take several values have sequences. Raises `OptionError` for values out of range
    and for options that contradict each other.

    >>> [rule.name for rule in make_rules(None, {"half_life": [500, 1000]})]
    ['half-life-500', 'half-life-1000']
    """
    for name, value in given.items():
        _check_range(name, value)
    names = [_chosen(schedule, given)] if schedule is not None else _implied(given)
    rules = [rule for name in names for rule in _rules_of(name, given)]
    for rule in rules:
        if rules.count(rule) > 1:
            raise _conflict(f"{rule.text()} is requested twice.")
    return tuple(rules)


def _conflict(message: str) -> OptionError:
    return OptionError(message, code=Code.CONFLICTING_OPTIONS)


def _chosen(schedule: str, given: Mapping[str, Any]) -> str:
    """Check a schedule that was named against the options that go with it."""
    name = SYNONYMS.get(schedule, schedule)
    if name not in SCHEDULES:
        known = ", ".join([*SCHEDULES, *SYNONYMS])
        message = f"--schedule is {schedule!r}; it must be one of {known}."
        raise OptionError(message, code=Code.INVALID_OPTION)
    own = {option.name for option in SCHEDULES[name].options}
    for option in given:
        if option not in own:
            homes = [home for home, one in SCHEDULES.items() if OPTIONS.get(option) in one.options]
            belongs = f"belongs to {' and '.join(homes)}" if homes else "is a schedule of its own"
            raise _conflict(f"--schedule {schedule} takes no {flag(option)}, which {belongs}.")
    varies = SCHEDULES[name].varies
    if varies is not None and varies.default is None and varies.name not in given:
        raise _conflict(f"--schedule {schedule} needs {flag(varies.name)}, such as 0.1.")
    return name


def _implied(given: Mapping[str, Any]) -> list[str]:
    """Return the schedules that options select where none is named."""
    # The value of --decay goes to one schedule, which a setting of its own selects.
    of_decay = {
        name: setting.name
        for name, schedule in ALL.items()
        for setting in schedule.settings
        if setting.name in given
    }
    if len(of_decay) > 1:
        homes = [f"{flag(one)} belongs to --schedule {name}" for name, one in of_decay.items()]
        raise _conflict(f"{' and '.join(homes)}.")
    own = {one.varies.name: name for name, one in ALL.items() if one.varies}
    others = [own[option] for option in own if option != "decay" and option in given]
    others += [EXPLICIT] * (EXPLICIT in given)
    if not of_decay and ("decay" in given or not others):
        return [DEFAULT, *others]
    return [*of_decay, *others]


def _rules_of(name: str, given: Mapping[str, Any]) -> list[Rule]:
    schedule = ALL[name]
    settings = {one.name: given.get(one.name, one.default) for one in schedule.settings}
    varies = schedule.varies
    if varies is None:
        return [Rule(name, settings)]
    values: Sequence[float] = given.get(varies.name, (varies.default,))
    return [Rule(name, {varies.name: value, **settings}) for value in values]


def _check_range(name: str, given: Any) -> None:
    option = OPTIONS.get(name)
    if option is None or option.limits is None:
        return
    for value in given if option.several else [given]:
        if not option.limits.hold_for(value):
            message = f"{flag(name)} is {short(value)}; it must {option.limits.text}."
            raise OptionError(message, code=Code.INVALID_OPTION)


def short(value: Any) -> str:
    """Write a value as briefly as possible without loss.

    >>> short(1000.0), short(0.9999999), short("step")
    ('1000', '0.9999999', 'step')
    """
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)
