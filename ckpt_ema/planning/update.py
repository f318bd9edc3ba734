"""Plans of updates: the averages that an output has, continued with the checkpoints since.

The shadow of what was folded is read in place of the old checkpoints, which may be gone.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ckpt_ema.containers.reader import hold_the_same, same_values
from ckpt_ema.containers.source import Source
from ckpt_ema.errors import CkptEmaError, Code, RefusedError, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.complete import refuse_hole
from ckpt_ema.find.select import Subset
from ckpt_ema.options import Options, PathLike, Weighting, make_options
from ckpt_ema.planning.average import Weighted, are_close, decays_by, weigh
from ckpt_ema.planning.decide import Chosen, choose_checkpoints, decide, paths_of, uncollected
from ckpt_ema.planning.plan import Plan
from ckpt_ema.planning.state import Folded, State
from ckpt_ema.storage import Storage
from ckpt_ema.storage.protocol import Kind


def plan_update(
    output: Path,
    states: Sequence[State],
    run: PathLike | Sequence[PathLike] | None = None,
    **engine: Any,
) -> Plan | None:
    """Plan to fold what is new in a run into the averages at `output`; None if nothing is.

    `states` are those of the averages there; `run` is the run that they were made of, unless given.
    `engine` has options that change no byte. Raises what `plan` raises, and `RefusedError` for a
    run that does not continue what was folded.
    """
    asked = states[0].asked
    with uncollected():
        engine = {"accumulate": asked.accumulate, **engine}
        options = make_options({**asked.options, **engine, "output": output})
        chosen = find_new(paths_of(asked.paths if run is None else run), options, states)
        new = new_checkpoints(chosen)
        return plan_new(chosen, new, options, states) if new else None


def find_new(paths: Sequence[Path], options: Options, states: Sequence[State]) -> Chosen:
    """Find the checkpoints of a run that are in no state, all later than those that are."""
    chosen = choose_checkpoints(paths, options)
    if not states:
        return chosen
    subset = Subset("", tuple(_not_in(states[0], chosen)))
    return chosen._replace(selected=chosen.selected._replace(subsets=(subset,), notes=()))


def new_checkpoints(chosen: Chosen) -> tuple[Checkpoint, ...]:
    """Return what `find_new` has found."""
    return chosen.selected.subsets[0].checkpoints


def plan_new(
    chosen: Chosen, new: Sequence[Checkpoint], options: Options, states: Sequence[State]
) -> Plan:
    """Plan to fold new checkpoints into the averages of `states`, or to begin some without."""
    if states:
        states = _in_order(states, options.weighting)
        _check_next(states[0], new[0], chosen)
    subsets = (Subset("", tuple(new)),)
    return decide(
        chosen._replace(
            found=replace(chosen.found, checkpoints=tuple(new)),
            selected=chosen.selected._replace(subsets=subsets),
        ),
        options,
        partial(_continued, states) if states else weigh,
        states,
    )


def _in_order(states: Sequence[State], weighting: Weighting) -> list[State]:
    """Return the states of averages that were made together, in the order of their rules."""
    by_name = {state.name: state for state in states}
    names = [rule.name for rule in weighting.rules]
    if by_name.keys() != set(names):
        folder = states[0].path.parent if len(states) == 1 else states[0].path.parent.parent
        message = f"{folder} holds {some(sorted(by_name))}, not {some(sorted(names))}, which were"
        message = f"{message} made together."
        hint = "Average the run again with --keep-state and --overwrite."
        raise RefusedError(message, hint, code=Code.STATE_DIFFERS, path=folder)
    return [by_name[name] for name in names]


def _continued(
    states: Sequence[State], subsets: Sequence[Subset], weighting: Weighting
) -> list[Weighted]:
    """Weigh all checkpoints, those in the states included; see `Choose`."""
    averages = []
    for state, rule in zip(states, weighting.rules, strict=True):
        checkpoints = (*state.checkpoints, *subsets[0].checkpoints)
        decays = decays_by(rule, checkpoints)
        before, since = decays[: len(state.decays)], decays[len(state.decays) :]
        if state.name != rule.name or not are_close(before, state.decays):
            message = f"{state.path} has other weights than {rule.text()} gives."
            raise RefusedError(message, code=Code.STATE_DIFFERS, path=state.path)
        averages.append(Weighted(rule.name, rule, checkpoints, (*state.decays, *since)))
    return averages


def _not_in(state: State, chosen: Chosen) -> list[Checkpoint]:
    """Return the selected checkpoints that are not in a state, all later than those that are.

    Raises `RefusedError` for an earlier one, and for one that was written anew since it was folded.
    """
    [subset] = chosen.selected.subsets
    known = {(one.checkpoint.name, one.checkpoint.step): one for one in state.folded}
    new: list[Checkpoint] = []
    for checkpoint in subset.checkpoints:
        folded = known.get((checkpoint.name, checkpoint.step))
        if folded is None:
            new.append(checkpoint)
            continue
        if new:
            raise _not_later(state, new[0])
        _check_unchanged(state, folded, checkpoint, chosen.source.storage)
    last = state.checkpoints[-1]
    if any((one.name, one.step) == (last.name, last.step) for one in subset.checkpoints):
        return new  # the order of the folder shows that they are later
    if new:
        first = new[0]
        if last.step is None or first.step is None or first.unit != last.unit:
            message = f"{first.path} may be earlier than {last.name}, the last in"
            message = f"{message} {state.path.parent}: not both have a step."
            raise RefusedError(message, code=Code.UNKNOWN_ORDER, path=first.path)
        if first.step <= last.step:
            raise _not_later(state, first)
    return new


def _not_later(state: State, checkpoint: Checkpoint) -> RefusedError:
    last = state.checkpoints[-1]
    message = f"{checkpoint.path} is not in {state.path.parent} and is no later than {last.name},"
    message = f"{message} the last that is: the run may have restarted."
    hint = "Average the run anew, or leave it out of the run's folder."
    return RefusedError(message, hint, code=Code.FOLDED_BEFORE, path=checkpoint.path)


def _check_unchanged(
    state: State, folded: Folded, checkpoint: Checkpoint, storage: Storage
) -> None:
    """Refuse a checkpoint that was folded and has been written again since."""
    before, files = folded
    is_here = before.path == checkpoint.path  # else a copy, which may have other times
    for file in files:
        path = checkpoint.model.folder / file.name
        if storage.kind(path) is Kind.ABSENT:  # the trainer may be deleting it
            return
        now = storage.identity(path)
        if now != file.identity if is_here else now.size_bytes != file.size_bytes:
            message = f"{path} has changed since it was folded into {state.path.parent}: the run"
            message = f"{message} may have restarted."
            hint = "Average the run anew."
            raise RefusedError(message, hint, code=Code.FOLDED_BEFORE, path=path)


def _check_next(state: State, first: Checkpoint, chosen: Chosen) -> None:
    """Refuse a copy of the last folded checkpoint, and a step without a model in between."""
    found, source = chosen.found, chosen.source
    last = state.checkpoints[-1]
    for hole in found.holes:
        if hole.earlier.name == last.name:
            raise refuse_hole(hole)
    still_there = (one for one in found.checkpoints if one.name == last.name)
    previous = next(still_there, None)
    if previous and not source.reading.allow_duplicates and _are_same(previous, first, source):
        raise same_values(previous.name, first.name)


def _are_same(one: Checkpoint, other: Checkpoint, source: Source) -> bool:
    try:
        here, there = ((c.model, source.read(c.model)) for c in (one, other))
    except CkptEmaError:  # it is being deleted, or is judged later
        return False
    return hold_the_same(here, there, source.storage)
