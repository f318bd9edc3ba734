"""Whether each checkpoint of a run is complete.

The newest may be incomplete, since a run crashes or is still being saved: it is left out with a
warning. One in the middle is a loss that somebody should know of: it is refused.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.found import Found
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.verdict import Judged, Outcome, Reason, Verdict
from ckpt_ema.notices import Notice
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions


def without_incomplete(found: Found, selection: Selection, source: Source) -> Found:
    """Return what was found without a newest checkpoint that is incomplete.

    With `skip_incomplete`, no incomplete one stays. Raises `RefusedError` if nothing is left, and
    for a newest one that was given by name.
    """
    problem_of = _problems(found.checkpoints, source)
    *older, newest = found.checkpoints
    incomplete: list[Checkpoint] = []
    if selection.skip_incomplete:
        incomplete = [one for one in found.checkpoints if problem_of(one)]
    elif problem_of(newest) and (newest.is_given or not older):
        raise IncompleteError(
            f"{newest.path} is incomplete: {problem_of(newest)}.",
            code=Code.INCOMPLETE,
            path=newest.path,
        )
    elif problem_of(newest):
        incomplete = [newest]
    left, gone = {one.name: f"incomplete: {problem_of(one)}" for one in incomplete}, set(incomplete)
    complete = tuple(one for one in found.checkpoints if one not in gone)
    if not complete:
        raise RefusedError(
            f"{found.root} holds no complete checkpoint.",
            code=Code.NO_CHECKPOINTS,
            path=found.root,
        )
    notices = (
        Notice(Code.INCOMPLETE, f"{one.name} is incomplete and left out: {problem_of(one)}.")
        for one in incomplete
    )
    return replace(
        found,
        checkpoints=complete,
        judged=tuple(_incomplete(one, left.get(one.name)) for one in found.judged),
        warnings=(*found.warnings, *notices),
        problem_of=problem_of,
    )


def check_complete(checkpoints: Sequence[Checkpoint], found: Found) -> None:
    """Refuse a checkpoint that takes part and is incomplete, though later ones exist."""
    for checkpoint in checkpoints:
        problem = found.problem_of(checkpoint)
        if problem:
            raise IncompleteError(
                f"{checkpoint.path} is incomplete, but later checkpoints exist: {problem}.",
                f"Restore it, or leave it out with --exclude {checkpoint.name}, or all such"
                " checkpoints with --skip-incomplete.",
                code=Code.INCOMPLETE,
                path=checkpoint.path,
            )


def _incomplete(judged: Judged, detail: str | None) -> Judged:
    if detail is None:
        return judged
    verdict = Verdict(Outcome.SKIPPED, Reason.INCOMPLETE, "incomplete", detail)
    return replace(judged, verdict=verdict)


def _problems(
    checkpoints: Sequence[Checkpoint], source: Source
) -> Callable[[Checkpoint], str | None]:
    """Return a function that gives what a checkpoint lacks, None for a complete one.

    It opens a checkpoint when it is asked about it, not before.
    """
    markers = {checkpoint.path: _markers(checkpoint.path, source) for checkpoint in checkpoints}
    # A marker that few have means nothing: somebody may have cleaned up the others.
    used = {
        name
        for name in set().union(*markers.values())
        if 2 * sum(name in present for present in markers.values()) > len(markers)
    }
    run = checkpoints[-1].path.parent
    beside, saved = source.storage.names(run), _tracked(run, source)

    @functools.cache
    def problem_of(checkpoint: Checkpoint) -> str | None:
        if saved is not None and checkpoint.unit == "step" and (checkpoint.step or 0) > saved[1]:
            return f"{saved[0]} has {saved[1]} as the last step that was saved"
        if not checkpoint.is_given:
            present = markers[checkpoint.path]
            problem = _marked(checkpoint.path, present, used, beside, source)
            if problem:
                return problem
        try:
            source.read(checkpoint.model)
        except IncompleteError as error:
            return error.message.rstrip(".")
        return None

    return problem_of


def _tracked(run: Path, source: Source) -> tuple[str, int] | None:
    """Return the last step that a run has saved, by its own file, with the file's name."""
    for name in conventions.TRACKERS:
        text = (source.storage.read(run / name) or b"").decode("utf-8", "replace").strip()
        if re.fullmatch(r"[0-9]{1,18}", text):
            return name, int(text)
    return None


def _markers(path: Path, source: Source) -> set[str]:
    """Return the trainers' markers in a folder, of complete or incomplete checkpoints."""
    if not source.storage.is_folder(path):
        return set()
    names = source.storage.names(path)
    return {
        marker
        for marker in (*conventions.DONE, *conventions.UNDONE)
        if marker in names
        or (marker.split("/")[0] in names and source.storage.kind(path / marker) is not Kind.ABSENT)
    }


def _marked(
    path: Path, present: set[str], used: set[str], beside: set[str], source: Source
) -> str | None:
    """Return what the trainer's own markers have against a checkpoint.

    `present` are those in it, `used` those in most checkpoints of the run, `beside` the names in
    the run's folder.
    """
    for name in (path.name, stem_of(path.name)):
        if f"{name}-unfinished" in beside:
            return f"{name}-unfinished lies beside it"
    for name in conventions.UNDONE:
        if name in present:
            return f"it holds {name}"
    for name in conventions.DONE if source.storage.is_folder(path) else ():
        if name in used and name not in present:
            return f"it lacks {name}, which other checkpoints of the run have"
    return None
