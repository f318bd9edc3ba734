"""`last`, `best`, `final` and names without a number: copies of a step, or a later step.

What they record or hold decides, whatever they are called: kohya, timm, RF-DETR and Lightning's
save_last save the last step as one.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ckpt_ema.containers.reader import hold_the_same
from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.find.checkpoint import STEP_UNITS, Checkpoint
from ckpt_ema.find.entries import STRANGE, Entry
from ckpt_ema.find.given import same_path, unselected
from ckpt_ema.find.order import as_checkpoint, deciding_unit
from ckpt_ema.find.verdict import Outcome, Reason, Rules, Verdict, alias, judge, skipped
from ckpt_ema.options import Selection
from ckpt_ema.trainers.conventions import (
    ALIAS,
    ALWAYS_A_COPY,
    FOLDER_WEIGHTS,
    INITIAL_NAME,
    MAYBE_ADDED,
)


class _Run(NamedTuple):
    """What rules know besides the entry."""

    steps: Sequence[Entry]
    checkpoints: Sequence[Checkpoint]
    selection: Selection


class _Place(NamedTuple):
    """Where an alias belongs by what it and the last step record, both in `unit`."""

    value: int
    last: int
    unit: str
    step: int | None  # the alias's place in the unit of the series, if that is recorded


def place_aliases(
    unnumbered: Sequence[Entry],
    steps: Sequence[Entry],
    checkpoints: Sequence[Checkpoint],
    selection: Selection,
) -> tuple[list[Checkpoint], dict[Entry, Verdict]]:
    """Return which names without a number are later steps, and all verdicts; raises if unknown."""
    run = _Run(steps, checkpoints, selection)
    verdicts: dict[Entry, Verdict] = {}
    places: dict[Entry, _Place] = {}
    for entry in unnumbered:
        try:
            decided = judge(_RULES, entry, run)
            place = None if decided else _place(entry, checkpoints[-1])
        except RefusedError as error:  # such as a pickled module beside state dicts
            decided, place = _unreadable(entry, error, run), None
        if place:
            places[entry] = place
        else:
            verdicts[entry] = decided or replace(_by_content(entry, run), rule="same-content")
    later, placed = _in_order(places, checkpoints[-1])
    return later, verdicts | placed


def _in_order(
    places: Mapping[Entry, _Place], newest: Checkpoint
) -> tuple[list[Checkpoint], dict[Entry, Verdict]]:
    """Put aliases that record a step after the numbered steps, or leave them out."""
    later: list[Checkpoint] = []
    verdicts: dict[Entry, Verdict] = {}
    last: int | None = None
    for entry, place in sorted(places.items(), key=lambda row: (row[1].value, row[0].name)):
        records = f"records {place.unit} {place.value}"
        if place.value > (place.last if last is None else last):
            last = place.value
            later.append(as_checkpoint(entry, newest.unit, place.step, is_given=True))
            detail = f"{records}, after {place.last} of {newest.name}"
            verdict = Verdict(Outcome.STEP, Reason.LATER, detail=detail)
        elif place.value in (last, place.last):
            verdict = alias(Reason.COPY, f"a copy of the last step: {records}")
        else:
            verdict = alias(Reason.EARLIER, f"an earlier step: {records}")
        verdicts[entry] = replace(verdict, rule="recorded-step")
    return later, verdicts


def _is_named_as_alias(entry: Entry, run: _Run) -> bool:
    """Return whether its name alone says that it is of the series."""
    belongs = entry.is_unnumbered_of(step.template for step in run.steps)
    return belongs or bool(ALIAS.search(entry.stem))


def _own_model(entry: Entry, run: _Run) -> Verdict | None:
    """Leave out the model of the run's own folder; it may be a later step than the folders in it.

    Only heads of tensors are read: many trainers leave a copy of the last or the best step.
    """
    if entry.name not in FOLDER_WEIGHTS or not run.steps[0].is_folder:
        return None
    with contextlib.suppress(RefusedError):
        if _has_tensors_of(entry, run) and not _step_with_the_same(entry, run, heads_only=True):
            return skipped(Reason.OWN_MODEL_UNLIKE)
    return skipped(Reason.OWN_MODEL)


def _other_tensors(entry: Entry, run: _Run) -> Verdict | None:
    """Leave out what is not the model of the series by its tensors, and what holds no tensors."""
    if _has_tensors_of(entry, run):
        return None
    is_apart = entry.is_folder and not _is_named_as_alias(entry, run)
    return skipped(Reason.NO_NUMBER if is_apart else Reason.ANOTHER_MODEL)


def _unreadable(entry: Entry, error: RefusedError, run: _Run) -> Verdict:
    if not _is_named_as_alias(entry, run) and error.code in _NO_WEIGHTS:
        return skipped(Reason.NO_NUMBER)
    if isinstance(error, IncompleteError):
        return skipped(Reason.INCOMPLETE, f"incomplete: {error.message.rstrip('.')}")
    detail = f"unreadable: {error.message}"
    return Verdict(Outcome.REFUSED, Reason.UNREADABLE, "unreadable", detail)


# Files that are not torch files, or do not hold a model.
_NO_WEIGHTS = (Code.NO_MODEL, Code.WRONG_FORMAT, Code.UNSAFE, Code.NOT_A_CHECKPOINT)


def _same_file(entry: Entry, run: _Run) -> Verdict | None:
    name = same_path(entry.path, run.checkpoints, entry.source)
    return alias(Reason.SAME_FILE, f"the same file as {name}") if name else None


_RULES: Rules[Entry, _Run] = (
    ("not-selected", lambda entry, run: unselected(entry.name, run.selection)),
    ("broken-link", lambda e, _: skipped(Reason.BROKEN_LINK) if e.kind in STRANGE else None),
    ("best", lambda e, _: alias(Reason.BEST) if ALWAYS_A_COPY.search(e.stem) else None),
    ("same-file", _same_file),
    ("no-aliases", lambda _, run: None if run.selection.aliases else skipped(Reason.NO_ALIASES)),
    ("no-model", lambda e, _: None if e.model else skipped(Reason.NO_MODEL)),
    ("own-model", _own_model),
    ("other-tensors", _other_tensors),
)


def _place(entry: Entry, newest: Checkpoint) -> _Place | None:
    """Return where an alias belongs; None if it records nothing that the last step records too."""
    recorded = entry.recorded_anywhere
    others = Entry(newest.path, entry.source).recorded_anywhere
    unit = deciding_unit(recorded, others)
    if unit:
        # The number in the names of the series may be the other one.
        same = [unit for unit in ("step", "epoch") if others.get(unit) == newest.step]
        step = next((recorded[unit] for unit in same if unit in recorded), None)
        return _Place(recorded[unit], others[unit], unit, step)
    unit = "step" if newest.unit in STEP_UNITS else newest.unit
    # Counts inside files begin at 0 or 1, whatever those in names do: near the last, bytes decide.
    if unit in recorded and newest.step is not None and abs(recorded[unit] - newest.step) > 1:
        return _Place(recorded[unit], newest.step, unit, recorded[unit])
    return None


def _by_content(entry: Entry, run: _Run) -> Verdict:
    """Judge an alias that records nothing by its tensors; raises if it may be a later step."""
    same = _step_with_the_same(entry, run)
    if same:
        return alias(Reason.COPY, f"a copy of {same.name}")
    if INITIAL_NAME.search(entry.stem):
        return skipped(Reason.NO_NUMBER)
    name = entry.name
    text = f"cannot tell where {name} belongs: it has no number and records no step."
    hint = f"Add it after the last step with --append {name}, or leave it out with --no-aliases."
    raise RefusedError(text, hint, code=Code.UNKNOWN_ORDER, path=entry.path)


def _has_tensors_of(entry: Entry, run: _Run) -> bool:
    """Return whether its tensors are called as those of the newest readable step."""
    assert entry.model is not None
    mine = entry.source.read(entry.model).tensors
    for one in reversed(run.checkpoints):
        with contextlib.suppress(IncompleteError):  # judged later
            theirs = entry.source.read(one.model).tensors
            return {MAYBE_ADDED.sub("", n) for n in mine} == {
                MAYBE_ADDED.sub("", n) for n in theirs
            }
    return True


def _step_with_the_same(entry: Entry, run: _Run, *, heads_only: bool = False) -> Checkpoint | None:
    """Return the newest step that holds the same tensors, byte for byte or as their heads go."""
    assert entry.model is not None
    source, mine = entry.source, entry.source.read(entry.model)
    for one in reversed(run.checkpoints):
        with contextlib.suppress(IncompleteError):  # judged later
            pair = (entry.model, mine), (one.model, source.read(one.model))
            if hold_the_same(*pair, source.storage, heads_only=heads_only):
                return one
    return None
