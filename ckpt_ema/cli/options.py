"""The options of the command line, made from rows: those of `ckpt_ema.options`, and commands' own.

Every option can also be set by an environment variable: CKPT_EMA_ and its name.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from ckpt_ema.errors import flag
from ckpt_ema.options import (
    BY_NEWEST,
    COMMON,
    ENGINE,
    EVALUATION,
    NO_LATER,
    OF_ONE,
    OUTPUT,
    PANELS,
    WRITING,
    Row,
    table,
)
from ckpt_ema.values import (
    COMMAND,
    COUNT,
    ENTRIES,
    FLAG,
    GLOBS,
    LAPSE,
    PART,
    PATH,
    SHARE,
    STEP,
    TEXT,
    TIME,
)

# Those of commands alone; a command takes those that its signature names.
OWN = (
    Row("explain", FLAG, "show the role of every entry and tensor, and why", OUTPUT, False),
    Row("plot", PATH, "draw a picture as .png or .svg; needs matplotlib", OUTPUT),
    Row("report", PATH, "write a page about it as .html", OUTPUT),
    Row("overwrite", FLAG, "replace an existing output", COMMON, False),
    Row("part", PART, "do part I of N; see `ckpt-ema finish --help`", ENGINE),
    Row("resume", FLAG, "keep partial work if interrupted, and continue it", ENGINE, False),
    Row("publish_every", COUNT, "publish after every N checkpoints; default: 1", COMMON, "1"),
    Row("until_step", STEP, "end after a checkpoint at this step or later", COMMON),
    Row("idle", TIME, "end when no checkpoint came for this long, such as 2h", COMMON),
    Row("interval", LAPSE, "time between two looks at the run; default: 10s", COMMON, "10s"),
    Row("skip_missed", FLAG, "skip a checkpoint deleted before it was folded", COMMON, False),
    Row("on_publish", TEXT, "command to run with the path ({}) after publishing", COMMON),
    Row("sample", SHARE, "fold only a random share of the tiles again, such as 1%", COMMON),
    Row("exit_code", FLAG, "exit with 1 if A and B differ", OUTPUT, False),
    Row("evaluate", COMMAND, "evaluate each average; {} stands for its path", EVALUATION),
    Row("metric", TEXT, "metric that the command prints, such as loss", EVALUATION),
    Row("minimize", FLAG, "lower is better; default: by the metric's name", EVALUATION, False),
    Row("maximize", FLAG, "higher is better; default: by the metric's name", EVALUATION, False),
    Row("greedy", FLAG, "add a greedy soup of the checkpoints", EVALUATION, False),
    Row("jobs", COUNT, "evaluations at a time; default: 1", EVALUATION),
    Row("timeout", LAPSE, "end an evaluation that takes longer", EVALUATION),
    Row("keep_all", FLAG, "keep every candidate, each in its folder", EVALUATION, False),
    Row("json", FLAG, "print JSON on stdout", OUTPUT, False),
    Row("markdown", FLAG, "print a table in Markdown", OUTPUT, False),
    Row("quiet", FLAG, "hide notes and progress", OUTPUT, False, short="-q"),
)

RunArgument = Annotated[
    list[str], typer.Argument(metavar="RUN", show_default=False, readable=False)
]


_NOT_CONTINUED = {
    *(*BY_NEWEST, *NO_LATER, "metric", "metric_mode"),
    *("weights", "normalize", "aliases", "keep_state"),
}
_NOT_SELECTED = {"best", "metric", "metric_mode", "keep_state"}
# Rows of the table that reach a command together, by the keyword that has them.
_HELD: Mapping[str, Callable[[str], bool]] = {
    "options": lambda _: True,
    "inputs": lambda name: name not in WRITING,  # for who makes no average
    "reading": OF_ONE.__contains__,
    "averaging": lambda name: name not in _NOT_SELECTED,  # for who evaluates averages
    "continued": lambda name: name not in _NOT_CONTINUED,  # for who adds checkpoints later
    "": lambda _: False,
}


def rows_of(command: Callable[..., None]) -> list[Row]:
    """Return the rows that a command's keywords name, by panel; see `_HELD`."""
    parameters = inspect.signature(inspect.unwrap(command)).parameters
    names = {name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY}
    held, own = _HELD[_holder(names)], [row for row in OWN if row.name in names]
    shared = [row for row in table() if row.name in names or held(row.name)]
    rows = [row for row in shared if row.name not in {one.name for one in own}] + own
    return sorted(rows, key=lambda row: PANELS.index(row.panel))


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Declare the rows of a command to Typer; those of the table reach it under one name."""
    parameters = inspect.signature(command).parameters
    holder = _holder(parameters)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        shared = {name: given.pop(name) for name in [*given] if name not in parameters}
        command(**given, **({holder: shared} if shared else {}))

    argument = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    declared = [*argument, *map(_parameter, rows_of(command))]
    run.__signature__ = inspect.Signature(declared)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in declared}
    return run


def _holder(names: Iterable[str]) -> str:
    return next((name for name in names if name in _HELD), "")


def variable(name: str) -> str:
    """Name the environment variable of an option.

    >>> variable("from_step")
    'CKPT_EMA_FROM'
    """
    return "CKPT_EMA" + flag(name)[1:].upper().replace("-", "_")


def _parameter(row: Row) -> inspect.Parameter:
    """Declare one option to Typer; values stay texts, which the table parses."""
    is_list = row.values in (GLOBS, ENTRIES)
    kind: Any = bool if row.values is FLAG else list[str] if is_list else str | None
    declared = typer.Option(
        *row.flags,
        help=row.help,
        envvar=variable(row.name),
        metavar=row.metavar or None,
        rich_help_panel=row.panel,
        autocompletion=(lambda: list(row.values.choices)) if row.values.choices else None,
    )
    return inspect.Parameter(
        row.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=[] if is_list else row.default,
        annotation=Annotated[kind, declared],
    )
