"""The checkpoints of a run in training order, and what was found beside them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ckpt_ema.containers.specs import ModelFiles
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.verdict import Judged
from ckpt_ema.notices import Notice

# Units of numbers in names that may count training steps.
STEP_UNITS = ("step", "checkpoint", "number")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved state of the model: a folder, or a file that holds the model by itself."""

    path: Path
    step: int | None  # in `unit`
    model: ModelFiles
    unit: str = "step"  # what the trainer counts: "step", "epoch", "save" (an index), ...
    name: str = ""  # what to call it; that of its path unless given
    is_given: bool = False  # a person named it, so it is not dropped with a warning alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.path.name)


class Hole(NamedTuple):
    """An entry that is named as a step and holds no model, between two steps that do."""

    path: Path
    why: str
    earlier: Checkpoint
    later: Checkpoint


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoints of a run, oldest first, and the verdict on every entry of its folder."""

    root: Path  # the run's folder, or the one checkpoint that is all there is
    checkpoints: tuple[Checkpoint, ...]
    judged: tuple[Judged, ...]
    warnings: tuple[Notice, ...] = ()
    holes: tuple[Hole, ...] = ()
    # Why a checkpoint is not complete, None if it is; opens it at the first call.
    problem_of: Callable[[Checkpoint], str | None] = lambda _: None

    @property
    def left_out(self) -> tuple[Judged, ...]:
        """The entries that do not take part although they might be expected to."""
        return tuple(entry for entry in self.judged if entry.is_left_out)


def gaps(checkpoints: Sequence[Checkpoint]) -> list[int | None]:
    """Return the steps from each checkpoint's predecessor to it; None where that is unknown."""
    # accelerate numbers its saves one after the other, which gives no distances.
    steps = [None if one.unit == "save" else one.step for one in checkpoints]
    return [None, *(None if a is None or b is None else b - a for a, b in pairwise(steps))]


def known_steps(checkpoints: Sequence[Checkpoint]) -> list[int] | None:
    """Return the steps of all checkpoints, which rise; None where they are not known."""
    return None if _obstacle(checkpoints) else [checkpoint.step or 0 for checkpoint in checkpoints]


def needed_steps(checkpoints: Sequence[Checkpoint], option: str) -> list[int]:
    """Return the steps of all checkpoints, which rise, for an option; raises if not known."""
    obstacle = _obstacle(checkpoints)
    if obstacle:
        why, hint = obstacle
        raise RefusedError(f"{option} counts training steps, but {why}.", hint, code=Code.NO_STEPS)
    return [checkpoint.step or 0 for checkpoint in checkpoints]


def _obstacle(checkpoints: Sequence[Checkpoint]) -> tuple[str, str] | None:
    """Return why steps are not known and what to do about it; None if they are."""
    saves = [checkpoint.name for checkpoint in checkpoints if checkpoint.unit == "save"]
    if saves:
        why = f"the number in {saves[0]} counts saves (accelerate), any number of steps apart"
        return (
            why,
            "Choose a schedule that counts checkpoints, or rename the folders by their steps.",
        )
    unknown = [checkpoint.name for checkpoint in checkpoints if checkpoint.step is None]
    if unknown:
        why = f"no step is known for {some(unknown)}"
        return why, "Choose a schedule that counts checkpoints, or leave these out."
    for earlier, later in pairwise(checkpoints):
        if (earlier.step or 0) >= (later.step or 0):
            why = f"{later.name} follows {earlier.name} in the list without being a later step"
            return why, "List the checkpoints in training order."
    return None
