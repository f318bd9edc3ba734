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
from ckpt_ema.discover import Found
from ckpt_ema.errors import IncompleteError, RefusedError, printable
from ckpt_ema.names import stem_of
from ckpt_ema.options import Options
from ckpt_ema.order import Checkpoint, Read


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
        elif options.skip_incomplete or (checkpoint is newest and kept and not found.is_list):
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
    folders = [checkpoint.path for checkpoint in checkpoints if os.path.isdir(checkpoint.path)]
    marked = {name for name in layouts.DONE if any(os.path.lexists(f / name) for f in folders)}
    saved = _tracked(checkpoints[-1].path.parent)
    for checkpoint in checkpoints:
        problem = _marked_unfinished(checkpoint.path, marked)
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


def _marked_unfinished(path: Path, marked: set[str]) -> str | None:
    """What the trainer's own markers say against a checkpoint; `marked` are those in use."""
    for name in (path.name, stem_of(path.name)):
        if os.path.lexists(path.parent / f"{name}-unfinished"):
            return f"{printable(name)}-unfinished lies beside it."
    if not os.path.isdir(path):
        return None
    for name in layouts.UNDONE:
        if os.path.lexists(path / name):
            return f"it holds {name}."
    for name in sorted(marked):
        if not os.path.lexists(path / name):
            return f"it lacks {name}, which other checkpoints of the run have."
    return None
