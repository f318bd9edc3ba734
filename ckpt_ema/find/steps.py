"""How far apart the checkpoints of a run are, in what their numbers count."""

from collections.abc import Sequence
from itertools import pairwise

from ckpt_ema.errors import RefusedError, printable, some
from ckpt_ema.find.order import Checkpoint


def gaps(checkpoints: Sequence[Checkpoint]) -> list[int | None]:
    """Steps from each checkpoint's predecessor to it; None where that is unknown.

    accelerate numbers its saves one after the other, which says nothing of distances.
    """
    known: list[int | None] = [None]
    for earlier, later in pairwise(checkpoints):
        if earlier.step is None or later.step is None or later.unit == "save":
            known.append(None)
        else:
            known.append(later.step - earlier.step)
    return known


def known_steps(checkpoints: Sequence[Checkpoint]) -> list[int] | None:
    """The steps of all checkpoints, which rise; None where they are not known."""
    return None if _obstacle(checkpoints) else [checkpoint.step or 0 for checkpoint in checkpoints]


def needed_steps(checkpoints: Sequence[Checkpoint], asked_by: str) -> list[int]:
    """The steps of all checkpoints, which rise; `asked_by` is the option that needs them.

    Raises `RefusedError` if they are not known, or count saves and not the training.
    """
    steps, obstacle = known_steps(checkpoints), _obstacle(checkpoints)
    if steps is None or obstacle is not None:
        why, hint = obstacle or ("", "")
        raise RefusedError(f"{asked_by} counts training steps, and {why}", hint)
    return steps


def _obstacle(checkpoints: Sequence[Checkpoint]) -> tuple[str, str] | None:
    """Why steps are not known, and what to do about it; None if they are."""
    saves = [checkpoint.name for checkpoint in checkpoints if checkpoint.unit == "save"]
    if saves:
        return (
            f"the number in {printable(saves[0])} counts saves (accelerate): how many steps lie"
            " between them is not known.",
            "Choose what counts checkpoints, or rename the folders by their steps.",
        )
    unknown = [checkpoint.name for checkpoint in checkpoints if checkpoint.step is None]
    if unknown:
        return (
            f"{some(unknown)} tells none.",
            "Choose what counts checkpoints, or leave that one out.",
        )
    for earlier, later in pairwise(checkpoints):
        if (earlier.step or 0) >= (later.step or 0):
            return (
                f"{printable(later.name)} comes after {printable(earlier.name)} in the list though"
                " its step does not.",
                "Give the checkpoints in training order.",
            )
    return None
