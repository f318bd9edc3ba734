"""What a caller may choose, checked as soon as it is chosen: the frozen `Options`."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt_ema.errors import OptionError
from ckpt_ema.schedules.formulas import SCHEDULES, decays

PathLike = str | os.PathLike[str]

# What --dtype calls the dtypes of safetensors; None is each tensor's own.
DTYPES = {"same": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# The values of the options that take one of a few; the first is the default.
CHOICES = {
    "schedule": SCHEDULES,
    "order": ("auto", "metadata", "name"),
    "weights": ("auto", "single", "sharded", "adapter"),
    "dtype": tuple(DTYPES),
    "accumulate": ("float64", "float32"),
}

# Extensions of models in other formats, which a folder would hardly be called by.
_NOT_WRITTEN = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".gguf")
_MOST = {"threads": 1024, "tile_elements": 1 << 28}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to average. Raises `OptionError` for a value that no average can have."""

    # The average.
    decay: float = 0.999
    schedule: str = "dynamic"
    allow_nonfinite: bool = False
    allow_duplicates: bool = False  # of one state under two steps
    # Which checkpoints, in which order.
    pattern: str | None = None  # a regular expression that the names of checkpoints must match
    order: str = "auto"
    append: Sequence[PathLike] = ()  # names in the run that go to the end
    aliases: bool = True  # whether `last`, `final` and the like are looked into
    skip_incomplete: bool = False
    # Which weights of a checkpoint.
    weights: str = "auto"
    component: str | None = None
    key: str | None = None  # the dotted path to the model in a torch file
    strip_prefix: str | None = None
    # The output.
    output: PathLike | None = None  # a folder or a .safetensors file; None: RUN-ema
    dtype: str = "same"
    config_from: PathLike | None = None
    # The engine.
    device: str = "auto"
    threads: int | None = None  # None: one for each core
    accumulate: str = "float64"
    # The shadow, its neighbours and what is read then stay in a core's share of the cache.
    tile_elements: int = 1 << 18

    def __post_init__(self) -> None:
        """Check every value by itself."""
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name, most in _MOST.items():
            number = getattr(self, name)
            if number is not None and not 1 <= number <= most:
                raise OptionError(f"{flag(name)} is {number}; it must lie between 1 and {most}.")
        decays(1, self.schedule, self.decay)
        for option in ("pattern", "component", "key", "strip_prefix"):
            value = getattr(self, option)
            if value is not None and not (isinstance(value, str) and value):
                raise OptionError(f"{flag(option)} is {value!r}; it must be a text.")
        if isinstance(self.append, str | os.PathLike):
            raise OptionError("append must be a list of names, not one name.")
        object.__setattr__(self, "append", tuple(self.append))
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


def flag(name: str) -> str:
    """What an option is called on the command line.

    >>> flag("skip_incomplete")
    '--skip-incomplete'
    """
    return "--" + name.replace("_", "-")


def _check_choice(name: str, choice: str, choices: Sequence[str]) -> None:
    if choice not in choices:
        raise OptionError(f"{flag(name)} is {choice!r}; it must be one of {', '.join(choices)}.")
