"""Whether checkpoints are of one run: the log of an earlier one begins that of a later one.

Trainers copy the whole log into every checkpoint. File times prove nothing: copying changes them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.entries import json_object
from ckpt_ema.notices import Notice
from ckpt_ema.trainers import conventions

_MOST_KEPT = 64  # logs, of megabytes each


@dataclass(frozen=True)
class Log:
    """What a checkpoint's trainer had logged when it was saved."""

    content: bytes

    @cached_property
    def rows(self) -> list[Mapping[str, Any]]:
        """The entries that have a step."""
        history = json_object(self.content).get("log_history")
        rows = history if isinstance(history, list) else []
        return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int]

    @cached_property
    def text(self) -> bytes:
        """The entries as they are written; empty if that cannot be told without parsing."""
        _, _, history = self.content.partition(b'"log_history": [')
        text, end, _ = history.partition(b"]")
        return text.strip() if end and b"[" not in text else b""

    @cached_property
    def by_step(self) -> dict[int, dict[str, list[Any]]]:
        """The values by step and name; a step may be logged several times."""
        found: dict[int, dict[str, list[Any]]] = {}
        for row in self.rows:
            values = found.setdefault(row["step"], {})
            for name, value in row.items():
                values.setdefault(name, []).append(value)
        return found


LogOf = Callable[[Path], Log]


def reader_of_logs(source: Source) -> LogOf:
    """Return a function that reads the log of a checkpoint, mostly once."""

    @lru_cache(_MOST_KEPT)
    def log_of(path: Path) -> Log:
        return Log(source.storage.read(path / conventions.TRAINER_STATE) or b"")

    return log_of


class Continuation(NamedTuple):
    """What the logs of two checkpoints say about each other."""

    is_proven: bool  # the later one holds what the earlier one has
    contradiction: str = ""


def continuation(earlier: Log, later: Log) -> Continuation:
    """Compare what two logs have of the same steps; the later may have lost its beginning."""
    if earlier.text and later.text.startswith(earlier.text):
        return Continuation(is_proven=True)
    mine, theirs = earlier.by_step, later.by_step
    if not mine or not theirs:
        return Continuation(is_proven=False)
    first, last = max(min(mine), min(theirs)), max(mine)
    steps = [step for step in sorted({*mine, *theirs}) if first <= step <= last]
    problems = (_difference(step, mine.get(step, {}), theirs.get(step, {})) for step in steps)
    problem = next(filter(None, problems), "")
    return Continuation(bool(steps) and not problem, problem)


def _difference(step: int, mine: Mapping[str, list[Any]], theirs: Mapping[str, list[Any]]) -> str:
    """Return how two logs differ at a step; evaluations may have been added."""
    for name in mine.keys() & theirs.keys():
        few, many = sorted((list(map(str, mine[name])), list(map(str, theirs[name]))), key=len)
        if few not in (many[: len(few)], many[-len(few) :]):
            return f"at step {step} one has {name} {mine[name][0]}, the other {theirs[name][0]}"
    only = (theirs or mine).keys() - {"step", "epoch"} if not (mine and theirs) else set()
    if any(not name.startswith("eval_") for name in only):
        return f"only one has an entry at step {step}"
    return ""


class OneRun(NamedTuple):
    """What the logs say of checkpoints that are averaged."""

    is_proven: bool  # each log goes on as the one before
    warnings: tuple[Notice, ...] = ()


def check_one_run(checkpoints: Sequence[Checkpoint], log_of: LogOf) -> OneRun:
    """Refuse checkpoints whose logs contradict each other; warn of them in a person's own list."""
    logs = [(checkpoint, log_of(checkpoint.path)) for checkpoint in checkpoints]
    logged = [(checkpoint, log) for checkpoint, log in logs if log.text or log.rows]
    is_proven = len(logged) == len(checkpoints)
    for (earlier, before), (later, after) in pairwise(logged):
        compared = continuation(before, after)
        is_proven = is_proven and compared.is_proven
        if compared.contradiction:
            text = (
                f"{earlier.name} and {later.name} are of two runs, since their logs contradict each"
                f" other: {compared.contradiction}."
            )
            if all(checkpoint.is_given for checkpoint in checkpoints):
                return OneRun(is_proven=False, warnings=(Notice(Code.SEVERAL_RUNS, text),))
            hint = "Choose the steps of one run with --include, --exclude, --from or --to."
            raise RefusedError(text, hint, code=Code.SEVERAL_RUNS, path=later.path)
    return OneRun(is_proven)
