"""What the evaluation of averages found, as plain values too: every candidate, and the best.

It is kept in the manifest of what `select` publishes, under `evaluation`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ckpt_ema.notices import Notice, notices_from
from ckpt_ema.output.shape import NUMBER, TEXT, fits

LAST = "last-checkpoint"  # the candidate without averaging
SOUP = "greedy-soup"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """One average, or the last checkpoint alone, and how it was evaluated."""

    name: str
    schedule: str  # for people
    weights: Mapping[str, float]  # by the name of the checkpoint, oldest first; they sum to 1
    metrics: Mapping[str, float] = field(default_factory=dict)  # finite; empty after a failure
    failure: str = ""  # why there is no usable metric
    seconds: float = 0.0  # that the evaluation took

    @property
    def effective_number(self) -> float:
        """The effective number of checkpoints, 1 / sum(w^2)."""
        return 1 / sum(weight * weight for weight in self.weights.values())


@dataclass(frozen=True, slots=True)
class SoupStep:
    """One step of a greedy soup: a checkpoint is tried, and kept or not."""

    checkpoint: str
    metric: float | None  # of the checkpoint alone; None if it was not evaluated successfully
    soup_metric: float | None  # of the soup with it
    is_kept: bool


@dataclass(frozen=True, slots=True)
class Selection:
    """The best of several averages, and what was measured of all of them."""

    metric: str
    is_minimized: bool
    command: str  # that evaluated, or the name of the function
    best: str  # the name of a candidate
    output: Path  # what was published: the best, or the folder of all candidates
    path: Path  # the best
    candidates: tuple[Candidate, ...]
    steps: tuple[SoupStep, ...] = ()  # of the greedy soup, if one was made
    warnings: tuple[Notice, ...] = ()
    is_up_to_date: bool = False  # it was there already, and nothing was evaluated

    @property
    def averaging_helps(self) -> bool:
        """Whether the best candidate is an average of several checkpoints."""
        return len(self.best_candidate.weights) > 1

    @property
    def value(self) -> float:
        """The best value of the metric."""
        return self.best_candidate.metrics[self.metric]

    @property
    def best_candidate(self) -> Candidate:
        """The candidate that was selected."""
        return next(one for one in self.candidates if one.name == self.best)

    def ranked(self) -> list[Candidate]:
        """Return the candidates, best first; ties keep their order, failures come last."""
        return ranked(self.candidates, self.metric, is_minimized=self.is_minimized)

    def described(self) -> dict[str, Any]:
        """Return it as plain values, ready for JSON."""
        return {
            "version": VERSION,
            "output": str(self.path),
            "metric": self.metric,
            "direction": "min" if self.is_minimized else "max",
            "command": self.command,
            "best": self.best,
            "candidates": [asdict(one) for one in self.candidates],
            "greedy": [asdict(one) for one in self.steps],
            "warnings": [warning.described() for warning in self.warnings],
        }


def brief(failure: str) -> str:
    """Return why a candidate has no metric, in one line: the reason, and the last line printed.

    >>> brief("exit code 1\\nTraceback:\\nKeyError: 'x'")
    "exit code 1 (KeyError: 'x')"
    """
    first, *lines = failure.splitlines()
    return f"{first} ({lines[-1]})" if lines else first


def ranked(candidates: Sequence[Candidate], metric: str, *, is_minimized: bool) -> list[Candidate]:
    """Return candidates, best first; ties keep their order, and failures come last.

    >>> metrics = {"a": {}, "b": {"x": 1.0}, "c": {"x": 2.0}}
    >>> every = [Candidate(name, "", {}, one) for name, one in metrics.items()]
    >>> [one.name for one in ranked(every, "x", is_minimized=False)]
    ['c', 'b', 'a']
    """
    sign = 1 if is_minimized else -1
    usable = [one for one in candidates if metric in one.metrics]
    failed = [one for one in candidates if metric not in one.metrics]
    return [*sorted(usable, key=lambda one: sign * one.metrics[metric]), *failed]


_CANDIDATE = {
    "name": TEXT,
    "schedule": TEXT,
    "weights": {...: NUMBER},
    "metrics": {...: NUMBER},
    "failure": TEXT,
    "seconds": NUMBER,
}
_METRIC = (*NUMBER, type(None))
_STEP = {"checkpoint": TEXT, "metric": _METRIC, "soup_metric": _METRIC, "is_kept": (bool,)}
_SELECTION = {
    "metric": TEXT,
    "direction": TEXT,
    "command": TEXT,
    "best": TEXT,
    "candidates": [_CANDIDATE],
    "greedy": [_STEP],
    "warnings": [{}],
}


def selection_from(described: object, output: Path, path: Path) -> Selection | None:
    """Return the selection that JSON describes; None if it describes none."""
    if not isinstance(described, Mapping) or not fits(described, _SELECTION):
        return None
    metric, best, rows = described["metric"], described["best"], described["candidates"]
    if not any(row["name"] == best and metric in row["metrics"] for row in rows):
        return None
    if not all(any(row["weights"].values()) for row in rows):
        return None
    return Selection(
        metric=metric,
        is_minimized=described["direction"] == "min",
        command=described["command"],
        best=best,
        output=output,
        path=path,
        candidates=tuple(Candidate(*(row[name] for name in _CANDIDATE)) for row in rows),
        steps=tuple(SoupStep(*(row[name] for name in _STEP)) for row in described["greedy"]),
        warnings=notices_from(described["warnings"]),
        is_up_to_date=True,
    )
