"""Evaluating averages by a command or a function, and noting what came of it."""

import hashlib
import marshal
import secrets
import shlex
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from ckpt_ema import values as of
from ckpt_ema.errors import Code, FailedError, OptionError, printable, some
from ckpt_ema.find.select import higher_is_better
from ckpt_ema.notices import Notice
from ckpt_ema.output.candidates import Candidates, Evaluated, without
from ckpt_ema.output.selected import brief
from ckpt_ema.selection.commands import Command, Ended, run_commands
from ckpt_ema.selection.metrics import last_lines, numbers, problem_of, read_metrics

Function = Callable[[Path], Mapping[str, Any]]
PLACE = "{}"  # for the path in a command
NAME_VARIABLE = "CKPT_EMA_CANDIDATE"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How to evaluate an average, and which of two is better."""

    evaluate: str | Function
    metric: str
    is_minimized: bool
    jobs: int
    timeout_seconds: float | None
    by: str  # what an earlier evaluation must have been made by, to be taken over

    @property
    def command(self) -> str:
        """The command, or the name of the function, for people."""
        return self.evaluate if isinstance(self.evaluate, str) else _name(self.evaluate)


class Trial(NamedTuple):
    """An average to evaluate."""

    name: str  # for people
    fingerprint: str
    folder: Path


Results = Generator[tuple[Trial, Evaluated], None, None]
Report = Callable[[Trial, Evaluated], None]


def make_evaluation(
    evaluate: str | Function | None,
    metric: str | None,
    *,
    minimize: bool,
    maximize: bool,
    jobs: int | str | None,
    timeout: float | str | None,
) -> Evaluation:
    """Check the options of an evaluation; raises `OptionError` if they make no sense."""
    if not evaluate or not metric:
        message = "select needs --eval and --metric."
        hint = "For example: --eval 'python evaluate.py {}' --metric loss."
        raise OptionError(message, hint, code=Code.CONFLICTING_OPTIONS)
    if minimize and maximize:
        message = "--minimize and --maximize exclude each other."
        raise OptionError(message, code=Code.CONFLICTING_OPTIONS)
    count: int = of.COUNT.parsed("jobs", 1 if jobs is None else jobs)
    seconds = None if timeout is None else of.LAPSE.parsed("timeout", timeout)
    if isinstance(evaluate, str):
        if PLACE not in evaluate:
            message = f"--eval {evaluate} has no {PLACE}, which stands for the path of a model."
            hint = f"Add it, as in --eval 'python evaluate.py {PLACE}'."
            raise OptionError(message, hint, code=Code.INVALID_OPTION)
    elif count != 1 or seconds is not None:
        message = "jobs and timeout apply to commands; a function evaluates one model at a time."
        raise OptionError(message, code=Code.CONFLICTING_OPTIONS)
    mode = "min" if minimize else "max" if maximize else "auto"
    is_minimized = not higher_is_better(metric, mode, "--minimize or --maximize")
    return Evaluation(evaluate, metric, is_minimized, count, seconds, _identity(evaluate))


def _name(function: Function) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{function.__module__}.{name}"


def _identity(evaluate: str | Function) -> str:
    """Return what tells evaluations apart: the command, or the code of a function.

    What else is called, or has values of its own, is never taken for the same again.
    """
    if isinstance(evaluate, str):
        return evaluate
    if not isinstance(evaluate, FunctionType) or evaluate.__closure__:
        return secrets.token_hex(8)
    return f"{_name(evaluate)} {hashlib.sha256(marshal.dumps(evaluate.__code__)).hexdigest()}"


def _way_of(code: int) -> str:
    """Describe an exit code; a shell adds 128 to the signal that killed what it ran.

    >>> _way_of(-9), _way_of(137), _way_of(255)
    ('was killed by signal 9', 'was killed by signal 9', 'ended with exit code 255')
    """
    number = code - 128 if 128 < code < 160 else -code
    return f"was killed by signal {number}" if number > 0 else f"ended with exit code {code}"


class Judge:
    """Evaluates averages, each of them once, and collects what to warn of."""

    def __init__(self, evaluation: Evaluation, stage: Candidates, report: Report) -> None:
        """Take over what `stage` knows; `report` is called after each evaluation."""
        self.warnings: list[Notice] = []
        self._evaluation, self._stage, self._report = evaluation, stage, report
        self._found: dict[str, Evaluated] = {}

    def known(self, fingerprint: str) -> Evaluated | None:
        """Return what evaluating an average gave, if that was done, now or before."""
        found = self._found.get(fingerprint)
        noted = self._stage.evaluated(fingerprint, self._evaluation.by)
        return noted if found is None and noted and self.value(noted) is not None else found

    def value(self, found: Evaluated | None) -> float | None:
        """Return the metric of what was found; None if there is no usable one."""
        return found.metrics.get(self._evaluation.metric) if found else None

    def evaluate(self, trials: Sequence[Trial]) -> None:
        """Evaluate averages that were made, but for those that are known."""
        new: dict[str, Trial] = {}
        for one in trials:
            if self.known(one.fingerprint) is None:
                new.setdefault(one.fingerprint, one)
        with closing(self._results([*new.values()])) as results:
            for trial, found in results:
                self._note(trial, self._checked(trial, found))

    def _results(self, trials: Sequence[Trial]) -> Results:
        if isinstance(self._evaluation.evaluate, str):
            yield from self._by_command(self._evaluation.evaluate, trials)
        else:
            for trial in trials:
                yield trial, self._by_function(self._evaluation.evaluate, trial)

    def _by_command(self, text: str, trials: Sequence[Trial]) -> Results:
        commands = [
            Command(text.replace(PLACE, shlex.quote(str(one.folder))), {NAME_VARIABLE: one.name})
            for one in trials
        ]
        jobs, seconds = self._evaluation.jobs, self._evaluation.timeout_seconds
        try:
            with closing(run_commands(commands, jobs, seconds)) as every:
                for number, ended in every:
                    yield trials[number], self._judged(ended)
        except OSError as error:
            message = f"The evaluation cannot be started: {error.strerror}."
            raise FailedError(message, code=Code.EVALUATION_FAILED) from error

    def _judged(self, ended: Ended) -> Evaluated:
        """Return the metrics that a command has printed, or why there are none."""
        failure, metrics = "", {}
        if ended.code is None:
            failure = f"the command timed out after {self._evaluation.timeout_seconds:g} s"
        elif ended.code:
            failure = f"the command {_way_of(ended.code)}"
        else:
            metrics = read_metrics(ended.stdout, self._evaluation.metric)
            failure = problem_of(metrics, self._evaluation.metric)
        if not failure:
            return Evaluated(metrics, seconds=ended.seconds)
        shown = last_lines(ended.stderr) or last_lines(ended.stdout)
        return Evaluated({}, "\n".join([failure, *shown]), ended.seconds)

    def _by_function(self, function: Function, trial: Trial) -> Evaluated:
        start, failure, metrics = time.monotonic(), "", {}
        try:
            reported = function(trial.folder)
            if isinstance(reported, Mapping):
                metrics = numbers(reported)
                failure = problem_of(metrics, self._evaluation.metric)
            else:
                failure = f"the function returned {type(reported).__name__}, not a mapping"
        except Exception as error:  # whatever it is, the other averages are evaluated
            failure = f"{type(error).__name__}: {printable(error)}"
        seconds = round(time.monotonic() - start, 3)
        return Evaluated({} if failure else metrics, failure, seconds)

    def _checked(self, trial: Trial, found: Evaluated) -> Evaluated:
        """Return a failure if the evaluation changed the model; remove what it added."""
        altered, added = self._stage.changes(trial.fingerprint, trial.folder)
        if added:
            without(trial.folder, added)
            message = f"The evaluation of {trial.name} wrote files next to the model, which are not"
            message = f"{message} kept: {some(added, 3)}."
            self.warnings.append(Notice(Code.EVALUATION_WROTE, message))
        if altered:
            failure = f"the evaluation changed {some(altered, 3)}, so it is not what was averaged"
            return found._replace(metrics={}, failure=failure)
        return found

    def _note(self, trial: Trial, found: Evaluated) -> None:
        finite = {name: x for name, x in found.metrics.items() if abs(x) < float("inf")}
        found = found._replace(metrics=finite)
        self._found[trial.fingerprint] = found
        if found.failure:
            message = f"{trial.name} has no usable {self._evaluation.metric}"
            message = f"{message}: {brief(found.failure)}."
            self.warnings.append(Notice(Code.EVALUATION_FAILED, message))
        else:
            self._stage.note_evaluated(trial.fingerprint, self._evaluation.by, found)
        self._report(trial, found)
