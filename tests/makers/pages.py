"""Made-up inspections and selections, as other commands hand them to their pages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ckpt_ema.errors import Code
from ckpt_ema.notices import Notice

HOSTILE = "<script>alert(1)</script>&\"'\u202e\x1b[31m"  # no name is safe


@dataclass(frozen=True)
class MadeUpCheckpoint:
    """A checkpoint that was looked at."""

    name: str
    step: int | None
    norm: float | None
    distance_to_previous: float | None
    distance_to_average: float | None
    zeros_share: float | None
    nonfinite: int | None
    z_score: float | None
    stands_out: bool


@dataclass(frozen=True)
class MadeUpInspection:
    """A run that was looked at."""

    checkpoints: tuple[MadeUpCheckpoint, ...]
    plane: tuple[tuple[float, float], ...]
    explained: tuple[float, float] = (0.81, 0.12)
    run: str = f"runs/{HOSTILE}"
    unit: str = "steps"
    schedule: str = "half-life 500 steps"
    warnings: tuple[Notice, ...] = (Notice(Code.ZEROS, f"w of {HOSTILE} has zeros."),)
    notes: tuple[Notice, ...] = (Notice(Code.DECIDED, f"{HOSTILE} was decided."),)


def made_up_inspection(count: int) -> MadeUpInspection:
    """A run that turns in a plane and slows down; the checkpoint after its half stands out."""
    odd = count // 2
    checkpoints, plane = [], []
    for n in range(count):
        far = 40 / (1 + n) + (9 if n == odd else 1)
        checkpoints.append(
            MadeUpCheckpoint(
                name=f"checkpoint-{500 * (n + 1)}" if n else HOSTILE,
                step=500 * (n + 1),
                norm=math.nan if n == 1 else 120.0 + n / count,
                distance_to_previous=far if n else None,
                distance_to_average=2 * far,
                zeros_share=0.001,
                nonfinite=3 if n == 1 else 0,
                z_score=4.2 if n == odd else -0.3,
                stands_out=n == odd,
            )
        )
        turn = 4 * n / count
        plane.append((5 * math.cos(turn) + (n == odd), 3 * math.sin(turn) * (1 - n / count)))
    return MadeUpInspection(tuple(checkpoints), tuple(plane))


@dataclass(frozen=True)
class MadeUpCandidate:
    """An average that was evaluated, or whose evaluation failed."""

    name: str
    metrics: Mapping[str, float]
    weights: Mapping[str, float]
    failure: str = ""


@dataclass(frozen=True)
class MadeUpSelection:
    """Averages that were evaluated."""

    metric: str
    is_minimized: bool
    best: str
    candidates: tuple[MadeUpCandidate, ...]


def made_up_selection(count: int) -> MadeUpSelection:
    """Half-lives with a best one in the middle, one that failed, and a greedy soup."""
    names = [f"checkpoint-{500 * (n + 1)}" for n in range(8)]
    found = []
    for n in range(count):
        losses = {"eval_loss": 1.86 + 0.001 * (n - count // 2) ** 2, "accuracy": 0.5}
        weights = dict(zip(names, (1 / len(names) for _ in names), strict=True))
        found.append(MadeUpCandidate(f"half-life-{100 * (n + 1)}", losses, weights))
    failed = MadeUpCandidate(HOSTILE, {}, {names[-1]: 1.0}, f"the command failed: {HOSTILE}")
    soup = MadeUpCandidate("soup", {"eval_loss": 1.859}, {names[0]: 0.5, names[-1]: 0.5})
    best = found[count // 2].name
    return MadeUpSelection("eval_loss", True, best, (failed, *found, soup))
