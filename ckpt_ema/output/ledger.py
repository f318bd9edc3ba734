"""The ledger of an unpublished output: which tiles are on disk, and how each part went."""

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.errors import Code, FailedError
from ckpt_ema.fold.crc32 import Piece
from ckpt_ema.fold.monitors.protocol import Monitor, Watched
from ckpt_ema.fold.tiles import Share
from ckpt_ema.output.workspace import LINES, Workspace, as_failure, write_all

SECONDS_BETWEEN_LINES = 10.0  # the most work that is lost, but for what takes longer to write
_OUTLINE = "outline"  # the record of what the parts are parts of


class Ledger:
    """The tiles that are done, by this process and by those before it; for many threads."""

    def __init__(
        self,
        workspace: Workspace,
        monitors: Sequence[Monitor],
        make_durable: Callable[[], None],
        *,
        is_kept: bool,
    ) -> None:
        """Read what was kept, unless nothing `is_kept`, and give `monitors` what they saw back."""
        self.done: set[int] = set()
        for line in _lines(workspace.path) if is_kept else ():
            self.done.update(n for first, last in line["tiles"] for n in range(first, last + 1))
            for monitor in monitors:
                if monitor.merges_twice:  # each line has what was seen up to then
                    monitor.merge(line["monitors"][monitor.name])
        self._is_kept = is_kept
        self._workspace = workspace
        self._path = workspace.path / f"tiles-{secrets.token_hex(4)}{LINES}"
        self._monitors, self._make_durable = monitors, make_durable
        self._new: list[int] = []
        self._lock = threading.Lock()
        self._last = time.monotonic()

    def finish(self, tiles: range) -> None:
        """Note that all bytes of these tiles have been written."""
        if self._is_kept:
            with self._lock:
                self._new.extend(tiles)

    def write_if_due(self) -> None:
        """Write a line if the last one is some seconds old."""
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self.write()

    def write(self) -> None:
        """Write a line for the tiles that were finished since the last one, if any were."""
        with self._lock:
            tiles, self._new = self._new, []
        if tiles:
            self._make_durable()
            line = {"tiles": list(ranges(tiles)), "monitors": states(self._monitors)}
            with as_failure(self._path), self._workspace.open_file(self._path) as fd:
                write_all(fd, json.dumps(line).encode() + b"\n", os.fstat(fd).st_size)
        self._last = time.monotonic()


def states(monitors: Sequence[Monitor]) -> dict[str, Any]:
    """Return the state of each monitor by its name."""
    return {monitor.name: monitor.state() for monitor in monitors}


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines in a workspace; the last one of a killed run may be incomplete."""
    for path in sorted(folder.glob(f"tiles-*{LINES}")):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and line.keys() >= {"tiles", "monitors"}:
                yield line


def ranges(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield numbers as ranges, first and last.

    >>> list(ranges([3, 1, 2, 7]))
    [(1, 3), (7, 7)]
    """
    for _, group in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in group]
        yield found[0], found[-1]


class Outline(NamedTuple):
    """What all parts of an output share."""

    files: Sequence[str]  # model files, in the order of their numbers
    manifests: Mapping[str, Mapping[str, Any]]  # by folder, without how it went
    watched: Watched
    bytes_written: int
    checksums: Sequence[Sequence[Sequence[Any]]] = ()  # of each model file that has some
    # Of each model file: what no tensor has, as ranges with their CRC-32, and its size.
    fixed: Sequence[tuple[Sequence[Piece], int]] = ()
    # What is at the output path and is replaced, and nothing else: fingerprints by folder.
    replaces: Mapping[str, str] = {}


class Part(NamedTuple):
    """How it went to fold a share of the work."""

    monitors: Mapping[str, Any]  # their states
    device: str
    seconds: float
    peak_memory_bytes: int
    bytes_read: int
    sync: bool = True  # whether what it wrote was synced
    is_resumed: bool = False  # tiles that an earlier process made are not in all monitors


def record(workspace: Workspace, outline: Outline, kind: str, share: Share, part: Part) -> None:
    """Record that a share is done; the `kind` of record tells parts from ranks."""
    workspace.record(_OUTLINE, outline._asdict())
    workspace.record(f"{kind}{share.part}-of-{share.of}", part._asdict())


def recorded(workspace: Workspace, kind: str) -> tuple[Outline, list[Part]]:
    """Return what was recorded of a complete set of parts; raises `FailedError` without one."""
    described = workspace.records(_OUTLINE).get(_OUTLINE, {})
    parts = _whole_set(workspace, kind)
    path = workspace.path
    try:
        outline = Outline(**described)
        watched = Watched(*outline.watched)
        return outline._replace(watched=watched), [Part(**part) for part in parts]
    except TypeError as error:
        message = f"The records in {path} are incomplete or of another version of ckpt-ema."
        hint = "Make any part again; if that does not help, remove them and make all parts again."
        raise FailedError(message, hint, code=Code.PARTS_MISSING, path=path) from error


def _whole_set(workspace: Workspace, kind: str) -> list[dict[str, Any]]:
    """Return the records of a division into parts that is complete."""
    divisions: dict[int, dict[int, dict[str, Any]]] = {}
    for name, part in workspace.records(kind).items():
        number, of = map(int, name.removeprefix(kind).split("-of-"))
        divisions.setdefault(of, {})[number] = part
    of, made = min(divisions.items(), key=lambda division: division[0] - len(division[1]))
    missing = [number for number in range(1, of + 1) if number not in made]
    if missing:
        listed = ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in ranges(missing))
        which = f"part {listed} of {of} is" if len(missing) == 1 else f"parts {listed} of {of} are"
        message = f"{workspace.final} cannot be finished yet: {which} missing."
        raise FailedError(message, code=Code.PARTS_MISSING, path=workspace.final)
    return list(made.values())
