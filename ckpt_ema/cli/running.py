"""Runs a library call that folds: shows the plan, its notices and progress, handles signals."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_ema.cli import exits
from ckpt_ema.cli.exits import say
from ckpt_ema.cli.options import variable

if TYPE_CHECKING:
    from ckpt_ema.output.manifest import Result
    from ckpt_ema.planning.plan import Plan

_MOST_ROWS = 24  # of the table of checkpoints; `ckpt-ema plan` shows more


class Running:
    """One call, with what it has planned."""

    def __init__(self, quiet: bool) -> None:
        self.plans: list[Plan] = []  # the plan, once execution has started
        self._quiet = quiet

    def result(self, call: "Callable[..., Result]", keywords: dict[str, Any]) -> "Result":
        """Return what a call returns, also where a signal arrives after publication."""
        from ckpt_ema.report.progress import ByteProgress
        from ckpt_ema.run import up_to_date, write_report

        command = command_line()
        shown = {"command": command, "started": self._started}
        try:
            with ByteProgress(self._quiet) as progress:

                def show(done_bytes: int, total_bytes: int) -> None:
                    if self.plans:  # of the ranks of a launch, only the first shows them
                        progress(done_bytes, total_bytes)

                return call(**keywords, **shown, progress=exits.ticking(show))
        except exits.SignalError:
            made = up_to_date(self.plans[0]) if self.plans else None
            if not made:
                raise
            if report := keywords.get("report"):
                write_report(made, report, command)
            return made

    def left(self, resume: bool) -> str:
        """Return what a signal leaves: nothing, or work that another run can continue."""
        from ckpt_ema.output.workspace import Workspace

        workspaces = [Workspace(one.output, one.work_id) for one in self.plans if resume]
        is_kept = any(workspace.path.exists() for workspace in workspaces)
        return "partial work kept, rerun with --resume" if is_kept else "nothing was written"

    def _started(self, plan: "Plan") -> None:
        from ckpt_ema.report import lines, terminal

        self.plans.append(plan)
        if not self._quiet:
            say(terminal.plan_text(plan, sys.stderr, _MOST_ROWS), "")
        say(*lines.notice_lines(plan, self._quiet))


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
