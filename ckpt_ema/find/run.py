"""From a folder or a list of paths to checkpoints in training order; two readings are refused."""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.candidates import Candidates, candidates_in
from ckpt_ema.find.checkpoint import Checkpoint, Found
from ckpt_ema.find.complete import without_incomplete
from ckpt_ema.find.entries import Entry, is_hub_cache
from ckpt_ema.find.folder import all_judged, in_folder, nothing_found
from ckpt_ema.find.further import with_further_files
from ckpt_ema.find.given import common_root, listed, none_selected, unmatched
from ckpt_ema.find.model_files import locate, unsupported
from ckpt_ema.find.names import captures_step, numbers_in
from ckpt_ema.find.order import step_in_name
from ckpt_ema.find.together import together
from ckpt_ema.find.verdict import UNSELECTED, Outcome, Reason, Verdict
from ckpt_ema.find.warnings import beside_container
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.storage.uri import suggestion
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.table import Refusal

# How far below a folder without checkpoints runs are looked for, and in how many folders.
_DEEPEST_RUN, _MOST_SEARCHED = 3, 100


def discover(paths: Sequence[Path], selection: Selection, source: Source) -> Found:
    """Find the checkpoints in one folder, or take the given folders and files in their order."""
    for path in paths:
        if source.storage.kind(path) is Kind.ABSENT:
            is_link = source.storage.exists(path)
            text = f"{path} is a broken link." if is_link else f"{path} does not exist."
            raise RefusedError(text, _instead_of(path), code=Code.NOT_FOUND, path=path)
    if len(paths) == 1 and source.storage.is_folder(paths[0]):
        run = paths[0]
        if run.name == "snapshots" and is_hub_cache(run.parent, source):
            run = run.parent  # where the revisions have names
        found = _in_run(run, candidates_in(run, selection, source), selection, source)
    else:
        runs = _given_runs(paths, selection, source)
        found = together(runs, selection, source) if runs else listed(paths, selection, source)
        given = {run.folder: path for run, path in zip(runs, paths, strict=False)}
        found = replace(found, root=given.get(found.root, found.root))
    return without_incomplete(with_further_files(found, source), selection, source)


def _in_run(run: Path, candidates: Candidates, selection: Selection, source: Source) -> Found:
    """Return the checkpoints in a folder of a run or deeper, or the one that the folder is."""
    if candidates.numbered and not candidates.are_stray():
        return in_folder(run, candidates, selection, source)
    inside = [] if candidates.unsupported else _runs_in(candidates, selection, source)
    if inside:
        is_one = len(inside) == 1
        found = (
            _in_run(run, inside[0], selection, source)
            if is_one
            else together(inside, selection, source, above=run)
        )
        warnings = (*found.warnings, *beside_container(candidates))
        return replace(found, root=run, warnings=warnings)
    return _alone(candidates, selection, source) or in_folder(run, candidates, selection, source)


def _instead_of(path: Path) -> str:
    """Return what to do about a path that does not exist."""
    uri = suggestion(str(path))
    return f"If it is a repository on the Hub, pass {uri}." if uri else "Check the path."


def _given_runs(paths: Sequence[Path], selection: Selection, source: Source) -> list[Candidates]:
    """Return what is in each of several folders of checkpoints; nothing if they are checkpoints."""
    runs: list[Candidates] = []
    for path in paths:
        run = _run_at(path, selection, source)
        if run is None and not runs:
            return []
        if run is None or any(one.folder == run.folder for one in runs):
            why = "is given twice" if run else f"is not a folder of checkpoints, as {paths[0]} is"
            code = Code.GIVEN_TWICE if run else Code.NOT_A_CHECKPOINT
            raise RefusedError(f"{path} {why}.", code=code, path=path)
        runs.append(run)
    return runs


def _run_at(path: Path, selection: Selection, source: Source) -> Candidates | None:
    """Return what is in the folder of a run; None for a checkpoint."""
    if not source.storage.is_folder(path):
        return None
    is_model = isinstance(locate(path, source), ModelFiles)
    if is_model and numbers_in(path.name):
        return None
    inside = candidates_in(path, selection, source)
    if inside.numbered and not inside.are_stray():
        is_series = len(inside.numbered) > 1 or any(entry.numbers for entry in inside.numbered)
        return inside if is_series or not is_model else None
    deeper = [] if is_model else _runs_in(inside, selection, source)
    return deeper[0] if len(deeper) == 1 else None


def _runs_in(candidates: Candidates, selection: Selection, source: Source) -> list[Candidates]:
    """Return what is in the folders that hold checkpoints: those of trainers, then any."""
    run = candidates.folder
    globs = (glob.split("/") for glob in conventions.CONTAINERS)
    paths = dict.fromkeys(path for glob in globs for path in _matching(run, glob, source))
    inside = [candidates_in(path, selection, source) for path in paths]
    hits = [one for one in inside if one.numbered or one.unsupported]
    # What ranks have written is training state beside a model (prime-rl's checkpoints/, weights/).
    models = [
        one
        for one in hits
        if any(e.model and e.model.path.name != conventions.DCP_METADATA for e in one.numbered)
    ]
    hits = models if len(models) == 1 else hits
    is_empty = not candidates.numbered and not candidates.skipped(*UNSELECTED, Reason.NOT_MATCHED)
    if not hits and is_empty and not locate(run, source, depth=1):
        hits = list(_runs_below(candidates, selection))
    return hits


def _runs_below(run: Candidates, selection: Selection) -> Iterator[Candidates]:
    """Yield what is in folders of any name that hold checkpoints, the nearest first."""
    queue, seen = deque([(run, 0)]), 0
    while queue:
        candidates, depth = queue.popleft()
        for entry in sorted(candidates.entries, key=lambda entry: entry.name):
            inside = _searched(entry, selection) if seen < _MOST_SEARCHED else None
            seen += inside is not None
            if inside and any(e.numbers for e in (*inside.numbered, *inside.unsupported)):
                yield inside
            elif inside and depth < _DEEPEST_RUN:
                queue.append((inside, depth + 1))


def _searched(entry: Entry, selection: Selection) -> Candidates | None:
    """Return what is in an entry, if it is a folder of the run that can be searched."""
    is_apart = entry.name.startswith(".") or conventions.NO_CHECKPOINTS.search(entry.name)
    if is_apart or not entry.is_folder or entry.source.storage.is_link(entry.path):
        return None
    try:
        return candidates_in(entry.path, selection, entry.source)
    except RefusedError as error:
        if error.code is Code.INACCESSIBLE:
            return None
        raise


def _matching(folder: Path, globs: list[str], source: Source) -> Iterator[Path]:
    """Yield the folders at a glob, one of whose parts each level of folders matches."""
    if not globs:
        yield folder
    elif source.storage.can_list(folder):
        for name in sorted(source.storage.names(folder)):
            if fnmatchcase(name, globs[0]) and source.storage.is_folder(folder / name):
                yield from _matching(folder / name, globs[1:], source)


def _alone(candidates: Candidates, selection: Selection, source: Source) -> Found | None:
    """Return the checkpoint that the folder itself is; None if it holds a series after all."""
    run, numbered = candidates.folder, candidates.numbered
    if not numbered:
        _check_selected(candidates, selection)
    is_run = candidates.unsupported or candidates.skipped(Reason.NO_MODEL)
    # A model deeper than a checkpoint's own folders, or beside unreadable steps, is not a step.
    own = None if is_run and not numbers_in(run.name) else locate(run, source, depth=1)
    if isinstance(own, ModelFiles) and own.path not in {e.model.path for e in numbered if e.model}:
        unit, step = step_in_name(Entry(run, source))
        checkpoint = Checkpoint(run, step, own, unit)
        members = {member.name.split("/")[0] for member in own.members}
        alone = Verdict(Outcome.STEP, Reason.ALONE, "alone")
        rest = Verdict(Outcome.OTHER, Reason.NOT_A_CHECKPOINT, "alone")
        verdicts = {e: alone if e.name in members else rest for e in candidates.entries}
        judged = all_judged({**verdicts, **candidates.verdicts})
        return Found(common_root([checkpoint]), (checkpoint,), judged)
    if numbered:
        return None
    for path, located in [*((e.path, e.located) for e in candidates.unsupported), (run, own)]:
        if isinstance(located, Refusal):
            raise unsupported(path, located)
    raise nothing_found(candidates, candidates.verdicts)


def _check_selected(candidates: Candidates, selection: Selection) -> None:
    """Refuse a pattern or globs that leave nothing of a folder."""
    names = [entry.name for entry in candidates.entries]
    matching = [name for name in names if re.search(selection.pattern or "(?!)", name)]
    if matching and not candidates.unsupported and not captures_step(selection.pattern):
        text = f"--pattern {selection.pattern} matches {some(matching)}, of which none is a step."
        hint = "Capture the step with a group, or list the checkpoints, oldest first."
        raise RefusedError(text, hint, code=Code.NO_MATCH, path=candidates.folder)
    if selection.pattern and not candidates.unsupported:
        what = f"{candidates.folder} holds no checkpoint that matches --pattern {selection.pattern}"
        text = f"{what}; its names are {some(names)}."
        raise RefusedError(text, code=Code.NO_MATCH, path=candidates.folder)
    unselected = candidates.skipped(*UNSELECTED)
    if unselected:
        unmatched(names, selection)
        raise none_selected((entry.name for entry in unselected), selection)
