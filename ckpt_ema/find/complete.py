"""Whether checkpoints are complete: a newest that is not is left out, one in the middle refused."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.find.checkpoint import Checkpoint, Found, Hole
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.verdict import Outcome, Reason, Verdict
from ckpt_ema.notices import Notice
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions


def without_incomplete(found: Found, selection: Selection, source: Source) -> Found:
    """Return what was found without a newest checkpoint that is incomplete, or, if asked, any."""
    problem_of = _problems(found.checkpoints, source)
    *older, newest = found.checkpoints
    doubtful = found.checkpoints if selection.skip_incomplete else (newest,)
    incomplete = {one: problem for one in doubtful if (problem := problem_of(one))}
    if incomplete and not selection.skip_incomplete and (newest.is_given or not older):
        text = f"{newest.path} is incomplete: {incomplete[newest]}."
        raise IncompleteError(text, code=Code.INCOMPLETE, path=newest.path)
    complete = tuple(one for one in found.checkpoints if one not in incomplete)
    if not complete:
        text = f"{found.root} holds no complete checkpoint."
        raise RefusedError(text, code=Code.NO_CHECKPOINTS, path=found.root)
    verdicts = {
        one.name: Verdict(Outcome.SKIPPED, Reason.INCOMPLETE, "incomplete", f"incomplete: {why}")
        for one, why in incomplete.items()
    }
    judged = (replace(one, verdict=verdicts.get(one.name, one.verdict)) for one in found.judged)
    texts = (f"{one.name} is incomplete and left out: {why}." for one, why in incomplete.items())
    warnings = (*found.warnings, *(Notice(Code.INCOMPLETE, text) for text in texts))
    return replace(
        found,
        checkpoints=complete,
        judged=tuple(judged),
        warnings=warnings,
        problem_of=problem_of,
    )


def check_complete(checkpoints: Sequence[Checkpoint], found: Found) -> None:
    """Refuse a checkpoint that is incomplete or has no model, among those that take part."""
    taken = set(checkpoints)
    places = [place for place, one in enumerate(found.checkpoints) if one in taken]
    for hole in found.holes:
        between = found.checkpoints[places[0] : places[-1]]
        if any(one.path == hole.earlier.path for one in between):
            raise refuse_hole(hole)
    for checkpoint in checkpoints:
        problem = found.problem_of(checkpoint)
        if problem:
            text = f"{checkpoint.path} is incomplete, but later checkpoints exist: {problem}."
            hint = _way_out(checkpoint.name)
            raise IncompleteError(text, hint, code=Code.INCOMPLETE, path=checkpoint.path)


def refuse_hole(hole: Hole) -> IncompleteError:
    """Return the error for a step without a model between steps that take part."""
    where = f"although its name is that of a step before {hole.later.name}"
    text = f"{hole.path} {hole.why}, {where}."
    return IncompleteError(text, _way_out(hole.path.name), code=Code.INCOMPLETE, path=hole.path)


def _way_out(name: str) -> str:
    return (
        f"Restore it, or leave it out with --exclude {name}, or all such checkpoints with"
        " --skip-incomplete."
    )


def _problems(
    checkpoints: Sequence[Checkpoint], source: Source
) -> Callable[[Checkpoint], str | None]:
    """Return a function that opens a checkpoint when asked, and gives what it lacks, if it does."""
    markers = {checkpoint.path: _markers(checkpoint.path, source) for checkpoint in checkpoints}
    # A marker that few have means nothing: somebody may have cleaned up the others.
    counts = Counter(marker for present in markers.values() for marker in present)
    used = {marker for marker, count in counts.items() if 2 * count > len(markers)}
    run = checkpoints[-1].path.parent
    beside, saved = source.storage.names(run), _tracked(run, source)

    def problems(one: Checkpoint) -> Iterator[str]:
        if saved is not None and one.unit == "step" and (one.step or 0) > saved[1]:
            yield f"{saved[0]} has {saved[1]} as the last step that was saved"
        if not one.is_given:
            names = (f"{name}-unfinished" for name in (one.path.name, stem_of(one.path.name)))
            yield from (f"{name} lies beside it" for name in names if name in beside)
            present = markers[one.path]
            yield from (f"it holds {name}" for name in conventions.UNDONE if name in present)
            if source.storage.is_folder(one.path):
                lacking = (name for name in conventions.DONE if name in used - present)
                yield from (
                    f"it lacks {n}, which other checkpoints of the run have" for n in lacking
                )
        last = one.model.written_last
        if last and source.storage.kind(one.model.folder / last) is Kind.ABSENT:
            yield f"it lacks {last}, which is written last"
        try:
            source.read(one.model)
        except IncompleteError as error:
            yield error.message.rstrip(".")

    return functools.cache(lambda checkpoint: next(problems(checkpoint), None))


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
    markers = (m for m in (*conventions.DONE, *conventions.UNDONE) if m.split("/")[0] in names)
    return {m for m in markers if m in names or source.storage.kind(path / m) is not Kind.ABSENT}
