"""The command line: arguments in, one library call, its outcome printed.

stdout carries the output path (or JSON) and nothing else; everything for people goes to stderr.
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from ckpt_ema import __version__
from ckpt_ema.cli_endings import (
    SignalError,
    errors_reported,
    ignore_signals,
    say,
    say_signal,
    stdout_reported,
    take_signals,
)
from ckpt_ema.cli_options import OUTPUT_PANEL, takes_options
from ckpt_ema.errors import printable

# Of the table of checkpoints; --json has them all.
_MOST_ROWS = 24
_MOST_ROWS_OF_PLAN = 200

app = typer.Typer(
    name="ckpt-ema",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


RunArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN",
        show_default=False,
        readable=False,
        path_type=str,  # a Path would make the current folder of an empty name
        help="A folder of numbered checkpoints; or the checkpoints themselves, oldest first.",
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        envvar="CKPT_EMA_OVERWRITE",
        rich_help_panel=OUTPUT_PANEL,
        help="Replace an output that is there already.",
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        envvar="CKPT_EMA_PLOT",
        metavar="FILE",
        readable=False,
        show_default=False,
        rich_help_panel=OUTPUT_PANEL,
        help="Draw the weights as a .png or .svg file, and into the model card; needs matplotlib.",
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        envvar="CKPT_EMA_QUIET",
        rich_help_panel=OUTPUT_PANEL,
        help="Say nothing but errors.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT_PANEL, help="Print JSON on stdout.")
]


def _examples(*commands: str) -> str:
    return "\n\n".join(["Examples:", *commands])


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Average the checkpoints of a training run into one model that loads where they load."""
    if version:
        typer.echo(f"ckpt-ema {__version__}")
        raise typer.Exit


@app.command(
    epilog=_examples(
        "ckpt-ema average runs/",
        "ckpt-ema average runs/ --half-life 2000 -o averaged",
        "ckpt-ema average runs/ --decay 0.4,0.8 --last 4,8",
        'OUT=$(ckpt-ema average runs/ -q) && evaluate "$OUT"',
    )
)
@takes_options
def average(
    run: RunArgument,
    options: dict[str, Any],
    plot: PlotOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Average the checkpoints in RUN and print the path of the result."""
    with errors_reported():
        from ckpt_ema.averaging import carry_out, up_to_date
        from ckpt_ema.planning.plan import plan as make_plan
        from ckpt_ema.report import figure, lines, plan_view
        from ckpt_ema.report.progress import ByteProgress

        decided = make_plan(run, **options)
        result = up_to_date(decided, overwrite=overwrite)
        picture = figure.plot(decided, plot) if plot else None
        if result is None:
            if not quiet:
                say(plan_view.plan_text(decided, sys.stderr, _MOST_ROWS), "")
                say(*lines.remark_lines(decided))
            with ByteProgress(quiet) as progress:
                result = carry_out(
                    decided,
                    overwrite=overwrite,
                    picture=picture,
                    progress=progress,
                    command=_command(),
                )
        ignore_signals()  # the output is there: from here on this is a success
        if not quiet:
            say(lines.result_line(result))
        _append_step_summary(plan_view.summary_lines(decided))
        with stdout_reported(done=f"{printable(result.output)} is complete"):
            if as_json:
                one, *more = result.manifests
                typer.echo(json.dumps([one, *more] if more else one, indent=2))
            for output in () if as_json else result.outputs:
                # A path as the bytes that it is, also where the terminal has no letters for them.
                typer.echo(os.fsencode(output))


@app.command(
    epilog=_examples(
        "ckpt-ema plan runs/",
        "ckpt-ema plan runs/ --half-life 500,2000 --plot weights.png",
        "ckpt-ema plan runs/ --decay 0.4 --json | jq '.candidates[].checkpoints[].weight'",
    )
)
@takes_options
def plan(
    run: RunArgument,
    options: dict[str, Any],
    plot: PlotOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what `average` would do, and the weight of each checkpoint; no tensor is read."""
    with errors_reported():
        from ckpt_ema.output import manifest
        from ckpt_ema.output.vacancy import is_vacant
        from ckpt_ema.planning.plan import plan as make_plan
        from ckpt_ema.report import figure, lines, plan_view

        decided = make_plan(run, **options)
        if plot:
            figure.plot(decided, plot)
        if as_json:
            typer.echo(json.dumps(manifest.describe_plan(decided), indent=2))
        else:
            typer.echo(plan_view.plan_text(decided, sys.stdout, _MOST_ROWS_OF_PLAN))
        if not quiet:
            say(*lines.remark_lines(decided))
            if not is_vacant(decided.output) and not manifest.is_up_to_date(decided):
                say(f"note: {printable(decided.output)} exists already and is something else.")


@app.command()
def formats(
    as_json: JsonOption = False,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print a table in Markdown.", rich_help_panel=OUTPUT_PANEL),
    ] = False,
) -> None:
    """Show which trainers' checkpoints are understood, and where their weights are."""
    from ckpt_ema.report import understood

    with errors_reported():
        if as_json:
            typer.echo(json.dumps(understood.described(), indent=2))
        elif markdown:
            typer.echo("\n".join(understood.markdown()))
        else:
            width = max(40, min(100, shutil.get_terminal_size().columns))
            typer.echo("\n".join(understood.lines(width)))


def _command() -> str:
    """The command as a person would type it again, with what the environment has to say."""
    program = Path(sys.argv[0])
    called = ["python", "-m", "ckpt_ema"] if program.suffix == ".py" else [program.name]
    chosen = [
        f"{name}={shlex.quote(value)}"
        for name, value in sorted(os.environ.items())
        if name.startswith("CKPT_EMA_")
    ]
    return " ".join([*chosen, shlex.join([*called, *sys.argv[1:]])])


def _append_step_summary(lines: list[str]) -> None:
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with contextlib.suppress(OSError), Path(path).open("a", encoding="utf-8") as summary:
            summary.write("\n".join(lines) + "\n")


def main() -> None:
    """Run the command line; never returns."""
    take_signals()
    # torch says it at import wherever numpy is missing, and nothing here needs numpy.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        app()
    except SignalError as error:  # before or after the command itself
        sys.exit(say_signal(error))
