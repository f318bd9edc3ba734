"""`ckpt-ema average`: the whole job."""

import os
from typing import Any

from ckpt_ema.cli import exits
from ckpt_ema.cli.exits import say
from ckpt_ema.cli.options import RunArgument, takes_options
from ckpt_ema.cli.running import Running
from ckpt_ema.errors import Code, OptionError, printable
from ckpt_ema.place import place_from

EXAMPLES = """
ckpt-ema plan runs/                                 # show the weights first
ckpt-ema average runs/
ckpt-ema average runs/ --half-life 2000 -o averaged
ckpt-ema average runs/ --decay 0.4,0.8 --last 4,8   # four averages, one pass
OUT=$(ckpt-ema average runs/ -q) && evaluate "$OUT"
"""


@takes_options
def average(
    run: RunArgument,
    *,
    options: dict[str, Any],
    plot: str | None,
    overwrite: bool,
    part: str | None,
    resume: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Average the checkpoints in RUN, a folder or checkpoints oldest first.

    Every option can be set by an environment variable, CKPT_EMA_DECAY and so on.
    """
    from ckpt_ema.report.progress import ByteProgress

    progress = ByteProgress(quiet)
    running = Running(quiet, progress)

    def is_kept() -> bool:
        from ckpt_ema.output.workspace import Workspace

        plans = running.plans
        return resume and any(Workspace(one.output, one.work_id).path.exists() for one in plans)

    with exits.errors_reported(is_kept):
        from ckpt_ema.run import average as average_whole
        from ckpt_ema.run import average_part

        if part and place_from(os.environ):
            why = "the ranks of a launch share the work by themselves"
            message = f"--part is for separate jobs; {why}."
            raise OptionError(message, code=Code.CONFLICTING_OPTIONS)
        keywords = {**options, "plot": plot, "overwrite": overwrite, "resume": resume}
        keywords |= running.keywords()
        with progress:
            result = running.result(
                lambda: (
                    average_part(run, part, **keywords)
                    if part
                    else average_whole(run, launch=True, waiting=say, **keywords)
                )
            )
        if part and not result.is_up_to_date:
            path = printable(result.output)
            done = f"part {part} of {path} is done; when all parts are, run: ckpt-ema finish {path}"
            say(*[] if quiet else [done])
        elif result.manifests:  # only the first rank has them
            exits.print_result(result, quiet=quiet, as_json=json)
