"""Made-up inspections and selections, as other commands hand them to their pages."""

import math
from collections.abc import Sequence
from pathlib import Path

from ckpt_ema.errors import Code
from ckpt_ema.measure.inspection import InspectedCheckpoint, Inspection
from ckpt_ema.measure.outliers import Reason
from ckpt_ema.notices import Notice
from ckpt_ema.output.selected import Candidate, Selection

HOSTILE = "<script>alert(1)</script>&\"'\u202e\x1b[31m"  # no name is safe


def made_up_inspection(count: int) -> Inspection:
    """A run that turns in a plane and slows down; the checkpoint after its half stands out."""
    odd = count // 2
    checkpoints, plane = [], []
    for n in range(count):
        far = 40 / (1 + n) + (9 if n == odd else 1)
        name = f"checkpoint-{500 * (n + 1)}" if n else HOSTILE
        checkpoints.append(
            InspectedCheckpoint(
                name=name,
                path=Path("runs") / name,
                step=500 * (n + 1),
                weight=1 / count,
                norm=None if n == 1 else 120.0 + n / count,
                distance_to_previous=far if n else None,
                distance_to_average=2 * far,
                zeros_share=0.001,
                nonfinite=3 if n == 1 else 0,
                ratio=None,
                z_score=4.2 if n == odd else -0.3,
                reason=Reason.OFF_PATH if n == odd else None,
            )
        )
        turn = 4 * n / count
        plane.append((5 * math.cos(turn) + (n == odd), 3 * math.sin(turn) * (1 - n / count)))
    return Inspection(
        run=f"runs/{HOSTILE}",
        schedule="half-life 500 steps",
        unit="steps",
        elements=1000,
        checkpoints=tuple(checkpoints),
        members=tuple(range(count)),
        gram=(),
        sampled_share=1.0,
        plane=tuple(plane),
        average_at=(1.0, 0.5),
        explained=(0.81, 0.12),
        bytes_read=1000,
        seconds=0.1,
        warnings=(Notice(Code.ZEROS, f"w of {HOSTILE} has zeros."),),
        notes=(Notice(Code.DECIDED, f"{HOSTILE} was decided."),),
    )


def selection_of(
    metric: str, is_minimized: bool, best: str, candidates: Sequence[Candidate]
) -> Selection:
    """Candidates, with what their page does not show made up."""
    output = Path("selected")
    command = "python eval.py {}"
    return Selection(metric, is_minimized, command, best, output, output, tuple(candidates))


def made_up_selection(count: int) -> Selection:
    """Half-lives with a best one in the middle, one that failed, and a greedy soup."""
    names = [f"checkpoint-{500 * (n + 1)}" for n in range(8)]
    found = []
    for n in range(count):
        losses = {"eval_loss": 1.86 + 0.001 * (n - count // 2) ** 2, "accuracy": 0.5}
        weights = dict(zip(names, (1 / len(names) for _ in names), strict=True))
        found.append(Candidate(f"half-life-{100 * (n + 1)}", "", weights, losses))
    failed = Candidate(HOSTILE, "", {names[-1]: 1.0}, {}, f"the command failed: {HOSTILE}")
    soup = Candidate("soup", "", {names[0]: 0.5, names[-1]: 0.5}, {"eval_loss": 1.859})
    best = found[count // 2].name
    return selection_of("eval_loss", True, best, (failed, *found, soup))
