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
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_ema import __version__
from ckpt_ema.cli.exits import (
    SignalError,
    check_signals,
    errors_reported,
    ignore_signals,
    say,
    say_signal,
    stdout_reported,
    take_signals,
)
from ckpt_ema.cli.options import takes_options
from ckpt_ema.errors import Code, OptionError, printable
from ckpt_ema.options import COMMON, ENGINE, OUTPUT
from ckpt_ema.ranks import place_from

if TYPE_CHECKING:
    from ckpt_ema.output.result import Result
    from ckpt_ema.planning.plan import Plan
    from ckpt_ema.run import Progress

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
        show_envvar=False,
        rich_help_panel=COMMON,
        help="Replace an output that is there already.",
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        envvar="CKPT_EMA_PLOT",
        show_envvar=False,
        metavar="FILE",
        readable=False,
        show_default=False,
        rich_help_panel=OUTPUT,
        help="Draw the weights as a .png or .svg file, and into the model card; needs matplotlib.",
    ),
]
PartOption = Annotated[
    str | None,
    typer.Option(
        "--part",
        envvar="CKPT_EMA_PART",
        show_envvar=False,
        metavar="I/N",
        show_default=False,
        rich_help_panel=ENGINE,
        help="Do the I-th of N parts of the work, for arrays of jobs; `ckpt-ema finish` publishes"
        " the output when all are done.",
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        envvar="CKPT_EMA_RESUME",
        show_envvar=False,
        rich_help_panel=ENGINE,
        help="Keep what is done if it is interrupted, and go on from what an interrupted run kept.",
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        envvar="CKPT_EMA_QUIET",
        show_envvar=False,
        rich_help_panel=OUTPUT,
        help="Say nothing but errors.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print JSON on stdout.")
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
    part: PartOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Average the checkpoints in RUN and print the path of the result."""
    with errors_reported(kept=resume):
        from ckpt_ema.report import lines, table
        from ckpt_ema.report.progress import ByteProgress

        if part and place_from(os.environ):
            raise OptionError(
                "--part is for separate jobs; the ranks of a launch share the work themselves.",
                code=Code.CONFLICTING_OPTIONS,
            )
        how = {"plot": plot, "overwrite": overwrite, "resume": resume}
        with ByteProgress(quiet) as progress:
            made = _average(run, part, {**options, **how}, quiet, progress)
        if part and not made.is_up_to_date:
            if not quiet:
                say(lines.part_line(made.plan, part))
            return
        if not made.manifests:
            return  # another rank than the first
        ignore_signals()  # the output is there: from here on this is a success
        if not quiet:
            say(*lines.reading_lines(made), lines.result_line(made))
        _append_step_summary(table.summary_lines(made.plan))
        _print_outputs(made, as_json)


def _average(
    run: list[Path], part: str | None, keywords: dict[str, Any], quiet: bool, progress: "Progress"
) -> "Result":
    """Make an average or a part of it, and show the plan and the progress of the first rank."""
    from ckpt_ema.output.manifest import is_up_to_date
    from ckpt_ema.report import lines, table
    from ckpt_ema.run import average, average_part, up_to_date

    plans: list[Plan] = []

    def started(plan: "Plan") -> None:
        plans.append(plan)
        if not quiet:
            say(table.plan_text(plan, sys.stderr, _MOST_ROWS), "")
            say(*lines.remark_lines(plan))

    def tick(done_bytes: int, total_bytes: int) -> None:
        check_signals()
        if plans:
            progress(done_bytes, total_bytes)

    keywords = {**keywords, "command": _command(), "started": started, "progress": tick}
    try:
        if part:
            return average_part(run, part, **keywords)
        return average(run, launch=True, waiting=lambda late: say(str(late)), **keywords)
    except SignalError:
        if not plans or not is_up_to_date(plans[0]):
            raise
        made = up_to_date(plans[0])  # the signal came when the output had its name already
        assert made
        return made


def _print_outputs(result: "Result", as_json: bool) -> None:
    """The manifests, or the paths of the outputs, a line each."""
    with stdout_reported(done=f"{printable(result.output)} is complete"):
        if as_json:
            one, *more = result.manifests
            typer.echo(json.dumps([one, *more] if more else one, indent=2))
        for output in () if as_json else result.outputs:
            # A path as the bytes that it is, also where the terminal has no letters for them.
            typer.echo(os.fsencode(output))


@app.command(
    epilog=_examples(
        "ckpt-ema average runs/ -o averaged --part $SLURM_ARRAY_TASK_ID/64  # in each job of 64",
        "ckpt-ema finish averaged",
    )
)
def finish(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            show_default=False,
            readable=False,
            help="What was --output, or would have been.",
        ),
    ],
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish an output whose parts are all made, and print its path."""
    with errors_reported():
        from ckpt_ema.report import lines
        from ckpt_ema.run import finish as publish

        finished = publish(output, overwrite=overwrite)
        ignore_signals()
        if not quiet:
            say(*lines.reading_lines(finished), lines.result_line(finished))
        _print_outputs(finished, as_json)


@app.command(
    epilog=_examples(
        "ckpt-ema plan runs/",
        "ckpt-ema plan runs/ --half-life 500,2000 --plot weights.png",
        "ckpt-ema plan runs/ --decay 0.4 --json | jq '.averages[].checkpoints[].weight'",
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
        from ckpt_ema.output.destination import is_free
        from ckpt_ema.planning.plan import plan as make_plan
        from ckpt_ema.report import figure, lines, table

        decided = make_plan(run, **options)
        if plot:
            figure.plot(decided, plot)
        if as_json:
            typer.echo(json.dumps(manifest.describe_plan(decided), indent=2))
        else:
            typer.echo(table.plan_text(decided, sys.stdout, _MOST_ROWS_OF_PLAN))
        if not quiet:
            say(*lines.remark_lines(decided))
            if not is_free(decided.output) and not manifest.is_up_to_date(decided):
                say(f"note: {printable(decided.output)} exists already and is something else.")


@app.command()
def formats(
    as_json: JsonOption = False,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print a table in Markdown.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Show which trainers' checkpoints are understood, and where their weights are."""
    from ckpt_ema.report import trainers

    with errors_reported():
        if as_json:
            typer.echo(json.dumps(trainers.described(), indent=2))
        elif markdown:
            typer.echo("\n".join(trainers.markdown()))
        else:
            width = max(40, min(100, shutil.get_terminal_size().columns))
            typer.echo("\n".join(trainers.lines(width)))


def _command() -> str:
    """The command as a person would type it again, with what the environment has to say."""
    program = Path(sys.argv[0])
    called = ["python", "-m", "ckpt_ema"] if program.suffix == ".py" else [program.name]
    chosen = [
        f"{name}={shlex.quote(value)}"
        for name, value in sorted(os.environ.items())
        if name.startswith("CKPT_EMA_")
    ]
    # Each part is given another one.
    words = [*called, *(word for word in sys.argv[1:] if not word.startswith("--part="))]
    if "--part" in words:
        place = words.index("--part")
        del words[place : place + 2]
    return " ".join([*chosen, shlex.join(words)])


def _append_step_summary(lines: list[str]) -> None:
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with contextlib.suppress(OSError), Path(path).open("a", encoding="utf-8") as summary:
            summary.write("\n".join(lines) + "\n")


def main() -> None:
    """Run the command line; never returns."""
    take_signals()
    # A launch reports its errors itself; torch's store would add a stack trace to each.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    # torch says it at import wherever numpy is missing, and nothing here needs numpy.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        app()
    except SignalError as error:  # before or after the command itself
        sys.exit(say_signal(error))
