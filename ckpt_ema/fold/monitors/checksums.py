"""Adds up the checksums of states: one that was read must be the one that was written."""

import threading
from collections import Counter
from typing import Any

from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.fold.monitors.protocol import Monitor, Watched
from ckpt_ema.fold.views import Seen, TileView
from ckpt_ema.notices import Notice


class Checksums(Monitor):
    """A `Monitor` of the float64 values that are read and written."""

    name = "checksums"
    sees_copies = True
    merges_twice = False

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._sums = [0] * ((len(watched.checkpoints) + watched.outputs) * bool(watched.outputs))
        self._lock = threading.Lock()

    def look(self, view: TileView, seen: Seen) -> None:
        """See `Monitor.look`; a state holds tied tensors under each of their names."""
        written = Counter(place.average for place in view.tile.span.places)
        sums = [*seen.sums]
        for average in written if sums else ():
            sums[len(view.plan.inputs) + average] *= written[average]
        self.merge(sums)

    def state(self) -> list[int]:
        """Return the sums of the inputs, then of the foldings."""
        with self._lock:
            return [*self._sums]

    def merge(self, state: Any) -> None:
        """See `Monitor.merge`."""
        with self._lock:
            pairs = zip(self._sums, state, strict=True)
            self._sums = [(one + other) % (1 << 64) for one, other in pairs]

    def verdict(self) -> tuple[Notice, ...]:
        """Raise `RefusedError` for a state that is not what was written."""
        for (path, expected), found in zip(self._watched.states, self._sums, strict=False):
            if found != expected:
                message = f"{path} is damaged: its values are not those that were written."
                hint = "Average the run again with --keep-state and --overwrite."
                raise RefusedError(message, hint, code=Code.DAMAGED, path=path)
        return ()
