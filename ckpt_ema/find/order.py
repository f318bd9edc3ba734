"""Putting the entries of a run in training order, by what they say of themselves or by their names.

What a trainer wrote inside a checkpoint comes first, then the words in its name (step, epoch), then
the one number that varies from name to name. Text order and modification times never order.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles, Specs, is_safetensors
from ckpt_ema.errors import IncompleteError, RefusedError, printable
from ckpt_ema.find.names import numbers_in, slots_in, stem_of
from ckpt_ema.find.recorded import recorded_beside
from ckpt_ema.options import Selection
from ckpt_ema.trainers import conventions

Read = Callable[[ModelFiles], Specs]

# Units of numbers in names that may count steps; others do not.
STEP_UNITS = ("step", "checkpoint", "number")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved state of the model: a folder, or a file that holds the model by itself."""

    path: Path
    step: int | None  # in `unit`
    model: ModelFiles
    unit: str = "step"  # what the trainer counts: "step", "epoch", "save" (an index), ...
    name: str = ""  # what to call it; that of its path unless given
    is_given: bool = False  # a person named it, so it is never left out in passing

    def __post_init__(self) -> None:
        """Take the name of the path."""
        object.__setattr__(self, "name", self.name or self.path.name)


@dataclass(slots=True)
class Entry:
    """A checkpoint whose place is not known yet."""

    path: Path
    model: ModelFiles
    label: str = ""  # what gives its numbers, if not the name of its path
    stem: str = field(init=False)

    def __post_init__(self) -> None:
        """Take the name apart."""
        self.label = self.label or self.path.name
        stem = stem_of(self.label)
        self.stem = conventions.VERSION.sub("", stem) if self.label.endswith(".ckpt") else stem

    @property
    def is_version(self) -> bool:
        """Whether Lightning gave it a suffix, since its name was taken."""
        return self.stem != stem_of(self.label)


def recorded_of(entry: Entry, source: Source, *, inside: bool) -> dict[str, int]:
    """What an entry says of its place; `inside`: also what torch files say, which have to be read.

    An incomplete file says nothing.
    """
    found = recorded_beside(entry.path, stem_of(entry.path.name), source).numbers
    if found or source.storage.is_folder(entry.path):
        return found
    if inside or is_safetensors(entry.path.name):
        try:
            return dict(source.read(entry.model).recorded)
        except IncompleteError:
            pass
    return {}


def ordered(entries: Sequence[Entry], selection: Selection, source: Source) -> list[Checkpoint]:
    """The entries of one series as checkpoints, oldest first.

    Raises `RefusedError` if nothing orders them, if what they say contradicts their names, or if
    two are the same step.
    """
    unit, keys = _keys(entries, selection, source)
    rows = sorted(zip(keys, entries, strict=True), key=lambda row: (row[0], row[1].label))
    checkpoints = []
    for key, entry in rows:
        step = None if unit == "time" else key
        checkpoints.append(Checkpoint(entry.path, step, entry.model, unit, entry.label))
    for (key, earlier), (next_key, later) in pairwise(rows):
        if key == next_key:
            raise _same_step(earlier, later, unit, key)
    return checkpoints


def _keys(entries: Sequence[Entry], selection: Selection, source: Source) -> tuple[str, list[int]]:
    """What is counted, and each entry's number."""
    matches = [re.search(selection.pattern, e.label) for e in entries] if selection.pattern else []
    if matches and all(match and match.groups() for match in matches):
        return "step", [_group(match) for match in matches if match]
    _check_versions(entries)
    beside = _keys_beside(entries, selection, source) if selection.order != "name" else None
    if beside:
        return beside
    named = named_keys(entries, source) if selection.order != "metadata" else None
    if named:
        if selection.order == "auto":
            _check_rises(entries, *named, source)
        return named
    return _keys_inside(entries, source)


def _keys_beside(
    entries: Sequence[Entry], selection: Selection, source: Source
) -> tuple[str, list[int]] | None:
    """The numbers that are told beside the weights or in a header, where all entries have them."""
    recorded = [recorded_of(entry, source, inside=False) for entry in entries]
    if all(conventions.NAMED_BY_DATE.search(entry.stem) for entry in entries):
        return "time", _by_date(entries, [claim.get("time") for claim in recorded])
    for unit in ("step", "epoch"):
        if all(unit in claim for claim in recorded):
            keys = [claim[unit] for claim in recorded]
            if selection.order == "auto":
                _check_names(entries, unit, keys, source)
            return unit, keys
    return None


def named_keys(entries: Sequence[Entry], source: Source) -> tuple[str, list[int]] | None:
    """The numbers that names give, with what they count; None if they give no order."""
    names = [numbers_in(entry.stem) for entry in entries]
    for unit in conventions.STEP_NAMES:
        if all(unit in numbers for numbers in names):
            keys = [numbers[unit] for numbers in names]
            return ("save" if _count_saves(entries, keys, source) else unit), keys
    slots = _varying_slot(entries)
    return ("number", slots) if slots else None


def _count_saves(entries: Sequence[Entry], keys: Sequence[int], source: Source) -> bool:
    """Whether the numbers are accelerate's, which count saves and say nothing of distances."""
    consecutive = sorted(keys) == list(range(min(keys), min(keys) + len(keys)))
    return consecutive and all(
        conventions.SAVE_INDEX.search(entry.stem) and source.storage.is_folder(entry.path)
        for entry in entries
    )


def _group(match: re.Match[str]) -> int:
    text = match.groupdict().get("step") or match.group(1)
    if not text or not re.fullmatch(r"[0-9]+", text):
        raise RefusedError(
            f"--pattern finds {printable(text)!r} in {printable(match.string)}, which is no step."
        )
    return int(text)


def _by_date(entries: Sequence[Entry], times: Sequence[int | None]) -> list[int]:
    """Times for all entries: one that tells none comes right after those before it by name."""
    last, keys = 0, {}
    for entry, time in sorted(zip(entries, times, strict=True), key=lambda row: row[0].label):
        keys[entry.path] = last + 1 if time is None else time
        last = max(last, keys[entry.path])
    return [keys[entry.path] for entry in entries]


def _check_versions(entries: Sequence[Entry]) -> None:
    """Refuse a mixture of Lightning's versions: files of one name from two runs."""
    first = next((entry for entry in entries if entry.is_version), None)
    if first is None or len({entry.label[len(entry.stem) :] for entry in entries}) == 1:
        return
    suffix = first.label[len(first.stem) :].removesuffix(".ckpt")
    plain = next(entry for entry in entries if entry.label[len(entry.stem) :] != f"{suffix}.ckpt")
    same = next((e for e in entries if e is not first and e.stem == first.stem), None)
    what = "are the same step from two runs" if same else "are from two runs"
    raise RefusedError(
        f"{printable((same or plain).label)} and {printable(first.label)} {what} (Lightning adds"
        f" {suffix} when a name is taken).",
        rf"Keep one set: --pattern '(?<!{suffix})\.ckpt$' or --pattern '{suffix}\.ckpt$'.",
    )


def _check_names(entries: Sequence[Entry], unit: str, keys: Sequence[int], source: Source) -> None:
    """Refuse entries that say another step inside than in their names."""
    for entry, key in zip(entries, keys, strict=True):
        numbers = numbers_in(entry.stem)
        units = STEP_UNITS if unit == "step" else (unit,)
        named = next((numbers[word] for word in units if word in numbers), key)
        if named != key:
            file = recorded_beside(entry.path, stem_of(entry.path.name), source).source
            raise RefusedError(
                f"{printable(entry.label)} says {unit} {key} in {file or 'its header'}. Was it"
                " renamed?",
                "Order by what it holds (--order metadata) or by the name (--order name).",
            )


def _check_rises(entries: Sequence[Entry], unit: str, keys: Sequence[int], source: Source) -> None:
    """Refuse names whose order is not that of the epochs in them, or of the steps in the files."""
    rows = [entry for _, entry in sorted(zip(keys, entries, strict=True), key=lambda row: row[0])]
    named = [{u: n for u, n in numbers_in(row.stem).items() if u == "epoch"} for row in rows]
    inside = [
        {} if source.storage.is_folder(row.path) else recorded_of(row, source, inside=True)
        for row in rows
    ]
    for recorded in (named, inside):
        for (earlier, first), (later, second) in pairwise(zip(rows, recorded, strict=True)):
            what = deciding_unit(first, second)
            if what and first[what] > second[what]:
                raise RefusedError(
                    f"{printable(earlier.label)} has {what} {first[what]} and"
                    f" {printable(later.label)} has {what} {second[what]}, though the {unit} in"
                    " their names rises. Was one renamed, or are they two runs?",
                    "Order by what they hold (--order metadata), by the names (--order name), or"
                    " by one number in them, such as --pattern 'epoch[-_=]?(?P<step>[0-9]+)'.",
                )


def deciding_unit(one: Mapping[str, int], other: Mapping[str, int]) -> str | None:
    """The unit that tells which of two recorded is later; None if they share none.

    A step that falls while the epoch rises counts within its epoch, and decides nothing.

    >>> deciding_unit({"step": 500, "epoch": 1}, {"step": 120, "epoch": 2})
    'epoch'
    """
    shared = [unit for unit in ("step", "epoch") if unit in one and unit in other]
    if len(shared) == 2 and (one["step"] - other["step"]) * (one["epoch"] - other["epoch"]) < 0:
        return "epoch"
    return shared[0] if shared else None


def _varying_slot(entries: Sequence[Entry]) -> list[int] | None:
    """Where names say no unit, the step is the one number that differs from name to name."""
    slots = [slots_in(entry.stem) for entry in entries]
    if len(entries) == 1:
        return [slots[0][-1]] if slots[0] else None
    if all(re.search(conventions.NUMBERS_A_RUN, entry.stem) for entry in entries):
        raise RefusedError(
            f"{printable(entries[0].label)} and {printable(entries[1].label)} are numbered as runs,"
            " not as moments of one; averaging across runs is not a trajectory.",
            "If they are steps all the same, say so with --pattern '([0-9]+)'.",
        )
    if len({len(row) for row in slots}) != 1:
        return None
    varying = [list(column) for column in zip(*slots, strict=True) if len(set(column)) > 1]
    return varying[0] if len(varying) == 1 else None


def _keys_inside(entries: Sequence[Entry], source: Source) -> tuple[str, list[int]]:
    recorded = [recorded_of(entry, source, inside=True) for entry in entries]
    for unit in ("step", "epoch"):
        if all(unit in claim for claim in recorded):
            return unit, [claim[unit] for claim in recorded]
    first, second = printable(entries[0].label), printable(entries[-1].label)
    raise RefusedError(
        f"The order of {first} and {second} is unknown: their names differ in several numbers or"
        " in none, and not all of them say their step inside.",
        "Pick the number with --pattern, such as --pattern 'step(?P<step>[0-9]+)', or pass the"
        " checkpoints one by one, oldest first.",
    )


def _same_step(earlier: Entry, later: Entry, unit: str, key: int) -> RefusedError:
    return RefusedError(
        f"{printable(earlier.label)} and {printable(later.label)} are both {unit} {key}.",
        "Choose with --pattern, or pass the checkpoints that belong together, oldest first.",
    )
