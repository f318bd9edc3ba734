"""`ckpt-ema update`: folds what is new in a run into an output."""

from functools import partial
from typing import Annotated, Any

import typer

from ckpt_ema.cli import exits
from ckpt_ema.cli.options import takes_options
from ckpt_ema.cli.running import Running

EXAMPLES = """
ckpt-ema average runs/ -o averaged --keep-state
ckpt-ema update averaged               # once there are new checkpoints
ckpt-ema update averaged /moved/runs
"""


@takes_options
def update(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", readable=False)],
    run: Annotated[list[str] | None, typer.Argument(metavar="RUN", readable=False)] = None,
    *,
    device: str,
    threads: str | None,
    tile_size: str | None,
    max_memory: str | None,
    strict: bool,
    sync: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Fold the new checkpoints of a run into an average.

    OUTPUT was made with --keep-state. It becomes the average of all checkpoints, byte for byte,
    even if the trainer has deleted those folded before. RUN is the run that it was made of, unless
    given.
    """
    with exits.errors_reported():
        from ckpt_ema.updating import update as update_output

        running = Running(quiet)
        engine = {"device": device, "threads": threads, "tile_size": tile_size}
        keywords: dict[str, Any] = {
            **engine,
            "max_memory": max_memory,
            "strict": strict,
            "sync": sync,
        }
        result = running.result(partial(update_output, output, run or None), keywords)
        exits.print_result(result, quiet=quiet, as_json=json)
