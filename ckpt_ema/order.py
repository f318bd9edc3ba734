"""Putting the entries of a run in training order, by what they say of themselves or by their names.

What a trainer wrote inside a checkpoint comes first, then the words in its name (step, epoch), then
the one number that varies from name to name. Text order and modification times never order.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from ckpt_ema import layouts
from ckpt_ema.claims import claims_beside
from ckpt_ema.errors import IncompleteError, RefusedError, printable
from ckpt_ema.formats import is_safetensors
from ckpt_ema.formats.specs import Specs, Weights
from ckpt_ema.names import numbers_in, slots_in, stem_of
from ckpt_ema.options import Options

Read = Callable[[Weights], Specs]

# Units of numbers in names that may count steps.
_AS_STEP = ("step", "checkpoint", "number")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved state of the model: a folder, or a file that holds the model by itself."""

    path: Path
    step: int | None  # in `unit`
    weights: Weights
    unit: str = "step"  # what the trainer counts: "step", "epoch", "save" (an index), ...

    @property
    def name(self) -> str:
        """What to call it."""
        return self.path.name


@dataclass(slots=True)
class Entry:
    """A checkpoint whose place is not known yet."""

    path: Path
    weights: Weights
    label: str = ""  # what gives its numbers, if not the name of its path
    stem: str = field(init=False)

    def __post_init__(self) -> None:
        """Take the name apart."""
        self.label = self.label or self.path.name
        stem = stem_of(self.label)
        self.stem = layouts.VERSION.sub("", stem) if self.label.endswith(".ckpt") else stem

    @property
    def is_version(self) -> bool:
        """Whether Lightning gave it a suffix, since its name was taken."""
        return self.stem != stem_of(self.label)


def claims_of(entry: Entry, read: Read, *, inside: bool) -> dict[str, int]:
    """What an entry says of its place; `inside`: also what torch files say, which have to be read.

    An incomplete file says nothing.
    """
    found = claims_beside(entry.path, stem_of(entry.path.name)).numbers
    if found or os.path.isdir(entry.path):
        return found
    if inside or is_safetensors(entry.path.name):
        try:
            return dict(read(entry.weights).claims)
        except IncompleteError:
            pass
    return {}


def ordered(entries: Sequence[Entry], options: Options, read: Read) -> list[Checkpoint]:
    """The entries of one series as checkpoints, oldest first.

    Raises `RefusedError` if nothing orders them, if what they say contradicts their names, or if
    two are the same step.
    """
    unit, keys = _keys(entries, options, read)
    rows = sorted(zip(keys, entries, strict=True), key=lambda row: (row[0], row[1].label))
    checkpoints = []
    for key, entry in rows:
        step = None if unit == "time" else key
        checkpoints.append(Checkpoint(entry.path, step, entry.weights, unit))
    for (key, earlier), (next_key, later) in pairwise(rows):
        if key == next_key:
            raise _same_step(earlier, later, unit, key)
    return checkpoints


def _keys(entries: Sequence[Entry], options: Options, read: Read) -> tuple[str, list[int]]:
    """What is counted, and each entry's number."""
    matches = [re.search(options.pattern, e.label) for e in entries] if options.pattern else []
    if matches and all(match and match.groups() for match in matches):
        return "step", [_group(match) for match in matches if match]
    claims = [claims_of(entry, read, inside=False) for entry in entries]
    names = [numbers_in(entry.stem) for entry in entries]
    if options.order != "name":
        for unit in ("step", "epoch", "time"):
            if all(unit in claim for claim in claims):
                keys = [claim[unit] for claim in claims]
                if options.order == "auto":
                    _check_names(entries, unit, keys, names)
                return unit, keys
    if all(layouts.NAMED_BY_DATE.search(entry.stem) for entry in entries):
        return "time", _by_date(entries, [claim.get("time") for claim in claims])
    for unit in ("step", "epoch", "checkpoint", "number"):
        if all(unit in numbers for numbers in names):
            keys = [numbers[unit] for numbers in names]
            if options.order == "metadata":
                break
            if options.order == "auto":
                _check_inside(entries, unit, keys, read)
            return _named_unit(entries, unit), keys
    if options.order != "metadata":
        slots = _varying_slot(entries)
        if slots:
            return "number", slots
    return _keys_inside(entries, read)


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


def _named_unit(entries: Sequence[Entry], unit: str) -> str:
    if unit == "checkpoint":
        is_save = all(layouts.SAVE_INDEX.search(entry.stem) for entry in entries)
        return "save" if is_save and os.path.isdir(entries[0].path) else unit
    return unit


def _check_names(
    entries: Sequence[Entry], unit: str, keys: Sequence[int], names: Sequence[dict[str, int]]
) -> None:
    """Refuse entries that say another step inside than in their names."""
    for entry, key, numbers in zip(entries, keys, names, strict=True):
        units = _AS_STEP if unit == "step" else (unit,)
        named = next((numbers[word] for word in units if word in numbers), key)
        if named != key:
            source = claims_beside(entry.path, stem_of(entry.path.name)).source
            raise RefusedError(
                f"{printable(entry.label)} says {unit} {key} in {source or 'its header'}. Was it"
                " renamed?",
                "Order by what it holds (--order metadata) or by the name (--order name).",
            )


def _check_inside(entries: Sequence[Entry], unit: str, keys: Sequence[int], read: Read) -> None:
    """Refuse torch files whose order by name is not that of the steps inside them."""
    if os.path.isdir(entries[0].path):
        return
    rows = sorted(zip(keys, entries, strict=True), key=lambda row: row[0])
    steps = [claims_of(entry, read, inside=True).get("step") for _, entry in rows]
    for (_, earlier), (_, later), (first, second) in zip(
        rows, rows[1:], pairwise(steps), strict=False
    ):
        if first is not None and second is not None and first > second:
            raise RefusedError(
                f"{printable(earlier.label)} says step {first} inside and {printable(later.label)}"
                f" says step {second}, though the {unit} in their names rises. Was one renamed?",
                "Order by what they hold (--order metadata) or by the names (--order name).",
            )


def _varying_slot(entries: Sequence[Entry]) -> list[int] | None:
    """Where names say no unit, the step is the one number that differs from name to name."""
    slots = [slots_in(entry.stem) for entry in entries]
    if len(entries) == 1:
        return [slots[0][-1]] if slots[0] else None
    if len({len(row) for row in slots}) != 1:
        return None
    varying = [list(column) for column in zip(*slots, strict=True) if len(set(column)) > 1]
    return varying[0] if len(varying) == 1 else None


def _keys_inside(entries: Sequence[Entry], read: Read) -> tuple[str, list[int]]:
    claims = [claims_of(entry, read, inside=True) for entry in entries]
    for unit in ("step", "epoch"):
        if all(unit in claim for claim in claims):
            return unit, [claim[unit] for claim in claims]
    first, second = printable(entries[0].label), printable(entries[-1].label)
    raise RefusedError(
        f"The order of {first} and {second} is unknown: their names differ in several numbers or"
        " in none, and not all of them say their step inside.",
        "Pick the number with --pattern, such as --pattern 'step(?P<step>[0-9]+)', or pass the"
        " checkpoints one by one, oldest first.",
    )


def _same_step(earlier: Entry, later: Entry, unit: str, key: int) -> RefusedError:
    one, other = printable(earlier.label), printable(later.label)
    if earlier.is_version or later.is_version:
        version = later.label[len(later.stem) :] if later.is_version else "-v1.ckpt"
        suffix = version.removesuffix(".ckpt")
        return RefusedError(
            f"{one} and {other} are the same {unit} from two runs (Lightning adds {suffix} when a"
            " name is taken).",
            rf"Keep one set: --pattern '(?<!{suffix})\.ckpt$' or --pattern '{suffix}\.ckpt$'.",
        )
    return RefusedError(
        f"{one} and {other} are both {unit} {key}.",
        "Choose with --pattern, or pass the checkpoints that belong together, oldest first.",
    )
