"""`last`, `best`, `final` and names without a number: copies of a step, or a later step.

In most runs they are copies; in some (kohya, timm, Lightning's save_last) they are the only save of
the last step. What they record or hold decides; where neither does, the run is refused.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckpt_ema.containers.compare import hold_the_same
from ckpt_ema.containers.source import Source
from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.find.checkpoint import STEP_UNITS, Checkpoint
from ckpt_ema.find.entries import Entry
from ckpt_ema.find.globs import unselected
from ckpt_ema.find.names import is_unnumbered_of
from ckpt_ema.find.order import deciding_unit
from ckpt_ema.find.series import Series
from ckpt_ema.find.verdict import Outcome, Reason, Rules, Ruling, Verdict, judge, when
from ckpt_ema.notices import Notice
from ckpt_ema.options import Selection
from ckpt_ema.trainers.conventions import ALIAS, ALWAYS_A_COPY, FOLDER_WEIGHTS


class Aliases(NamedTuple):
    """What became of the names without a number."""

    later: tuple[Checkpoint, ...]  # steps after the last numbered one, oldest first
    verdicts: Mapping[Entry, Verdict]
    warnings: tuple[Notice, ...]


class _Run(NamedTuple):
    """What rules know besides the entry."""

    series: Series
    checkpoints: Sequence[Checkpoint]
    selection: Selection
    source: Source


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an alias belongs by what it and the last step record, both in `unit`."""

    value: int
    last: int
    unit: str
    step: int | None  # the alias's place in the unit of the series, if that is recorded


def place_aliases(
    unnumbered: Sequence[Entry],
    series: Series,
    checkpoints: Sequence[Checkpoint],
    selection: Selection,
    source: Source,
) -> Aliases:
    """Return which of the names without a number are later steps, and why others are not.

    Raises `RefusedError` for one whose place is unknown.
    """
    run = _Run(series, checkpoints, selection, source)
    verdicts: dict[Entry, Verdict] = {}
    places: dict[Entry, _Place | None] = {}
    for entry in unnumbered:
        try:
            decided = judge(_RULES, entry, run)
            if decided:
                verdicts[entry] = decided
            else:
                places[entry] = _place(entry, checkpoints[-1])
        except RefusedError as error:  # such as a pickled module beside state dicts
            unreadable = Ruling(Outcome.REFUSED, Reason.UNREADABLE, f"unreadable: {error.message}")
            verdicts[entry] = unreadable.by("unreadable")
    known = {entry: place for entry, place in places.items() if place}
    for entry in [entry for entry, place in places.items() if place is None]:
        verdicts[entry] = _by_content(entry, run).by("same-content")
    return _in_order(known, verdicts, run)


def _in_order(
    known: Mapping[Entry, _Place], verdicts: Mapping[Entry, Verdict], run: _Run
) -> Aliases:
    """Put aliases that record a step after the numbered steps, or leave them out."""
    newest = run.checkpoints[-1]
    later: list[Checkpoint] = []
    rulings: dict[Entry, Verdict] = {}
    warnings = [
        Notice(Code.LEFT_OUT, f"{entry.name} is left out, {one.detail}.")
        for entry, one in verdicts.items()
        if one.reason is Reason.INCOMPLETE
    ]
    last: int | None = None
    for entry, place in sorted(known.items(), key=lambda row: (row[1].value, row[0].name)):
        records = f"records {place.unit} {place.value}"
        if place.value > (place.last if last is None else last):
            last = place.value
            assert entry.model is not None
            later.append(
                Checkpoint(entry.path, place.step, entry.model, newest.unit, is_given=True)
            )
            ruling = Ruling(Outcome.STEP, Reason.LATER)
            text = f"{entry.name} is used as the last step: it {records}, after {place.last} of"
            warnings.append(Notice(Code.DECIDED, f"{text} {newest.name}."))
        elif place.value in (last, place.last):
            ruling = Ruling(Outcome.ALIAS, Reason.COPY, f"a copy of the last step: {records}")
        else:
            ruling = Ruling(Outcome.ALIAS, Reason.EARLIER, f"an earlier step: {records}")
        rulings[entry] = ruling.by("recorded-step")
    return Aliases(tuple(later), {**verdicts, **rulings}, tuple(warnings))


# --- Rules ----------------------------------------------------------------------------------------


def _unrelated(entry: Entry, run: _Run) -> Ruling | None:
    """Leave out names that no series has, and the model of the run's own folder."""
    is_usual = entry.name in FOLDER_WEIGHTS
    belongs = any(is_unnumbered_of(entry.stem, template) for template in run.series.templates)
    if is_usual and not (belongs and not run.series.steps[0].is_folder):
        return Ruling(Outcome.SKIPPED, Reason.OWN_MODEL)
    if belongs or ALIAS.search(entry.stem):
        return None
    return Ruling(Outcome.SKIPPED, Reason.NO_NUMBER)


def _same_file(entry: Entry, run: _Run) -> Ruling | None:
    file_id = run.source.storage.file_id
    own = file_id(entry.path)
    for checkpoint in run.checkpoints:
        if file_id(checkpoint.path) == own:
            return Ruling(Outcome.ALIAS, Reason.SAME_FILE, f"the same file as {checkpoint.name}")
    return None


_RULES: Rules[Entry, _Run] = (
    ("unrelated-name", _unrelated),
    ("not-selected", lambda entry, run: unselected(entry.name, run.selection)),
    ("broken-link", lambda e, _: when(e.is_strange, Outcome.SKIPPED, Reason.BROKEN_LINK)),
    ("best", lambda e, _: when(ALWAYS_A_COPY.search(e.stem), Outcome.ALIAS, Reason.BEST)),
    ("same-file", _same_file),
    (
        "no-aliases",
        lambda _, run: when(not run.selection.aliases, Outcome.SKIPPED, Reason.NO_ALIASES),
    ),
    ("no-model", lambda e, _: when(e.model is None, Outcome.SKIPPED, Reason.NO_MODEL)),
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


def _by_content(entry: Entry, run: _Run) -> Ruling:
    """Judge an alias that records nothing by its tensors; raises if it may be a later step."""
    assert entry.model is not None
    try:
        mine = (entry.model, run.source.read(entry.model))
        newest_first = []
        for one in reversed(run.checkpoints):
            with contextlib.suppress(IncompleteError):  # judged later
                newest_first.append((one, (one.model, run.source.read(one.model))))
    except IncompleteError as error:
        detail = error.message.rstrip(".")
        return Ruling(Outcome.SKIPPED, Reason.INCOMPLETE, f"incomplete: {detail}")
    if newest_first and newest_first[0][1][1].tensors.keys() != mine[1].tensors.keys():
        return Ruling(Outcome.SKIPPED, Reason.ANOTHER_MODEL)
    for one, theirs in newest_first:
        if hold_the_same(mine, theirs, run.source.storage):
            return Ruling(Outcome.ALIAS, Reason.COPY, f"a copy of {one.name}")
    name = entry.name
    raise RefusedError(
        f"cannot tell where {name} belongs: it has no number and records no step.",
        f"Add it after the last step with --append {name}, or leave it out with --no-aliases.",
        code=Code.UNKNOWN_ORDER,
        path=entry.path,
    )
