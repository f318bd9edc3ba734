"""Finds float tensors that hold two values only, such as masks, whose average holds others."""

import threading
from typing import Any, NamedTuple

from ckpt_ema.errors import Code, some
from ckpt_ema.fold.monitors.protocol import Monitor, Watched
from ckpt_ema.fold.tiles import Segment
from ckpt_ema.fold.views import FEW_VALUES, Seen, TileView, describe
from ckpt_ema.notices import Notice


class Found(NamedTuple):
    """What a tensor, or a part of it, holds in all checkpoints."""

    values: tuple[float, ...]  # all of them; of three or more, the first three
    is_mixed: bool  # some checkpoint holds two of them
    changes: bool  # from checkpoint to checkpoint

    def joined(self, other: "Found") -> "Found":
        """Return what two parts hold."""
        values = tuple(sorted({*self.values, *other.values}))[:3]
        return Found(values, self.is_mixed or other.is_mixed, self.changes or other.changes)


_WEIGHT = Found((0.0, 1.0, 2.0), is_mixed=False, changes=False)


class TwoValues(Monitor):
    """A `Monitor` of tensors that have held at most two values so far."""

    name = "two-values"

    def __init__(self, _watched: Watched) -> None:
        self._found: dict[str, Found] = {}
        self._lock = threading.Lock()

    def look(self, view: TileView, seen: Seen) -> None:
        """See `Monitor.look`; a tensor with more values elsewhere is not looked at."""
        suspects = seen.having(FEW_VALUES)
        for number in {0, len(view.segments) - 1}.difference(suspects):
            one = view.segments[number]
            if not one.is_whole:  # other parts may hold few values
                self.add(one.tensor.name, _WEIGHT)
        for number in suspects:
            one = view.segments[number]
            known = self._found.get(one.tensor.name)
            is_asked = view.plan.rulings[one.tensor.key].is_asked
            if not is_asked and not (known and len(known.values) > 2):
                found = _found_in(view, one)
                if found or not one.is_whole:
                    self.add(one.tensor.name, found or _WEIGHT)

    def add(self, name: str, found: Found) -> None:
        """Add what a part of a tensor holds."""
        with self._lock:
            self._found[name] = found.joined(self._found.get(name, found))

    def state(self) -> dict[str, Found]:
        """Return what was found, by the name of the tensor."""
        with self._lock:
            return {**self._found}

    def merge(self, state: Any) -> None:
        """See `Monitor.merge`."""
        for name, (values, is_mixed, changes) in state.items():
            self.add(name, Found(tuple(values), is_mixed, changes))

    def verdict(self) -> tuple[Notice, ...]:
        """Return a warning of all such tensors that change."""
        names = sorted(
            name
            for name, one in self.state().items()
            if len(one.values) == 2 and one.is_mixed and one.changes
        )
        if not names:
            return ()
        low, high = self._found[names[0]].values
        text = (
            f"{some(names, 3)} hold two values only ({low:g} and {high:g}) and change, as masks and"
            " signs do, which are not weights: the average holds other values; decide with --keep"
            " GLOB or --average GLOB."
        )
        return (Notice(Code.NOT_A_WEIGHT, text),)


def _found_in(view: TileView, segment: Segment) -> Found | None:
    """Return what a segment holds; None if some checkpoint has more than two values."""
    found, before = None, None
    for checkpoint in range(len(view.plan.inputs)):
        content = view.read_again(checkpoint, segment.start, segment.stop)
        held = describe(content)
        if held.others:
            return None
        values = tuple(sorted({held.low, held.high}))
        changes = before is not None and before != content.data
        here = Found(values, len(values) == 2, changes)
        found, before = found.joined(here) if found else here, content.data
    return found
