"""`ckpt-ema average`: the whole job."""

import gc
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_ema.cli import exits
from ckpt_ema.cli.exits import say
from ckpt_ema.cli.options import RunArgument, takes_options, variable
from ckpt_ema.errors import Code, OptionError, printable
from ckpt_ema.place import place_from

if TYPE_CHECKING:
    from ckpt_ema.execute import Progress
    from ckpt_ema.output.manifest import Result
    from ckpt_ema.planning.plan import Plan

EXAMPLES = """
ckpt-ema plan runs/                                 # show the weights first
ckpt-ema average runs/
ckpt-ema average runs/ --half-life 2000 -o averaged
ckpt-ema average runs/ --decay 0.4,0.8 --last 4,8   # four averages, one pass
OUT=$(ckpt-ema average runs/ -q) && evaluate "$OUT"
"""
_MOST_ROWS = 24  # of the table of checkpoints; `ckpt-ema plan` shows more


@takes_options
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
    plans: list[Plan] = []  # the plan, once execution has started

    def is_kept() -> bool:
        from ckpt_ema.output.workspace import Workspace

        return resume and any(Workspace(one.output, one.work_id).path.exists() for one in plans)

    with exits.errors_reported(is_kept):
        from ckpt_ema.report.progress import ByteProgress

        if part and place_from(os.environ):
            why = "the ranks of a launch share the work by themselves"
            message = f"--part is for separate jobs; {why}."
            raise OptionError(message, code=Code.CONFLICTING_OPTIONS)
        keywords = {**options, "plot": plot, "overwrite": overwrite, "resume": resume}
        with ByteProgress(quiet) as progress:
            result = _average(run, part, keywords, quiet, progress, plans)
        if part and not result.is_up_to_date:
            path = printable(result.output)
            done = f"part {part} of {path} is done; when all parts are, run: ckpt-ema finish {path}"
            say(*[] if quiet else [done])
        elif result.manifests:  # only the first rank has them
            exits.print_result(result, quiet=quiet, as_json=json)


def _average(
    run: list[str],
    part: str | None,
    keywords: dict[str, Any],
    quiet: bool,
    progress: "Progress",
    plans: "list[Plan]",
) -> "Result":
    """Make the averages or a part; the first rank shows progress and the plan, and notes it."""
    from ckpt_ema.report import lines, terminal
    from ckpt_ema.run import average as average_whole
    from ckpt_ema.run import average_part, up_to_date

    def started(plan: "Plan") -> None:
        plans.append(plan)
        if not quiet:
            say(terminal.plan_text(plan, sys.stderr, _MOST_ROWS), "")
        say(*lines.notice_lines(plan, quiet))

    def tick(done_bytes: int, total_bytes: int) -> None:
        at_work()
        if plans:
            progress(done_bytes, total_bytes)

    keywords = {**keywords, "command": command_line(), "started": started, "progress": tick}
    try:
        if part:
            return average_part(run, part, **keywords)
        return average_whole(run, launch=True, waiting=say, **keywords)
    except exits.SignalError:
        made = up_to_date(plans[0]) if plans else None
        if not made:
            raise
        return made  # the signal arrived after publication


def at_work() -> None:
    """Raise for a signal whose own error was swallowed, and collect garbage from now on."""
    exits.check_signals()
    if not gc.isenabled():
        gc.freeze()  # the plan and all modules stay until the end
        gc.enable()


def command_line() -> str:
    """Return the command as a person would type it again, with its environment variables."""
    program = Path(sys.argv[0])
    called = ["python", "-m", "ckpt_ema"] if program.suffix == ".py" else [program.name]
    chosen = [
        f"{name}={shlex.quote(value)}"
        for name, value in sorted(os.environ.items())
        if name.startswith("CKPT_EMA_") and name != variable("part")
    ]
    # Each part has its own --part.
    words = [word for word in sys.argv[1:] if not word.startswith("--part=")]
    if "--part" in words:
        place = words.index("--part")
        del words[place : place + 2]
    return " ".join([*chosen, shlex.join([*called, *words])])
