"""Which tiles of an unpublished output are done, so that an interrupted run can go on.

A line of a file in the work folder says it of some tiles, once their bytes are on disk. Tiles are
numbers: the folder's key stands for everything else that the work depends on.
"""

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

from ckpt_ema.fold.monitors.twins import Twins
from ckpt_ema.fold.monitors.zeros import Turn, Zeroed
from ckpt_ema.output.workspace import JOURNAL, WorkFolder, as_failure, durable_file, write_all

_SECONDS = 10.0  # of work that is lost at most, but for what takes longer to write


class Journal:
    """The tiles that are done, by this process and by those before it; for many threads."""

    def __init__(self, work: WorkFolder, make_durable: Callable[[], None]) -> None:
        """`make_durable` brings what has been written to the disk."""
        lines = list(_lines(work))
        self.done = {
            tile
            for line in lines
            for first, last in line["tiles"]
            for tile in range(first, last + 1)
        }
        self.different = {(one, other) for line in lines for one, other in line["different"]}
        self.zeroed = [Turn(*turn) for line in lines for turn in line["zeroed"]]
        self._path = work.path / f"tiles-{secrets.token_hex(4)}{JOURNAL}"
        self._make_durable = make_durable
        self._new: list[int] = []
        self._lock = threading.Lock()
        self._last = time.monotonic()

    def finish(self, tiles: Iterable[int]) -> None:
        """Note that tiles have been written."""
        with self._lock:
            self._new.extend(tiles)

    def write_if_due(self, twins: Twins, zeroed: Zeroed) -> None:
        """`write`, if it was not done in the last seconds."""
        if time.monotonic() - self._last >= _SECONDS:
            self.write(twins, zeroed)

    def write(self, twins: Twins, zeroed: Zeroed) -> None:
        """Write down what is done and what was learnt: pairs that differ, turns to zeros."""
        with self._lock:
            tiles, self._new = self._new, []
        if tiles:
            self._make_durable()
            line = {
                "tiles": list(ranges(tiles)),
                "different": twins.different,
                "zeroed": zeroed.found,
            }
            with as_failure(self._path), durable_file(self._path) as fd:
                write_all(fd, json.dumps(line).encode() + b"\n", os.fstat(fd).st_size)
        self._last = time.monotonic()


def _lines(work: WorkFolder) -> Iterator[dict[str, Any]]:
    """What is written down; the last line of a killed run may be half there."""
    for path in sorted(work.path.glob(f"tiles-*{JOURNAL}")):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and line.keys() >= {"tiles", "different", "zeroed"}:
                yield line


def ranges(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Numbers as ranges, first and last.

    >>> list(ranges([3, 1, 2, 7]))
    [(1, 3), (7, 7)]
    """
    for _, group in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in group]
        yield found[0], found[-1]
