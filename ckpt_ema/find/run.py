"""From a folder or a list of paths to checkpoints in training order; two readings are refused."""

import os
import re
import shlex
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import chain, groupby, pairwise
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.aliases import place_aliases
from ckpt_ema.find.candidates import Candidates, candidates_in
from ckpt_ema.find.checkpoint import Checkpoint, Found, Hole
from ckpt_ema.find.complete import without_incomplete
from ckpt_ema.find.entries import Entry, Verdicts, is_hub_cache
from ckpt_ema.find.further import with_further_files
from ckpt_ema.find.given import append, common_root, listed, none_selected, unmatched
from ckpt_ema.find.logs import continuation, reader_of_logs
from ckpt_ema.find.model_files import folders_with_models, locate, unsupported
from ckpt_ema.find.names import captures_step, numbers_in
from ckpt_ema.find.order import ordered, step_in_name
from ckpt_ema.find.series import choose_series, modelless
from ckpt_ema.find.verdict import APPENDED, UNSELECTED, Judged, Outcome, Reason, Verdict, skipped
from ckpt_ema.find.warnings import beside_container, warnings_about
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.table import Refusal

# How far below a folder without checkpoints runs are looked for, and in how many folders.
_DEEPEST_RUN, _MOST_SEARCHED = 3, 100
_DEEPEST_WEIGHTS = 8  # that an error names


def discover(paths: Sequence[Path], selection: Selection, source: Source) -> Found:
    """Find the checkpoints in one folder, or take the given folders and files in their order."""
    for path in paths:
        if source.storage.kind(path) is Kind.ABSENT:
            is_link = source.storage.exists(path)
            text = f"{path} is a broken link." if is_link else f"{path} does not exist."
            raise RefusedError(text, "Check the path.", code=Code.NOT_FOUND, path=path)
    if len(paths) == 1 and source.storage.is_folder(paths[0]):
        run = paths[0]
        if run.name == "snapshots" and is_hub_cache(run.parent, source):
            run = run.parent  # where the revisions have names
        found = _in_run(run, candidates_in(run, selection, source), selection, source)
    else:
        runs = _given_runs(paths, selection, source)
        found = _together(runs, selection, source) if runs else listed(paths, selection, source)
        given = {run.folder: path for run, path in zip(runs, paths, strict=False)}
        found = replace(found, root=given.get(found.root, found.root))
    return without_incomplete(with_further_files(found, source), selection, source)


def _in_run(run: Path, candidates: Candidates, selection: Selection, source: Source) -> Found:
    """Return the checkpoints in a folder of a run or deeper, or the one that the folder is."""
    if candidates.numbered and not candidates.are_stray():
        return _in_folder(run, candidates, selection, source)
    inside = [] if candidates.unsupported else _runs_in(candidates, selection, source)
    if inside:
        is_one = len(inside) == 1
        found = (
            _in_run(run, inside[0], selection, source)
            if is_one
            else _together(inside, selection, source, above=run)
        )
        warnings = (*found.warnings, *beside_container(candidates))
        return replace(found, root=run, warnings=warnings)
    return _alone(candidates, selection, source) or _in_folder(run, candidates, selection, source)


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


def _together(
    runs: Sequence[Candidates], selection: Selection, source: Source, above: Path | None = None
) -> Found:
    """Return the checkpoints of several folders, if the steps of each go on after another's.

    Folders that nobody named, in the folder `above`, are one run only if their logs prove it.
    """
    common = Path(os.path.commonpath([os.path.abspath(one.folder) for one in runs]))
    labels = {one.folder: os.path.relpath(one.folder, common) for one in runs}
    numbered, unnumbered, unsupported = zip(*(one.undecided for one in runs), strict=True)
    verdicts = dict(chain(*(one.verdicts.items() for one in runs)))
    merged = Candidates(
        common,
        tuple(chain(*numbered)),
        tuple(chain(*unnumbered)),
        tuple(chain(*unsupported)),
        verdicts,
    )
    if above and len({entry.name for entry in merged.numbered}) < len(merged.numbered):
        raise _parallel(runs, above)
    try:
        found = _in_folder(runs[-1].folder, merged, selection, source)
    except RefusedError as error:
        if error.code is Code.SAME_STEP:
            raise _parallel(runs, error.path) from error
        if above and error.code in _UNORDERED:
            names = some([one.folder for one in runs])
            text = f"{names} cannot be read as one run: {error.message}"
            raise RefusedError(
                text, "Pass one of them.", code=Code.SEVERAL_RUNS, path=above
            ) from error
        raise
    checkpoints = [one for one in found.checkpoints if one.path.parent in labels]
    in_turn = [folder for folder, _ in groupby(one.path.parent for one in checkpoints)]
    if len(in_turn) > len(set(in_turn)):
        raise _parallel(runs, in_turn[-1])
    if above:
        _check_proven(runs, checkpoints, above, source)
    return _labelled(replace(found, root=in_turn[-1]), labels)


def _check_proven(
    runs: Sequence[Candidates], checkpoints: Sequence[Checkpoint], above: Path, source: Source
) -> None:
    """Refuse folders that nobody named, unless each log goes on as that of the folder before."""
    log_of = reader_of_logs(source)
    for earlier, later in pairwise(checkpoints):
        if earlier.path.parent != later.path.parent:
            logs = continuation(log_of(earlier.path), log_of(later.path))
            if logs.contradiction:
                raise _parallel(runs, later.path)
            if not logs.is_proven:
                folders = [str(one.folder) for one in runs]
                text = f"{above} holds checkpoints in {some(folders)}, of one run or of several."
                command = f"ckpt-ema average {shlex.join(folders)}"
                hint = f"If a run was resumed, pass all its folders: {command}; else pass one."
                raise RefusedError(text, hint, code=Code.SEVERAL_RUNS, path=above)


_UNORDERED = (Code.SEVERAL_SERIES, Code.UNKNOWN_ORDER, Code.CONTRADICTORY_STEPS, Code.SEVERAL_RUNS)


def _parallel(runs: Sequence[Candidates], path: str | Path | None) -> RefusedError:
    """Return the error for runs of which none goes on where another ends."""
    names = some([one.folder for one in runs])
    text = f"{names} are {len(runs)} runs: none goes on where another ends."
    hint = (
        "An average across runs is not one over training: pass one of them, or the checkpoints that"
        " belong together, oldest first."
    )
    return RefusedError(text, hint, code=Code.SEVERAL_RUNS, path=path)


def _labelled(found: Found, labels: Mapping[Path, str]) -> Found:
    """Call each checkpoint by its folder too: those of several folders may have one name."""

    def name(path: Path, own: str) -> str:
        return f"{labels[path.parent]}/{own}" if path.parent in labels else own

    renamed = {one: replace(one, name=name(one.path, one.name)) for one in found.checkpoints}
    return replace(
        found,
        checkpoints=tuple(renamed.values()),
        judged=tuple(replace(one, name=name(one.path, one.name)) for one in found.judged),
        holes=tuple(
            hole._replace(earlier=renamed[hole.earlier], later=renamed[hole.later])
            for hole in found.holes
        ),
    )


def _in_folder(run: Path, candidates: Candidates, selection: Selection, source: Source) -> Found:
    """Return the checkpoints among the candidates of a folder, the run's own or one in it."""
    pattern_warnings = unmatched((entry.name for entry in candidates.entries), selection)
    series = choose_series(candidates, selection)
    steps = [entry for entry, verdict in series.items() if verdict.outcome is Outcome.STEP]
    if not steps:
        raise _nothing_found(candidates, {**candidates.verdicts, **series})
    numbered = ordered(steps, selection)
    later, aliases = place_aliases(candidates.unnumbered, steps, numbered, selection)
    appended = append((candidates.folder, run), [*numbered, *later], selection, source)
    verdicts = {**candidates.verdicts, **series, **aliases}
    lacking = modelless(verdicts, steps)
    verdicts |= dict.fromkeys(
        (e for e in lacking if verdicts[e].outcome is Outcome.OTHER), skipped(Reason.NO_MODEL)
    )
    holes = () if selection.skip_incomplete else tuple(_holes(lacking, steps, numbered))
    inside = {hole.path for hole in holes}
    at_ends = {entry: why for entry, why in lacking.items() if entry.path not in inside}
    warnings = (
        *pattern_warnings,
        *warnings_about(verdicts, steps, numbered[-1], appended, at_ends),
    )
    checkpoints = (*numbered, *later, *appended)
    return Found(run, checkpoints, _all_judged(verdicts, appended), warnings, holes)


def _holes(
    lacking: Mapping[Entry, str], steps: Sequence[Entry], numbered: Sequence[Checkpoint]
) -> Iterator[Hole]:
    """Yield the entries without a model whose numbers are between those of two steps."""
    place = {checkpoint.path: place for place, checkpoint in enumerate(numbered)}
    for entry, why in lacking.items():
        alike = [step for step in steps if step.template == entry.template]
        before = [place[step.path] for step in alike if step.slots < entry.slots]
        after = [place[step.path] for step in alike if step.slots > entry.slots]
        if before and after:
            earlier, later = numbered[max(before)], numbered[min(after)]
            yield Hole(entry.path, why, earlier, later)


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
    # A model deeper than a checkpoint's own folders, or beside unreadable steps, is no step.
    own = None if is_run and not numbers_in(run.name) else locate(run, source, depth=1)
    if isinstance(own, ModelFiles) and own.path not in {e.model.path for e in numbered if e.model}:
        unit, step = step_in_name(Entry(run, source))
        checkpoint = Checkpoint(run, step, own, unit)
        members = {member.name.split("/")[0] for member in own.members}
        alone = Verdict(Outcome.STEP, Reason.ALONE, "alone")
        rest = Verdict(Outcome.OTHER, Reason.NOT_A_CHECKPOINT, "alone")
        verdicts = {e: alone if e.name in members else rest for e in candidates.entries}
        judged = _all_judged({**verdicts, **candidates.verdicts})
        return Found(common_root([checkpoint]), (checkpoint,), judged)
    if numbered:
        return None
    for path, located in [*((e.path, e.located) for e in candidates.unsupported), (run, own)]:
        if isinstance(located, Refusal):
            raise unsupported(path, located)
    raise _nothing_found(candidates, candidates.verdicts)


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


def _nothing_found(candidates: Candidates, verdicts: Verdicts) -> RefusedError:
    """Return the error for a folder without checkpoints, with what is there."""
    deeper = _in_folders_of_each(candidates, verdicts)
    if deeper:
        return deeper
    rows = verdicts.items()
    left_out = [f"{e.name} ({one})" for e, one in rows if one.outcome is not Outcome.OTHER]
    left_out += [entry.name for entry in candidates.unnumbered]
    others = [f"{entry.name}/" if entry.is_folder else entry.name for entry in verdicts]
    if left_out:
        seen = f" and left out {some(left_out)}"
    elif others:
        seen = f" and found {len(others)} entries, none with model weights: {some(others)}"
    else:
        seen = "; the folder is empty"
    text = (
        f"No checkpoints found in {candidates.folder}; looked for numbered folders or files with"
        f" model weights (checkpoint-500, step_100, epoch=1-step=100.ckpt, ...){seen}."
    )
    hint = "If the weights are deeper, pass that folder, or choose names with --pattern."
    for entry in list(verdicts)[:1]:
        files = entry.source.storage.files_below(candidates.folder, _DEEPEST_WEIGHTS)
        weights = [f for f in files if "/" in f and conventions.WEIGHTS_EXTENSION.search(f)]
        if weights:
            hint = f"There is {weights[0]}: pass the folder that holds such checkpoints."
    return RefusedError(text, hint, code=Code.NO_CHECKPOINTS, path=candidates.folder)


def _in_folders_of_each(candidates: Candidates, verdicts: Verdicts) -> RefusedError | None:
    """Return the error for checkpoints with several models, each in a folder; None without."""
    numbered = [entry for entry in verdicts if entry.numbers and entry.is_folder]
    inside = [folders_with_models(entry.path, entry.source) for entry in numbered]
    names = [name for name in inside[0] if all(name in one for one in inside)] if inside else []
    if not names:
        return None
    text = f"Checkpoints in {candidates.folder} have models in folders of their own: {some(names)}."
    hint = f"Choose one with {' or '.join(f'--component {name}' for name in names[:5])}."
    path = candidates.folder
    return RefusedError(text, hint, code=Code.SEVERAL_MODELS, path=path)


def _all_judged(verdicts: Verdicts, appended: Sequence[Checkpoint] = ()) -> tuple[Judged, ...]:
    """Return the verdicts on all entries, series by number, and on appended ones from elsewhere."""
    entries = sorted(verdicts, key=lambda entry: (entry.template, entry.slots, entry.name))
    judged = [entry.judged(verdicts[entry]) for entry in entries]
    known = {one.path for one in judged}
    others = [Judged(one.path, one.name, APPENDED) for one in appended if one.path not in known]
    return (*judged, *others)
