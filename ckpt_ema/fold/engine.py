"""The one loop: which tile, which thread, which device.

A thread takes the next tile, reads its range from every checkpoint, folds, rounds and writes it
where it belongs. Threads share only the list of tiles, so the bytes do not depend on their number.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch

from ckpt_ema.containers.specs import TensorSpec
from ckpt_ema.errors import Code, FailedError
from ckpt_ema.fold.devices import CPU, accumulator, elements_at_a_time, is_out_of_memory
from ckpt_ema.fold.monitors.protocol import Monitor, TileView
from ckpt_ema.fold.shadow import is_finite
from ckpt_ema.fold.sources import TORCH_DTYPES, Sources
from ckpt_ema.fold.tile_fold import Staging, TileFold, Use, make_fold
from ckpt_ema.fold.tiles import Tile, cut, joined
from ckpt_ema.planning.plan import Plan

_POLL_SECONDS = 0.1  # the longest time before the main thread handles a signal
_ROOM_TO_START = 16 << 20  # a thread's stack, and what it takes before it does anything


class Destination(NamedTuple):
    """Where finished bytes go; both are called from many threads."""

    write: Callable[[int, memoryview, int], None]  # number of an output file, bytes, offset
    finish: Callable[[range], None]  # numbers of tiles whose bytes have all been written


def run(
    plan: Plan,
    tiles: Iterable[Tile],
    device: torch.device,
    destination: Destination,
    monitors: Sequence[Monitor],
    tick: Callable[[int], None],
) -> bool:
    """Fold tiles of `plan` on `device`, and show the values to monitors.

    `tick` is called in this thread, ten times a second, with the bytes read so far; what it raises
    ends the work. A thread for which an accelerator has no memory left continues on the CPU;
    returns whether none had to.

    Raises `FailedError` if a file changes or cannot be read, and whatever `destination` and
    `monitors` raise; by then every thread has ended.
    """
    sources = Sources(plan)
    try:
        elements = elements_at_a_time(plan, device)
        wide_tiles = joined(tiles, elements)
        job = _Job(plan, wide_tiles, device, elements, sources, destination, monitors)
        _run_threads(job, tick)
        sources.verify()
        return job.device_sufficed
    finally:
        sources.close()


@dataclass(slots=True)
class _Job:
    """What the threads share."""

    plan: Plan
    tiles: Iterator[Tile]
    device: torch.device
    elements: int  # that a thread has on the device at a time
    sources: Sources
    destination: Destination
    monitors: Sequence[Monitor]
    device_sufficed: bool = True
    bytes_read: int = 0
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_tile(self) -> Tile | None:
        with self.lock:
            return None if self.stopped else next(self.tiles, None)

    def count_read(self, size_bytes: int) -> None:
        with self.lock:
            self.bytes_read += size_bytes

    def read_again(
        self, checkpoint: int, source: TensorSpec, start: int, count: int
    ) -> torch.Tensor:
        """See `TileView.read`."""
        return self.sources.values(checkpoint, source, start, count, Staging(count * 8))


def _run_threads(job: _Job, tick: Callable[[int], None]) -> None:
    threads = job.plan.threads
    with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-ema") as pool:
        try:
            with job.lock:  # so that no thread takes memory before all have started
                pending = {_started(pool, job) for _ in range(threads)}
            while pending:
                done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                tick(job.bytes_read)
        finally:
            job.stopped = True


def _started(pool: ThreadPoolExecutor, job: _Job) -> Future[None]:
    # Python waits forever for the start of a thread that finds no memory.
    bytes(_ROOM_TO_START)
    try:
        return pool.submit(_Worker(job).work)
    except RuntimeError as error:
        raise FailedError(
            "The machine can start no more threads.",
            "Try --threads 1 and --max-memory 64MiB.",
            code=Code.OUT_OF_MEMORY,
        ) from error


@contextlib.contextmanager
def _end_of_memory_reported() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message, hint = "Out of memory; nothing was written.", "Try --max-memory 64MiB."
        raise FailedError(message, hint, code=Code.OUT_OF_MEMORY) from error


class _StoppedError(Exception):
    """Another thread has failed, or the process was asked to end."""


class _Worker:
    """One thread's part, with memory of its own."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._plan = job.plan
        self._device = job.device
        self._elements = job.elements
        self._fold: TileFold | None = None  # made for the first averaged tensor
        self._staging = Staging(0)  # for kept tensors, likewise

    def work(self) -> None:
        """Take tiles until there are none."""
        # There is one thread per core already; without this each would start a team of its own.
        torch.set_num_threads(1)
        with contextlib.suppress(_StoppedError), _end_of_memory_reported():
            while (tile := self._job.next_tile()) is not None:
                if tile.span.averaged:
                    self._average(tile)
                else:
                    self._keep(tile)
                self._job.destination.finish(tile.numbers)

    def _average(self, tile: Tile) -> None:
        """Fold a tile of every checkpoint and write each average; if need be, on the CPU."""
        for part in cut(tile, self._elements):
            if not self._fits(part):
                self._leave_device()
                rest = tile.length - (part.start - tile.start)
                self._average(tile._replace(start=part.start, length=rest))
                return

    def _fits(self, tile: Tile) -> bool:
        """Fold what the device has room for; return False if its memory is full."""
        try:
            self._fold = self._fold or self._make_fold()
            self._fold_tile(tile, self._fold)
        except RuntimeError as error:
            if self._device == CPU or not is_out_of_memory(error):
                raise
            return False
        return True

    def _leave_device(self) -> None:
        """Continue on the CPU."""
        self._device, self._elements, self._fold = CPU, self._plan.tile_elements, None
        self._job.device_sufficed = False

    def _make_fold(self) -> TileFold:
        wide = accumulator(self._plan, self._device)
        of_checkpoints, widest_bytes = uses(self._plan), self._plan.work.widest_bytes
        return make_fold(of_checkpoints, self._elements, wide, self._device, widest_bytes)

    def _keep(self, tile: Tile) -> None:
        """Copy the bytes of the newest checkpoint."""
        span = tile.span
        assert span.kept_from is not None
        if tile.length > len(self._staging.bytes):
            self._staging = Staging(tile.length)
        data = self._job.sources.read(
            span.kept_from, span.sources[0], tile.start, tile.length, self._staging
        )
        self._job.count_read(tile.length)
        for target in span.places:
            self._job.destination.write(target.file, data, target.offset + tile.start)

    def _fold_tile(self, tile: Tile, fold: TileFold) -> None:
        span, layout_of = tile.span, self._plan.work.layout_of
        view = TileView(self._plan, tile, self._job.read_again)
        watching = [see for monitor in self._job.monitors if (see := monitor.watch(view))]

        def read(index: int, staging: Staging) -> torch.Tensor:
            if self._job.stopped:  # a tile of a thousand checkpoints takes its time
                raise _StoppedError
            source = span.sources[layout_of[index]]
            return self._job.sources.values(index, source, tile.start, tile.length, staging)

        def read_and_show(index: int, staging: Staging) -> torch.Tensor:
            values = read(index, staging)
            content = staging.bytes[: values.nbytes]
            for see in watching:
                see(index, content, values.itemsize)
            return values

        fold.fold(tile.length, read_and_show)
        if not self._hand_on(view, fold, only_finite=True):
            fold.fold(tile.length, read, keeping_infinities=True)
            self._hand_on(view, fold, only_finite=False)
        self._job.count_read(span.bytes_read(layout_of, tile.length))

    def _hand_on(self, view: TileView, fold: TileFold, *, only_finite: bool) -> bool:
        """Write the averages of a tile where they belong; return whether all are finite.

        Those that are not are left out (`only_finite`), or shown to the monitors and written.
        """
        tile, dtypes = view.tile, view.tile.span.dtypes
        all_finite = True
        for name, same in groupby(sorted(dtypes), dtypes.__getitem__):
            dtype, numbers = TORCH_DTYPES[name], list(same)
            data = fold.rounded(slice(numbers[0], numbers[-1] + 1), tile.length, dtype)
            if not is_finite(torch.frombuffer(data, dtype=dtype)):
                all_finite = False
                if only_finite:
                    continue
                self._show_nonfinite(view, numbers, torch.frombuffer(data, dtype=dtype))
            size_bytes = tile.length * dtype.itemsize
            for target in tile.span.places:
                if target.average in numbers:
                    row = numbers.index(target.average) * size_bytes
                    offset = target.offset + tile.start * dtype.itemsize
                    part = data[row : row + size_bytes]
                    self._job.destination.write(target.file, part, offset)
        return all_finite

    def _show_nonfinite(
        self, view: TileView, averages: Sequence[int], rounded: torch.Tensor
    ) -> None:
        rows = rounded.view(len(averages), view.tile.length)
        for average, values in zip(averages, rows, strict=True):
            for monitor in () if is_finite(values) else self._job.monitors:
                monitor.see_nonfinite(view, average, values)


def uses(plan: Plan) -> list[list[Use]]:
    """Return how each checkpoint of a plan is used by each of its averages."""
    found: list[list[Use]] = [[] for _ in plan.checkpoints]
    for number_of_average, average in enumerate(plan.averages):
        for checkpoint, decay in zip(average.members, (None, *average.decays), strict=True):
            found[checkpoint].append(Use(number_of_average, decay))
    return found
