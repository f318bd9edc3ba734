"""`ckpt-ema finish`: publish an output whose parts are made."""

from typing import Annotated

import typer

from ckpt_ema.cli.exits import errors_reported, ignore_signals, print_outputs, say
from ckpt_ema.cli.options import JSON, OVERWRITE, QUIET, takes_options

EXAMPLES = """
ckpt-ema average runs/ -o averaged --part 3/64   # in the third of 64 jobs
ckpt-ema finish averaged                        # when all parts are made
"""


@takes_options(OVERWRITE, JSON, QUIET)
def finish(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", readable=False)],
    *,
    overwrite: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Publish an output whose parts are all made, and print its path.

    OUTPUT is what --output was, or its default.
    """
    with errors_reported():
        from ckpt_ema.report import lines
        from ckpt_ema.run import finish as publish

        result = publish(output, overwrite=overwrite)
        ignore_signals()
        say(*lines.warning_lines(result.warnings))
        if not quiet:
            say(lines.result_line(result))
        print_outputs(result, json)
