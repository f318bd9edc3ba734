"""The command line: each command parses, makes one library call and prints its outcome.

stdout carries the output path (or JSON) and nothing else; everything for people goes to stderr.
"""

import sys
import warnings
from typing import Annotated

import typer

from ckpt_ema import __version__
from ckpt_ema.cli import average, finish, formats, plan
from ckpt_ema.cli.exits import SignalError, say_signal, take_signals
from ckpt_ema.cli.help import Command

app = typer.Typer(
    name="ckpt-ema",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command, epilog=average.EXAMPLES)(average.average)
app.command(cls=Command, epilog=plan.EXAMPLES)(plan.plan)
app.command(cls=Command, epilog=finish.EXAMPLES)(finish.finish)
app.command(cls=Command, epilog=formats.EXAMPLES)(formats.formats)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Average the checkpoints of a training run into one model, in the format of the run."""
    if version:
        typer.echo(f"ckpt-ema {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; never returns."""
    take_signals()
    # torch warns at import where numpy is missing, which nothing here needs.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        app()
    except SignalError as error:  # before or after the command itself
        sys.exit(say_signal(error))
