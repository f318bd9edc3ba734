"""The command line: each command parses, makes one library call and prints its outcome.

stdout carries the output path (or JSON) and nothing else; everything for people goes to stderr.
"""

import gc
import json as json_format
import shutil
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer

from ckpt_ema import __version__
from ckpt_ema.cli import average, compare, exits, inspect, select, update, verify, watch
from ckpt_ema.cli.exits import say, show
from ckpt_ema.cli.help import Command
from ckpt_ema.cli.options import RunArgument, takes_options
from ckpt_ema.cli.texts import TextGroup
from ckpt_ema.errors import printable

_MOST_ROWS = 200  # of the table of checkpoints; --json has them all
_PLAN_EXAMPLES = """
ckpt-ema plan runs/ --explain
ckpt-ema plan runs/ --half-life 500,2000 --plot weights.png
ckpt-ema plan runs/ --decay 0.4 --json | jq '.averages[].checkpoints[].weight'
"""
_FINISH_EXAMPLES = """
ckpt-ema average runs/ -o averaged --part 3/64   # in the third of 64 jobs
ckpt-ema finish averaged                        # when all parts are made
"""

app = typer.Typer(
    name="ckpt-ema",
    cls=TextGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command, epilog=average.EXAMPLES)(average.average)
app.command(cls=Command, epilog=update.EXAMPLES)(update.update)
app.command(cls=Command, epilog=watch.EXAMPLES)(watch.watch)
app.command(cls=Command, epilog=verify.EXAMPLES)(verify.verify)
app.command(cls=Command, epilog=select.EXAMPLES)(select.select)


@app.command(cls=Command, epilog=_PLAN_EXAMPLES)
@takes_options
def plan(
    run: RunArgument,
    *,
    options: dict[str, Any],
    explain: bool,
    plot: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """Show what `ckpt-ema average` would do, without averaging.

    RUN and the options are those of `ckpt-ema average`.
    """
    with exits.errors_reported():
        from ckpt_ema.output.destination import is_free
        from ckpt_ema.output.manifest import describe_plan, is_up_to_date
        from ckpt_ema.planning.decide import plan as make_plan
        from ckpt_ema.report import figure, lines, terminal
        from ckpt_ema.report.explain import explanation

        decided = make_plan(run, **options)
        if plot:
            figure.plot(decided, plot)
        if json:
            show(json_format.dumps(describe_plan(decided), indent=2))
        else:
            show(terminal.plan_text(decided, sys.stdout, _MOST_ROWS))
            if explain:
                show("\n" + explanation(decided.run, decided.judged, decided.tensor_roles))
        say(*lines.notice_lines(decided, quiet))
        if not (quiet or is_free(decided.output) or is_up_to_date(decided)):
            say(f"note: {printable(decided.output)} exists and is not this average")


app.command(cls=Command, epilog=inspect.EXAMPLES)(inspect.inspect)
app.command(cls=Command, epilog=compare.EXAMPLES)(compare.compare)


@app.command(cls=Command, epilog=_FINISH_EXAMPLES)
@takes_options
def finish(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", readable=False)],
    *,
    overwrite: bool,
    sync: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Publish an output whose parts are all made, and print its path.

    OUTPUT is what --output was, or its default.
    """
    with exits.errors_reported():
        from ckpt_ema.run import finish as publish

        result = publish(output, overwrite=overwrite, sync=sync)
        exits.print_result(result, quiet=quiet, as_json=json)


@app.command(cls=Command, epilog="ckpt-ema formats")
@takes_options
def formats(*, json: bool, markdown: bool) -> None:
    """List the trainers whose checkpoints are read, and where their model weights are."""
    from ckpt_ema.report import trainers

    with exits.errors_reported():
        if json:
            show(json_format.dumps(trainers.described(), indent=2))
        elif markdown:
            show("\n".join(trainers.markdown()))
        else:
            width = max(40, min(100, shutil.get_terminal_size().columns))
            show("\n".join(trainers.lines(width)))


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
