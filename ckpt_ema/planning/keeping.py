"""Keeping states: which averages can be continued, and that a continued one stays what it was."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ckpt_ema.containers.specs import COPIED, Role, Specs
from ckpt_ema.errors import Code, OptionError, RefusedError, flag, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.options import BY_NEWEST, NO_LATER, Options
from ckpt_ema.planning.average import Weighted
from ckpt_ema.planning.contents import Facts, Judged
from ckpt_ema.planning.roles import Ruling
from ckpt_ema.planning.state import Asked, Folded, State, lay_out_state
from ckpt_ema.targets.target import Output, OutputFile


def check_extendable(options: Options) -> None:
    """Refuse to keep the state of averages that no checkpoint can be folded into later."""
    for name in BY_NEWEST:
        if getattr(options.selection, name):
            why = "which other checkpoints take part depends on the newest"
            raise _not_extendable(flag(name), why)
    for name in NO_LATER:
        if getattr(options.selection, name) is not None:
            raise _not_extendable(flag(name), "no later checkpoint would take part")
    for rule in options.weighting.rules:
        if not rule.extends:
            why = "a further checkpoint changes the weights of all others among each other"
            raise _not_extendable(rule.asked_by, why)


def _not_extendable(option: str, why: str) -> OptionError:
    message = f"--keep-state cannot be used with {option}: {why}."
    return OptionError(message, code=Code.NOT_EXTENDABLE)


class FactsOfState:
    """The facts of the oldest checkpoint of an average, which may be gone."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __call__(self, key: str) -> Facts:
        """Return the facts of a tensor; raises `RefusedError` for one that was not asked for."""
        if key not in self._state.facts:
            raise _differs(self._state, key, "cannot be judged without the oldest checkpoint")
        return self._state.facts[key]


class Keeper(NamedTuple):
    """Lays out the states of the averages of a plan."""

    states: Sequence[State]  # what was folded before
    specs_of: Mapping[Checkpoint, Specs]  # of the checkpoints that are read
    judged: Judged
    asked: Asked

    def with_state(self, average: Weighted, output: Output) -> Output:
        """Return an output with its state; raises `RefusedError` if it is not of the same model."""
        newest = average.checkpoints[-1]
        rulings = self.judged.rulings[newest]
        folded = [self._folded(c) for c in average.checkpoints if c in self.specs_of]
        facts: Mapping[str, Facts] = self.judged.of_oldest
        for state in (one for one in self.states if one.name == average.name):
            _check_same_tensors(state, self.specs_of[newest], output.files, rulings)
            folded = [*state.folded, *folded]
            facts = {**state.facts, **facts}
        state_file = lay_out_state(average, folded, output, rulings, facts, self.asked)
        return replace(output, state=state_file)

    def _folded(self, checkpoint: Checkpoint) -> Folded:
        """Return a checkpoint with the files that it has as any but the newest."""
        files = self.specs_of[checkpoint].files
        return Folded(checkpoint, tuple(one for one in files if one.member != COPIED))


def _check_same_tensors(
    state: State, newest: Specs, files: Sequence[OutputFile], rulings: Mapping[str, Ruling]
) -> None:
    """Refuse a checkpoint that averages or keeps other tensors than those in the state."""
    written = (one for file in files for one in file.tensors if one.averaged)
    averaged = {one.key for one in written if 0 not in one.shape}
    kept = {key for key, one in rulings.items() if one.made is not Role.AVERAGED}
    own = state.specs.tensors
    known, found = {*own, *state.kept}, averaged | kept
    if known - found:
        raise _differs(state, min(known - found), f"lacks {some(sorted(known - found), 3)}")
    if found - known:
        raise _differs(state, min(found - known), f"also has {some(sorted(found - known), 3)}")
    for key in sorted(averaged ^ own.keys()):
        reason = rulings[key].rule.reason.value
        raise _differs(state, key, f"has {key}, which was judged otherwise before ({reason})")
    for key in averaged:
        shape, before = newest.tensors[key].shape, own[key].shape
        if shape != before:
            raise _differs(state, key, f"has {key} of shape {list(shape)}, not {list(before)}")


def _differs(state: State, tensor: str, how: str) -> RefusedError:
    message = f"The new checkpoint {how}, unlike the {len(state.folded)} in {state.path.parent}."
    hint = "Average the checkpoints that belong together anew."
    return RefusedError(message, hint, code=Code.STATE_DIFFERS, path=state.path, tensor=tensor)
