"""`ckpt-ema inspect`: the checkpoints of a run beside each other."""

import json as json_format
import sys
from typing import TYPE_CHECKING, Any

from ckpt_ema.cli import exits
from ckpt_ema.cli.exits import say, show
from ckpt_ema.cli.options import RunArgument, takes_options
from ckpt_ema.cli.running import command_line

if TYPE_CHECKING:
    from ckpt_ema.planning.plan import Plan

EXAMPLES = """
ckpt-ema inspect runs/
ckpt-ema inspect runs/ --last 20 --plot path.png --report report.html
ckpt-ema inspect runs/ --json | jq '.checkpoints[] | select(.stands_out) | .name'
"""
_MOST_ROWS = 200  # of the table of checkpoints; --json has them all


@takes_options
def inspect(
    run: RunArgument,
    *,
    inputs: dict[str, Any],
    plot: str | None,
    report: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """Measure the checkpoints in RUN, and name those that stand out.

    RUN is what `ckpt-ema average` takes. Every checkpoint's norm, its distances to the checkpoint
    before and to the average, and its zeros and non-finite values are measured in one pass.
    """
    with exits.errors_reported():
        from ckpt_ema.measure.inspection import inspect as measure
        from ckpt_ema.report import figure, lines
        from ckpt_ema.report.inspection_text import inspection_text
        from ckpt_ema.report.pages.inspection import inspection_page
        from ckpt_ema.report.pages.report import check_report, write_report
        from ckpt_ema.report.progress import ByteProgress

        def started(plan: "Plan") -> None:
            if plot:
                figure.check_drawable(plot, plan)
            if report:
                check_report(report, [*plan.input_paths])

        with ByteProgress(quiet, "inspecting") as progress:
            found = measure(run, started=started, progress=exits.ticking(progress), **inputs)
        if plot:
            figure.plot(found, plot)
        if report:
            write_report(report, inspection_page(found, command_line()), "nothing else is written")
        if json:
            show(json_format.dumps(found.described(), indent=2))
        else:
            show(inspection_text(found, sys.stdout, _MOST_ROWS))
        say(*lines.warning_lines(found.warnings))
        say(*[] if quiet else [f"note: {note}" for note in found.notes])
