"""From the candidates of one folder to its checkpoints in training order, or why there are none."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.aliases import place_aliases
from ckpt_ema.find.candidates import Candidates
from ckpt_ema.find.checkpoint import Checkpoint, Found, Hole
from ckpt_ema.find.entries import Entry, Verdicts
from ckpt_ema.find.given import append, unmatched
from ckpt_ema.find.model_files import folders_with_models
from ckpt_ema.find.order import ordered
from ckpt_ema.find.series import choose_series, modelless
from ckpt_ema.find.verdict import APPENDED, Judged, Outcome, Reason, skipped
from ckpt_ema.find.warnings import warnings_about
from ckpt_ema.options import Selection
from ckpt_ema.trainers import conventions

_DEEPEST_WEIGHTS = 8  # that an error names


def in_folder(run: Path, candidates: Candidates, selection: Selection, source: Source) -> Found:
    """Return the checkpoints among the candidates of a folder, the run's own or one in it."""
    pattern_warnings = unmatched((entry.name for entry in candidates.entries), selection)
    series = choose_series(candidates, selection)
    steps = [entry for entry, verdict in series.items() if verdict.outcome is Outcome.STEP]
    if not steps:
        raise nothing_found(candidates, {**candidates.verdicts, **series})
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
    return Found(run, checkpoints, all_judged(verdicts, appended), warnings, holes)


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


def nothing_found(candidates: Candidates, verdicts: Verdicts) -> RefusedError:
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


def all_judged(verdicts: Verdicts, appended: Sequence[Checkpoint] = ()) -> tuple[Judged, ...]:
    """Return the verdicts on all entries, series by number, and on appended ones from elsewhere."""
    entries = sorted(verdicts, key=lambda entry: (entry.template, entry.slots, entry.name))
    judged = [entry.judged(verdicts[entry]) for entry in entries]
    known = {one.path for one in judged}
    others = [Judged(one.path, one.name, APPENDED) for one in appended if one.path not in known]
    return (*judged, *others)
