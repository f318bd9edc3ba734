"""`last`, `best`, `final` and names without a number: copies of a step, or a later step.

What they record or hold decides: kohya, timm and Lightning's save_last save the last step as one.
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
from ckpt_ema.trainers.conventions import ALIAS, ALWAYS_A_COPY, FOLDER_WEIGHTS


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
            detail = f"unreadable: {error.message}"
            decided, place = Verdict(Outcome.REFUSED, Reason.UNREADABLE, "unreadable", detail), None
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


def _not_of_the_series(entry: Entry, run: _Run) -> Verdict | None:
    """Leave out names that no series has, and the model of the run's own folder."""
    belongs = entry.is_unnumbered_of(step.template for step in run.steps)
    if entry.name in FOLDER_WEIGHTS and not (belongs and not run.steps[0].is_folder):
        return skipped(Reason.OWN_MODEL)
    return None if belongs or ALIAS.search(entry.stem) else skipped(Reason.NO_NUMBER)


def _same_file(entry: Entry, run: _Run) -> Verdict | None:
    name = same_path(entry.path, run.checkpoints, entry.source)
    return alias(Reason.SAME_FILE, f"the same file as {name}") if name else None


_RULES: Rules[Entry, _Run] = (
    ("not-of-the-series", _not_of_the_series),
    ("not-selected", lambda entry, run: unselected(entry.name, run.selection)),
    ("broken-link", lambda e, _: skipped(Reason.BROKEN_LINK) if e.kind in STRANGE else None),
    ("best", lambda e, _: alias(Reason.BEST) if ALWAYS_A_COPY.search(e.stem) else None),
    ("same-file", _same_file),
    ("no-aliases", lambda _, run: None if run.selection.aliases else skipped(Reason.NO_ALIASES)),
    ("no-model", lambda e, _: None if e.model else skipped(Reason.NO_MODEL)),
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
    assert entry.model is not None
    source, newest_first = entry.source, []
    try:
        mine = source.read(entry.model)
        for one in reversed(run.checkpoints):
            with contextlib.suppress(IncompleteError):  # judged later
                newest_first.append((one, source.read(one.model)))
    except IncompleteError as error:
        return skipped(Reason.INCOMPLETE, f"incomplete: {error.message.rstrip('.')}")
    if newest_first and newest_first[0][1].tensors.keys() != mine.tensors.keys():
        return skipped(Reason.ANOTHER_MODEL)
    for one, theirs in newest_first:
        if hold_the_same((entry.model, mine), (one.model, theirs), source.storage):
            return alias(Reason.COPY, f"a copy of {one.name}")
    name = entry.name
    text = f"cannot tell where {name} belongs: it has no number and records no step."
    hint = f"Add it after the last step with --append {name}, or leave it out with --no-aliases."
    raise RefusedError(text, hint, code=Code.UNKNOWN_ORDER, path=entry.path)
