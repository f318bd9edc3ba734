"""The values that options take: what a person or a program writes, parsed to one form."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ckpt_ema.errors import Code, OptionError, flag

# Extensions of files that are not written; nobody gives them to a folder.
_NOT_WRITTEN = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".gguf")
_MOST_THREADS, _MOST_TILE_BYTES = 1024, 1 << 31
_SECONDS_OF = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_TIME = re.compile(rf"([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?)\s*({'|'.join(_SECONDS_OF)})?")
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(?:([kmgt])(i?b)?|b)?", re.IGNORECASE)


class Values(NamedTuple):
    """One kind of values; a command line gives them as text."""

    parse: Callable[[Any], Any]  # raises ValueError, TypeError or OverflowError for any other
    must: str  # completes "it must" in messages
    metavar: str = ""
    choices: tuple[str, ...] = ()

    def parsed(self, name: str, given: Any) -> Any:
        """Return the value of the option `name`; raises `OptionError` for an impossible one."""
        try:
            return self.parse(given)
        except (TypeError, ValueError, OverflowError, re.error) as error:
            shown = ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
            message = f"{flag(name)} is {shown!r}; it must {self.must}."
            raise OptionError(message, code=Code.INVALID_OPTION) from error


def _text(given: Any) -> str:
    if not isinstance(given, str) or not given:
        raise TypeError
    return given


def _path(given: Any) -> str:
    return _text(os.fspath(given))


def _output(given: Any) -> str:
    if _path(given).endswith(_NOT_WRITTEN):
        raise ValueError
    return _path(given)


def _names(given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError
    return tuple(map(_path, given))


def _entries(given: Any) -> tuple[str, ...]:
    if any(os.path.basename(os.path.normpath(name)) in ("", ".", "..") for name in _names(given)):
        raise ValueError
    return _names(given)


def choice(*choices: str) -> Values:
    """Return the values of an option that takes one of a few words."""

    def parse(given: Any) -> str:
        if given not in choices:
            raise ValueError
        return str(given)

    return Values(parse, f"be one of {', '.join(choices)}", choices=choices)


def _number(kind: type[int] | type[float]) -> Callable[[Any], Any]:
    def parse(given: Any) -> Any:
        number = kind(given)
        # Neither 2.5 nor True is a count.
        is_cut = kind is int and not isinstance(given, str) and number != given
        if isinstance(given, bool) or is_cut:
            raise ValueError
        return number

    return parse


def _count(given: Any, most: float = float("inf")) -> int:
    number: int = _number(int)(given)
    if not 1 <= number <= most:
        raise ValueError
    return number


def _size(given: Any, most: float = float("inf")) -> int:
    """Parse a number of bytes, from a number or a text.

    >>> _size("64MiB"), _size("1.5 MB"), _size("2k")
    (67108864, 1500000, 2048)
    """
    if not isinstance(given, str):
        return _count(given, most)
    match = _SIZE.fullmatch(given.strip())
    if not match:
        raise ValueError
    number, letter, rest = match.groups(default="")
    base = 1000 if rest.lower() == "b" else 1024
    return _count(int(float(number) * base ** " kmgt".index(letter.lower() or " ")), most)


def _several(parse: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """Parse one value, a sequence of values, or a text with commas."""

    def parse_all(given: Any) -> tuple[Any, ...]:
        values = given.split(",") if isinstance(given, str) else given
        if not isinstance(values, Sequence):
            values = [values]
        if not values:
            raise ValueError
        return tuple(map(parse, values))

    return parse_all


def _step_range(given: Any) -> tuple[int, int]:
    """Parse one step or a range of steps.

    >>> _step_range("100"), _step_range("1000-5000"), _step_range((200, 300))
    ((100, 100), (1000, 5000), (200, 300))
    """
    text = "-".join(map(str, given)) if isinstance(given, tuple) else str(given)
    match = re.fullmatch(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?", text)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ValueError
    return int(match[1]), int(match[2] or match[1])


def _seconds(given: Any) -> float:
    """Parse a time, from a number of seconds or a text.

    >>> _seconds("90"), _seconds("1.5 min"), _seconds("2h")
    (90.0, 90.0, 7200.0)
    """
    match = _TIME.fullmatch(str(given).strip())
    if not match:
        raise ValueError
    return float(match[1]) * _SECONDS_OF[match[2] or "s"]


def _share(given: Any) -> float:
    """Parse a share above 0, as a number or in percent.

    >>> _share("1%"), _share("0.5"), _share(1)
    (0.01, 0.5, 1.0)
    """
    text = str(given).strip()
    number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < number <= 1:
        raise ValueError
    return number


def _lapse(given: Any) -> float:
    if not _seconds(given):
        raise ValueError
    return _seconds(given)


TEXT = Values(_text, "be a text")
PATH = Values(_path, "be a path", "PATH")
OUTPUT = Values(_output, "be a folder or a .safetensors file", "PATH")
WEIGHTS = Values(lambda one: one if isinstance(one, Mapping) else _path(one), "be a path", "FILE")
COMMAND = Values(_text, "be a command for the shell", "COMMAND")
PART = Values(_text, "be a part, such as 3/64", "I/N")
REGEX = Values(lambda given: re.compile(_text(given)).pattern, "be a regular expression", "REGEX")
GLOBS = Values(_names, "be a list of globs", "GLOB")
ENTRIES = Values(_entries, "be a list of names of entries of the run", "NAME")
FLAG = Values(bool, "be true or false")
NUMBER = Values(_number(float), "be a number", "X")
NUMBERS = Values(_several(_number(float)), "be numbers, separated by commas", "X,...")
COUNT = Values(_count, "be a whole number of at least 1", "N")
COUNTS = Values(_several(_count), "be whole numbers of at least 1, separated by commas", "N,...")
THREADS = Values(
    lambda given: _count(given, _MOST_THREADS), f"be a number between 1 and {_MOST_THREADS}", "N"
)
STEP = Values(_number(int), "be a whole number", "STEP")
STEPS = Values(
    _several(_step_range), "be steps and ranges of steps, such as 100,200,1000-5000", "STEPS"
)
SIZE = Values(_size, "be a size, such as 64MiB", "SIZE")
TILE = Values(
    lambda given: _size(given, _MOST_TILE_BYTES), "be a size of at most 2GiB, such as 4MiB", "SIZE"
)
LAPSE = Values(_lapse, "be a time of more than 0 s, such as 10s", "TIME")
TIME = Values(_seconds, "be a time, such as 30s, 10min or 2h", "TIME")
SHARE = Values(_share, "be a share, such as 1% or 0.5", "SHARE")
ACCUMULATE = choice("float64", "float32")._replace(metavar="DTYPE")
FORM, ORDER = choice("auto", "single", "sharded", "adapter"), choice("auto", "metadata", "name")
WHICH = choice("raw", "ema")
METRIC_MODE = choice("auto", "min", "max")
