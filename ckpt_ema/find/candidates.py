"""What each entry of a folder is by itself; an entry that no rule decides is a candidate."""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from re import Pattern
from typing import NamedTuple

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import RefusedError
from ckpt_ema.find.entries import STRANGE, Entry, list_entries, names_in
from ckpt_ema.find.given import unselected
from ckpt_ema.find.names import captures_step, stem_of
from ckpt_ema.find.verdict import APPENDED, Outcome, Reason, Rules, Verdict, judge, other, skipped
from ckpt_ema.find.weights_file import holds_weights
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.table import Refusal


@dataclass(frozen=True)
class Candidates:
    """The entries of a folder: candidates of three kinds, and those that a rule decided."""

    folder: Path
    numbered: tuple[Entry, ...]
    unnumbered: tuple[Entry, ...]  # "last", "best", or a name without a number
    unsupported: tuple[Entry, ...]  # numbered ones, in a format that is not read
    verdicts: Mapping[Entry, Verdict]

    @property
    def undecided(self) -> tuple[tuple[Entry, ...], ...]:
        """The three kinds of candidates."""
        return self.numbered, self.unnumbered, self.unsupported

    @property
    def entries(self) -> list[Entry]:
        """All entries of the folder."""
        return [*self.verdicts, *self.numbered, *self.unnumbered, *self.unsupported]

    def skipped(self, *reasons: Reason) -> list[Entry]:
        """Return the entries that may hold a model and that a rule left out for these reasons."""
        rows = self.verdicts.items()
        return [e for e, one in rows if one.outcome is Outcome.SKIPPED and one.reason in reasons]

    def are_stray(self) -> bool:
        """Return whether lone numbered files (`value_head_1.pt`) lie beside a model: no run."""
        templates = {entry.template for entry in self.numbered}
        is_series = len(templates) < len(self.numbered) or any(e.is_folder for e in self.numbered)
        return not is_series and not any(e.is_unnumbered_of(templates) for e in self.unnumbered)


def candidates_in(folder: Path, selection: Selection, source: Source) -> Candidates:
    """List a folder and judge its entries one by one."""
    entries = list_entries(folder, source)
    names = frozenset(entry.name for entry in entries)
    appended = frozenset(os.path.basename(os.path.normpath(name)) for name in selection.append)
    context = _Folder(names, appended, selection)
    verdicts = {entry: judge(_RULES, entry, context) for entry in entries}
    verdicts = _with_second_choice(verdicts, source.reading.which)
    verdicts |= _of_the_folder_itself(verdicts, names)
    undecided = [entry for entry, verdict in verdicts.items() if verdict is None]
    numbered = [entry for entry in undecided if not _is_unnumbered(entry, selection)]
    if not any(entry.model for entry in numbered):
        # A series in which every name has `final` or `best`, a part of the run's name.
        others = [e for e in undecided if e.model and _is_unnumbered(e, selection)]
        several = _several(others) & {entry.template for entry in others if entry.slots}
        numbered += [entry for entry in others if entry.template in several]
    # "model.ckpt" beside "model-v1.ckpt": the best of Lightning under one name.
    taken = {e.template for e in numbered if e.model and e.is_version}
    numbered += [e for e in undecided if e.template in taken and e not in numbered and e.model]
    if not captures_step(selection.pattern):
        # "resnet50.pt" beside "resnet50_epoch_1.pt": its number is in the model's name.
        several = _several(entry for entry in numbered if entry.model)
        files = [e for e in numbered if not e.is_folder and e.template not in several]
        models = {entry for entry in files if entry.is_unnumbered_of(several)}
        numbered = [entry for entry in numbered if entry not in models]
    known = set(numbered)
    return Candidates(
        folder,
        tuple(entry for entry in numbered if entry.model),
        tuple(entry for entry in undecided if entry not in known),
        tuple(entry for entry in numbered if isinstance(entry.located, Refusal)),
        {entry: verdict for entry, verdict in verdicts.items() if verdict},
    )


def _with_second_choice(
    verdicts: dict[Entry, Verdict | None], which: str
) -> dict[Entry, Verdict | None]:
    """Leave open averages and states that hold a model if there is no raw model beside them.

    With --which ema, raw models are left out if there are averages.
    """
    models = [e for e, verdict in verdicts.items() if not verdict and e.slots and e.model]
    averages = [entry for entry in models if _matches(entry, conventions.AVERAGED_NAME)]
    if which == "ema" and averages:
        raw = [entry for entry in models if entry not in averages]
        return {**verdicts, **dict.fromkeys(raw, replace(skipped(Reason.RAW), rule="which"))}
    if models:
        return verdicts
    for reason in (Reason.AVERAGE, Reason.TRAINING_STATE):
        decided = [e for e, one in verdicts.items() if one and one.reason is reason and e.slots]
        others = [e for e in decided if e.model and holds_weights(e.model, e.source)]
        if others:
            return {**verdicts, **dict.fromkeys(others)}
    return verdicts


def _of_the_folder_itself(
    verdicts: Mapping[Entry, Verdict | None], names: Collection[str]
) -> dict[Entry, Verdict]:
    """Leave out the one state of DeepSpeed that a checkpoint has beside its model."""
    models = [entry for entry, verdict in verdicts.items() if not verdict and entry.model]
    ours = [entry for entry in models if entry.is_of_deepspeed]
    if len(ours) != 1 or not any(name in names for name in conventions.FOLDER_WEIGHTS):
        return {}
    return {ours[0]: replace(skipped(Reason.TRAINING_STATE), rule="beside-model")}


def _several(entries: Iterable[Entry]) -> set[str]:
    """Return the templates that more than one of the entries has."""
    counts = Counter(entry.template for entry in entries)
    return {template for template, count in counts.items() if count > 1}


def _is_unnumbered(entry: Entry, selection: Selection) -> bool:
    """Return whether a name belongs to no series by itself: "last", "best", or without a number."""
    is_alias = conventions.ALIAS.search(entry.stem) and not entry.is_revision
    is_known = (entry.numbers or entry.slots) and not is_alias
    return not is_known and not (selection.pattern and entry.slots)


class _Folder(NamedTuple):
    """What rules know besides the entry."""

    names: frozenset[str]  # of everything in the folder
    appended: frozenset[str]  # names given to --append
    selection: Selection


def _weights_elsewhere(entry: Entry, folder: _Folder) -> Verdict | None:
    twin = f"{stem_of(entry.name)}.safetensors"
    if entry.has_weights_extension and twin != entry.name and twin in folder.names:
        return skipped(Reason.WEIGHTS_ELSEWHERE, f"{twin} has the weights")
    return None


def _no_weights_by_name(entry: Entry, _folder: _Folder) -> Verdict | None:
    may_be = entry.has_weights_extension or entry.name in conventions.FOLDER_WEIGHTS or entry.slots
    if may_be or entry.is_folder or entry.is_revision:
        return None
    is_alias_by_content = conventions.ALIAS.search(entry.stem) and entry.model
    return None if is_alias_by_content else other()


def _not_selected(entry: Entry, folder: _Folder) -> Verdict | None:
    if entry.name in conventions.FOLDER_WEIGHTS:
        return None
    verdict = unselected(entry.name, folder.selection)
    is_told = entry.slots or not entry.is_folder or entry.is_revision
    return verdict if verdict is None or is_told else other(verdict.reason)


def _not_matched(entry: Entry, folder: _Folder) -> Verdict | None:
    pattern = folder.selection.pattern
    is_left_out = pattern and entry.slots and not re.search(pattern, entry.name)
    return skipped(Reason.NOT_MATCHED) if is_left_out else None


def _not_regular(entry: Entry, _folder: _Folder) -> Verdict | None:
    may_be_weights = entry.numbers or entry.has_weights_extension
    return skipped(Reason.NOT_REGULAR) if may_be_weights and entry.kind in STRANGE else None


def _part_of_something(entry: Entry, _folder: _Folder) -> Verdict | None:
    is_part = any(p.search(entry.name) for p in (conventions.NO_CHECKPOINTS, conventions.COMPONENT))
    return other() if entry.is_folder and not entry.numbers and is_part else None


def _own_output(entry: Entry, folder: _Folder) -> Verdict | None:
    if folder.selection.pattern or not entry.is_folder:
        return None
    manifest = entry.path / conventions.MANIFEST_NAME
    try:
        is_ours = entry.source.storage.kind(manifest) is not Kind.ABSENT
    except RefusedError:  # a folder that may not be entered
        if entry.numbers and not any(
            _matches(entry, name) for name in (*conventions.NOT_A_MODEL, conventions.AVERAGED_NAME)
        ):
            names_in(entry.path, entry.source)
            raise
        return None
    return _not_a_step(entry, Reason.OWN_OUTPUT) if is_ours else None


def _by_name(reason: Reason, pattern: Pattern[str]) -> Callable[[Entry, _Folder], Verdict | None]:
    """Return a rule that names matching a pattern are not steps; --pattern overrides it."""

    def rule(entry: Entry, folder: _Folder) -> Verdict | None:
        if folder.selection.pattern or not _matches(entry, pattern):
            return None
        if reason is Reason.SHARD and not folder.names.isdisjoint(conventions.FOLDER_WEIGHTS):
            return other(Reason.SHARD)  # of the folder's own model
        return _not_a_step(entry, reason)

    return rule


def _average_by_name(entry: Entry, folder: _Folder) -> Verdict | None:
    is_wanted = entry.source.reading.which == "ema"
    return None if is_wanted else _by_name(Reason.AVERAGE, conventions.AVERAGED_NAME)(entry, folder)


def _not_listable(entry: Entry, _folder: _Folder) -> Verdict | None:
    may_be_step = not entry.is_folder or entry.numbers
    is_listable = may_be_step or entry.source.storage.can_list(entry.path)
    return None if is_listable else skipped(Reason.NOT_LISTABLE)


def _no_model(entry: Entry, folder: _Folder) -> Verdict | None:
    if _is_unnumbered(entry, folder.selection):
        is_told = not entry.is_folder or conventions.ALIAS.search(entry.stem)
        return None if is_told or entry.model else other(Reason.NO_MODEL)
    if entry.located:
        return None
    if not entry.numbers:
        return other(Reason.NO_MODEL)
    component = entry.source.reading.component
    detail = f"no model weights for --component {component}" if component else ""
    inside = entry.source.storage.names(entry.path) if entry.is_folder and not component else ()
    if any(map(conventions.SHARD_OR_RANK.search, inside)):
        detail = "its weights are in files of ranks, which have to be merged first"
    return skipped(Reason.NO_MODEL, detail)


# The first to decide counts; rules on names come before those that look inside.
_RULES: Rules[Entry, _Folder] = (
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
    ("average-by-name", _average_by_name),
    ("not-listable", _not_listable),
    ("no-model", _no_model),
)


def _matches(entry: Entry, pattern: Pattern[str]) -> bool:
    """Return whether a pattern is in the name with or, for a file, without its extension."""
    return bool(pattern.search(entry.name) or pattern.search(stem_of(entry.name)))


def _not_a_step(entry: Entry, reason: Reason) -> Verdict:
    """Return the verdict that an entry is not a step, reported if it looks like one."""
    is_told = entry.numbers or not entry.is_folder or entry.model
    return skipped(reason) if is_told else other(reason)
