"""The one table of options, in five frozen groups; each stage takes the group that it needs.

The command line, environment variables, manifests and fingerprints are made from its rows. Options
of schedules stand beside their formulas, in `schedules`; `Keywords` has the types of all of them.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypedDict

from ckpt_ema import values as of
from ckpt_ema.errors import Code, OptionError, flag
from ckpt_ema.schedules.rules import DEFAULT, EXPLICIT, OPTIONS, SCHEDULES, Rule, make_rules
from ckpt_ema.storage.uri import absolute
from ckpt_ema.values import Values

PathLike = str | os.PathLike[str]
StepRange = tuple[int, int]  # first and last, both included
Numbers = float | Sequence[float] | str
Counts = int | Sequence[int] | str

# The names that --dtype gives to the dtypes of safetensors; None keeps each tensor's own.
DTYPES = {"same": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# What --save-as makes: safetensors, or a copy of the newest checkpoint in its own format.
SAFETENSORS, CHECKPOINT = "safetensors", "checkpoint"

# Panels of the command line's help, in the order in which they are shown.
EVALUATION = "Evaluation"
COMMON, SCHEDULE, CHECKPOINTS = "Most used", "Schedule", "Which checkpoints"
MODEL, OUTPUT, ENGINE = "Which model in a checkpoint", "Output", "Execution"
PANELS = (EVALUATION, COMMON, SCHEDULE, CHECKPOINTS, MODEL, OUTPUT, ENGINE)


@dataclass(frozen=True, slots=True)
class Row:
    """One option."""

    name: str
    values: Values
    help: str  # one line, without a full stop; of a flag that is on by default, for --no-...
    panel: str
    default: Any = None
    changes_bytes: bool = False  # of the output, for the same checkpoints and weights
    short: str = ""  # a short flag

    @property
    def flags(self) -> tuple[str, ...]:
        """Return its names on the command line."""
        long = flag(self.name)
        if self.default is True:
            return (f"{long}/--no-{long[2:]}",)
        return (long, self.short) if self.short else (long,)

    @property
    def metavar(self) -> str:
        """Return the word that stands for its value in help texts; empty for a flag."""
        last_word = self.name.rpartition("_")[2].upper()
        return "" if self.values is of.FLAG else self.values.metavar or last_word


def _row(values: Values, help_text: str, default: Any = None, **more: Any) -> Any:
    about = {"values": values, "help": help_text, "default": default, **more}
    return field(default=default, metadata=about)


class Group:
    """Options that one stage takes; making one parses every value."""

    __slots__ = ()
    panel: ClassVar[str]  # the default for its rows

    def __post_init__(self) -> None:
        """Parse every value and refuse contradictions; raises `OptionError`."""
        for row in self.rows():
            value = getattr(self, row.name)
            if value != row.default:
                object.__setattr__(self, row.name, row.values.parsed(row.name, value))
        self._check()

    def _check(self) -> None:
        """Refuse options that contradict each other."""

    @classmethod
    def rows(cls) -> list[Row]:
        """Return the rows of its options."""
        declared: Any = cls
        own = [one for one in fields(declared) if one.metadata]
        return [Row(one.name, **{"panel": cls.panel, **one.metadata}) for one in own]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting(Group):
    """How checkpoints are weighted: a schedule with its options, or explicit weights."""

    panel = SCHEDULE

    schedule: str | None = _row(
        of.TEXT, ", ".join(SCHEDULES).replace(DEFAULT, f"{DEFAULT} (default)")
    )
    weights: PathLike | Mapping[str, float] | None = _row(
        of.WEIGHTS, "explicit weights by checkpoint name or step"
    )
    normalize: bool = _row(of.FLAG, "divide the weights of --weights by their sum", False)
    options: Mapping[str, Any] = field(default_factory=dict)  # of schedules, those that were given
    rules: tuple[Rule, ...] = field(init=False)

    def _check(self) -> None:
        parsed = {
            name: _schedule_values(name).parsed(name, value)
            for name, value in self.options.items()
            if value is not None and value is not False
        }
        object.__setattr__(self, "options", parsed)
        given = {**parsed, **({EXPLICIT: self.weights} if self.weights is not None else {})}
        object.__setattr__(self, "rules", make_rules(self.schedule, given))
        if self.normalize and self.weights is None:
            raise _conflict("--normalize goes with --weights.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection(Group):
    """Which checkpoints take part, and in which order."""

    panel = CHECKPOINTS

    last: tuple[int, ...] | None = _row(of.COUNTS, "take the N newest checkpoints", panel=COMMON)
    best: tuple[int, ...] | None = _row(
        of.COUNTS, "take the N best by --metric; ties go to the later one"
    )
    metric: str | None = _row(of.TEXT, "metric used by --best, such as eval_loss")
    metric_mode: str = _row(of.METRIC_MODE, "which values are better: auto, min or max", "auto")
    from_step: int | None = _row(of.STEP, "take this step and later ones")
    to_step: int | None = _row(of.STEP, "take this step and earlier ones")
    steps: tuple[StepRange, ...] | None = _row(of.STEPS, "take steps such as 100,200,1000-5000")
    every: int | None = _row(of.COUNT, "take every N-th, counting back from the newest")
    min_gap: int | None = _row(of.COUNT, "take checkpoints at least N steps apart")
    include: tuple[str, ...] = _row(of.GLOBS, "take only names matching this glob; repeatable", ())
    exclude: tuple[str, ...] = _row(of.GLOBS, "skip names matching this glob; repeatable", ())
    pattern: str | None = _row(of.REGEX, "take only names matching; a group captures the step")
    order: str = _row(of.ORDER, "step to trust if they disagree: auto, metadata, name", "auto")
    append: tuple[str, ...] = _row(of.ENTRIES, "add this entry after the last step; repeatable", ())
    aliases: bool = _row(of.FLAG, "do not look for a later step in last, final and so on", True)
    skip_incomplete: bool = _row(of.FLAG, "skip incomplete checkpoints instead of failing", False)

    def _check(self) -> None:
        if (self.best is None) != (self.metric is None):
            raise _conflict("--best and --metric go together: --best 3 --metric eval_loss.")
        if self.metric is None and self.metric_mode != "auto":
            raise _conflict("--metric-mode goes with --best and --metric.")
        first, last = self.from_step, self.to_step
        if first is not None and last is not None and first > last:
            raise _conflict(f"--from {first} is later than --to {last}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Group):
    """What is read from a checkpoint: which of its models, and which values are accepted."""

    panel = MODEL

    form: str = _row(of.FORM, "which to take: auto, single, sharded or adapter", "auto")
    which: str = _row(
        of.WHICH,
        "raw weights or the trainer's own average: raw, ema",
        "raw",
        changes_bytes=True,
    )
    component: str | None = _row(of.TEXT, "average only this folder, such as unet")
    key: str | None = _row(
        of.TEXT, "where the model is in a torch file, such as state_dict", changes_bytes=True
    )
    strip_prefix: str | None = _row(
        of.TEXT, "remove this from tensor names, such as _orig_mod.", changes_bytes=True
    )
    average: tuple[str, ...] = _row(
        of.GLOBS, "average tensors matching this glob; repeatable", (), changes_bytes=True
    )
    keep: tuple[str, ...] = _row(
        of.GLOBS, "keep the newest value of matching tensors; repeatable", (), changes_bytes=True
    )
    drop: tuple[str, ...] = _row(
        of.GLOBS, "leave matching tensors out; repeatable", (), changes_bytes=True
    )
    allow_nonfinite: bool = _row(
        of.FLAG, "average NaN and infinity instead of refusing them", False, changes_bytes=True
    )
    allow_duplicates: bool = _row(of.FLAG, "accept checkpoints with identical values", False)
    allow_zeros: bool = _row(of.FLAG, "accept a checkpoint that ends in zeros", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output(Group):
    """What is written, and where."""

    panel = OUTPUT

    output: str | None = _row(
        of.OUTPUT, "folder or .safetensors file; default: RUN-ema", panel=COMMON, short="-o"
    )
    dtype: str = _row(
        of.choice(*DTYPES),
        "of averages: same, float32, bfloat16 or float16",
        "same",
        changes_bytes=True,
    )
    save_as: str | None = _row(
        of.choice(SAFETENSORS, CHECKPOINT),
        "safetensors, or checkpoint: in the newest one's format",
        changes_bytes=True,
    )
    config_from: str | None = _row(of.PATH, "take the configuration from this model folder")
    card: bool = _row(of.FLAG, "do not write a model card (README.md)", True, changes_bytes=True)
    keep_state: bool = _row(of.FLAG, "keep the exact average, for `ckpt-ema update`", False)

    def _check(self) -> None:
        if self.keep_state and self.output is not None and self.output.endswith(".safetensors"):
            raise _conflict("--keep-state needs an output folder; --output names a file.")
        if self.save_as != CHECKPOINT:
            return
        kept = {"--dtype": self.dtype != "same", "--config-from": self.config_from is not None}
        for name in filter(kept.__getitem__, kept):
            what = "which keeps the dtypes and files of the newest checkpoint"
            raise _conflict(f"{name} cannot be used with --save-as checkpoint, {what}.")
        if self.output is not None and self.output.endswith(".safetensors"):
            raise _conflict("--save-as checkpoint writes a folder; --output names a file.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine(Group):
    """How the work is done; the result depends on `accumulate` alone."""

    panel = ENGINE

    device: str = _row(of.TEXT, "auto, cpu, cuda, cuda:1, mps or xpu", "auto")
    threads: int | None = _row(of.THREADS, "threads that read and fold; default: one per core")
    accumulate: str = _row(
        of.ACCUMULATE, "float64, or float32 by torch: not exact", "float64", changes_bytes=True
    )
    tile_size: int | None = _row(of.TILE, "bytes that a thread reads at a time")
    max_memory: int | None = _row(of.SIZE, "limit on the working memory, such as 512MiB")
    strict: bool = _row(of.FLAG, "treat every warning as an error", False)
    sync: bool = _row(of.FLAG, "do not wait until the output is on the disk", True)


class Options(NamedTuple):
    """All options of one call, for the place where the stages are called."""

    weighting: Weighting
    selection: Selection
    reading: Reading
    output: Output
    engine: Engine

    def given(self) -> dict[str, Any]:
        """Return what is not at its default, as plain values for JSON."""
        chosen = {row.name: value for row, value in self._values() if value != row.default}
        return {name: _plain(value) for name, value in {**chosen, **self.weighting.options}.items()}

    def repeatable(self) -> dict[str, Any]:
        """Return what is given and decides which averages are made, wherever they are written."""
        own = {row.name for row in Engine.rows()} | {"output"}
        given = {name: value for name, value in self.given().items() if name not in own}
        if "config_from" in given:  # another process may be in another folder
            given["config_from"] = absolute(given["config_from"])
        return given

    def deciding(self) -> dict[str, Any]:
        """Return the options that change the output's bytes, for the same checkpoints."""
        return {row.name: value for row, value in self._values() if row.changes_bytes}

    def _values(self) -> list[tuple[Row, Any]]:
        return [(row, getattr(group, row.name)) for group in self for row in group.rows()]


class AveragingKeywords(TypedDict, total=False):
    """The keyword arguments of `select`: those of `average` that it takes.

    Values may be texts, as on the command line; None is the default.
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
    which: str
    component: str | None
    key: str | None
    strip_prefix: str | None
    average: Sequence[str]
    keep: Sequence[str]
    drop: Sequence[str]
    allow_nonfinite: bool
    allow_duplicates: bool
    allow_zeros: bool
    output: PathLike | None
    dtype: str
    save_as: str | None
    config_from: PathLike | None
    card: bool
    device: str
    threads: int | str | None
    accumulate: str
    tile_size: int | str | None
    max_memory: int | str | None
    strict: bool
    sync: bool


class Keywords(AveragingKeywords, total=False):
    """The keyword arguments of `average`, `plan` and the rest, one for each row."""

    best: Counts | None
    metric: str | None
    metric_mode: str
    keep_state: bool


_GROUPS: tuple[type[Group], ...] = (Weighting, Selection, Reading, Output, Engine)

# Options of averages that cannot be continued: those that select by what comes later, so that a new
# checkpoint would change which others take part, and those that no later checkpoint matches.
BY_NEWEST = ("last", "best", "every", "min_gap", "append")
NO_LATER = ("steps", "to_step")

# The options that matter only where averages are made and written.
WRITING = {
    *(row.name for row in Output.rows()),
    *("allow_nonfinite", "allow_duplicates", "allow_zeros", "device", "accumulate", "sync"),
}
# Those that say how one checkpoint is read, whatever its run.
OF_ONE = {"form", "which", "component", "key", "strip_prefix", "drop", "threads"}


def make_options(given: Mapping[str, Any]) -> Options:
    """Sort options by their group; raises `OptionError` for an impossible value.

    Raises `TypeError` for a name that no option has, as Python does for an unknown keyword.
    """
    unknown = given.keys() - {row.name for row in table()}
    if unknown:
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")

    def take(group: type[Group], **more: Any) -> Any:
        own = {row.name: given[row.name] for row in group.rows() if row.name in given}
        return group(**own, **more)

    schedules = {name: given[name] for name in OPTIONS if name in given}
    return Options(take(Weighting, options=schedules), *map(take, _GROUPS[1:]))


def table() -> list[Row]:
    """Return every option, those of schedules included, in the order of help texts."""
    rows = Weighting.rows()
    for option in OPTIONS.values():
        panel = COMMON if option.name in ("decay", "half_life") else SCHEDULE
        default = False if option.kind is bool else None
        values = _schedule_values(option.name)
        rows.append(Row(option.name, values, option.help, panel, default, short=option.short))
    rows += [row for group in _GROUPS[1:] for row in group.rows()]
    return sorted(rows, key=lambda row: PANELS.index(row.panel))


def _schedule_values(name: str) -> Values:
    option = OPTIONS[name]
    if option.choices:
        return of.choice(*option.choices)
    numbers = of.NUMBERS if option.several else of.NUMBER
    return of.FLAG if option.kind is bool else numbers


def _plain(value: Any) -> Any:
    """Return an option's value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): weight for key, weight in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _conflict(message: str) -> OptionError:
    return OptionError(message, code=Code.CONFLICTING_OPTIONS)
