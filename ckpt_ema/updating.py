"""Updating: folds the checkpoints that are new in a run into averages that kept their state."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.execute import How
from ckpt_ema.options import PathLike
from ckpt_ema.output.destination import check_replaced, is_free, outputs_at
from ckpt_ema.output.manifest import Result, read_manifest
from ckpt_ema.output.publish import publish_held
from ckpt_ema.output.workspace import HELD, Workspace
from ckpt_ema.planning.output import named
from ckpt_ema.planning.state import State, count_folded, read_state
from ckpt_ema.planning.update import plan_update
from ckpt_ema.run import carry_out, made_before, split

if TYPE_CHECKING:
    from typing_extensions import Unpack


class UpdateKeywords(How, total=False):
    """The keyword arguments of `update`."""

    device: str
    threads: int | str | None
    tile_size: int | str | None
    max_memory: int | str | None
    strict: bool
    sync: bool


def update(
    output: PathLike,
    run: PathLike | Sequence[PathLike] | None = None,
    **keywords: "Unpack[UpdateKeywords]",
) -> Result:
    """Fold the checkpoints that are new in a run into the averages at `output`.

    These were made with `keep_state`; they are replaced at once, states included, by the averages
    of all checkpoints, byte for byte, although the old ones may be gone. `run` is the run that they
    were made of, if it was moved; of a list of checkpoints, the new ones. Options are those of
    `ckpt_ema.average` that change no byte, such as `device` and `progress`. If nothing is new,
    nothing is read. What a killed `watch` has folded and not published is published first.

    Raises `RefusedError` for an output without a state or with a damaged one, for a run that does
    not continue what was folded, while a `watch` is running, and what `ckpt_ema.average` raises;
    the old output stays.
    """
    path = named(output)
    if Workspace(path, HELD).is_there():
        _publish_what_is_held(path)
    outputs, states = read_states(path)
    how, options = split(keywords)
    plan = plan_update(path, states, run, **options)
    if plan is None:
        return made_before(path, outputs, [read_manifest(one) for one in outputs])
    return carry_out(plan, {**how, "overwrite": True})


def read_states(output: Path) -> tuple[list[Path], list[State]]:
    """Return the averages at a path and the state of each; raises `RefusedError` without them."""
    outputs = outputs_at(output)
    if not outputs:
        message = f"{output} is not an output of ckpt-ema."
        hint = "Make one with ckpt-ema average RUN --keep-state."
        raise RefusedError(message, hint, code=Code.NO_STATE, path=output)
    return outputs, [read_state(one, read_manifest(one)) for one in outputs]


class SoFar(NamedTuple):
    """The states of what was folded into an output."""

    published: Sequence[State]
    held: Sequence[State]  # by a watch that has not published them yet; empty if none are later


def folded_so_far(output: Path, held: Path) -> SoFar:
    """Return what is at an output path, and what a watch holds; raises `RefusedError`."""
    published, waiting = ([] if is_free(one) else read_states(one)[1] for one in (output, held))
    is_later = count_folded(waiting) > count_folded(published)
    return SoFar(published, waiting if is_later else ())


def publish_instead(held: Path, output: Path, published: Sequence[State]) -> None:
    """Publish what is held in place of what it continues; raises what `publish_held` raises."""
    publish_held(held, output, _fingerprints(published, output))


def check_still_there(states: Sequence[State], output: Path) -> None:
    """Raise `RefusedError` unless an output is still the one whose states these are."""
    check_replaced(output, _fingerprints(states, output))


def _fingerprints(states: Sequence[State], output: Path) -> dict[str, str]:
    return {os.path.relpath(one.path.parent, output): one.fingerprint for one in states}


def _publish_what_is_held(output: Path) -> None:
    """Publish what a killed watch holds; raises `RefusedError` while a watch is running."""
    with Workspace(output, HELD) as workspace:
        workspace.kept = True
        done = folded_so_far(output, workspace.output)
        if done.held:
            publish_instead(workspace.output, output, done.published)
        workspace.kept = False
