"""`ckpt-ema formats`: the trainers whose checkpoints are read."""

import json as json_format
import shutil

import typer

from ckpt_ema.cli.exits import errors_reported
from ckpt_ema.cli.options import JSON, MARKDOWN, takes_options

EXAMPLES = "ckpt-ema formats"


@takes_options(JSON, MARKDOWN)
def formats(*, json: bool, markdown: bool) -> None:
    """List the trainers whose checkpoints are read, and where their model weights are."""
    from ckpt_ema.report import trainers

    with errors_reported():
        if json:
            typer.echo(json_format.dumps(trainers.described(), indent=2))
        elif markdown:
            typer.echo("\n".join(trainers.markdown()))
        else:
            width = max(40, min(100, shutil.get_terminal_size().columns))
            typer.echo("\n".join(trainers.lines(width)))
