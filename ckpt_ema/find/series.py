"""Which series of numbered names is the run: one, or several whose entries record their steps."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from ckpt_ema.containers.reader import hold_the_same, same_values
from ckpt_ema.containers.specs import is_safetensors
from ckpt_ema.errors import Code, IncompleteError, RefusedError, some
from ckpt_ema.find.candidates import Candidates
from ckpt_ema.find.entries import Entry, Verdicts
from ckpt_ema.find.names import bare_of, captures_step, pattern_of
from ckpt_ema.find.verdict import Outcome, Reason, Verdict, alias, skipped
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.table import Refusal


def choose_series(found: Candidates, selection: Selection) -> dict[Entry, Verdict]:
    """Return the verdict on each numbered entry; raises if several series may be the run."""
    steps = found.numbered
    verdicts: dict[Entry, Verdict] = {}
    for name, rule in _RULES:
        decided = rule(steps, selection)
        verdicts |= {entry: replace(verdict, rule=name) for entry, verdict in decided.items()}
        steps = tuple(entry for entry in steps if entry not in decided)
    for entry in found.unsupported:
        verdicts[entry] = _unsupported(entry, steps, selection)
    _check_folders(steps)
    return verdicts | dict.fromkeys(steps, Verdict(Outcome.STEP, Reason.NUMBERED, "series"))


def _beside_models(steps: Sequence[Entry], _selection: Selection) -> Verdicts:
    """Leave out what DeepSpeed saves to resume from, beside a series of whole models."""
    ours = [entry for entry in steps if entry.is_of_deepspeed]
    models = {entry.template for entry in steps if entry not in ours}
    others = [entry for entry in ours if models and entry.template not in models]
    return dict.fromkeys(others, skipped(Reason.TRAINING_STATE))


def _beside_files(steps: Sequence[Entry], _selection: Selection) -> Verdicts:
    """Leave out folders beside files of their names, which hold something else."""
    files = {entry.template for entry in steps if not entry.is_folder}
    folders = [entry for entry in steps if entry.is_folder and entry.template in files]
    return dict.fromkeys(folders, skipped(Reason.BESIDE_FILE))


def _same_steps(steps: Sequence[Entry], selection: Selection) -> Verdicts:
    """Of several series that are one, leave out what records the step of an earlier entry."""
    if not _record_their_steps(steps, selection):
        return {}
    first: dict[int, Entry] = {}
    verdicts: dict[Entry, Verdict] = {}
    for entry in steps:
        same = first.setdefault(entry.recorded["step"], entry)
        if same is not entry:
            verdicts[entry] = alias(Reason.SAME_STEP, f"the same step as {same.name}")
    return verdicts


def _only_ones(steps: Sequence[Entry], selection: Selection) -> Verdicts:
    """Leave out lone names beside a series; raises if several series remain."""
    if captures_step(selection.pattern) or _record_their_steps(steps, selection):
        return {}
    counts = Counter(entry.template for entry in steps)
    several = {t: n for t, n in counts.items() if n > 1} or counts
    if len(several) > 1:
        run = steps[0].path.parent
        names = {entry.template: entry.name for entry in reversed(steps)}
        series = " and ".join(f"{count} × {template}" for template, count in several.items())
        patterns = [f"--pattern '{pattern_of(template, names[template])}'" for template in several]
        what = f"{run} holds {len(several)} series of checkpoints, {series}"
        text, hint = f"{what}; they may be the same states saved twice.", " or ".join(patterns)
        raise RefusedError(text, f"Choose one: {hint}.", code=Code.SEVERAL_SERIES, path=run)
    lone = [entry for entry in steps if entry.template not in several]
    if len(lone) > len(steps) - len(lone):
        raise _mostly_unlike(steps, lone)
    return dict.fromkeys(lone, skipped(Reason.ONLY_ONE))


def _mostly_unlike(steps: Sequence[Entry], lone: Sequence[Entry]) -> RefusedError:
    """Return the error for a series that would leave out more checkpoints than it takes."""
    taken = [entry.name for entry in steps if entry not in lone]
    left_out = some([entry.name for entry in lone])
    text = f"{some(taken)} would be averaged without {left_out}, whose names are different."
    hint = (
        "If all are steps, say where the step is with --pattern, such as"
        " --pattern 'step[-_]?(?P<step>[0-9]+)'; otherwise leave these out with --exclude."
    )
    return RefusedError(text, hint, code=Code.SEVERAL_SERIES, path=lone[0].path)


def _outputs_of_ours(steps: Sequence[Entry], _selection: Selection) -> Verdicts:
    """Leave out files that ckpt-ema wrote; `candidates` has folders."""
    ours: dict[Entry, Verdict] = {}
    for entry in steps:
        if is_safetensors(entry.path.name) and entry.model and not entry.is_folder:
            with contextlib.suppress(IncompleteError):  # judged later
                headers = entry.source.read(entry.model).metadata
                if any(conventions.PROVENANCE_KEY in header for header in headers):
                    ours[entry] = skipped(Reason.OWN_OUTPUT)
    return ours


def _same_files(steps: Sequence[Entry], _selection: Selection) -> Verdicts:
    """Leave out further names of a file or folder; raises for revisions with one content."""
    verdicts: dict[Entry, Verdict] = {}
    unique: dict[object, Entry] = {}
    # Links come after what they lead to.
    for entry in sorted(steps, key=lambda e: (e.source.storage.is_link(e.path), e.path.name)):
        first = unique.setdefault(_identity(entry), entry)
        if first is not entry and not entry.is_revision:
            verdicts[entry] = alias(Reason.SAME_FILE, f"the same file as {first.name}")
        elif first is not entry and not entry.source.reading.allow_duplicates:
            raise same_values(first.name, entry.name)
    return verdicts


def _copies(steps: Sequence[Entry], _selection: Selection) -> Verdicts:
    """Leave out a checkpoint that was copied into the folder of a resumed run."""
    verdicts: dict[Entry, Verdict] = {}
    first: dict[str, Entry] = {}
    for entry in steps:
        same = first.setdefault(entry.name, entry)
        if same is not entry and entry.model and same.model:
            source = entry.source
            models = [(one, source.read(one)) for one in (same.model, entry.model)]
            if hold_the_same(models[0], models[1], source.storage):
                verdicts[entry] = alias(Reason.COPY, f"a copy of {same.path}")
    return verdicts


def _check_folders(steps: Sequence[Entry]) -> None:
    """Refuse models in folders of different names: they may be different models."""
    known = (".", *conventions.MODEL_FOLDERS, *conventions.DCP_FOLDERS)
    models = [
        (e, os.path.relpath(e.model.folder, e.path)) for e in steps if e.is_folder and e.model
    ]
    first: dict[str, Entry] = {}
    for entry, folder in models:
        if folder not in known:
            first.setdefault(folder, entry)
    if len(first) > 1:
        (folder, one), (other_folder, other) = list(first.items())[:2]
        text = f"{one.name} has its model in {folder}/, and {other.name} in {other_folder}/."
        hint = f"Choose one model with --component {folder}, and leave out others with --exclude."
        raise RefusedError(text, hint, code=Code.SEVERAL_MODELS, path=other.path)


_Rule = Callable[[Sequence[Entry], Selection], Verdicts]
_RULES: tuple[tuple[str, _Rule], ...] = (
    ("deepspeed-beside-models", _beside_models),
    ("folder-beside-file", _beside_files),
    ("same-step", _same_steps),
    ("only-one", _only_ones),
    ("output-of-ours", _outputs_of_ours),
    ("same-file", _same_files),
    ("copy", _copies),
)


def _unsupported(entry: Entry, steps: Sequence[Entry], selection: Selection) -> Verdict:
    """Refuse a step of the series in a format that is not read; others are left out."""
    located = entry.located
    assert isinstance(located, Refusal)
    is_step = (entry.template, entry.is_folder) in {(one.template, one.is_folder) for one in steps}
    if is_step and not selection.skip_incomplete:
        text = f"{entry.path} is {located.what}, unlike other steps of the run."
        hint = f"{located.instead} Or leave such steps out with --skip-incomplete."
        raise RefusedError(text, hint, code=Code.UNSUPPORTED_FORMAT, path=entry.path)
    return Verdict(Outcome.REFUSED, Reason.UNSUPPORTED, "unsupported", located.what)


def _record_their_steps(steps: Sequence[Entry], selection: Selection) -> bool:
    """Return whether several series are one that changed its names, by what they record."""
    templates = {entry.template for entry in steps}
    return (
        len(templates) > 1
        and selection.order != "name"
        and len({bare_of(template) for template in templates}) == 1
        and all("step" in entry.recorded for entry in steps)
    )


def modelless(verdicts: Verdicts, steps: Sequence[Entry]) -> dict[Entry, str]:
    """Return the entries that are named as a step of the series and hold no model, and why.

    A folder beside files is one only with the extension of a file: others hold results.
    """
    numbers = {(step.template, *step.slots) for step in steps}
    is_folder = {step.template: step.is_folder for step in steps}
    found = {}
    for entry, verdict in verdicts.items():
        why = _WITHOUT_MODEL.get(verdict.reason)
        may_be_step = is_folder.get(entry.template) or entry.has_weights_extension
        is_alike = entry.template in is_folder and (entry.template, *entry.slots) not in numbers
        if why and may_be_step and is_alike:
            found[entry] = "is a broken link" if entry.kind is Kind.ABSENT else why
    return found


_WITHOUT_MODEL = {
    Reason.NO_MODEL: "holds no model",
    Reason.NOT_REGULAR: "is neither a file nor a folder",
    Reason.NOT_LISTABLE: "cannot be listed",
}


def _identity(entry: Entry) -> object:
    """Return a value that is equal for two names of one checkpoint: of its files, or its folder."""
    assert entry.model is not None
    storage = entry.source.storage
    # Different checkpoints may share an index of shards or chunks, or one of several models.
    files = [os.path.join(entry.model.folder, member.name) for member in entry.model.members]
    is_list = any(f.endswith((conventions.INDEX_SUFFIX, conventions.DCP_METADATA)) for f in files)
    if is_list or any(storage.kind(file) is Kind.ABSENT for file in files):
        return storage.file_id(entry.path)
    return tuple(map(storage.file_id, files))
