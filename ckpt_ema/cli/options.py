"""The options of the command line, made from rows: those of `ckpt_ema.options`, and commands' own.

Every option can also be set by an environment variable: CKPT_EMA_ and its name.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from ckpt_ema.errors import flag
from ckpt_ema.options import COMMON, ENGINE, OUTPUT, PANELS, Row, table
from ckpt_ema.values import ENTRIES, FLAG, GLOBS, PATH, Values

OVERWRITE = Row("overwrite", FLAG, "replace an existing output", COMMON, False)
PLOT = Row("plot", PATH, "draw the weights as .png or .svg; needs matplotlib", OUTPUT)
EXPLAIN = Row("explain", FLAG, "show the role of every entry and tensor, and why", OUTPUT, False)
JSON = Row("json", FLAG, "print JSON on stdout", OUTPUT, False)
MARKDOWN = Row("markdown", FLAG, "print a table in Markdown", OUTPUT, False)
QUIET = Row("quiet", FLAG, "hide notes and progress", OUTPUT, False, short="-q")
PART = Row(
    "part", Values(str, "be a part", "I/N"), "do part I of N; see `ckpt-ema finish --help`", ENGINE
)
RESUME = Row("resume", FLAG, "keep partial work if interrupted, and continue it", ENGINE, False)

RunArgument = Annotated[
    list[str], typer.Argument(metavar="RUN", show_default=False, readable=False)
]


def takes_options(*own: Row) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command its own rows, as keywords of their names.

    A command with a parameter `options` takes those of the table too, and gets them in it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(command).parameters
        shared = table() if "options" in parameters else []
        rows = in_panels([*shared, *own])

        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = {row.name: given.pop(row.name) for row in shared}
            command(**given, **({"options": options} if shared else {}))

        argument = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        declared = [*argument, *map(_parameter, rows)]
        run.__signature__ = inspect.Signature(declared)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in declared}
        return run

    return decorate


def in_panels(rows: Iterable[Row]) -> list[Row]:
    """Sort rows by their panel."""
    return sorted(rows, key=lambda row: PANELS.index(row.panel))


def variable(name: str) -> str:
    """Name the environment variable of an option.

    >>> variable("from_step")
    'CKPT_EMA_FROM'
    """
    return "CKPT_EMA" + flag(name)[1:].upper().replace("-", "_")


def _parameter(row: Row) -> inspect.Parameter:
    """Declare one option to Typer; values stay texts, which the table parses."""
    kind: Any = str | None
    if row.values is FLAG:
        kind = bool
    elif row.values in (GLOBS, ENTRIES):
        kind = list[str]
    declared = typer.Option(
        *row.flags,
        help=row.help,
        envvar=variable(row.name),
        metavar=row.metavar or None,
        rich_help_panel=row.panel,
        autocompletion=(lambda: list(row.values.choices)) if row.values.choices else None,
    )
    default = [] if kind == list[str] else row.default
    return inspect.Parameter(
        row.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, declared],
    )
