"""Finds float tensors that hold two values only, such as masks, whose average holds others."""

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt_ema.errors import Code, some
from ckpt_ema.fold.monitors.protocol import Monitor, TileView, Watch, Watched
from ckpt_ema.fold.tiles import Segment
from ckpt_ema.notices import Notice

if TYPE_CHECKING:
    import torch

_PROBES = 8  # elements that tell nearly every weight from a mask


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

    def watch(self, view: TileView) -> Watch | None:
        """See `Monitor.watch`; a tensor with more values elsewhere is not looked at."""
        known = (self._found.get(one.tensor.name) for one in view.segments)
        is_known = all(one and len(one.values) > 2 for one in known)
        return None if is_known else _Watch(self, view)

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
            " signs do, which are no weights: the average holds other values; decide with --keep"
            " GLOB or --average GLOB."
        )
        return (Notice(Code.NOT_A_WEIGHT, text),)


class _Watch(Watch):
    """Looks for few values in one tile, where a few elements do not rule it out."""

    def __init__(self, monitor: TwoValues, view: TileView) -> None:
        self._monitor = monitor
        self._view = view
        self._suspects: dict[Segment, Found | None] = {}
        self._last: dict[Segment, torch.Tensor] = {}  # values in the checkpoint before

    def see(self, checkpoint: int, _content: memoryview, values: "torch.Tensor") -> None:
        """See `Watch.see`."""
        if checkpoint == 0:
            self._suspects = dict.fromkeys(self._probed(values))
        for segment in [*self._suspects]:
            self._see_segment(segment, values[segment.start : segment.stop])

    def see_average(self, _average: int, _values: "torch.Tensor") -> None:
        """See `Watch.see_average`."""
        for segment, found in self._suspects.items():
            if found:
                self._monitor.add(segment.tensor.name, found)
        self._suspects = {}

    def _probed(self, values: "torch.Tensor") -> list[Segment]:
        """Return the segments of which a few elements hold at most two values."""
        found, rulings = [], self._view.plan.rulings
        for one in self._view.segments:
            step = max(1, (one.stop - one.start) // _PROBES)
            if len({*values[one.start : one.stop : step].tolist()}) > 2:
                self._clear(one)
            elif not rulings[one.tensor.key].is_asked:
                found.append(one)
        return found

    def _clear(self, segment: Segment) -> None:
        """Stop suspecting a tensor, other parts of which may hold few values."""
        self._suspects.pop(segment, None)
        if not segment.is_whole:
            self._monitor.add(segment.tensor.name, _WEIGHT)

    def _see_segment(self, segment: Segment, values: "torch.Tensor") -> None:
        low, high = values.aminmax()
        if not bool(((values == low) | (values == high)).all()):
            self._clear(segment)
            return
        last = self._last.get(segment)
        changes = last is not None and not last.equal(values)
        self._last[segment] = values.clone()  # the memory is used again
        held = tuple(sorted({float(low), float(high)}))
        found = Found(held, len(held) == 2, changes)
        before = self._suspects[segment]
        self._suspects[segment] = found.joined(before) if before else found
