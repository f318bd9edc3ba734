"""One option of a schedule: its values, its default, and what it is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ScheduleOption:
    """An option of one or several schedules, by the name it has in Python.

    With `several`, each value makes an average of its own.
    """

    name: str
    help: str
    kind: type = float  # of each value: float, bool, or str for one of `choices`
    several: bool = False
    default: Any = None
    choices: tuple[str, ...] = ()
    is_valid: Callable[[float], bool] = lambda _: True
    limits: str = ""  # what a value must do, for messages
    label: str = ""  # in the name of an average, where it is not the default; "{}" is the value
    short: str = ""  # a short flag
