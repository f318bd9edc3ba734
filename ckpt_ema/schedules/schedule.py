"""What a schedule is: a formula from the steps of checkpoints to decays, and its options."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Steps = Sequence[int]


class Limits(NamedTuple):
    """The values that an option may have."""

    hold_for: Callable[[float], bool]
    text: str  # completes "it must" in messages


SHARE = Limits(lambda x: 0 <= x <= 1, "lie between 0 and 1")
POSITIVE = Limits(lambda x: 0 < x < math.inf, "be above 0 and finite")


@dataclass(frozen=True, slots=True)
class ScheduleOption:
    """An option of one or several schedules, by the name it has in Python."""

    name: str
    help: str
    kind: type = float  # of each value: float, bool, or str for one of `choices`
    several: bool = False  # takes several values; each makes an average of its own
    default: Any = None
    choices: tuple[str, ...] = ()
    limits: Limits | None = None
    label: str = ""  # in the name of an average, where it is not the default; "{}" is the value
    short: str = ""  # a short flag


@dataclass(frozen=True, slots=True)
class Schedule:
    """One schedule: its formula, its options, and its name for people."""

    formula: Callable[..., list[float]] | None  # of steps and its options; None: a file has all
    text: str  # for people; "{}" is the value of `varies`, {unit} and {units} what the run counts
    varies: ScheduleOption | None = None  # each value makes an average of its own
    settings: tuple[ScheduleOption, ...] = ()
    counts_steps: bool = False  # training steps, not checkpoints
    label: str = ""  # in the names of averages; that of the schedule unless given
    is_implied: bool = False  # only selected by its option, never by --schedule
    # Whether further checkpoints leave the decays of those before them as they are.
    extends: bool = True

    @property
    def options(self) -> tuple[ScheduleOption, ...]:
        """All options that it takes."""
        return (*([self.varies] if self.varies else []), *self.settings)


# The decay of every schedule that has one decay for each checkpoint.
DECAY = ScheduleOption(
    "decay",
    "decay per checkpoint (dynamic: cap); default: 0.999",
    several=True,
    default=0.999,
    limits=SHARE,
    short="-d",
)
