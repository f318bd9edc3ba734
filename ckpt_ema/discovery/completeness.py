"""Whether each checkpoint of a run is whole, before anything is made of them.

The newest may be unfinished, since a run crashes or is still being saved: it is left out with a
warning. One in the middle is a loss that somebody should know of: it is refused.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_ema import layouts
from ckpt_ema.discovery.discover import Found
from ckpt_ema.discovery.locate import names_in
from ckpt_ema.discovery.names import stem_of
from ckpt_ema.discovery.order import Checkpoint, Read
from ckpt_ema.errors import IncompleteError, RefusedError, printable
from ckpt_ema.options import Options


def complete(found: Found, options: Options, read: Read) -> Found:
    """What was found without the checkpoints that are not whole.

    Raises `RefusedError` for one that is not the newest, unless `skip_incomplete`; and for one that
    was given by name.
    """
    kept: list[Checkpoint] = []
    left_out = list(found.left_out)
    warnings = list(found.warnings)
    problems = _problems(found.checkpoints, read)
    newest = found.checkpoints[-1]
    for checkpoint, problem in zip(found.checkpoints, problems, strict=True):
        if problem is None:
            kept.append(checkpoint)
        elif options.skip_incomplete or (checkpoint is newest and kept and not newest.is_given):
            left_out.append((checkpoint.path, "incomplete"))
            warnings.append(f"{printable(checkpoint.name)} is incomplete and left out: {problem}")
        elif checkpoint is newest:
            raise RefusedError(f"{printable(checkpoint.path)} is incomplete: {problem}")
        else:
            raise RefusedError(
                f"{printable(checkpoint.path)} is incomplete, but later checkpoints exist:"
                f" {problem}",
                "Restore it, or leave such checkpoints out with --skip-incomplete.",
            )
    if not kept:
        raise RefusedError(f"{printable(found.root)} holds no complete checkpoint.")
    return replace(
        found, checkpoints=tuple(kept), left_out=tuple(left_out), warnings=tuple(warnings)
    )


def _problems(checkpoints: Sequence[Checkpoint], read: Read) -> Iterator[str | None]:
    """What each checkpoint lacks, None for one that is whole."""
    markers = [_markers(checkpoint.path) for checkpoint in checkpoints]
    # A marker that few have says nothing: somebody may have cleaned up the others.
    used = {
        name
        for name in set().union(*markers)
        if 2 * sum(name in present for present in markers) > len(markers)
    }
    run = checkpoints[-1].path.parent
    beside, saved = names_in(run), _tracked(run)
    for checkpoint, present in zip(checkpoints, markers, strict=True):
        problem = None
        if not checkpoint.is_given:
            problem = _marked_unfinished(checkpoint.path, present, used, beside)
        if saved is not None and checkpoint.unit == "step" and (checkpoint.step or 0) > saved:
            problem = f"{layouts.TRACKER_NAME} says that the last whole step is {saved}."
        if problem is None:
            try:
                read(checkpoint.weights)
            except IncompleteError as error:
                problem = error.message
        yield problem


def _tracked(run: Path) -> int | None:
    """The last step that a run says it has saved."""
    try:
        text = (run / layouts.TRACKER_NAME).read_text(errors="replace").strip()
    except OSError:
        return None
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _markers(path: Path) -> set[str]:
    """The markers of trainers, of whole or unfinished checkpoints, that a folder holds."""
    if not os.path.isdir(path):
        return set()
    names = names_in(path)
    return {
        marker
        for marker in (*layouts.DONE, *layouts.UNDONE)
        if marker.split("/")[0] in names and os.path.lexists(os.path.join(path, marker))
    }


def _marked_unfinished(
    path: Path, present: set[str], used: set[str], beside: set[str]
) -> str | None:
    """What the trainer's own markers say against a checkpoint.

    `present` are those in it, `used` those in any checkpoint of the run, `beside` the names in the
    run's folder.
    """
    for name in (path.name, stem_of(path.name)):
        if f"{name}-unfinished" in beside:
            return f"{printable(name)}-unfinished lies beside it."
    for name in layouts.UNDONE:
        if name in present:
            return f"it holds {name}."
    for name in layouts.DONE if os.path.isdir(path) else ():
        if name in used and name not in present:
            return f"it lacks {name}, which other checkpoints of the run have."
    return None
