"""Updating: folds the checkpoints that are new in a run into averages that kept their state."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.execute import How
from ckpt_ema.options import PathLike
from ckpt_ema.output.destination import outputs_at
from ckpt_ema.output.manifest import Result, read_manifest
from ckpt_ema.planning.output import named
from ckpt_ema.planning.state import State, read_state
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
    nothing is read.

    Raises `RefusedError` for an output without a state or with a damaged one, for a run that does
    not continue what was folded, and what `ckpt_ema.average` raises; the old output stays.
    """
    path = named(output)
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
