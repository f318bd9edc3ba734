"""`ckpt-ema select`: averages are evaluated, and the best is kept."""

import json as json_format
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ckpt_ema.cli import exits
from ckpt_ema.cli.exits import say
from ckpt_ema.cli.options import RunArgument, takes_options
from ckpt_ema.cli.running import command_line
from ckpt_ema.errors import printable

if TYPE_CHECKING:
    from ckpt_ema.output.candidates import Evaluated
    from ckpt_ema.output.selected import Selection
    from ckpt_ema.planning.plan import Plan
    from ckpt_ema.report.progress import ByteProgress

EXAMPLES = """
ckpt-ema select runs/ --last 4,8 --eval 'python eval.py {}' --metric loss
"""
_MOST_ROWS = 24  # of the table of checkpoints


@takes_options
def select(
    run: RunArgument,
    *,
    averaging: dict[str, Any],
    evaluate: str | None,
    metric: str | None,
    minimize: bool,
    maximize: bool,
    greedy: bool,
    jobs: str | None,
    timeout: str | None,
    keep_all: bool,
    report: str | None,
    overwrite: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Evaluate averages and the last checkpoint; keep the best."""
    keywords = {
        **averaging,
        "evaluate": evaluate,
        "metric": metric,
        "minimize": minimize,
        "maximize": maximize,
        "greedy": greedy,
        "jobs": jobs,
        "timeout": timeout,
        "keep_all": keep_all,
        "overwrite": overwrite,
    }
    _select(run, keywords, _Shown(evaluate or "", metric or "", quiet, report), json)


def _select(run: list[str], keywords: dict[str, Any], shown: "_Shown", as_json: bool) -> None:
    with exits.errors_reported(shown.left), closing(shown):
        from ckpt_ema.selection.select import select as select_best

        command = command_line()
        selection = select_best(
            run,
            command=command,
            progress=shown.progress,
            started=shown.started,
            evaluated=shown.evaluated,
            publishing=exits.ignore_signals,
            **keywords,
        )
        shown.result(selection, command)
        text = json_format.dumps(selection.described(), indent=2) if as_json else ""
        exits.print_paths([selection.path], text, selection.path)


class _Shown:
    """What is printed on stderr."""

    def __init__(self, command: str, metric: str, quiet: bool, report: str | None) -> None:
        self.quiet, self._report = quiet, report
        self._command, self._metric = command, metric
        self._plans: list[Plan] = []  # the plan, once averages are made
        self._bar: ByteProgress | None = None  # of the pass over the checkpoints

    def close(self) -> None:
        """Remove the bar."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def left(self) -> str:
        """Return what a signal leaves: nothing, or candidates that another run can use."""
        from ckpt_ema.output.candidates import leftover

        is_kept = any(leftover(plan.output) for plan in self._plans)
        how = "partial work kept, the same command continues"
        return how if is_kept else "nothing was written"

    def started(self, plan: "Plan") -> None:
        """Show the averages."""
        from ckpt_ema.report import lines, terminal

        if self._report:
            from ckpt_ema.report.pages.report import check_report

            check_report(self._report, [plan.output, *plan.input_paths])
        self._plans.append(plan)
        if not self.quiet:
            say(terminal.plan_text(plan, sys.stderr, _MOST_ROWS), "")
        say(*lines.notice_lines(plan, self.quiet))
        if not self.quiet:
            say(f"evaluating each with: {printable(self._command)}")

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        """Show how far a pass over checkpoints has come."""
        from ckpt_ema.report.progress import ByteProgress

        self._bar = self._bar or ByteProgress(self.quiet)
        exits.ticking(self._bar)(done_bytes, total_bytes)
        if done_bytes >= total_bytes:
            self.close()

    def evaluated(self, name: str, found: "Evaluated") -> None:
        """Show one evaluation; a failure with its last lines, under -q too."""
        if found.failure:
            first, *lines = found.failure.splitlines()
            say(f"{printable(name)}: failed after {found.seconds:.1f} s: {first}")
            say(*(f"  {line}" for line in lines))
        elif not self.quiet:
            from ckpt_ema.report.selection import number

            value = number(found.metrics[self._metric])
            say(f"{printable(name)}: {self._metric} {value} in {found.seconds:.1f} s")

    def result(self, selection: "Selection", command: str) -> None:
        """Show warnings, the table and what is best, and write the page if one is wanted."""
        from ckpt_ema.report import lines
        from ckpt_ema.report.selection import result_line, table_lines

        exits.ignore_signals()  # what was asked for is complete
        known = self._plans[0].warnings if self._plans else ()
        say(*lines.warning_lines(selection.warnings[len(known) :]))
        if not self.quiet:
            say("\n".join(["", *table_lines(selection), ""]), result_line(selection))
        if self._report:
            from ckpt_ema.report.pages.report import check_report, write_report
            from ckpt_ema.report.pages.selection import selection_page

            check_report(self._report, [selection.output])
            page, done = selection_page(selection, command), f"{selection.path} is complete"
            write_report(self._report, page, done)
