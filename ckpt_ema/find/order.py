"""Training order: by what checkpoints record, then by the words in names, then by a varying number.

Text order and modification times never order.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.find.checkpoint import STEP_UNITS, Checkpoint
from ckpt_ema.find.entries import Entry, recorded_beside
from ckpt_ema.find.names import (
    captures_step,
    count_of,
    magnitudes_in,
    rounding_of,
    slots_in,
    stem_of,
)
from ckpt_ema.options import Selection
from ckpt_ema.trainers import conventions

_Keys = tuple[str, list[int]]  # what is counted, and the number of each entry
_Facts = Callable[[Entry], Mapping[str, int]]
_UNITS = ("step", "epoch")
# How much later a name with another magnitude may be: from 900 to 1k, and from 1k to 1M.
_MOST_JUMP = 1000


def ordered(entries: Sequence[Entry], selection: Selection) -> list[Checkpoint]:
    """Return the entries of one series as checkpoints, oldest first; raises if that is unknown."""
    unit, keys = _keys(entries, selection)
    rows = sorted(zip(keys, entries, strict=True), key=lambda row: (row[0], row[1].name))
    for (key, earlier), (next_key, later) in pairwise(rows):
        if key == next_key:
            text = f"{earlier.name} and {later.name} are both {unit} {key}."
            hint = (
                "Choose with --pattern, or pass the checkpoints that belong together, oldest first."
            )
            raise RefusedError(text, hint, code=Code.SAME_STEP, path=earlier.path)
    return [as_checkpoint(entry, unit, None if unit == "time" else key) for key, entry in rows]


def as_checkpoint(entry: Entry, unit: str, step: int | None, is_given: bool = False) -> Checkpoint:
    """Return an entry that holds a model as a checkpoint."""
    assert entry.model is not None
    return Checkpoint(entry.path, step, entry.model, unit, entry.name, is_given)


def step_in_name(entry: Entry) -> tuple[str, int | None]:
    """Return the unit and the step in a name; the step is None if there is none."""
    return next(iter(entry.numbers.items()), ("step", None))


def _keys(entries: Sequence[Entry], selection: Selection) -> _Keys:
    pattern = selection.pattern
    if pattern and captures_step(pattern):
        matches = [re.search(pattern, entry.name) for entry in entries]
        if all(matches):
            return "step", [_captured(match) for match in matches if match]
    _check_versions(entries)
    recorded = _recorded_keys(entries, selection) if selection.order != "name" else None
    if recorded:
        return recorded
    named = named_keys(entries) if selection.order != "metadata" else None
    if named:
        _check_magnitudes(entries, named[1])
    if named and selection.order == "auto":
        _check_rises(entries, *named)
        named = _as_epochs(entries, *named)
    keys = named or _shared(entries, lambda entry: entry.recorded_anywhere)
    if keys is None:
        raise RefusedError(
            f"the order of {entries[0].name} and {entries[-1].name} is unknown: their names differ"
            " in several numbers or in none, and not all of them record a step.",
            "Pick the number with --pattern, such as --pattern 'step(?P<step>[0-9]+)', or pass the"
            " checkpoints one by one, oldest first.",
            code=Code.UNKNOWN_ORDER,
            path=entries[0].path,
        )
    return keys


def _as_epochs(entries: Sequence[Entry], unit: str, keys: Sequence[int]) -> _Keys:
    """Return bare numbers in names as epochs, if the files record them as such and other steps."""
    inside = [{} if entry.is_folder else entry.recorded_anywhere for entry in entries]
    are_epochs = unit in ("checkpoint", "number") and all(
        one.get("epoch") == key != one.get("step", key)
        for one, key in zip(inside, keys, strict=True)
    )
    return "epoch" if are_epochs else unit, [*keys]


def _shared(entries: Sequence[Entry], facts: _Facts, units: Iterable[str] = _UNITS) -> _Keys | None:
    """Return the first unit in which all entries have a number, and the numbers."""
    for unit in units:
        if all(unit in facts(entry) for entry in entries):
            return unit, [facts(entry)[unit] for entry in entries]
    return None


def _recorded_keys(entries: Sequence[Entry], selection: Selection) -> _Keys | None:
    """Return the numbers recorded beside the weights or in headers, if all entries have them."""
    if all(conventions.NAMED_BY_DATE.search(entry.stem) for entry in entries):
        return "time", _by_date(entries)
    recorded = _shared(entries, lambda entry: entry.recorded)
    if recorded and selection.order == "auto":
        _check_names(entries, recorded[0])
        named = named_keys(entries)
        if named and any(entry.is_of_deepspeed for entry in entries):
            _check_rises(entries, *named)
    return recorded


def named_keys(entries: Sequence[Entry]) -> _Keys | None:
    """Return the numbers in the names, with what they count; None if names give no order."""
    named = _shared(entries, lambda entry: entry.numbers, conventions.STEP_NAMES)
    if named:
        unit, keys = named
        is_index = all(conventions.SAVE_INDEX.search(e.stem) and e.is_folder for e in entries)
        # accelerate counts its saves, which gives no distances.
        is_save = is_index and sorted(keys) == [*range(min(keys), min(keys) + len(keys))]
        return ("save" if is_save else unit), keys
    slots = _varying_slot(entries)
    return ("number", slots) if slots else None


def _captured(match: re.Match[str]) -> int:
    group = "step" if match.groupdict().get("step") else 1
    text = match[group]
    # The magnitude belongs to the number though `step_(\d+)` does not capture it.
    whole = conventions.MAGNITUDE.match(match.string, match.start(group)) if text else None
    if whole and not whole[0][len(text) :][:1].isdigit():
        text = whole[0]
    is_number = text and (whole or re.fullmatch("[0-9]+", text))
    step = count_of(text) if is_number else None
    if step is None:
        why = f"--pattern captures {text!r} in {match.string}, which is not a step."
        raise RefusedError(why, code=Code.NO_STEPS)
    return step


def _by_date(entries: Sequence[Entry]) -> list[int]:
    """Return times; an entry that records none comes right after those before it by name."""
    last, keys = 0, {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        keys[entry] = entry.recorded.get("time", last + 1)
        last = max(last, keys[entry])
    return [keys[entry] for entry in entries]


def _check_versions(entries: Sequence[Entry]) -> None:
    """Refuse a mixture of Lightning's versions: files of one name from two runs.

    The best checkpoints of one run may share a name too; the steps in them tell.
    """
    versions = {entry: stem_of(entry.name)[len(entry.stem) :] for entry in entries}  # "-v1"
    first = next((entry for entry in entries if versions[entry]), None)
    if first is None or len({*versions.values()}) == 1:
        return
    is_last = conventions.ALIAS.search(first.stem) and not conventions.ALWAYS_A_COPY.search(
        first.stem
    )
    if len({entry.stem for entry in entries}) == 1 and not is_last:
        steps = [entry.recorded_anywhere.get("step") for entry in entries]
        if None not in steps and len({*steps}) == len(steps):
            return
    version = versions[first]
    other = next(entry for entry in entries if versions[entry] != version)
    same = next((one for one in entries if one is not first and one.stem == first.stem), None)
    what = f"{first.name} are {'the same step ' if same else ''}from two runs"
    text = f"{(same or other).name} and {what} (Lightning adds {version} when a name is taken)."
    hint = rf"Keep one set: --pattern '(?<!{version})\.ckpt$' or --pattern '{version}\.ckpt$'."
    raise RefusedError(text, hint, code=Code.SEVERAL_RUNS, path=first.path)


def _check_names(entries: Sequence[Entry], unit: str) -> None:
    """Refuse entries that record another step than their names give."""
    units = STEP_UNITS if unit == "step" else (unit,)
    for entry in entries:
        recorded = entry.recorded[unit]
        named = next((entry.numbers[word] for word in units if word in entry.numbers), recorded)
        if abs(named - recorded) > rounding_of(named, entry.stem):
            _, file = recorded_beside(entry.path, entry.source)
            if entry.is_of_deepspeed and not file:
                continue  # it counts updates, whatever its user counts in names
            where = f"{unit} {recorded} in {file or 'its header'}"
            text = f"{entry.name} records {where}; was it renamed?"
            hint = "Order by what it records (--order metadata) or by its name (--order name)."
            raise RefusedError(text, hint, code=Code.CONTRADICTORY_STEPS, path=entry.path)


def _check_magnitudes(entries: Sequence[Entry], keys: Sequence[int]) -> None:
    """Refuse a letter that may be no magnitude: `step-300b` after `step-200` is a variant."""
    rows = sorted(zip(keys, entries, strict=True), key=lambda row: row[0])
    for (key, earlier), (next_key, later) in pairwise(rows):
        letters = [magnitudes_in(entry.stem) for entry in (earlier, later)]
        if letters[0] != letters[1] and next_key > _MOST_JUMP * key > 0:
            raise RefusedError(
                f"{later.name} would be {next_key:,}, far beyond {earlier.name} ({key:,}): the"
                " letter after a number may be a magnitude, or may be not.",
                "Leave one out with --exclude, or pass the checkpoints one by one, oldest first.",
                code=Code.UNKNOWN_ORDER,
                path=later.path,
            )


def _check_rises(entries: Sequence[Entry], unit: str, keys: Sequence[int]) -> None:
    """Refuse names in another order than the epochs in them, or than the steps in the files."""
    rows = [entry for _, entry in sorted(zip(keys, entries, strict=True), key=lambda row: row[0])]
    named = [{u: n for u, n in entry.numbers.items() if u == "epoch"} for entry in rows]
    inside = [
        entry.recorded_anywhere if entry.is_of_deepspeed or not entry.is_folder else {}
        for entry in rows
    ]
    for recorded in (named, inside):
        for (earlier, first), (later, second) in pairwise(zip(rows, recorded, strict=True)):
            what = deciding_unit(first, second)
            if what and first[what] > second[what]:
                raise RefusedError(
                    f"{earlier.name} has {what} {first[what]} and {later.name} has {what}"
                    f" {second[what]}, although the {unit} in their names rises; was one renamed,"
                    " or are they two runs?",
                    "Order by what they record (--order metadata), by their names (--order name),"
                    " or by one number in them, such as --pattern 'epoch[-_=]?(?P<step>[0-9]+)'.",
                    code=Code.CONTRADICTORY_STEPS,
                    path=later.path,
                )


def deciding_unit(one: Mapping[str, int], other: Mapping[str, int]) -> str | None:
    """Return the unit that decides which of two records is later; None if they share none.

    A step that falls while the epoch rises counts within its epoch, and decides nothing.

    >>> deciding_unit({"step": 500, "epoch": 1}, {"step": 120, "epoch": 2})
    'epoch'
    """
    shared = [unit for unit in _UNITS if unit in one and unit in other]
    if len(shared) == 2 and (one["step"] - other["step"]) * (one["epoch"] - other["epoch"]) < 0:
        return "epoch"
    return shared[0] if shared else None


def _varying_slot(entries: Sequence[Entry]) -> list[int] | None:
    """Return the one number that differs from name to name, where names give no unit."""
    # Without the suffix of a name that was taken, which is not a step.
    slots = [slots_in(entry.stem) for entry in entries]
    if len(entries) == 1:
        return [slots[0][-1]] if slots[0] else None
    if all(re.search(conventions.NUMBERS_A_RUN, entry.stem) for entry in entries):
        raise RefusedError(
            f"{entries[0].name} and {entries[1].name} are numbered as runs, not as states of one,"
            " and an average across runs is not one over training.",
            "If they are steps after all, use --pattern '([0-9]+)'.",
            code=Code.SEVERAL_RUNS,
            path=entries[0].path,
        )
    if len({len(row) for row in slots}) != 1:
        return None
    varying = [list(column) for column in zip(*slots, strict=True) if len(set(column)) > 1]
    return varying[0] if len(varying) == 1 else None
