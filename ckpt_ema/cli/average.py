"""`ckpt-ema average`: the whole job."""

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from ckpt_ema.cli import exits
from ckpt_ema.cli.exits import say
from ckpt_ema.cli.options import RunArgument, takes_options
from ckpt_ema.cli.running import Running
from ckpt_ema.errors import Code, OptionError, printable
from ckpt_ema.place import place_from

if TYPE_CHECKING:
    from ckpt_ema.output.manifest import Result

EXAMPLES = """
ckpt-ema plan runs/                                 # show the weights first
ckpt-ema average runs/ --half-life 2000 -o averaged
OUT=$(ckpt-ema average runs/ -q) && evaluate "$OUT"
"""


@takes_options
def average(
    run: RunArgument,
    *,
    options: dict[str, Any],
    plot: str | None,
    report: str | None,
    overwrite: bool,
    part: str | None,
    resume: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Average the checkpoints of a run into one model.

    RUN is a folder, or checkpoints oldest first. Environment variables, CKPT_EMA_DECAY and so on,
    set options too.
    """
    running = Running(quiet)
    files = {"plot": plot, "report": report}
    keywords = {**options, **files, "overwrite": overwrite, "resume": resume}
    with exits.errors_reported(lambda: running.left(resume)):
        result = running.result(partial(_call, run, part), keywords)
        if part and not result.is_up_to_date:
            path = printable(result.output)
            done = f"part {part} of {path} is done; when all parts are, run: ckpt-ema finish {path}"
            say(*[] if quiet else [done])
        elif result.manifests:  # only the first rank has them
            exits.print_result(result, quiet=quiet, as_json=json)


def _call(run: list[str], part: str | None, **keywords: Any) -> "Result":
    from ckpt_ema.run import average as average_whole
    from ckpt_ema.run import average_part

    if part and place_from(os.environ):
        why = "the ranks of a launch share the work by themselves"
        message = f"--part is for separate jobs; {why}."
        raise OptionError(message, code=Code.CONFLICTING_OPTIONS)
    if part:
        return average_part(run, part, **keywords)
    return average_whole(run, launch=True, waiting=say, **keywords)
