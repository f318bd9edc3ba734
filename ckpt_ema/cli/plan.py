"""`ckpt-ema plan`: what `average` would do."""

import json as json_format
import sys
from typing import Any

from ckpt_ema.cli import exits
from ckpt_ema.cli.exits import say, show
from ckpt_ema.cli.options import RunArgument, takes_options
from ckpt_ema.errors import printable

EXAMPLES = """
ckpt-ema plan runs/ --explain
ckpt-ema plan runs/ --half-life 500,2000 --plot weights.png
ckpt-ema plan runs/ --decay 0.4 --json | jq '.averages[].checkpoints[].weight'
"""
_MOST_ROWS = 200  # of the table of checkpoints; --json has them all


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
