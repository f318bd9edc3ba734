"""Watches a run: folds each checkpoint once it is complete, before the trainer deletes it.

The run is polled, which works on network file systems and object stores alike. What was folded is
held beside the output until it is published, so that a killed process loses nothing.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ckpt_ema.errors import (
    CkptEmaError,
    Code,
    FailedError,
    IncompleteError,
    RefusedError,
    counted,
    some,
)
from ckpt_ema.execute import How
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.verdict import Judged, Reason
from ckpt_ema.options import Keywords, PathLike, make_options
from ckpt_ema.output.manifest import Result
from ckpt_ema.planning.decide import Chosen, paths_of
from ckpt_ema.planning.update import new_checkpoints
from ckpt_ema.storage import Storage, storages_anew
from ckpt_ema.storage.uri import path_of
from ckpt_ema.values import COUNT, LAPSE, STEP, TIME
from ckpt_ema.watching.events import Event, Kind, Reporter
from ckpt_ema.watching.held import HeldAverage
from ckpt_ema.watching.hook import Hook
from ckpt_ema.watching.sightings import Listing, Sightings

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Of a run without checkpoints, or without complete or matching ones.
_NOT_YET = (Code.NO_CHECKPOINTS, Code.NOT_FOUND, Code.NOTHING_SELECTED, Code.NO_MATCH)
_UNFINISHED = (Reason.NO_MODEL, Reason.UNSUPPORTED)  # of a folder that is not filled yet


class Until(NamedTuple):
    """When a watch ends; without either, only a signal ends it."""

    step: int | None = None  # after a checkpoint at this step or later
    idle_seconds: float | None = None  # without a new checkpoint


class WatchKeywords(Keywords, total=False):
    """The options of a watch, beside its own."""

    command: str | None
    progress: Callable[[int, int], None] | None


def watch(
    run: PathLike,
    *,
    publish_every: int | str = 1,
    until_step: int | str | None = None,
    idle: float | str | None = None,
    interval: float | str = 10.0,
    skip_missed: bool = False,
    on_publish: str | None = None,
    event: Callable[[Event], None] = lambda _: None,
    **keywords: "Unpack[WatchKeywords]",
) -> Result:
    """Average a run while it goes on: fold each checkpoint once it is complete, in order.

    The options are those of `ckpt_ema.average` with `keep_state`. A checkpoint is folded when two
    looks, `interval` seconds apart, have seen the same complete files. The output is published
    after `publish_every` checkpoints, and at the end: after a checkpoint at `until_step` or later,
    or when no checkpoint came for `idle` seconds; times may be texts, such as "2h". `on_publish` is
    a command that gets the path, in place of `{}` or as its last word; it runs in the background,
    and is waited for at the end. `event` is called with what happens.

    An interrupted watch that is started again continues where it stopped. Raises `FailedError` for
    a checkpoint that was seen and deleted before it was folded, unless `skip_missed`; it stays out
    of the average. Raises what `ckpt_ema.update` raises; whatever was folded is published first.
    """
    progress = keywords.pop("progress", None)
    how: How = {"command": keywords.pop("command", None), "progress": progress}
    options = make_options({**keywords, "keep_state": True})
    until = _until(until_step, idle)
    every: int = COUNT.parsed("publish_every", publish_every)
    seconds = LAPSE.parsed("interval", interval)
    reporter = Reporter(event, is_strict=options.engine.strict)
    average = HeldAverage(paths_of(run), options, reporter, how)
    with average.workspace, Hook(on_publish, reporter) as hook:
        average.start()
        so_far = f"{counted(len(average.checkpoints), 'checkpoint')} so far"
        reporter.tell(Kind.STARTED, f"watching {run}: {so_far}")
        watching = _Watch(paths_of(run)[0], average, hook, reporter, skip_missed=skip_missed)
        watching.go_on(every, until, seconds)
        return average.result()


def _until(step: int | str | None, idle: float | str | None) -> Until:
    return Until(
        None if step is None else STEP.parsed("until_step", step),
        None if idle is None else TIME.parsed("idle", idle),
    )


class _Watch:
    """One watch: the average so far, and what is waited for."""

    def __init__(
        self, run: Path, average: HeldAverage, hook: Hook, reporter: Reporter, *, skip_missed: bool
    ) -> None:
        self._run, self._average, self._hook = run, average, hook
        self._reporter, self._skip_missed = reporter, skip_missed
        self._listing, self._sightings = Listing(run), Sightings()
        self._is_due = True  # a look, although no name has changed
        self._problem: CkptEmaError | None = None  # for which the last look was in vain
        self._last_news = time.monotonic()

    def go_on(self, publish_every: int, until: Until, interval_seconds: float) -> None:
        """Look, fold, publish and wait until the end; publish whatever ends it."""
        try:
            self._go_on(publish_every, until, interval_seconds)
            self._publish()
        except BaseException as error:
            with suppress(CkptEmaError, OSError):  # the first error tells more
                self._publish(runs_hook=isinstance(error, Exception))
            raise

    def _go_on(self, publish_every: int, until: Until, interval_seconds: float) -> None:
        while True:
            self._hook.look()
            self._look()
            if self._average.unpublished >= publish_every:
                self._try_to_publish()
            if self._has_reached(until):
                return
            time.sleep(interval_seconds)

    def _has_reached(self, until: Until) -> bool:
        """Return whether the end has come; raises what kept checkpoints from being folded."""
        last = self._average.checkpoints[-1].step if self._average.checkpoints else None
        if until.step is not None and last is not None and last >= until.step:
            return True
        if self._sightings.has_news:
            self._last_news = time.monotonic()
            return False
        idle_seconds = time.monotonic() - self._last_news
        if until.idle_seconds is None or idle_seconds < until.idle_seconds:
            return False
        if self._problem:
            raise self._problem
        return True

    def _look(self) -> None:
        """Look at the run if anything may have changed; after an error it is looked at again."""
        self._sightings.has_news = False
        try:
            [storage] = storages_anew([self._run])
            is_changed = self._listing.has_changed(storage)
            if is_changed or self._is_due:
                self._is_due, self._problem = True, None
                self._is_due = self._look_and_fold(storage, is_changed)
        except CkptEmaError as error:
            waits = self._sightings.waits() or not self._average.checkpoints
            self._problem = error if waits or _may_pass(error) else None
            if isinstance(error, IncompleteError) or error.code in _NOT_YET:
                self._reporter.say(Kind.WAITING, error.message)
            elif _may_pass(error):
                self._reporter.say(Kind.RETRYING, f"{error} Trying again.")
            else:
                raise

    def _look_and_fold(self, storage: Storage, is_changed: bool) -> bool:
        """Fold what has settled; return whether to look again, although no name has changed."""
        if storage.exists(self._run):  # else its file system may not be mounted
            for path, name in self._sightings.vanished(storage).items():
                self._miss(path, name)
        self._sightings.look(storage)
        if self._sightings.are_growing() and not is_changed:
            return True  # to find what else is new takes seconds in a long run
        try:
            chosen = self._average.find_new()
        except RefusedError as error:
            self._expect_the_only_one(error, storage)
            is_final = self._sightings.is_final(error, storage)
            if is_final or isinstance(error, IncompleteError) or error.code in _NOT_YET:
                raise
            self._problem = error
            return True
        unfinished = [one for one in chosen.found.judged if one.verdict.reason in _UNFINISHED]
        self._listing.follow(chosen.found.checkpoints, [one.path for one in unfinished])
        settled = self._sightings.settled(new_checkpoints(chosen), storage)
        self._say_what_waits(chosen.found.judged, storage)
        if settled:
            self._fold(chosen, settled)
        return self._sightings.waits()

    def _expect_the_only_one(self, error: RefusedError, storage: Storage) -> None:
        """Wait for a checkpoint that is incomplete and alone, unless it is being deleted."""
        known = {one.path for one in self._average.checkpoints}
        if error.code is Code.INCOMPLETE and error.path and path_of(error.path) not in known:
            path = path_of(error.path)
            self._sightings.expect(path, path.name, storage)

    def _say_what_waits(self, judged: Sequence[Judged], storage: Storage) -> None:
        """Say which entries are not complete yet, and which never count."""
        known = {one.name for one in self._average.checkpoints}
        for one in judged:
            reason = one.verdict.reason
            if reason is Reason.NO_ALIASES:
                text = f"{one.name} is left out: a name without a number may be written again"
                self._reporter.say_once(Kind.LEFT_OUT, text, one.name)
            if one.name in known or not one.is_left_out:  # a known one is being deleted
                continue
            if reason is Reason.INCOMPLETE:
                self._sightings.expect(one.path, one.name, storage)
            if reason is Reason.INCOMPLETE or reason in _UNFINISHED:
                text = f"{one.name} is not complete yet ({one.verdict})"
                self._reporter.say(Kind.WAITING, text, one.name)

    def _fold(self, chosen: Chosen, settled: Sequence[Checkpoint]) -> None:
        warnings = self._average.fold(chosen, settled)
        self._sightings.forget(one.path for one in settled)
        self._last_news = time.monotonic()
        names, count = [one.name for one in settled], len(self._average.checkpoints)
        self._reporter.tell(Kind.FOLDED, f"{some(names, 3)} folded, {count} in all", names)
        self._reporter.warn(warnings)

    def _miss(self, path: Path, name: str) -> None:
        """Note that a checkpoint is gone; raises `FailedError` unless it may be skipped."""
        self._sightings.forget([path])
        what = f"{path} was deleted before it was folded"
        if not self._skip_missed:
            hint = "Keep more checkpoints, look more often with --interval, or pass --skip-missed."
            raise FailedError(f"{what}.", hint, code=Code.MISSED, path=path)
        self._reporter.tell(Kind.MISSED, f"{what}; skipped", [name])

    def _try_to_publish(self) -> None:
        """Publish what is held, unless somebody's files are in the way."""
        try:
            self._publish()
        except RefusedError as error:
            self._reporter.say(Kind.WARNING, f"not published: {error}")

    def _publish(self, *, runs_hook: bool = True) -> None:
        """Publish what is held, if anything is."""
        if self._average.publish():
            self._reporter.tell(Kind.PUBLISHED, f"published {self._average.output}")
            if runs_hook:
                self._hook.run(self._average.output)


def _may_pass(error: CkptEmaError) -> bool:
    """Return whether what failed may work later, when a disk or a network is back."""
    is_failure = isinstance(error, FailedError) or error.code is Code.INACCESSIBLE
    return is_failure and error.code is not Code.MISSED
