"""Watches a run: folds each checkpoint once it is complete, before the trainer deletes it.

The run is polled, which works on network file systems and object stores alike. What was folded is
held beside the output until it is published, so that a killed process loses nothing.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ckpt_ema.errors import CkptEmaError, Code, FailedError, IncompleteError, RefusedError, some
from ckpt_ema.execute import How
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.verdict import Reason
from ckpt_ema.notices import Notice
from ckpt_ema.options import Options, PathLike, make_options
from ckpt_ema.output.destination import is_free
from ckpt_ema.output.manifest import Result, read_manifest
from ckpt_ema.output.publish import publish_held
from ckpt_ema.output.workspace import Workspace
from ckpt_ema.planning.decide import Chosen, paths_of, uncollected
from ckpt_ema.planning.output import sibling_of
from ckpt_ema.planning.state import State
from ckpt_ema.planning.update import find_new, new_checkpoints, plan_new
from ckpt_ema.run import RunKeywords, carry_out, made_before, split
from ckpt_ema.storage import storages_anew
from ckpt_ema.storage.local import Local
from ckpt_ema.updating import read_states
from ckpt_ema.values import TIME
from ckpt_ema.watching.hook import Hook
from ckpt_ema.watching.sightings import Listing, Sightings

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Of a run without checkpoints, or without a complete one.
_NOT_YET = (Code.NO_CHECKPOINTS, Code.NOT_FOUND, Code.NOTHING_SELECTED)
# Warnings that change with every checkpoint; one is enough.
_OF_WEIGHTS = (Code.FEW_CHECKPOINTS, Code.UNEVEN_WEIGHTS, Code.UNEVEN_GAPS)
_KEY = "watch"  # of the workspace: one watch for each output


class Kind(Enum):
    """What happened."""

    STARTED = "started"
    WAITING = "waiting"  # for a checkpoint that is incomplete, or may still change
    FOLDED = "folded"
    PUBLISHED = "published"
    MISSED = "missed"  # a checkpoint was deleted before it was folded
    WARNING = "warning"
    RETRYING = "retrying"  # something failed that may work later


class Event(NamedTuple):
    """Something that happened: a line for people, and what programs ask for."""

    kind: Kind
    text: str
    checkpoints: tuple[str, ...] = ()  # by name


class Until(NamedTuple):
    """When a watch ends; without either, only a signal ends it."""

    step: int | None = None  # after a checkpoint at this step or later
    idle_seconds: float | None = None  # without a new checkpoint


def watch(
    run: PathLike,
    *,
    publish_every: int = 1,
    until_step: int | None = None,
    idle: float | str | None = None,
    interval: float | str = 10.0,
    skip_missed: bool = False,
    on_publish: str | None = None,
    event: Callable[[Event], None] = lambda _: None,
    **keywords: "Unpack[RunKeywords]",
) -> Result:
    """Average a run while it goes on: fold each checkpoint once it is complete, in order.

    The options are those of `ckpt_ema.average` with `keep_state`. A checkpoint is folded when two
    looks, `interval` seconds apart, have seen the same complete files. The output is published
    after `publish_every` checkpoints, and at the end: after a checkpoint at `until_step` or later,
    or when no checkpoint came for `idle` seconds; times may be texts, such as "2h". `on_publish` is
    a command that gets the path, in place of `{}` or as its last word. `event` is called with what
    happens.

    An interrupted watch that is started again continues where it stopped. Raises `FailedError` for
    a checkpoint that was seen and deleted before it was folded, unless `skip_missed`; it stays out
    of the average. Raises what `ckpt_ema.update` raises; whatever was folded is published first.
    """
    how, options = split(keywords)
    made = make_options({**options, "keep_state": True})
    until = Until(until_step, None if idle is None else TIME.parsed("idle", idle))
    seconds = TIME.parsed("interval", interval)
    hook = Hook(on_publish, lambda text: event(Event(Kind.WARNING, text)))
    watching = _Watch(paths_of(run), made, hook, event, how)
    with watching.workspace, hook:
        watching.start()
        try:
            watching.go_on(publish_every, until, seconds, skip_missed)
        except BaseException:
            with suppress(CkptEmaError, OSError):  # the first error tells more
                watching.publish()
            raise
        return watching.result()


class _Watch:
    """One watch: what was folded, and what is waited for."""

    def __init__(
        self,
        paths: Sequence[Path],
        options: Options,
        hook: Hook,
        event: Callable[[Event], None],
        how: How,
    ) -> None:
        asked = options.output.output
        [output] = Local().real_paths([asked or sibling_of(paths[0])])
        self._paths, self._options, self._output = paths, options, Path(output)
        self._hook, self._event, self._how = hook, event, how
        self.workspace = Workspace(self._output, _KEY)
        self._states: Sequence[State] = ()
        self._unpublished = 0  # checkpoints that were folded since the last publication
        self._listing, self._sightings = Listing(paths[0]), Sightings()
        self._is_due = True  # a look, although no name has changed
        self._said, self._warned = set[str](), {Code.FEW_CHECKPOINTS}  # one is enough to begin
        self._last_news = time.monotonic()

    @property
    def _held(self) -> Path:
        return self.workspace.output

    def start(self) -> None:
        """Continue what is at the output path, or what an interrupted watch held."""
        published = [] if is_free(self._output) else read_states(self._output)[1]
        held: list[State] = []
        with suppress(RefusedError):
            held = read_states(self._held)[1]
        counts = [len(states[0].folded) if states else 0 for states in (published, held)]
        self._states = held if counts[1] > counts[0] else published
        self._unpublished = max(0, counts[1] - counts[0])
        for state in self._states:
            _check_asked(state, self._options, self._output)
        done = f"{max(counts)} checkpoints folded so far" if max(counts) else "nothing folded yet"
        self._event(Event(Kind.STARTED, f"watching {self._paths[0]}: {done}"))

    def go_on(
        self, publish_every: int, until: Until, interval_seconds: float, skip_missed: bool
    ) -> None:
        """Look, fold, publish and wait until the end."""
        while True:
            self._hook.look()
            self._look_and_fold(skip_missed)
            if self._unpublished >= publish_every:
                self._try_to_publish()
            if self._has_reached(until):
                return
            time.sleep(interval_seconds)

    def _has_reached(self, until: Until) -> bool:
        last = self._states[0].checkpoints[-1].step if self._states else None
        if until.step is not None and last is not None and last >= until.step:
            return True
        idle_seconds = time.monotonic() - self._last_news
        return until.idle_seconds is not None and idle_seconds >= until.idle_seconds

    def _look_and_fold(self, skip_missed: bool) -> None:
        [storage] = storages_anew(self._paths)
        if not self._listing.has_changed(storage) and not self._is_due:
            return
        for checkpoint in self._sightings.vanished(storage):
            self._miss(checkpoint, skip_missed)
        try:
            with uncollected():
                chosen = find_new(self._paths, self._options, self._states)
        except RefusedError as error:
            if error.code not in _NOT_YET and not isinstance(error, IncompleteError):
                raise
            self._is_due = isinstance(error, IncompleteError)
            self._say(Kind.WAITING, error.message)
            return
        self._listing.follow(chosen.found.checkpoints)
        settled = self._sightings.settled(new_checkpoints(chosen), storage)
        incomplete = [one for one in chosen.found.judged if one.verdict.reason is Reason.INCOMPLETE]
        for one in incomplete:
            self._say(Kind.WAITING, f"{one.name} is not complete yet ({one.verdict})", one.name)
        if settled:
            self._fold(chosen, settled, skip_missed)
        self._is_due = self._sightings.waits() or bool(incomplete)

    def _fold(self, chosen: Chosen, settled: Sequence[Checkpoint], skip_missed: bool) -> None:
        """Fold checkpoints and hold the result; if one has vanished, the others are tried again."""
        names = tuple(checkpoint.name for checkpoint in settled)
        try:
            with uncollected():
                plan = plan_new(chosen, settled, self._options, self._states)
            self._warn(plan.warnings)
            made = carry_out(plan, {**self._how, "held": self._held})
        except CkptEmaError as error:
            vanished = self._sightings.vanished(chosen.source.storage)
            for checkpoint in vanished:
                self._miss(checkpoint, skip_missed)
            if not (vanished or isinstance(error, FailedError)):
                raise
            if not vanished:
                self._say(Kind.RETRYING, f"{some(names, 3)}: {error}; trying again")
            return
        self._warn(made.warnings)
        self._sightings.forget(settled)
        self._states = read_states(self._held)[1]
        self._unpublished += len(settled)
        self.workspace.kept = True
        self._last_news = time.monotonic()
        count = len(self._states[0].folded)
        self._event(Event(Kind.FOLDED, f"{some(names, 3)} folded, {count} in all", names))

    def _miss(self, checkpoint: Checkpoint, skip_missed: bool) -> None:
        """Note that a checkpoint is gone; raises `FailedError` unless it may be skipped."""
        self._sightings.forget([checkpoint])
        what = f"{checkpoint.path} was deleted before it was folded"
        if not skip_missed:
            hint = "Keep more checkpoints, look more often with --interval, or pass --skip-missed."
            raise FailedError(f"{what}.", hint, code=Code.MISSED, path=checkpoint.path)
        self._event(Event(Kind.MISSED, f"{what}; skipped", (checkpoint.name,)))

    def _try_to_publish(self) -> None:
        """Publish what is held, unless somebody's files are in the way."""
        try:
            self.publish()
        except RefusedError as error:
            self._say(Kind.WARNING, f"not published: {error}")

    def publish(self) -> None:
        """Publish what is held, if anything is."""
        if not self._unpublished:
            return
        publish_held(self._held, self._output)
        self._unpublished, self.workspace.kept = 0, False
        self._states = read_states(self._output)[1]
        self._event(Event(Kind.PUBLISHED, f"published {self._output}"))
        self._hook.run(self._output)

    def result(self) -> Result:
        """Publish what is left and return the result."""
        self.publish()
        if not self._states:
            message = f"{self._paths[0]} has no complete checkpoint; the watch ends without one."
            raise RefusedError(message, code=Code.NO_CHECKPOINTS, path=self._paths[0])
        outputs, _ = read_states(self._output)
        return made_before(self._output, outputs, [read_manifest(one) for one in outputs])

    def _warn(self, warnings: Sequence[Notice]) -> None:
        for warning in warnings:
            if warning.code not in _OF_WEIGHTS or warning.code not in self._warned:
                self._say(Kind.WARNING, str(warning))
            self._warned.add(warning.code)

    def _say(self, kind: Kind, text: str, *checkpoints: str) -> None:
        """Tell of an event, unless it was told before."""
        if text not in self._said:
            self._said.add(text)
            self._event(Event(kind, text, checkpoints))


def _check_asked(state: State, options: Options, output: Path) -> None:
    """Refuse to continue averages that were made with other options."""
    before, now = (
        json.dumps(one, sort_keys=True) for one in (state.asked.options, options.repeatable())
    )
    if before != now:
        message = f"{output} was made with other options: {before}, not {now}."
        hint = "Give the same options, or choose another --output."
        raise RefusedError(message, hint, code=Code.STATE_DIFFERS, path=output)
