"""`ckpt-ema compare`: two checkpoints beside each other."""

import json as json_format
import sys
from typing import Annotated, Any

import typer

from ckpt_ema.cli import exits
from ckpt_ema.cli.exits import say, show
from ckpt_ema.cli.options import takes_options

EXAMPLES = """
ckpt-ema compare runs/checkpoint-900 runs/checkpoint-1000
ckpt-ema compare runs@1000 runs-ema
ckpt-ema compare a.safetensors s3://bucket/run/b.pt --exit-code -q && echo equal
"""
_MOST_ROWS = 10  # of each table; --json has them all


@takes_options
def compare(
    a: Annotated[str, typer.Argument(metavar="A", show_default=False, readable=False)],
    b: Annotated[str, typer.Argument(metavar="B", show_default=False, readable=False)],
    *,
    reading: dict[str, Any],
    exit_code: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Compare the checkpoints A and B, tensor by tensor.

    Each is a folder, a file or a URI, of any format that is read, or a step of a run: RUN@STEP.
    """
    with exits.errors_reported():
        from ckpt_ema.measure.comparison import compare as measure
        from ckpt_ema.report.comparison_text import comparison_text
        from ckpt_ema.report.progress import ByteProgress

        with ByteProgress(quiet, "comparing") as progress:
            found = measure(a, b, progress=exits.ticking(progress), **reading)
        if json:
            show(json_format.dumps(found.described(), indent=2))
        else:
            show(comparison_text(found, sys.stdout, _MOST_ROWS))
        say(*[] if quiet else [f"note: {note}" for note in found.notes])
    if exit_code and not found.is_equal:
        raise typer.Exit(1)
