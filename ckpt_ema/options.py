"""The one table of options: five frozen groups, of which each stage takes its own.

A row gives an option its name, the values it takes, its default, its help and its panel on the
command line, and says whether it changes the bytes of the output. The command line, environment
variables, typed keywords, manifests and fingerprints are made from these rows. The options of
schedules stand beside their formulas, in `schedules.table`.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypedDict

from ckpt_ema.errors import Code, OptionError, flag
from ckpt_ema.schedules.rules import Rule, make_rules
from ckpt_ema.schedules.table import DEFAULT_SCHEDULE, EXPLICIT, OPTIONS, SCHEDULES, SYNONYMS

PathLike = str | os.PathLike[str]
StepRange = tuple[int, int]  # first and last, both included

# What --dtype calls the dtypes of safetensors; None is each tensor's own.
DTYPES = {"same": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# Extensions of other formats, which nobody would call a folder by.
_NOT_WRITTEN = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".gguf")

# Panels of the command line's help, in the order in which they are shown.
COMMON, SCHEDULE, CHECKPOINTS = "Most used", "Schedule", "Which checkpoints"
MODEL, OUTPUT, ENGINE = "Which model in a checkpoint", "Output", "Execution"


# --- The values of options ------------------------------------------------------------------------


class Values(NamedTuple):
    """The values that an option takes."""

    parse: Callable[[Any], Any]  # raises ValueError, TypeError or OverflowError for any other
    must: str  # what a value must do, for messages
    words: Any = str  # what the command line makes of the words given
    metavar: str | None = None
    choices: tuple[str, ...] = ()


def _number(kind: type[int] | type[float]) -> Callable[[Any], Any]:
    def parse(given: Any) -> Any:
        number = kind(given)
        # 2.5 is no count, and True is none either.
        is_cut = kind is int and not isinstance(given, str) and number != given
        if isinstance(given, bool) or is_cut:
            raise ValueError
        return number

    return parse


def _several(parse: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """Parse one value, a sequence of values, or a text with commas."""
    return lambda given: tuple(parse(value) for value in _listed(given))


def _listed(given: Any) -> Sequence[Any]:
    values = given.split(",") if isinstance(given, str) else given
    values = values if isinstance(values, Sequence) else [values]
    if not values:
        raise ValueError
    return values


def _count(given: Any) -> int:
    number: int = _number(int)(given)
    if number < 1:
        raise ValueError
    return number


_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(?:([kmgt])(i?b)?|b)?", re.IGNORECASE)


def _size(given: Any) -> int:
    """Parse a number of bytes, from a number or a text.

    >>> _size("64MiB"), _size("1.5 MB"), _size("2k")
    (67108864, 1500000, 2048)
    """
    if not isinstance(given, str):
        return _count(given)
    match = _SIZE.fullmatch(given.strip())
    if not match:
        raise ValueError
    number, letter, rest = match.groups(default="")
    base = 1000 if rest.lower() == "b" else 1024
    return _count(int(float(number) * base ** " kmgt".index(letter.lower() or " ")))


def _step_ranges(given: Any) -> tuple[StepRange, ...]:
    """Parse steps and ranges of steps.

    >>> _step_ranges("100,1000-5000")
    ((100, 100), (1000, 5000))
    """
    found = []
    for part in _listed(given):
        text = "-".join(map(str, part)) if isinstance(part, tuple) else str(part)
        match = re.fullmatch(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?", text)
        if not match or int(match[1]) > int(match[2] or match[1]):
            raise ValueError
        found.append((int(match[1]), int(match[2] or match[1])))
    return tuple(found)


def _names(given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError
    return tuple(_text(os.fspath(one)) for one in given)


def _text(given: Any) -> str:
    if not isinstance(given, str) or not given:
        raise TypeError
    return given


def _path(given: Any) -> str:
    return _text(os.fspath(given))


def _regex(given: Any) -> str:
    try:
        re.compile(_text(given))
    except re.error as error:
        raise ValueError from error
    return str(given)


def _flag(given: Any) -> bool:
    return bool(given)


def _limited(parse: Callable[[Any], int], most: int) -> Callable[[Any], int]:
    def parsed(given: Any) -> int:
        number = parse(given)
        if number > most:
            raise ValueError
        return number

    return parsed


def _choice(*choices: str) -> Values:
    def parse(given: Any) -> str:
        if given not in choices:
            raise ValueError
        return str(given)

    return Values(parse, f"be one of {', '.join(choices)}", choices=choices)


_MOST_THREADS, _MOST_TILE_BYTES = 1024, 1 << 31
TEXT = Values(_text, "be a text")
REGEX = Values(_regex, "be a regular expression", metavar="REGEX")
PATH = Values(_path, "be a path")
NAMES = Values(_names, "be a list of names", list[str])
FLAG = Values(_flag, "be true or false", bool)
NUMBER = Values(_number(float), "be a number", float)
NUMBERS = Values(_several(_number(float)), "be numbers, separated by commas", metavar="X[,X...]")
STEP = Values(_number(int), "be a whole number", int, "STEP")
STEPS = Values(_step_ranges, "be steps and ranges, such as 100,200,1000-5000", metavar="STEPS")
COUNT = Values(_count, "be a whole number of at least 1", int)
COUNTS = Values(
    _several(_count), "be whole numbers of at least 1, separated by commas", metavar="N[,N...]"
)
THREADS = Values(
    _limited(_count, _MOST_THREADS), f"be a whole number between 1 and {_MOST_THREADS}", int, "N"
)
SIZE = Values(_size, "be a size, such as 64MiB", metavar="SIZE")
TILE = Values(
    _limited(_size, _MOST_TILE_BYTES), "be a size of at most 2GiB, such as 4MiB", metavar="SIZE"
)


def _parsed(name: str, given: Any, values: Values) -> Any:
    try:
        return values.parse(given)
    except (TypeError, ValueError, OverflowError) as error:
        shown = ",".join(map(str, given)) if isinstance(given, list | tuple) else given
        raise OptionError(
            f"{flag(name)} is {str(shown)!r}; it must {values.must}.", code=Code.INVALID_OPTION
        ) from error


# --- The table ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One option. Its default is None, or that of its field."""

    name: str
    values: Values
    help: str
    panel: str
    default: Any = None
    changes_bytes: bool = False  # of the output, for the same checkpoints and weights
    short: str = ""  # a short flag
    metavar: str | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        """What it is called on the command line."""
        long = flag(self.name)
        if self.values.words is bool and self.default:
            return (f"{long}/--no-{long[2:]}",)
        return (long, self.short) if self.short else (long,)


def _row(
    values: Values,
    help_text: str,
    panel: str,
    default: Any = None,
    *,
    changes_bytes: bool = False,
    short: str = "",
    metavar: str | None = None,
) -> Any:
    about = (values, help_text, panel, default, changes_bytes, short, metavar)
    return field(default=default, metadata={"row": about})


def _parse_rows(group: Any) -> None:
    """Bring every option of a group to its one form."""
    for row in rows_of(type(group)):
        value = getattr(group, row.name)
        if value != row.default or row.values.choices:
            object.__setattr__(group, row.name, _parsed(row.name, value, row.values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting:
    """How checkpoints are weighted: a schedule with its options, or explicit weights."""

    schedule: str | None = _row(
        TEXT,
        f"{', '.join(SCHEDULES)}; or {', '.join(SYNONYMS)}; default: inferred from the other"
        f" options, else {DEFAULT_SCHEDULE}",
        SCHEDULE,
        metavar="NAME",
    )
    weights: PathLike | Mapping[str, float] | None = _row(
        PATH, "file of explicit weights by checkpoint name or step", SCHEDULE, metavar="FILE"
    )
    normalize: bool = _row(FLAG, "divide the weights of --weights by their sum", SCHEDULE, False)
    options: Mapping[str, Any] = field(default_factory=dict)  # of schedules, those that were given
    rules: tuple[Rule, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Parse every value and find the rules that they ask for."""
        if not isinstance(self.weights, Mapping):
            _parse_rows(self)
        parsed = {
            name: _parsed(name, value, schedule_values(name))
            for name, value in self.options.items()
            if value is not None and value is not False
        }
        object.__setattr__(self, "options", parsed)
        given = {**parsed, **({EXPLICIT: self.weights} if self.weights is not None else {})}
        object.__setattr__(self, "rules", make_rules(self.schedule, given))
        if self.normalize and self.weights is None:
            raise OptionError("--normalize goes with --weights.", code=Code.CONFLICTING_OPTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which checkpoints take part, and in which order."""

    last: tuple[int, ...] | None = _row(COUNTS, "take the N newest checkpoints", COMMON)
    best: tuple[int, ...] | None = _row(
        COUNTS, "take the N best by --metric; ties go to the later checkpoint", CHECKPOINTS
    )
    metric: str | None = _row(
        TEXT, "metric used by --best, such as eval_loss", CHECKPOINTS, metavar="NAME"
    )
    metric_mode: str = _row(
        _choice("auto", "min", "max"),
        "whether a low or a high metric is better",
        CHECKPOINTS,
        "auto",
    )
    from_step: int | None = _row(STEP, "take this step and later ones", CHECKPOINTS)
    to_step: int | None = _row(STEP, "take this step and earlier ones", CHECKPOINTS)
    steps: tuple[StepRange, ...] | None = _row(
        STEPS, "take these steps: 100,200 or ranges, 1000-5000", CHECKPOINTS
    )
    every: int | None = _row(
        COUNT, "take every N-th, counted back from the newest", CHECKPOINTS, metavar="N"
    )
    min_gap: int | None = _row(
        COUNT, "take checkpoints at least this many steps apart", CHECKPOINTS, metavar="STEPS"
    )
    include: tuple[str, ...] = _row(
        NAMES, "take only names matching this glob; repeatable", CHECKPOINTS, (), metavar="GLOB"
    )
    exclude: tuple[str, ...] = _row(
        NAMES, "leave out names matching this glob; repeatable", CHECKPOINTS, (), metavar="GLOB"
    )
    pattern: str | None = _row(
        REGEX, "take only names matching this regex; its group, if any, is the step", CHECKPOINTS
    )
    order: str = _row(
        _choice("auto", "metadata", "name"),
        "which step to trust when name and contents disagree",
        CHECKPOINTS,
        "auto",
    )
    append: tuple[str, ...] = _row(
        NAMES, "add this entry after the last step; repeatable", CHECKPOINTS, (), metavar="NAME"
    )
    aliases: bool = _row(
        FLAG, "look into last, final and the like for a later step", CHECKPOINTS, True
    )
    skip_incomplete: bool = _row(
        FLAG, "leave out incomplete checkpoints instead of refusing the run", CHECKPOINTS, False
    )

    def __post_init__(self) -> None:
        """Parse every value and refuse contradictions."""
        _parse_rows(self)
        if (self.best is None) != (self.metric is None):
            raise OptionError(
                "--best and --metric go together: --best 3 --metric eval_loss.",
                code=Code.CONFLICTING_OPTIONS,
            )
        if self.metric is None and self.metric_mode != "auto":
            raise OptionError(
                "--metric-mode goes with --best and --metric.", code=Code.CONFLICTING_OPTIONS
            )
        first, last = self.from_step, self.to_step
        if first is not None and last is not None and first > last:
            raise OptionError(
                f"--from {first} is later than --to {last}.", code=Code.CONFLICTING_OPTIONS
            )
        for name in self.append:
            if os.path.basename(os.path.normpath(name)) in ("", ".", ".."):
                raise OptionError(
                    f"--append {name!r} is not the name of an entry of the run.",
                    code=Code.INVALID_OPTION,
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is read from a checkpoint: which of its models, and which values are accepted."""

    form: str = _row(
        _choice("auto", "single", "sharded", "adapter"),
        "which to take of a single file, shards and an adapter",
        MODEL,
        "auto",
    )
    component: str | None = _row(
        TEXT, "average only this folder of each checkpoint, such as unet", MODEL, metavar="NAME"
    )
    key: str | None = _row(
        TEXT,
        "where the model is in a torch file, such as state_dict",
        MODEL,
        changes_bytes=True,
        metavar="PATH",
    )
    strip_prefix: str | None = _row(
        TEXT,
        "remove this from the front of tensor names",
        MODEL,
        changes_bytes=True,
        metavar="PREFIX",
    )
    allow_nonfinite: bool = _row(
        FLAG, "average NaN and infinity instead of refusing them", MODEL, False, changes_bytes=True
    )
    allow_duplicates: bool = _row(
        FLAG, "average steps that hold the same values instead of refusing them", MODEL, False
    )

    def __post_init__(self) -> None:
        """Parse every value."""
        _parse_rows(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is written, and where."""

    output: str | None = _row(
        PATH, "folder or .safetensors file to write; default: RUN-ema", COMMON, short="-o"
    )
    dtype: str = _row(
        _choice(*DTYPES), "dtype of averaged tensors", OUTPUT, "same", changes_bytes=True
    )
    config_from: str | None = _row(
        PATH, "model folder to take the configuration from", OUTPUT, metavar="FOLDER"
    )
    card: bool = _row(FLAG, "write a model card, README.md", OUTPUT, True, changes_bytes=True)

    def __post_init__(self) -> None:
        """Parse every value and refuse a file of a format that is not written."""
        _parse_rows(self)
        if self.output is not None and self.output.endswith(_NOT_WRITTEN):
            raise OptionError(
                f"--output {self.output!r}: only folders and .safetensors files are written.",
                code=Code.INVALID_OPTION,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How the work is done; the result does not depend on it, but for `accumulate`."""

    device: str = _row(TEXT, "auto, cpu, cuda, cuda:1, mps or xpu", ENGINE, "auto")
    threads: int | None = _row(THREADS, "threads that read and fold; default: one per core", ENGINE)
    accumulate: str = _row(
        _choice("float64", "float32"),
        "precision of the fold; float32 is faster and not exact",
        ENGINE,
        "float64",
        changes_bytes=True,
    )
    tile_size: int | None = _row(TILE, "how much of a checkpoint a thread reads at a time", ENGINE)
    max_memory: int | None = _row(SIZE, "limit on the working memory of the fold", ENGINE)

    def __post_init__(self) -> None:
        """Parse every value."""
        _parse_rows(self)


Group = type[Weighting] | type[Selection] | type[Reading] | type[Output] | type[Engine]


class Options(NamedTuple):
    """All that was chosen for one call, for the place where the stages are called."""

    weighting: Weighting
    selection: Selection
    reading: Reading
    output: Output
    engine: Engine

    def given(self) -> dict[str, Any]:
        """Return what is not at its default, as plain values for JSON."""
        chosen = {
            row.name: value
            for group in self
            for row in rows_of(type(group))
            if (value := getattr(group, row.name)) != row.default
        }
        return {name: _plain(value) for name, value in {**chosen, **self.weighting.options}.items()}

    def deciding(self) -> dict[str, Any]:
        """Return the options that change the output's bytes, of the same checkpoints."""
        return {
            row.name: getattr(group, row.name)
            for group in self
            for row in rows_of(type(group))
            if row.changes_bytes
        }


def make_options(given: Mapping[str, Any]) -> Options:
    """Sort options by their group; raises `OptionError` for a value that no average can have.

    Raises `TypeError` for a name that no option has, as Python does for an unknown keyword.
    """
    left = dict(given)
    schedules = {name: left.pop(name) for name in OPTIONS if name in left}

    def take(group: Group) -> dict[str, Any]:
        return {row.name: left.pop(row.name) for row in rows_of(group) if row.name in left}

    options = Options(
        Weighting(**take(Weighting), options=schedules),
        Selection(**take(Selection)),
        Reading(**take(Reading)),
        Output(**take(Output)),
        Engine(**take(Engine)),
    )
    if left:
        raise TypeError(f"unexpected keyword argument {next(iter(left))!r}")
    return options


def rows_of(group: Group) -> list[Row]:
    """Return the rows of one group."""
    found = []
    for one in fields(group):
        if "row" in one.metadata:
            values, help_text, panel, default, changes, short, metavar = one.metadata["row"]
            metavar = metavar or values.metavar
            found.append(Row(one.name, values, help_text, panel, default, changes, short, metavar))
    return found


def table() -> list[Row]:
    """Return every option, those of schedules included, in the order of help texts."""
    own = [
        row for group in (Weighting, Selection, Reading, Output, Engine) for row in rows_of(group)
    ]
    common = ("decay", "half_life")
    schedules = [
        Row(
            option.name,
            schedule_values(option.name),
            option.help,
            COMMON if option.name in common else SCHEDULE,
            False if option.kind is bool else None,
            short=option.short,
            metavar=schedule_values(option.name).metavar,
        )
        for option in OPTIONS.values()
    ]
    panels = (COMMON, SCHEDULE, CHECKPOINTS, MODEL, OUTPUT, ENGINE)
    return sorted([*schedules, *own], key=lambda row: panels.index(row.panel))


def schedule_values(name: str) -> Values:
    """Return the values that an option of a schedule takes."""
    option = OPTIONS[name]
    if option.choices:
        return _choice(*option.choices)
    if option.kind is bool:
        return FLAG
    return NUMBERS if option.several else NUMBER


def _plain(value: Any) -> Any:
    """Return an option's value as JSON has it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): weight for key, weight in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


# --- Keywords -------------------------------------------------------------------------------------

Numbers = float | Sequence[float] | str
Counts = int | Sequence[int] | str


class Keywords(TypedDict, total=False):
    """The keyword arguments of `average`, `plan` and the rest: one for each row of the table.

    A value may be given as the command line has it, as a text; None is the default.
    """

    decay: Numbers | None
    num_updates: str | None
    zero_debias: bool
    power: float | str | None
    inv_gamma: float | str | None
    sigma_rel: Numbers | None
    decay_per_step: Numbers | None
    half_life: Numbers | None
    schedule: str | None
    weights: PathLike | Mapping[str, float] | None
    normalize: bool
    last: Counts | None
    best: Counts | None
    metric: str | None
    metric_mode: str
    from_step: int | str | None
    to_step: int | str | None
    steps: str | Sequence[int | StepRange] | int | None
    every: int | str | None
    min_gap: int | str | None
    include: Sequence[str]
    exclude: Sequence[str]
    pattern: str | None
    order: str
    append: Sequence[PathLike]
    aliases: bool
    skip_incomplete: bool
    form: str
    component: str | None
    key: str | None
    strip_prefix: str | None
    allow_nonfinite: bool
    allow_duplicates: bool
    output: PathLike | None
    dtype: str
    config_from: PathLike | None
    card: bool
    device: str
    threads: int | str | None
    accumulate: str
    tile_size: int | str | None
    max_memory: int | str | None
