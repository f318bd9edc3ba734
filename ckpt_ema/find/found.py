"""What discovery comes to."""

from dataclasses import dataclass
from pathlib import Path

from ckpt_ema.find.order import Checkpoint


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoints of a run, oldest first, and what was not taken for one and why."""

    root: Path  # the folder that the run lives in, or the one checkpoint that is all there is
    checkpoints: tuple[Checkpoint, ...]
    left_out: tuple[tuple[Path, str], ...] = ()
    warnings: tuple[str, ...] = ()
