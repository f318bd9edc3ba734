"""What an entry is by itself: one ordered table of rules, of which the first that decides counts.

Rules on names come before those that look inside. An entry that no rule decides is a candidate: it
may be a step or, without a number, a name for one. `series` and `aliases` judge the candidates by
tables of the same kind.
"""

import re
from collections.abc import Callable
from re import Pattern
from typing import NamedTuple

from ckpt_ema.errors import RefusedError
from ckpt_ema.find.entries import Entry, names_in
from ckpt_ema.find.globs import unselected
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.verdict import APPENDED, Reason, Rules, Verdict, other, skipped
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


def _weights_elsewhere(entry: Entry, folder: Folder) -> Verdict | None:
    twin = f"{stem_of(entry.name)}.safetensors"
    if entry.has_weights_extension and twin != entry.name and twin in folder.names:
        return skipped(Reason.WEIGHTS_ELSEWHERE, f"{twin} has the weights")
    return None


def _no_weights_by_name(entry: Entry, _folder: Folder) -> Verdict | None:
    may_be = entry.has_weights_extension or _is_usual(entry) or entry.slots
    return None if may_be or entry.is_folder or entry.is_revision else other()


def _not_selected(entry: Entry, folder: Folder) -> Verdict | None:
    verdict = None if _is_usual(entry) else unselected(entry.name, folder.selection)
    is_told = entry.slots or not entry.is_folder or entry.is_revision
    return verdict if verdict is None or is_told else other(verdict.reason)


def _not_matched(entry: Entry, folder: Folder) -> Verdict | None:
    pattern = folder.selection.pattern
    is_left_out = pattern and entry.slots and not re.search(pattern, entry.name)
    return skipped(Reason.NOT_MATCHED) if is_left_out else None


def _not_regular(entry: Entry, _folder: Folder) -> Verdict | None:
    may_be_weights = entry.numbers or entry.has_weights_extension
    return skipped(Reason.NOT_REGULAR) if entry.is_strange and may_be_weights else None


def _part_of_something(entry: Entry, _folder: Folder) -> Verdict | None:
    patterns = (conventions.NO_CHECKPOINTS, conventions.COMPONENT)
    is_part = any(pattern.search(entry.name) for pattern in patterns)
    return other() if entry.is_folder and not entry.numbers and is_part else None


def _own_output(entry: Entry, folder: Folder) -> Verdict | None:
    if folder.selection.pattern or not entry.is_folder:
        return None
    manifest = entry.path / conventions.MANIFEST_NAME
    try:
        is_ours = entry.source.storage.kind(manifest) is not Kind.ABSENT
    except RefusedError:  # a folder that may not be entered
        if entry.numbers and not any(_matches(entry, name) for name in conventions.NOT_A_MODEL):
            names_in(entry.path, entry.source)
            raise
        return None
    return _not_a_step(entry, Reason.OWN_OUTPUT) if is_ours else None


def _by_name(reason: Reason, pattern: Pattern[str]) -> Callable[[Entry, Folder], Verdict | None]:
    """Return the rule that names with a pattern are no steps, which --pattern overrides."""

    def rule(entry: Entry, folder: Folder) -> Verdict | None:
        if folder.selection.pattern or not _matches(entry, pattern):
            return None
        if reason is Reason.SHARD and not folder.names.isdisjoint(conventions.FOLDER_WEIGHTS):
            return other(Reason.SHARD)  # of the folder's own model
        return _not_a_step(entry, reason)

    return rule


def _not_listable(entry: Entry, _folder: Folder) -> Verdict | None:
    may_be_step = not entry.is_folder or entry.numbers
    is_listable = may_be_step or entry.source.storage.can_list(entry.path)
    return None if is_listable else skipped(Reason.NOT_LISTABLE)


def _no_model(entry: Entry, folder: Folder) -> Verdict | None:
    if is_unnumbered(entry, folder.selection):
        is_told = not entry.is_folder or conventions.ALIAS.search(entry.stem)
        return None if is_told or entry.model else other(Reason.NO_MODEL)
    if entry.located:
        return None
    if not entry.numbers:
        return other(Reason.NO_MODEL)
    component = entry.source.reading.component
    detail = f"no model weights for --component {component}" if component else ""
    return skipped(Reason.NO_MODEL, detail)


RULES: Rules[Entry, Folder] = (
    ("appended", lambda e, f: APPENDED if e.name in f.appended else None),
    ("weights-elsewhere", _weights_elsewhere),
    ("no-weights-by-name", _no_weights_by_name),
    ("not-selected", _not_selected),
    (
        "revision-without-step",
        lambda e, _: skipped(Reason.NO_NUMBER) if e.is_revision and not e.numbers else None,
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


def _not_a_step(entry: Entry, reason: Reason) -> Verdict:
    """Return that an entry is no step, to be reported if one might have expected it to be."""
    is_told = entry.numbers or not entry.is_folder or entry.model
    return skipped(reason) if is_told else other(reason)
