"""`ckpt-ema formats`: which trainers' checkpoints are read."""

import json as json_format
import shutil

from ckpt_ema.cli import exits
from ckpt_ema.cli.exits import show
from ckpt_ema.cli.options import takes_options

EXAMPLES = "ckpt-ema formats"


@takes_options
def formats(*, json: bool, markdown: bool) -> None:
    """List the trainers whose checkpoints are read."""
    from ckpt_ema.report import trainers

    with exits.errors_reported():
        if json:
            show(json_format.dumps(trainers.described(), indent=2))
        elif markdown:
            show("\n".join(trainers.markdown()))
        else:
            width = max(40, min(100, shutil.get_terminal_size().columns))
            show("\n".join(trainers.lines(width)))
