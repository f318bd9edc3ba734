"""From a folder or a list of paths to checkpoints in training order; two readings are refused."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.aliases import place_aliases
from ckpt_ema.find.candidates import Candidates, candidates_in
from ckpt_ema.find.checkpoint import STEP_UNITS, Checkpoint, Found, Hole
from ckpt_ema.find.complete import without_incomplete
from ckpt_ema.find.entries import Entry, Verdicts, is_hub_cache
from ckpt_ema.find.further import with_further_files
from ckpt_ema.find.given import append, common_root, listed, none_selected, unmatched
from ckpt_ema.find.model_files import locate, unsupported
from ckpt_ema.find.names import numbers_in, stem_of, template_of
from ckpt_ema.find.order import ordered, step_in_name
from ckpt_ema.find.series import choose_series, modelless
from ckpt_ema.find.verdict import APPENDED, UNSELECTED, Judged, Outcome, Reason, Verdict, skipped
from ckpt_ema.notices import Notice
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.table import Refusal


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
        found = listed(paths, selection, source)
    return without_incomplete(with_further_files(found, source), selection, source)


def _in_run(run: Path, candidates: Candidates, selection: Selection, source: Source) -> Found:
    """Return the checkpoints in a folder of a run or deeper, or the one that the folder is."""
    if candidates.numbered and not candidates.are_stray():
        return _in_folder(run, candidates, selection, source)
    folder = candidates.folder
    inner = None if candidates.unsupported else _container_of(folder, selection, source)
    if inner:
        found = _in_run(run, inner, selection, source)
        warnings = (*found.warnings, *_beside_container(candidates))
        return replace(found, root=run, warnings=warnings)
    return _alone(candidates, selection, source) or _in_folder(run, candidates, selection, source)


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
    warnings = (*pattern_warnings, *_warnings(verdicts, steps, numbered[-1], appended, at_ends))
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


def _container_of(run: Path, selection: Selection, source: Source) -> Candidates | None:
    """Return what is in the folder that holds a run's checkpoints, which trainers name alike."""
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
    if len(hits) > 1:
        what = f"{len(hits)} runs ({some([os.path.relpath(one.folder, run) for one in hits])})"
        text = f"{run} contains {what}, and an average across runs is not one over training."
        raise RefusedError(text, "Pass one of them.", code=Code.SEVERAL_RUNS, path=run)
    return hits[0] if hits else None


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
    return RefusedError(text, hint, code=Code.NO_CHECKPOINTS, path=candidates.folder)


def _all_judged(verdicts: Verdicts, appended: Sequence[Checkpoint] = ()) -> tuple[Judged, ...]:
    """Return the verdicts on all entries, series by number, and on appended ones from elsewhere."""
    entries = sorted(verdicts, key=lambda entry: (entry.template, entry.slots, entry.name))
    judged = [entry.judged(verdicts[entry]) for entry in entries]
    known = {one.path for one in judged}
    others = [Judged(one.path, one.name, APPENDED) for one in appended if one.path not in known]
    return (*judged, *others)


def _warnings(
    verdicts: Verdicts,
    steps: Sequence[Entry],
    newest: Checkpoint,
    appended: Sequence[Checkpoint],
    lacking: Mapping[Entry, str],
) -> Iterator[Notice]:
    """Yield warnings about entries left out in doubt and those placed after the newest step."""
    templates = {entry.template for entry in steps}
    units = STEP_UNITS if newest.unit in STEP_UNITS else (newest.unit,)
    of_reason = defaultdict(list)
    for entry, verdict in verdicts.items():
        of_reason[verdict.reason].append(entry)
    for why in dict.fromkeys(lacking.values()):
        paths = [entry.path for entry, each in lacking.items() if each == why]
        text = f"{paths[0]} {why} and is left out: unfinished save?"
        if len(paths) > 1:
            text = f"{some(path.name for path in paths)} are left out, as each {why}."
        yield Notice(Code.INCOMPLETE, text)
    lone = of_reason[Reason.ONLY_ONE]
    if lone:
        later = [e for e in lone if any(e.numbers.get(u, 0) > (newest.step or 0) for u in units)]
        then = f"; {later[0].name} seems to be later than {newest.name}" if later else ""
        text = (
            f"No other name is like {some(entry.name for entry in lone)}, left out of the average"
            f"{then}. Take it in with --pattern, or confirm with --exclude."
        )
        yield Notice(Code.LEFT_OUT, text)
    for one in appended:
        if template_of(stem_of(one.name)) in templates:
            text = f"puts it after {newest.name}, although its name has a number."
            yield Notice(Code.OUT_OF_ORDER, f"--append {one.name} {text}")
    for entry, verdict in verdicts.items():
        about = _ABOUT_ALIASES.get(verdict.reason)
        if about and not (verdict.reason is Reason.ANOTHER_MODEL and entry.is_folder):
            code = _CODES.get(verdict.reason, Code.LEFT_OUT)
            yield Notice(code, about.format(name=entry.name, detail=verdict.detail))


_ABOUT_ALIASES = {
    Reason.INCOMPLETE: "{name} is left out, {detail}.",
    Reason.UNREADABLE: "{name} may be a later step and is left out, {detail}",
    Reason.LATER: "{name} is used as the last step: it {detail}.",
    Reason.OWN_MODEL_UNLIKE: (
        "{name} in the run's folder is left out, and is not the model of any checkpoint; add it as"
        " the last step with --append {name}, or confirm with --exclude {name}."
    ),
    Reason.ANOTHER_MODEL: (
        "{name} is left out, since its tensors are not those of the checkpoints; confirm with"
        " --exclude {name}."
    ),
}
_CODES = {Reason.LATER: Code.DECIDED, Reason.ANOTHER_MODEL: Code.OTHER_WEIGHTS}


def _beside_container(candidates: Candidates) -> list[Notice]:
    """Return a warning of models beside the folder of checkpoints, which are not opened."""
    names = [e.name for e in candidates.unnumbered if conventions.ALIAS.search(e.stem)]
    if not names:
        return []
    text = (
        f"{candidates.folder} also holds {some(names)}, outside its folder of checkpoints; if that"
        f" is a later step, add it with --append {names[0]}."
    )
    return [Notice(Code.LEFT_OUT, text)]
