"""`last`, `best`, `final` and names without a number: copies of a step, or a step of their own.

In most runs they are copies; in some (kohya, timm, Lightning's save_last) they are the only save of
the last step. What they hold decides, and where that cannot be told, it stops.
"""

import filecmp
import os
from collections.abc import Sequence
from pathlib import Path

from ckpt_ema import layouts
from ckpt_ema.errors import RefusedError, printable
from ckpt_ema.formats.specs import Weights
from ckpt_ema.locate import kind_of, locate
from ckpt_ema.names import stem_of
from ckpt_ema.options import Options
from ckpt_ema.order import Checkpoint, Entry, Read, claims_of


def resolve_aliases(
    members: list[Checkpoint],
    aliases: Sequence[Path],
    options: Options,
    read: Read,
    left_out: list[tuple[Path, str]],
) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints with those aliases at the end that are a later step, and remarks on them.

    What is a copy is added to `left_out`. Raises `RefusedError` for one whose place is unknown.
    """
    remarks = []
    checkpoints = list(members)
    for path in aliases:
        reason = _why_no_step(path, members, options)
        weights = None if reason else locate(path, options)
        if not isinstance(weights, Weights):
            left_out.append((path, reason or "no model weights in it"))
            continue
        entry = Entry(path, weights)
        unit, step, newest = _place(entry, checkpoints[-1], read)
        if step is None:
            copied = _copied(weights, members)
            if copied is None:
                raise _unknown_place(path)
            left_out.append((path, f"a copy of {copied.path.name}"))
        elif step > newest:
            checkpoints.append(Checkpoint(path, step, weights, checkpoints[-1].unit))
            remarks.append(
                f"{printable(path.name)} is taken as the last step: it says {unit} {step} inside,"
                f" after {newest} of {printable(members[-1].path.name)}."
            )
        else:
            same = "the last" if step == newest else "an earlier"
            left_out.append((path, f"a copy of {same} step: it says {unit} {step} inside"))
    return checkpoints, remarks


def _why_no_step(path: Path, members: Sequence[Checkpoint], options: Options) -> str | None:
    if kind_of(path) is None:
        return "a link that leads nowhere"
    if layouts.ALWAYS_A_COPY.search(stem_of(path.name)):
        return "a copy of the best step"
    for member in members:
        if os.path.samefile(path, member.path):
            return f"the same file as {member.path.name}"
    return None if options.aliases else "left out by --no-aliases"


def _place(entry: Entry, newest: Checkpoint, read: Read) -> tuple[str, int | None, int]:
    """The unit that both tell, the entry's number in it (None if it tells none), the newest's."""
    claims = claims_of(entry, read, inside=True)
    others = claims_of(Entry(newest.path, newest.weights), read, inside=True)
    for unit in ("step", "epoch"):
        if unit in claims and unit in others:
            return unit, claims[unit], others[unit]
    if "step" in claims and newest.unit in ("step", "checkpoint", "number"):
        return "step", claims["step"], newest.step or 0
    if newest.unit in claims:
        return newest.unit, claims[newest.unit], newest.step or 0
    return "step", None, 0


def _copied(weights: Weights, members: Sequence[Checkpoint]) -> Checkpoint | None:
    """The checkpoint whose first weights file holds the same bytes; the newest is tried first."""
    for member in reversed(members):
        if filecmp.cmp(weights.path, member.weights.path, shallow=False):
            return member
    return None


def _unknown_place(path: Path) -> RefusedError:
    name = printable(path.name)
    return RefusedError(
        f"{name} has no number and no step inside, so its place is unknown.",
        f"Add it at the end with --append {name}, or leave it out with --no-aliases.",
    )
