"""What an entry is by itself: one ordered table of rules, of which the first that decides counts.

Rules on names come before those that look inside. An entry that no rule decides is a candidate: it
may be a step or, without a number, a name for one. `series` and `aliases` judge the candidates by
tables of the same kind.
"""

import re
from re import Pattern
from typing import NamedTuple

from ckpt_ema.errors import RefusedError
from ckpt_ema.find.entries import Entry, names_in
from ckpt_ema.find.globs import unselected
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.verdict import Outcome, Reason, Rule, Rules, Ruling, when
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions


class Folder(NamedTuple):
    """What rules know besides the entry."""

    names: frozenset[str]  # of everything in the folder
    appended: frozenset[str]  # names given to --append
    selection: Selection


def is_unnumbered(entry: Entry, selection: Selection) -> bool:
    """Return whether a name belongs to no series by itself: "last", "best", or without a number."""
    is_alias = conventions.ALIAS.search(entry.stem) and not entry.is_revision
    if is_alias and not (selection.pattern and entry.slots):
        return True
    return not (entry.numbers or entry.slots)


def _weights_elsewhere(entry: Entry, folder: Folder) -> Ruling | None:
    twin = f"{stem_of(entry.name)}.safetensors"
    if entry.has_weights_extension and twin != entry.name and twin in folder.names:
        return _skipped(Reason.WEIGHTS_ELSEWHERE, f"{twin} has the weights")
    return None


def _no_weights_by_name(entry: Entry, _folder: Folder) -> Ruling | None:
    may_be = entry.has_weights_extension or _is_usual(entry) or entry.slots
    return None if may_be or entry.is_folder or entry.is_revision else _other()


def _not_selected(entry: Entry, folder: Folder) -> Ruling | None:
    ruling = None if _is_usual(entry) else unselected(entry.name, folder.selection)
    is_told = entry.slots or not entry.is_folder or entry.is_revision
    return ruling if ruling is None or is_told else _other(ruling.reason)


def _not_matched(entry: Entry, folder: Folder) -> Ruling | None:
    pattern = folder.selection.pattern
    is_left_out = pattern and entry.slots and not re.search(pattern, entry.name)
    return when(is_left_out, Outcome.SKIPPED, Reason.NOT_MATCHED)


def _part_of_something(entry: Entry, _folder: Folder) -> Ruling | None:
    patterns = (conventions.NO_CHECKPOINTS, conventions.COMPONENT)
    is_part = any(pattern.search(entry.name) for pattern in patterns)
    return _other() if entry.is_folder and not entry.numbers and is_part else None


def _own_output(entry: Entry, folder: Folder) -> Ruling | None:
    if folder.selection.pattern or not entry.is_folder:
        return None
    storage = entry.source.storage
    try:
        is_ours = storage.kind(entry.path / conventions.MANIFEST_NAME) is not Kind.ABSENT
    except RefusedError:  # a folder that may not be entered
        if entry.numbers and not any(_matches(entry, name) for name in conventions.NOT_A_MODEL):
            names_in(entry.path, entry.source)
            raise
        return None
    return _not_a_step(entry, Reason.OWN_OUTPUT) if is_ours else None


def _by_name(reason: Reason, pattern: Pattern[str]) -> Rule[Entry, Folder]:
    """Return the rule that names with a pattern are no steps, which --pattern overrides."""

    def rule(entry: Entry, folder: Folder) -> Ruling | None:
        if folder.selection.pattern or not _matches(entry, pattern):
            return None
        if reason is Reason.SHARD and not folder.names.isdisjoint(conventions.FOLDER_WEIGHTS):
            return _other(Reason.SHARD)  # of the folder's own model
        return _not_a_step(entry, reason)

    return rule


def _not_regular(entry: Entry, _folder: Folder) -> Ruling | None:
    may_be_weights = entry.numbers or entry.has_weights_extension
    return when(entry.is_strange and may_be_weights, Outcome.SKIPPED, Reason.NOT_REGULAR)


def _not_listable(entry: Entry, _folder: Folder) -> Ruling | None:
    is_strange = (
        entry.is_folder and not entry.numbers and not entry.source.storage.can_list(entry.path)
    )
    return when(is_strange, Outcome.SKIPPED, Reason.NOT_LISTABLE)


def _no_model(entry: Entry, folder: Folder) -> Ruling | None:
    if is_unnumbered(entry, folder.selection):
        is_told = not entry.is_folder or conventions.ALIAS.search(entry.stem)
        return None if is_told or entry.model else _other(Reason.NO_MODEL)
    if entry.located:
        return None
    if not entry.numbers:
        return _other(Reason.NO_MODEL)
    component = entry.source.reading.component
    detail = f"no model weights for --component {component}" if component else ""
    return _skipped(Reason.NO_MODEL, detail)


RULES: Rules[Entry, Folder] = (
    ("appended", lambda e, f: when(e.name in f.appended, Outcome.STEP, Reason.APPENDED)),
    ("weights-elsewhere", _weights_elsewhere),
    ("no-weights-by-name", _no_weights_by_name),
    ("not-selected", _not_selected),
    (
        "revision-without-step",
        lambda e, _: when(e.is_revision and not e.numbers, Outcome.SKIPPED, Reason.NO_NUMBER),
    ),
    ("not-matched", _not_matched),
    ("not-regular", _not_regular),
    ("part-of-something", _part_of_something),
    ("own-output", _own_output),
    ("unfinished-name", _by_name(Reason.UNFINISHED_NAME, conventions.UNFINISHED_NAME)),
    ("training-state", _by_name(Reason.TRAINING_STATE, conventions.STATE_NAME)),
    ("shard-or-rank", _by_name(Reason.SHARD, conventions.SHARD_OR_RANK)),
    ("merged", _by_name(Reason.MERGED, conventions.MERGED)),
    ("module", _by_name(Reason.MODULE, conventions.MODULE_FOLDER)),
    ("average-by-name", _by_name(Reason.AVERAGE, conventions.AVERAGED_NAME)),
    ("not-listable", _not_listable),
    ("no-model", _no_model),
)


def _is_usual(entry: Entry) -> bool:
    """Return whether the name is that of a model in its own folder."""
    return entry.name in conventions.FOLDER_WEIGHTS


def _matches(entry: Entry, pattern: Pattern[str]) -> bool:
    """Return whether a pattern is in the name with or, for a file, without its extension."""
    return bool(pattern.search(entry.name) or pattern.search(stem_of(entry.name)))


def _not_a_step(entry: Entry, reason: Reason) -> Ruling:
    """Return that an entry is no step, to be told if it might have been expected to be one."""
    is_told = entry.numbers or not entry.is_folder or entry.model
    return _skipped(reason) if is_told else _other(reason)


def _skipped(reason: Reason, detail: str = "") -> Ruling:
    return Ruling(Outcome.SKIPPED, reason, detail)


def _other(reason: Reason = Reason.NOT_A_CHECKPOINT) -> Ruling:
    return Ruling(Outcome.OTHER, reason)
