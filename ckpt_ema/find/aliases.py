"""`last`, `best`, `final` and names without a number: copies of a step, or a step of their own.

In most runs they are copies; in some (kohya, timm, Lightning's save_last) they are the only save of
the last step. What they hold decides, and where that cannot be told, it stops.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_ema.containers.compare import hold_the_same
from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles
from ckpt_ema.errors import IncompleteError, RefusedError, printable
from ckpt_ema.find.model_files import locate
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.order import STEP_UNITS, Checkpoint, Entry, deciding_unit, recorded_of
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions


@dataclass(frozen=True, slots=True)
class _Alias:
    """A name whose place in the run is asked for."""

    path: Path
    model: ModelFiles
    place: int | None  # what it says inside, in `unit`; None if it says nothing comparable
    unit: str
    newest: int  # what the last step says, in the same unit
    step: int | None  # its place in the unit of the series, if that is the same


def resolve_aliases(
    members: Sequence[Checkpoint],
    aliases: Sequence[Path],
    selection: Selection,
    source: Source,
    left_out: list[tuple[Path, str]],
) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints with those aliases at the end that are a later step, and remarks on them.

    What is a copy is added to `left_out`. Raises `RefusedError` for one whose place is unknown.
    """
    found = []
    for path in aliases:
        reason = _why_no_step(path, members, selection, source)
        try:
            model = None if reason else locate(path, source)
            if not isinstance(model, ModelFiles):
                left_out.append((path, reason or "no model weights in it"))
                continue
            found.append(_placed(path, model, members[-1], source))
        except RefusedError as error:  # a whole pickled module, say, beside state dicts
            left_out.append((path, f"not read: {error.message}"))
    checkpoints, remarks = list(members), []
    newest = None
    for alias in sorted(found, key=lambda alias: (alias.place or 0, alias.path.name)):
        if alias.place is None:
            try:
                left_out.append((alias.path, _why_a_copy(alias, members, source)))
            except IncompleteError as error:
                left_out.append((alias.path, "incomplete"))
                remarks.append(f"{printable(alias.path.name)} is left out: {error.message}")
        elif alias.place > (newest if newest is not None else alias.newest):
            newest = alias.place
            checkpoints.append(
                Checkpoint(alias.path, alias.step, alias.model, members[-1].unit, is_given=True)
            )
            remarks.append(
                f"{printable(alias.path.name)} is taken as the last step: it says {alias.unit}"
                f" {alias.place} inside, after {alias.newest} of {printable(members[-1].name)}."
            )
        else:
            kind = "a copy of the last" if alias.place in (newest, alias.newest) else "an earlier"
            said = f"it says {alias.unit} {alias.place} inside"
            left_out.append((alias.path, f"{kind} step: {said}"))
    return checkpoints, remarks


def _why_no_step(
    path: Path, members: Sequence[Checkpoint], selection: Selection, source: Source
) -> str | None:
    if source.storage.kind(path) in (Kind.ABSENT, Kind.OTHER):
        return "a link that leads nowhere"
    if conventions.ALWAYS_A_COPY.search(stem_of(path.name)):
        return "a copy of the best step"
    for member in members:
        if os.path.samefile(path, member.path):
            return f"the same file as {member.name}"
    return None if selection.aliases else "left out by --no-aliases"


def _placed(path: Path, model: ModelFiles, newest: Checkpoint, source: Source) -> _Alias:
    """An alias with what it and the newest step both say inside."""
    recorded = recorded_of(Entry(path, model), source, inside=True)
    others = recorded_of(Entry(newest.path, newest.model), source, inside=True)
    deciding = deciding_unit(recorded, others)
    if deciding:
        place, last = recorded[deciding], others[deciding]
        # In the unit of the series it may be told by the other number.
        same = [unit for unit in ("step", "epoch") if others.get(unit) == newest.step]
        step = next((recorded[unit] for unit in same if unit in recorded), None)
        return _Alias(path, model, place, deciding, last, step)
    unit = "step" if newest.unit in STEP_UNITS else newest.unit
    # Counts inside files begin at 0 or 1, whatever those in names do: near the last, bytes decide.
    if unit in recorded and newest.step is not None and abs(recorded[unit] - newest.step) > 1:
        return _Alias(path, model, recorded[unit], unit, newest.step, recorded[unit])
    return _Alias(path, model, None, unit, 0, None)


def _why_a_copy(alias: _Alias, members: Sequence[Checkpoint], source: Source) -> str:
    """Why an alias that says nothing is no step; raises `RefusedError` if it may be one."""
    mine = (alias.model, source.read(alias.model))
    newest_first = []
    for member in reversed(members):
        with contextlib.suppress(IncompleteError):  # an unfinished save, of which others will tell
            newest_first.append((member, (member.model, source.read(member.model))))
    if newest_first and newest_first[0][1][1].tensors.keys() != mine[1].tensors.keys():
        return "another model than the steps'"
    for member, theirs in newest_first:
        if hold_the_same(mine, theirs, source.storage):
            return f"a copy of {member.name}"
    name = printable(alias.path.name)
    raise RefusedError(
        f"{name} has no number and no step inside, so its place is unknown.",
        f"Add it at the end with --append {name}, or leave it out with --no-aliases.",
    )
