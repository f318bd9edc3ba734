"""The average of a watch: folded checkpoint by checkpoint, held beside the output, published."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_ema.containers.source import forget_headers
from ckpt_ema.errors import CkptEmaError, Code, RefusedError
from ckpt_ema.execute import How
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.notices import Notice
from ckpt_ema.options import Options
from ckpt_ema.output.destination import is_free, outputs_at
from ckpt_ema.output.manifest import Result, read_manifest
from ckpt_ema.output.workspace import HELD, Workspace
from ckpt_ema.planning.decide import Chosen, uncollected
from ckpt_ema.planning.fingerprint import precision
from ckpt_ema.planning.output import check_destination, named, sibling_of
from ckpt_ema.planning.state import State, count_folded
from ckpt_ema.planning.update import find_new, plan_new
from ckpt_ema.run import carry_out, made_before
from ckpt_ema.storage import storage_for
from ckpt_ema.updating import check_still_there, folded_so_far, publish_instead, read_states
from ckpt_ema.watching.events import Reporter


class HeldAverage:
    """What a watch has made so far; what is not published is held in its workspace."""

    def __init__(
        self, paths: Sequence[Path], options: Options, reporter: Reporter, how: How
    ) -> None:
        """Make it of a run, if the output can be; raises `RefusedError` otherwise."""
        self.output = named(options.output.output or sibling_of(paths[0]))
        check_destination(self.output, paths, storage_for(paths[0]))
        self._paths, self._how = paths, how
        output = replace(options.output, output=str(self.output))
        self._options = options._replace(output=output)
        self._reporter = reporter
        self.workspace = Workspace(self.output, HELD)
        self._held = self.workspace.output
        self._states: Sequence[State] = ()
        self._published: Sequence[State] = ()
        self.unpublished = 0  # checkpoints that were folded since the last publication

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that were folded, oldest first."""
        return self._states[0].checkpoints if self._states else ()

    def start(self) -> None:
        """Take stock of what is at the output path, and of what an interrupted watch has held."""
        self.workspace.kept = True  # until it is known that nothing is held
        self._published, held = folded_so_far(self.output, self._held)
        self._states = held or self._published
        for state in self._states:
            _check_asked(state, self._options)
        self.workspace.kept = bool(held)
        self.unpublished = count_folded(self._states) - count_folded(self._published)

    def find_new(self) -> Chosen:
        """Find the checkpoints of the run that were not folded yet; raises what `find_new` does."""
        with uncollected():
            return find_new(self._paths, self._options, self._states)

    def fold(self, chosen: Chosen, settled: Sequence[Checkpoint]) -> tuple[Notice, ...]:
        """Fold checkpoints and hold the result; returns warnings about their values."""
        engine = self._options.engine
        lenient = self._options._replace(engine=replace(engine, strict=False))
        with uncollected():
            plan = plan_new(chosen, settled, lenient, self._states)
        self._reporter.warn(plan.warnings)
        self.workspace.kept = True  # whatever comes before the result is noted
        try:
            made = carry_out(replace(plan, engine=engine), {**self._how, "held": self._held})
        except CkptEmaError:
            check_still_there(self._states, self._held if self.unpublished else self.output)
            raise
        forget_headers()  # that of a state grows with each checkpoint
        self._states = read_states(self._held)[1]
        self.unpublished += len(settled)
        return made.warnings

    def publish(self) -> bool:
        """Publish what is held, if anything is; after an interruption, once more does no harm.

        The disk tells what is held, since a signal may come before it is noted here. After an
        interrupted publication it is what was published before.
        """
        if not self.workspace.kept:
            return False
        held = [] if is_free(self._held) else read_states(self._held)[1]
        is_later = count_folded(held) > count_folded(self._published)
        if is_later:
            publish_instead(self._held, self.output, self._published)
        is_new = is_later or self.unpublished > 0
        self.unpublished, self.workspace.kept = 0, False
        if is_new:
            self._states = self._published = read_states(self.output)[1]
        return is_new

    def result(self) -> Result:
        """Return what was published."""
        outputs = outputs_at(self.output)
        return made_before(self.output, outputs, [read_manifest(one) for one in outputs])


def _check_asked(state: State, options: Options) -> None:
    """Refuse to continue averages that were made with other options."""
    before = {**state.asked.options, "accumulate": state.asked.accumulate}
    now = {**options.repeatable(), "accumulate": precision(options.engine)}
    shown, asked = (json.dumps(one, sort_keys=True) for one in (before, now))
    if shown != asked:
        folder = state.path.parent
        message = f"{folder} was made with other options: {shown}, not {asked}."
        hint = "Give the same options, or choose another --output."
        raise RefusedError(message, hint, code=Code.STATE_DIFFERS, path=folder)
