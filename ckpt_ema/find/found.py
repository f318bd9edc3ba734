"""The result of finding checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.verdict import Judged
from ckpt_ema.notices import Notice


def no_problem(_checkpoint: Checkpoint) -> str | None:
    """Return that nothing is known against a checkpoint."""
    return None


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoints of a run, oldest first, and the verdict on every entry of its folder."""

    root: Path  # the run's folder, or the one checkpoint that is all there is
    checkpoints: tuple[Checkpoint, ...]
    judged: tuple[Judged, ...]
    warnings: tuple[Notice, ...] = ()
    # Why a checkpoint is not complete, None if it is; opens it at the first call.
    problem_of: Callable[[Checkpoint], str | None] = no_problem

    @property
    def left_out(self) -> tuple[Judged, ...]:
        """The entries that do not take part although they might be expected to."""
        return tuple(entry for entry in self.judged if entry.is_left_out)
