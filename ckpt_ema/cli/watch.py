"""`ckpt-ema watch`: averages a run while it goes on."""

import gc
import json as json_format
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_ema.cli import exits
from ckpt_ema.cli.exits import say, show
from ckpt_ema.cli.options import takes_options
from ckpt_ema.cli.running import command_line
from ckpt_ema.errors import printable

if TYPE_CHECKING:
    from ckpt_ema.watching.events import Event

EXAMPLES = """
ckpt-ema watch runs/ -o averaged --half-life 2000
ckpt-ema watch runs/ -o averaged --until-step 100000 --idle 2h
ckpt-ema watch runs/ -o averaged --on-publish 'evaluate {} >> losses.txt'
"""
_HIDDEN = ("started", "waiting", "folded", "published", "left-out")  # kinds of events, by -q


@takes_options
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", readable=False)],
    *,
    continued: dict[str, Any],
    publish_every: str,
    until_step: str | None,
    idle: str | None,
    interval: str,
    skip_missed: bool,
    on_publish: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """Average a run while it goes on.

    Each checkpoint is folded once, before the trainer deletes it. RUN and the options are those of
    `ckpt-ema average`.
    """
    with exits.errors_reported(lambda: "what was folded is kept"):
        from ckpt_ema.watching.watch import watch as watch_run

        gc.enable()  # it may take weeks
        result = watch_run(
            run,
            publish_every=publish_every,
            until_step=until_step,
            idle=idle,
            interval=interval,
            skip_missed=skip_missed,
            on_publish=on_publish,
            event=partial(_tell, quiet=quiet, as_json=json),
            command=command_line(),
            progress=lambda *_: exits.check_signals(),
            **continued,
        )
        if not json:
            for output in result.outputs:
                show(printable(output))


def _tell(event: "Event", *, quiet: bool, as_json: bool) -> None:
    """Print a line for an event."""
    kind = event.kind.value
    if as_json:
        row = {"time": time.time(), "event": kind, "text": event.text}
        show(json_format.dumps({**row, "checkpoints": list(event.checkpoints)}))
    elif not (quiet and kind in _HIDDEN):
        say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(event.text)}")
