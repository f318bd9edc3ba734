"""`ckpt-ema average`: the whole job."""

import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_ema.cli.exits import (
    SignalError,
    check_signals,
    errors_reported,
    ignore_signals,
    print_outputs,
    say,
)
from ckpt_ema.cli.options import (
    JSON,
    OVERWRITE,
    PART,
    PLOT,
    QUIET,
    RESUME,
    RunArgument,
    takes_options,
    variable,
)
from ckpt_ema.errors import OptionError
from ckpt_ema.ranks import joined

if TYPE_CHECKING:
    from ckpt_ema.fold.tiles import Share
    from ckpt_ema.output.result import Result
    from ckpt_ema.planning.plan import Plan
    from ckpt_ema.ranks import Ranks
    from ckpt_ema.run import Progress

EXAMPLES = """
ckpt-ema plan runs/                                 # show the weights first
ckpt-ema average runs/
ckpt-ema average runs/ --half-life 2000 -o averaged
ckpt-ema average runs/ --decay 0.4,0.8 --last 4,8   # four averages, one pass
OUT=$(ckpt-ema average runs/ -q) && evaluate "$OUT"
"""
OWN_ROWS = (PLOT, OVERWRITE, PART, RESUME, JSON, QUIET)
_MOST_ROWS = 24  # of the table of checkpoints; `ckpt-ema plan` shows more


@takes_options(*OWN_ROWS)
def average(
    run: RunArgument,
    *,
    options: dict[str, Any],
    plot: str | None,
    overwrite: bool,
    part: str | None,
    resume: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Average the checkpoints in RUN, a folder or checkpoints oldest first.

    Every option can be set by an environment variable, CKPT_EMA_DECAY and so on.
    """
    with errors_reported(kept=resume), joined(os.environ) as ranks:
        from ckpt_ema.fold.tiles import share_from
        from ckpt_ema.planning.plan import plan as make_plan
        from ckpt_ema.report import figure, lines, table
        from ckpt_ema.report.progress import ByteProgress
        from ckpt_ema.run import up_to_date

        share = share_from(part) if part else None
        is_first = ranks is None or ranks.rank == 0
        quiet = quiet or not is_first
        decided = make_plan(run, **options)
        result = up_to_date(decided, overwrite=overwrite)
        if ranks:
            ranks.agree("plan", f"{decided.work_id} {'to do' if result is None else 'is done'}")
        picture = figure.plot(decided, plot) if plot and is_first else None
        if is_first:
            say(*lines.warning_lines(decided.warnings))
        if result is None:
            if not quiet:
                say(table.plan_text(decided, sys.stderr, _MOST_ROWS), "")
                say(*lines.note_lines(decided))
            with ByteProgress(quiet) as progress:
                result = _carry_out(
                    decided,
                    share,
                    ranks,
                    overwrite,
                    picture=picture,
                    progress=_watched(progress),
                    command=_command(),
                    resume=resume,
                )
        if not is_first:
            return
        if result is None:
            if not quiet:
                say(lines.part_line(os.fspath(decided.output), str(share)))
            return
        ignore_signals()  # the output is there: from here on this is a success
        say(*lines.warning_lines(result.warnings))
        if not quiet:
            say(lines.result_line(result))
        _append_step_summary(table.summary_lines(decided))
        print_outputs(result, json)


def _watched(progress: "Progress") -> "Progress":
    """Check for signals at each call too, so that none is lost."""

    def tick(done_bytes: int, total_bytes: int) -> None:
        check_signals()
        progress(done_bytes, total_bytes)

    return tick


def _carry_out(
    decided: "Plan",
    share: "Share | None",
    ranks: "Ranks | None",
    overwrite: bool,
    **how: Any,
) -> "Result | None":
    """All of it, a share of it (None: others do the rest), or that of this rank."""
    from ckpt_ema.output.manifest import is_up_to_date
    from ckpt_ema.parts import carry_out_part, carry_out_together
    from ckpt_ema.run import carry_out, up_to_date

    if ranks and share:
        raise OptionError("--part is for jobs that run apart; the ranks of a launch are parts.")
    if ranks:
        return carry_out_together(decided, ranks, overwrite=overwrite, **how)
    if share:
        carry_out_part(decided, share, **how)
        return None
    try:
        return carry_out(decided, overwrite=overwrite, **how)
    except SignalError:
        if not is_up_to_date(decided):
            raise
        return up_to_date(decided)  # it came when the output had its name already


def _command() -> str:
    """Return the command as a person would type it again, with its environment variables."""
    program = Path(sys.argv[0])
    called = ["python", "-m", "ckpt_ema"] if program.suffix == ".py" else [program.name]
    chosen = [
        f"{name}={shlex.quote(value)}"
        for name, value in sorted(os.environ.items())
        if name.startswith("CKPT_EMA_") and name != variable("part")
    ]
    # Each part has its own --part.
    words = [*called, *(word for word in sys.argv[1:] if not word.startswith("--part="))]
    if "--part" in words:
        place = words.index("--part")
        del words[place : place + 2]
    return " ".join([*chosen, shlex.join(words)])


def _append_step_summary(lines: list[str]) -> None:
    """Add to the summary page of a GitHub job."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with contextlib.suppress(OSError), Path(path).open("a", encoding="utf-8") as summary:
            summary.write("\n".join(lines) + "\n")
