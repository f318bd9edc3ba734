"""The options of the command line, made from rows, those of `ckpt_ema.options` and of commands.

Every option can also be set by an environment variable: CKPT_EMA_ and its name.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ckpt_ema.errors import flag
from ckpt_ema.options import Row, table
from ckpt_ema.options.table import COMMON, ENGINE, OUTPUT
from ckpt_ema.options.values import FLAG, PATH, TEXT

OVERWRITE = Row("overwrite", FLAG, "replace an existing output", COMMON, False)
PLOT = Row("plot", PATH, "draw the weights as .png or .svg; needs matplotlib", OUTPUT)
EXPLAIN = Row("explain", FLAG, "show what every entry and every tensor is taken for", OUTPUT, False)
JSON = Row("json", FLAG, "print JSON on stdout", OUTPUT, False)
MARKDOWN = Row("markdown", FLAG, "print a table in Markdown", OUTPUT, False)
QUIET = Row("quiet", FLAG, "hide notes and progress", OUTPUT, False, short="-q")
PART = Row("part", TEXT, "do part I of N; `ckpt-ema finish` publishes the output", ENGINE)
RESUME = Row("resume", FLAG, "keep partial work if interrupted, and continue it", ENGINE, False)

RunArgument = Annotated[
    list[str], typer.Argument(metavar="RUN", show_default=False, readable=False)
]


def takes_options(*own: Row) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each of its own rows, which it gets by their names.

    A command with a parameter `options` also gets those of the table that were given, in it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        arguments = [
            p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        shared = table() if "options" in signature.parameters else []
