"""Whether each checkpoint of a run is whole, before anything is made of them.

The newest may be unfinished, since a run crashes or is still being saved: it is left out with a
warning. One in the middle is a loss that somebody should know of: it is refused.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import IncompleteError, RefusedError, printable
from ckpt_ema.find.found import Found
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.order import Checkpoint
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions

ProblemOf = Callable[[Checkpoint], str | None]


def problems(checkpoints: Sequence[Checkpoint], source: Source) -> ProblemOf:
    """A function that says what a checkpoint of the run lacks, None for one that is whole.

    It opens a checkpoint when it is asked about it, not before.
    """
    markers = {checkpoint.path: _markers(checkpoint.path, source) for checkpoint in checkpoints}
    # A marker that few have says nothing: somebody may have cleaned up the others.
    used = {
        name
        for name in set().union(*markers.values())
        if 2 * sum(name in present for present in markers.values()) > len(markers)
    }
    run = checkpoints[-1].path.parent
    beside, saved = source.storage.names(run), _tracked(run, source)

    @functools.cache
    def problem_of(checkpoint: Checkpoint) -> str | None:
        if saved is not None and checkpoint.unit == "step" and (checkpoint.step or 0) > saved:
            return f"{conventions.TRACKER_NAME} says that the last whole step is {saved}."
        if not checkpoint.is_given:
            present = markers[checkpoint.path]
            problem = _marked_unfinished(checkpoint.path, present, used, beside, source)
            if problem:
                return problem
        try:
            source.read(checkpoint.model)
        except IncompleteError as error:
            return error.message
        return None

    return problem_of


def without_unfinished(found: Found, selection: Selection, problem_of: ProblemOf) -> Found:
    """What was found without a newest checkpoint that is not whole; a crash leaves such a one.

    With `skip_incomplete` none that is not whole stays. Raises `RefusedError` if nothing is left,
    and for a newest one that was given by name.
    """
    *older, newest = found.checkpoints
    unfinished: list[Checkpoint] = []
    if selection.skip_incomplete:
        unfinished = [c for c in found.checkpoints if problem_of(c)]
    elif problem_of(newest) and (newest.is_given or not older):
        raise RefusedError(f"{printable(newest.path)} is incomplete: {problem_of(newest)}")
    elif problem_of(newest):
        unfinished = [newest]
    whole = tuple(c for c in found.checkpoints if c not in set(unfinished))
    if not whole:
        raise RefusedError(f"{printable(found.root)} holds no complete checkpoint.")
    return replace(
        found,
        checkpoints=whole,
        left_out=(*found.left_out, *((c.path, "incomplete") for c in unfinished)),
        warnings=(
            *found.warnings,
            *(
                f"{printable(c.name)} is incomplete and left out: {problem_of(c)}"
                for c in unfinished
            ),
        ),
    )


def check_whole(checkpoints: Sequence[Checkpoint], problem_of: ProblemOf) -> None:
    """Refuse a checkpoint that takes part and is not whole, though later ones are."""
    for checkpoint in checkpoints:
        problem = problem_of(checkpoint)
        if problem:
            raise RefusedError(
                f"{printable(checkpoint.path)} is incomplete, but later checkpoints exist:"
                f" {problem}",
                f"Restore it, or leave it out with --exclude {printable(checkpoint.name)}, or all"
                " such checkpoints with --skip-incomplete.",
            )


def _tracked(run: Path, source: Source) -> int | None:
    """The last step that a run says it has saved."""
    text = (
        (source.storage.read(run / conventions.TRACKER_NAME) or b"")
        .decode("utf-8", "replace")
        .strip()
    )
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _markers(path: Path, source: Source) -> set[str]:
    """The markers of trainers, of whole or unfinished checkpoints, that a folder holds."""
    if not source.storage.is_folder(path):
        return set()
    names = source.storage.names(path)
    return {
        marker
        for marker in (*conventions.DONE, *conventions.UNDONE)
        if marker in names
        or (marker.split("/")[0] in names and source.storage.kind(path / marker) is not Kind.ABSENT)
    }


def _marked_unfinished(
    path: Path, present: set[str], used: set[str], beside: set[str], source: Source
) -> str | None:
    """What the trainer's own markers say against a checkpoint.

    `present` are those in it, `used` those in any checkpoint of the run, `beside` the names in the
    run's folder.
    """
    for name in (path.name, stem_of(path.name)):
        if f"{name}-unfinished" in beside:
            return f"{printable(name)}-unfinished lies beside it."
    for name in conventions.UNDONE:
        if name in present:
            return f"it holds {name}."
    for name in conventions.DONE if source.storage.is_folder(path) else ():
        if name in used and name not in present:
            return f"it lacks {name}, which other checkpoints of the run have."
    return None
