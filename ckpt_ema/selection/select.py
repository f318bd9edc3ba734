"""The whole selection in one call: make averages, evaluate each of them, publish the best."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ckpt_ema.errors import Code, FailedError, OptionError, RefusedError, some
from ckpt_ema.execute import Progress
from ckpt_ema.notices import Notice, notices_from, refuse_warnings
from ckpt_ema.options import AveragingKeywords, PathLike
from ckpt_ema.output.candidates import Candidates, Evaluated, leftover, without
from ckpt_ema.output.destination import check_free, outputs_at
from ckpt_ema.output.manifest import is_made
from ckpt_ema.output.selected import SOUP, Candidate, Selection, SoupStep, brief, ranked
from ckpt_ema.output.workspace import remove
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.decide import Choose, plan_chosen
from ckpt_ema.planning.plan import Plan
from ckpt_ema.run import RunKeywords
from ckpt_ema.selection.competing import (
    competing,
    placed,
    singles,
    soup,
    weights_by_name,
)
from ckpt_ema.selection.evaluation import Evaluation, Function, Judge, make_evaluation
from ckpt_ema.selection.publish import publish, published_before
from ckpt_ema.selection.soups import Soups
from ckpt_ema.selection.staging import Entrant, make_averages, trials

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Watching(TypedDict, total=False):
    """What is recorded and called on the way; nothing here changes what is selected."""

    command: str | None
    progress: Progress | None
    started: Callable[[Plan], None] | None
    evaluated: Callable[[str, Evaluated], None] | None
    publishing: Callable[[], None] | None


class SelectKeywords(AveragingKeywords, Watching, total=False):
    """Further keyword arguments of `select`."""


def select(
    run: PathLike | Sequence[PathLike],
    *,
    evaluate: str | Function,
    metric: str,
    minimize: bool = False,
    maximize: bool = False,
    greedy: bool = False,
    jobs: int | str | None = None,
    timeout: float | str | None = None,
    keep_all: bool = False,
    overwrite: bool = False,
    **keywords: "Unpack[SelectKeywords]",
) -> Selection:
    """Make averages of the checkpoints in `run`, evaluate each, and publish the best.

    Takes the options of `ckpt_ema.average` too. `evaluate` is a command for the shell with `{}` for
    the path of a model, or a function from the path to a mapping of metrics. A candidate whose
    evaluation fails, or takes longer than `timeout` seconds, is left out with a warning. At most
    `jobs` commands run at a time. With neither `minimize` nor `maximize`, the name of the metric
    decides. `greedy` adds a greedy soup. `keep_all` publishes a folder with every candidate.
    `command` is recorded; `progress` and `started` are those of `ckpt_ema.average`, `evaluated` is
    called after each evaluation, and `publishing` before the last step.

    Raises what `ckpt_ema.average` raises, and `FailedError` if no evaluation succeeds.
    """
    evaluation = make_evaluation(
        evaluate, metric, minimize=minimize, maximize=maximize, jobs=jobs, timeout=timeout
    )
    options: dict[str, Any] = {**keywords}
    names = [name for name in Watching.__annotations__ if name in options]
    watching = cast("Watching", {name: options.pop(name) for name in names})
    job = _plan(run, options, evaluation, greedy=greedy, keep_all=keep_all)
    return job.done_before() or job.run(watching, overwrite)


def _plan(
    run: PathLike | Sequence[PathLike],
    options: Mapping[str, Any],
    evaluation: Evaluation,
    *,
    greedy: bool,
    keep_all: bool,
) -> "_Job":
    if str(options.get("output") or "").endswith(".safetensors"):
        message = f"--output {options['output']} is one file, which has no room for the figures."
        raise OptionError(message, "Name a folder.", code=Code.CONFLICTING_OPTIONS)
    planned = plan_chosen(run, competing, **options)

    def plan_of(choose: Choose) -> Plan:
        return plan_chosen(run, choose, **{**options, "strict": False})  # warned of already

    alone = plan_of(singles()) if greedy else None
    return _Job(planned, alone, plan_of, evaluation, keep_all)


@dataclass(frozen=True)
class _Job:
    """What was asked for."""

    planned: Plan
    alone: Plan | None  # of each checkpoint alone, for a greedy soup
    plan_of: Callable[[Choose], Plan]
    evaluation: Evaluation
    keep_all: bool

    @property
    def key(self) -> str:
        """A digest of everything that decides what is published."""
        plans = [self.planned, *([self.alone] if self.alone else [])]
        averages = [(one.name, one.output.fingerprint) for plan in plans for one in plan.averages]
        how = [self.evaluation.by, self.evaluation.metric, self.evaluation.is_minimized]
        text = json.dumps([averages, *how, self.keep_all])
        return hashlib.sha256(text.encode()).hexdigest()

    def done_before(self) -> Selection | None:
        """Return the selection if it is at the output path already, every file whole."""
        final = self.planned.output
        found = published_before(final, self.key)
        if not found:
            return None
        averages = {one.name: one for one in self.planned.averages}
        for path in outputs_at(final):
            name = found.best if path == final else path.name
            average = averages.get(name) or self._soup_again(found)
            if average is None or not is_made(placed(average, path).output):
                return None
        if kept := leftover(final):
            remove(kept)  # of a run that was killed right after publication
        return found

    def _soup_again(self, found: Selection) -> Average | None:
        """Return the greedy soup of an earlier run, planned again."""
        weights = next((one.weights for one in found.candidates if one.name == SOUP), None)
        if weights is None or self.alone is None:
            return None
        every = enumerate(self.alone.checkpoints)
        members = [number for number, one in every if one.name in weights]
        return self.plan_of(soup(SOUP, members)).averages[0]

    def run(self, watching: Watching, overwrite: bool) -> Selection:
        """Make, evaluate and publish, in a folder that is kept if that is interrupted."""
        final, report = self.planned.output, watching.get("evaluated") or (lambda *_: None)
        check_free(final, overwrite)
        if started := watching.get("started"):
            started(self.planned)
        with Candidates(final, overwrite, sync=self.planned.engine.sync) as stage:
            judge = Judge(self.evaluation, stage, lambda trial, found: report(trial.name, found))
            try:
                how: RunKeywords = {"progress": watching.get("progress")}
                selection, entrants = self._decide(stage, judge, how)
                if publishing := watching.get("publishing"):
                    publishing()
                publish(stage, entrants, selection, self.key, watching.get("command"))
            except (FailedError, RefusedError) as error:
                if stage.has_any:
                    again = "What was made and evaluated is kept: run the same command again."
                    error.hint = f"{error.hint} {again}".strip()
                raise
        return selection

    def _decide(
        self, stage: Candidates, judge: Judge, how: RunKeywords
    ) -> tuple[Selection, list[Entrant]]:
        """Make and evaluate all candidates; return the selection, and what may be published."""
        entrants = make_averages(self.planned, stage.folder, stage, how)
        judge.evaluate(trials(entrants, [one.average.name for one in entrants]))
        steps: list[SoupStep] = []
        if self.alone:
            soups = Soups(self.plan_of, self.alone, stage, judge, how)
            found, steps = soups.find(self.evaluation)
            entrants[-1:-1] = [found] if found else []  # before the last checkpoint
        candidates = [self._candidate(one, judge) for one in entrants]
        best = self._best(candidates)
        wanted = [one for one in entrants if self.keep_all or one.average.name == best.name]
        for one in wanted:
            if one.average.name == SOUP:
                soups.make(one)
        wanted = _unchanged(wanted, stage, best.name, judge)
        output = self.planned.output
        selection = Selection(
            metric=self.evaluation.metric,
            is_minimized=self.evaluation.is_minimized,
            command=self.evaluation.command,
            best=best.name,
            output=output,
            path=output / best.name if self.keep_all else output,
            candidates=tuple(candidates),
            steps=tuple(steps),
            warnings=(*self.planned.warnings, *self._warnings(stage, judge, candidates)),
        )
        return selection, wanted

    def _candidate(self, entrant: Entrant, judge: Judge) -> Candidate:
        average, found = entrant.average, judge.known(entrant.fingerprint) or Evaluated()
        weights = weights_by_name(entrant.plan, average)
        return Candidate(average.name, average.text, weights, *found)

    def _best(self, candidates: Sequence[Candidate]) -> Candidate:
        """Return the best candidate; raises `FailedError` if none was evaluated successfully."""
        metric, is_minimized = self.evaluation.metric, self.evaluation.is_minimized
        best = ranked(candidates, metric, is_minimized=is_minimized)[0]
        if metric not in best.metrics:
            first = candidates[0]
            message = f"No candidate has a usable {metric}; {first.name}: {brief(first.failure)}."
            raise FailedError(message, code=Code.EVALUATION_FAILED)
        return best

    def _warnings(
        self, stage: Candidates, judge: Judge, candidates: Sequence[Candidate]
    ) -> list[Notice]:
        """Return what only making and evaluating shows; raises for it if strict."""
        made = stage.manifest(stage.folder / self.planned.averages[0].name)
        warnings = [*notices_from(made.get("warnings_of_reading")), *judge.warnings]
        metric = self.evaluation.metric
        values = [one.metrics[metric] for one in candidates if metric in one.metrics]
        if len(values) > 1 and len(set(values)) == 1:
            message = f"Every candidate has the same {metric}, {values[0]:g}; check that the"
            message = f"{message} evaluation loads the model at the path that it is given."
            warnings.append(Notice(Code.SAME_METRIC, message))
        if self.planned.engine.strict:
            refuse_warnings(warnings)
        return warnings


def _unchanged(
    entrants: Sequence[Entrant], stage: Candidates, best: str, judge: Judge
) -> list[Entrant]:
    """Return the candidates that are still what was made, and remove what was added to them.

    Raises `FailedError` if the best is not among them: another evaluation has changed it.
    """
    kept = []
    for one in entrants:
        altered, added = stage.changes(one.fingerprint, one.folder)
        without(one.folder, added)
        if not altered:
            kept.append(one)
            continue
        name, files = one.average.name, some(altered, 3)
        if name == best:
            message = f"{files} of {name}, the best candidate, changed after its evaluation."
            raise FailedError(message, code=Code.CHANGED, path=one.folder)
        if judge.value(judge.known(one.fingerprint)) is not None:  # else it was warned of
            message = f"{files} of {name} changed after its evaluation, so it is not kept."
            judge.warnings.append(Notice(Code.EVALUATION_WROTE, message))
    return kept
