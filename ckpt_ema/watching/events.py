"""What a watch reports while it runs: one event for each thing that happens, none of them twice."""

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from ckpt_ema.errors import Code
from ckpt_ema.notices import Notice, refuse_warnings

# Warnings about weights change with every checkpoint, so the first of each code is enough.
_OF_WEIGHTS = (Code.FEW_CHECKPOINTS, Code.UNEVEN_WEIGHTS, Code.UNEVEN_GAPS)
# These do not hold for long: a watch begins with one checkpoint, and waits for complete ones.
_PASSING = (Code.FEW_CHECKPOINTS, Code.INCOMPLETE)


class Kind(Enum):
    """What happened."""

    STARTED = "started"
    WAITING = "waiting"  # for a checkpoint that is incomplete, or for the first one
    FOLDED = "folded"
    PUBLISHED = "published"
    LEFT_OUT = "left-out"  # a name that is no checkpoint of its own
    MISSED = "missed"  # a checkpoint was deleted before it was folded
    WARNING = "warning"
    RETRYING = "retrying"  # something failed that may work later


class Event(NamedTuple):
    """Something that happened: a line for people, and what programs ask for."""

    kind: Kind
    text: str
    checkpoints: tuple[str, ...] = ()  # by name


class Reporter:
    """Calls a function with events, and with what stays as it is only once."""

    def __init__(self, event: Callable[[Event], None], *, is_strict: bool) -> None:
        self._event, self._is_strict = event, is_strict
        self._said, self._said_once, self._codes = set[str](), set[str](), set[Code]()

    def tell(self, kind: Kind, text: str, checkpoints: Iterable[str] = ()) -> None:
        """Report an event; what was said once may be said again after it."""
        self._said.clear()
        self._event(Event(kind, text, tuple(checkpoints)))

    def say(self, kind: Kind, text: str, *checkpoints: str) -> None:
        """Report an event unless it was said since something else happened."""
        if text not in self._said:
            self._said.add(text)
            self._event(Event(kind, text, checkpoints))

    def say_once(self, kind: Kind, text: str, *checkpoints: str) -> None:
        """Report an event unless it was ever reported."""
        if text not in self._said_once:
            self._said_once.add(text)
            self._event(Event(kind, text, checkpoints))

    def warn(self, warnings: Sequence[Notice]) -> None:
        """Report each warning once; raises `RefusedError` if warnings are to be errors."""
        lasting = [one for one in warnings if one.code not in _PASSING]
        refuse_warnings(lasting if self._is_strict else ())
        for warning in lasting:
            if not (warning.code in _OF_WEIGHTS and warning.code in self._codes):
                self.say_once(Kind.WARNING, str(warning))
            self._codes.add(warning.code)
