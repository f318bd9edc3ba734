"""What a caller may choose, checked as soon as it is chosen: the frozen `Options`."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ckpt_ema.errors import OptionError, flag, printable
from ckpt_ema.schedules.rules import Rule, make_rules
from ckpt_ema.schedules.table import RULE_OPTIONS

PathLike = str | os.PathLike[str]
StepRange = tuple[int, int]  # first and last, both included

# What --dtype calls the dtypes of safetensors; None is each tensor's own.
DTYPES = {"same": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# The values of the options that take one of a few; the first is the default.
CHOICES = {
    "num_updates": ("index", "step"),
    "metric_mode": ("auto", "min", "max"),
    "order": ("auto", "metadata", "name"),
    "form": ("auto", "single", "sharded", "adapter"),
    "dtype": tuple(DTYPES),
    "accumulate": ("float64", "float32"),
}

# Extensions of models in other formats, which a folder would hardly be called by.
_NOT_WRITTEN = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".gguf")
_MOST = {"threads": 1024, "tile_size": 1 << 31}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(?:([kmgt])(i?b)?|b)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to average. Raises `OptionError` for a value that no average can have.

    Where an option takes several values, each makes an average of its own; they may be given as
    one value, as a sequence, or as a text with commas, and are brought to a tuple.
    """

    # The weights.
    schedule: str | None = None  # None: what the other options mean, or else dynamic
    decay: tuple[float, ...] | None = None
    num_updates: str | None = None
    zero_debias: bool = False
    power: float | None = None
    inv_gamma: float | None = None
    decay_per_step: tuple[float, ...] | None = None
    half_life: tuple[float, ...] | None = None
    sigma_rel: tuple[float, ...] | None = None
    weights: PathLike | Mapping[str, float] | None = None  # a file, or weights by name or step
    normalize: bool = False
    allow_nonfinite: bool = False
    allow_duplicates: bool = False  # of one state under two steps
    # Which checkpoints, in which order.
    last: tuple[int, ...] | None = None
    best: tuple[int, ...] | None = None
    metric: str | None = None
    metric_mode: str = "auto"
    from_step: int | None = None
    to_step: int | None = None
    steps: tuple[StepRange, ...] | None = None  # as a text: "100,200,1000-5000"
    every: int | None = None
    min_gap: int | None = None  # in steps
    include: Sequence[str] = ()  # patterns of whole names, as a shell has them
    exclude: Sequence[str] = ()
    pattern: str | None = None  # a regular expression that the names of checkpoints must match
    order: str = "auto"
    append: Sequence[PathLike] = ()  # names in the run that go to the end
    aliases: bool = True  # whether `last`, `final` and the like are looked into
    skip_incomplete: bool = False
    # Which weights of a checkpoint.
    form: str = "auto"
    component: str | None = None
    key: str | None = None  # the dotted path to the model in a torch file
    strip_prefix: str | None = None
    # The output.
    output: PathLike | None = None  # a folder or a .safetensors file; None: RUN-ema
    dtype: str = "same"
    config_from: PathLike | None = None
    card: bool = True  # whether folders get a README.md
    # The engine.
    device: str = "auto"
    threads: int | None = None  # None: one for each core
    accumulate: str = "float64"
    tile_size: int | None = None  # in bytes, or as "4MiB"; None: what a core's cache holds
    max_memory: int | None = None  # of the fold, and as much of an accelerator's; as `tile_size`

    def __post_init__(self) -> None:
        """Bring lists to one form and check every value by itself."""
        for name in ("decay", "decay_per_step", "half_life", "sigma_rel"):
            self._set(name, _several(name, getattr(self, name), float))
        for name in ("power", "inv_gamma"):
            self._set(name, _number(name, getattr(self, name), float))
        for name in ("last", "best"):
            self._set(name, _several(name, getattr(self, name), int))
        for name in ("from_step", "to_step", "every", "min_gap", "threads"):
            self._set(name, _number(name, getattr(self, name), int))
        for name in ("tile_size", "max_memory"):
            self._set(name, _size(name, getattr(self, name)))
        self._set("steps", _ranges(self.steps))
        for name in ("append", "include", "exclude"):
            self._set(name, _names(name, getattr(self, name)))
        for name, choices in CHOICES.items():
            if name != "num_updates" or self.num_updates is not None:  # it selects a schedule
                _check_choice(name, getattr(self, name), choices)
        for name, most in _MOST.items():
            _check_count(name, getattr(self, name), most)
        _check_count("max_memory", self.max_memory)
        self.rules()
        self._check_selection()
        self._check_paths()
        self._check_texts()

    def rules(self) -> tuple[Rule, ...]:
        """The schedules that are asked for, each with its numbers."""
        given = {name: getattr(self, name) for name in RULE_OPTIONS}
        return make_rules(
            self.schedule,
            {name: v for name, v in given.items() if v is not None and v is not False},
        )

    def given(self) -> dict[str, Any]:
        """What is not at its default, as plain values."""
        return {
            field.name: _plain(value)
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_selection(self) -> None:
        for name in ("last", "best", "every", "min_gap"):
            value = getattr(self, name)
            for count in value if isinstance(value, tuple) else (value,):
                _check_count(name, count)
        if (self.best is None) != (self.metric is None):
            raise OptionError("--best and --metric go together: --best 3 --metric eval_loss.")
        if self.metric is None and self.metric_mode != "auto":
            raise OptionError("--metric-mode goes with --best and --metric.")
        if self.normalize and self.weights is None:
            raise OptionError("--normalize goes with --weights.")
        first, last = self.from_step, self.to_step
        if first is not None and last is not None and first > last:
            raise OptionError(f"--from {self.from_step} is later than --to {self.to_step}.")

    def _check_paths(self) -> None:
        for option, others in (("output", ()), ("config_from", ()), ("weights", (Mapping,))):
            value = getattr(self, option)
            if value is not None and not isinstance(value, (str, os.PathLike, *others)):
                raise OptionError(f"{flag(option)} is {printable(value)!r}; it must be a path.")
            if value == "":
                raise OptionError(f"{flag(option)} is empty; it must be a path.")

    def _check_texts(self) -> None:
        for option in ("device", "pattern", "component", "key", "strip_prefix", "metric"):
            value = getattr(self, option)
            if value is not None and not (isinstance(value, str) and value):
                raise OptionError(f"{flag(option)} is {value!r}; it must be a text.")
        for name in [os.fspath(path) for path in self.append]:
            if os.path.basename(os.path.normpath(name)) in ("", ".", ".."):
                raise OptionError(f"--append {name!r} is no name in the run.")
        if self.output is not None and os.fspath(self.output).endswith(_NOT_WRITTEN):
            raise OptionError(
                f"--output {os.fspath(self.output)!r}: only .safetensors files and folders are"
                " written."
            )
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise OptionError(f"--pattern is no regular expression: {error}.") from error


def _plain(value: Any) -> Any:
    """An option's value as JSON knows it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): weight for key, weight in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _number(name: str, given: Any, kind: type[int] | type[float]) -> Any:
    """The value of an option that has one number, from a number or a text; None stays None."""
    try:
        return None if given is None else _converted(given, kind)
    except (TypeError, ValueError, OverflowError) as error:
        what = "a number" if kind is float else "a whole number"
        raise OptionError(f"{flag(name)} is {printable(given)!r}; it must be {what}.") from error


def _size(name: str, given: Any) -> int | None:
    """A number of bytes, from a number or a text.

    >>> _size("max_memory", "64MiB"), _size("max_memory", "1.5 MB"), _size("max_memory", "2k")
    (67108864, 1500000, 2048)
    """
    if not isinstance(given, str):
        return _number(name, given, int)  # type: ignore[no-any-return]
    match = _SIZE.fullmatch(given.strip())
    if not match:
        raise OptionError(f"{flag(name)} is {printable(given)!r}; it must be a size, as 64MiB is.")
    number, letter, rest = match.groups(default="")
    base = 1000 if rest.lower() == "b" else 1024
    return int(float(number) * base ** " kmgt".index(letter.lower() or " "))


def _several(name: str, given: Any, kind: type[int] | type[float]) -> tuple[Any, ...] | None:
    """The values of an option that may have several: a number, a list, or a text with commas."""
    if given is None:
        return None
    values = _listed(name, given)
    try:
        return tuple(_converted(value, kind) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        what = "numbers" if kind is float else "whole numbers"
        shown = printable(",".join(map(str, values)))
        raise OptionError(
            f"{flag(name)} is {shown!r}; it must be {what}, separated by commas."
        ) from error


def _converted(given: Any, kind: type[int] | type[float]) -> Any:
    number = kind(given)
    # 2.5 is no count, and True is none either.
    if isinstance(given, bool) or (kind is int and not isinstance(given, str) and number != given):
        raise ValueError
    return number


def _listed(name: str, given: Any) -> Sequence[Any]:
    """The values of an option: of a text with commas, of a list, or the one that there is."""
    values = given.split(",") if isinstance(given, str) else given
    values = values if isinstance(values, Sequence) else [values]
    if not values:
        raise OptionError(f"{flag(name)} has no value.")
    return values


def _ranges(given: Any) -> tuple[StepRange, ...] | None:
    """Steps and ranges of steps: "100,200,1000-5000" as ((100, 100), (200, 200), (1000, 5000))."""
    if given is None:
        return None
    found = []
    for part in _listed("steps", given):
        text = "-".join(map(str, part)) if isinstance(part, tuple) else str(part)
        match = re.fullmatch(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise OptionError(
                f"--steps has {printable(text)!r}; it takes steps and ranges, such as"
                " 100,200,1000-5000."
            )
        found.append((first, last))
    return tuple(found)


def _names(name: str, given: Any) -> tuple[Any, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise OptionError(f"{flag(name)} must be a list of names, not one name.")
    kind = str | os.PathLike if name == "append" else str
    if not all(isinstance(one, kind) for one in given):
        raise OptionError(f"{flag(name)} must be a list of names.")
    return tuple(given)


def _check_count(name: str, number: int | None, most: int | None = None) -> None:
    if number is not None and not 1 <= number <= (most or number):
        limits = f"lie between 1 and {most}" if most else "be at least 1"
        raise OptionError(f"{flag(name)} is {number}; it must {limits}.")


def _check_choice(name: str, choice: str | None, choices: Sequence[str]) -> None:
    if choice not in choices:
        raise OptionError(
            f"{flag(name)} is {printable(choice)!r}; it must be one of {', '.join(choices)}."
        )
