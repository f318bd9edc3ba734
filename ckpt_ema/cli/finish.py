"""`ckpt-ema finish`: publishes an output that was made in parts."""

from typing import Annotated

import typer

from ckpt_ema.cli import exits
from ckpt_ema.cli.options import takes_options

EXAMPLES = """
ckpt-ema average runs/ -o averaged --part 3/64   # in the third of 64 jobs
ckpt-ema finish averaged                        # when all parts are made
"""


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
