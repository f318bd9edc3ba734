"""The command line: each command parses, makes one library call and prints its outcome.

stdout carries the output path (or JSON) and nothing else; everything for people goes to stderr.
"""

import gc
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from ckpt_ema import __version__
from ckpt_ema.cli import (
    average,
    compare,
    exits,
    finish,
    formats,
    inspect,
    plan,
    select,
    update,
    verify,
    watch,
)
from ckpt_ema.cli.exits import say
from ckpt_ema.cli.help import Command
from ckpt_ema.cli.texts import TextGroup

app = typer.Typer(
    name="ckpt-ema",
    cls=TextGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _run, _examples in (
    (average.average, average.EXAMPLES),
    (plan.plan, plan.EXAMPLES),
    (watch.watch, watch.EXAMPLES),
    (update.update, update.EXAMPLES),
    (select.select, select.EXAMPLES),
    (verify.verify, verify.EXAMPLES),
    (inspect.inspect, inspect.EXAMPLES),
    (compare.compare, compare.EXAMPLES),
    (finish.finish, finish.EXAMPLES),
    (formats.formats, formats.EXAMPLES),
):
    app.command(cls=Command, epilog=_examples)(_run)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With --version, also show what averages on the CPU.")
    ] = False,
) -> None:
    """Average the checkpoints of a training run into one model, in the format of the run."""
    if verbose and not version:
        raise typer.BadParameter("--verbose goes with --version.")
    gc.disable()  # modules and plans are large and have no cycles; the fold turns it on again
    if version:
        typer.echo(f"ckpt-ema {__version__}")
        if verbose:
            from ckpt_ema.fold import native

            typer.echo(f"fold: {native.described()}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line and end the process."""
    exits.take_signals()
    # torch warns at import where numpy is missing, which nothing here needs.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        code = _exit_code()
    except exits.SignalError as error:  # before or after the command itself
        code = exits.say_signal(error)
    except OSError as error:  # of stdout, where help and the version go
        say(f"error: {exits.unwritten(error)}")
        code = 1
    exits.leave(code)


def _exit_code() -> int:
    """Run the command line, whose last act is to raise `SystemExit`."""
    try:
        app()
    except SystemExit as end:
        if sys.stdout:
            sys.stdout.flush()
        return int(end.code or 0)
    return 0
