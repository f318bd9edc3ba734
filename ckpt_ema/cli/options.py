"""The options of the command line, made from rows: those of `ckpt_ema.options`, and commands' own.

Every option can also be set by an environment variable: CKPT_EMA_ and its name.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ckpt_ema.errors import flag
from ckpt_ema.options import COMMON, ENGINE, EVALUATION, OUTPUT, PANELS, Row, table
from ckpt_ema.values import COMMAND, COUNT, ENTRIES, FLAG, GLOBS, PART, PATH, SECONDS, TEXT

# Those of commands alone; a command takes those that its signature names.
OWN = (
    Row("explain", FLAG, "show the role of every entry and tensor, and why", OUTPUT, False),
    Row("plot", PATH, "draw the weights as .png or .svg; needs matplotlib", OUTPUT),
    Row("overwrite", FLAG, "replace an existing output", COMMON, False),
    Row("part", PART, "do part I of N; see `ckpt-ema finish --help`", ENGINE),
    Row("resume", FLAG, "keep partial work if interrupted, and continue it", ENGINE, False),
    Row("evaluate", COMMAND, "evaluate each average; {} stands for its path", EVALUATION),
    Row("metric", TEXT, "metric that the command prints, such as loss", EVALUATION),
    Row("minimize", FLAG, "lower is better; default: by the metric's name", EVALUATION, False),
    Row("maximize", FLAG, "higher is better; default: by the metric's name", EVALUATION, False),
    Row("greedy", FLAG, "add a greedy soup of the checkpoints", EVALUATION, False),
    Row("jobs", COUNT, "evaluations at a time; default: 1", EVALUATION),
    Row("timeout", SECONDS, "end an evaluation that takes longer", EVALUATION),
    Row("keep_all", FLAG, "keep every candidate, each in its folder", EVALUATION, False),
    Row("json", FLAG, "print JSON on stdout", OUTPUT, False),
    Row("markdown", FLAG, "print a table in Markdown", OUTPUT, False),
    Row("quiet", FLAG, "hide notes and progress", OUTPUT, False, short="-q"),
)

# The whole table, and the rows that do not belong with the name by which a command takes it.
_SHARED: dict[str, set[str]] = {
    "options": set(),
    "averaging": {"best", "metric", "metric_mode"},  # of the trainer, not of evaluations
}

RunArgument = Annotated[
    list[str], typer.Argument(metavar="RUN", show_default=False, readable=False)
]


def rows_of(command: Callable[..., None]) -> list[Row]:
    """Return the rows that a command's keywords name, by panel; two names stand for the table."""
    parameters = inspect.signature(inspect.unwrap(command)).parameters
    names = {name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY}
    own = [row for row in OWN if row.name in names]
    names -= {row.name for row in own}
    for without in (without for home, without in _SHARED.items() if home in names):
        names |= {row.name for row in table()} - without - {row.name for row in own}
    rows = [*(row for row in table() if row.name in names), *own]
    return sorted(rows, key=lambda row: PANELS.index(row.panel))


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Declare the rows of a command to Typer; those of the table reach it under one name."""
    parameters = inspect.signature(command).parameters
    home = next((name for name in _SHARED if name in parameters), "")

    @functools.wraps(command)
    def run(**given: Any) -> None:
        shared = {name: given.pop(name) for name in [*given] if name not in parameters}
        command(**given, **({home: shared} if home else {}))

    argument = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    declared = [*argument, *map(_parameter, rows_of(command))]
    run.__signature__ = inspect.Signature(declared)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in declared}
    return run


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
