"""The one loop: which tile, which thread, which device; the number of threads changes no byte."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import groupby, product

import torch

from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import FOLDED, TensorSpec
from ckpt_ema.errors import Code, FailedError
from ckpt_ema.fold.devices import CPU, accumulator, elements_at_a_time, is_out_of_memory
from ckpt_ema.fold.monitors.protocol import Monitor, TileView, Watch
from ckpt_ema.fold.shadow import is_finite
from ckpt_ema.fold.tile_fold import Staging, TileFold, Use, make_fold
from ckpt_ema.fold.tiles import Segments, Tile, cut, joined
from ckpt_ema.planning.plan import Plan

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, FOLDED[name]) for name in FOLDED}
_POLL_SECONDS = 0.1  # the longest time before the main thread handles a signal
_ROOM_TO_START = 16 << 20  # a thread's stack, and what it takes before it does anything

Write = Callable[[int, memoryview, int], None]  # number of an output file, bytes, offset
Finish = Callable[[range], None]  # numbers of tiles whose bytes have all been written


def run(
    plan: Plan,
    tiles: Iterable[Tile],
    device: torch.device,
    write: Write,
    finish: Finish,
    monitors: Sequence[Monitor],
    tick: Callable[[int], None],
) -> bool:
    """Fold tiles of `plan` on `device`, and show the values to monitors.

    `write` and `finish` are called from many threads, `tick` from this one, ten times a second,
    with the bytes read so far; what they raise ends the work, and every thread. A thread for which
    an accelerator has no memory left continues on the CPU; returns whether none had to.
    """
    with Reader(plan.storage, [(c.folder, c.specs) for c in plan.checkpoints]) as reader:
        elements = elements_at_a_time(plan, device)
        wide_tiles = joined(tiles, elements)
        job = _Job(
            plan, wide_tiles, device, elements, reader, write, finish, monitors, Segments(plan)
        )
        _run_threads(job, tick)
        reader.verify()
        return job.device_sufficed


@dataclass(slots=True)
class _Job:
    """What the threads share."""

    plan: Plan
    tiles: Iterator[Tile]
    device: torch.device
    elements: int  # that a thread has on the device at a time
    reader: Reader
    write: Write
    finish: Finish
    monitors: Sequence[Monitor]
    segments: Segments
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

    def read(
        self,
        number: int,
        source: TensorSpec,
        start: int,
        count: int,
        staging: Staging | None = None,
    ) -> torch.Tensor:
        """Return `count` elements from element `start` of an averaged tensor on: shape (count,)."""
        dtype = _DTYPES[source.dtype]
        staging = staging or Staging(count * dtype.itemsize)
        content = staging.bytes[: count * dtype.itemsize]
        self.reader.read_into(number, source, start * dtype.itemsize, content)
        return staging.values(dtype, count)


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
        message = "The machine can start no more threads."
        hint = "Try --threads 1 and --max-memory 64MiB."
        raise FailedError(message, hint, code=Code.OUT_OF_MEMORY) from error


class _StoppedError(Exception):
    """Another thread has failed, or the process was asked to end."""


class _Worker:
    """One thread's part, with memory of its own."""

    def __init__(self, job: _Job) -> None:
        self._job, self._plan = job, job.plan
        self._device, self._elements = job.device, job.elements
        self._fold: TileFold | None = None  # made for the first averaged tensor
        self._staging = Staging(0)  # for kept tensors, likewise

    def work(self) -> None:
        """Take tiles until there are none."""
        # There is one thread per core already; without this each would start a team of its own.
        torch.set_num_threads(1)
        try:
            while (tile := self._job.next_tile()) is not None:
                if tile.span.averaged:
                    self._average(tile)
                else:
                    self._keep(tile)
                self._job.finish(tile.numbers)
        except _StoppedError:
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = "The machine ran out of memory; nothing was written."
            hint = "Try --max-memory 64MiB."
            raise FailedError(message, hint, code=Code.OUT_OF_MEMORY) from error

    def _average(self, tile: Tile) -> None:
        """Fold a tile of every checkpoint and write each average; if need be, on the CPU."""
        for part in cut(tile, self._elements):
            if not self._fits(part):
                self._device, self._elements, self._fold = CPU, self._plan.tile_elements, None
                self._job.device_sufficed = False
                rest = tile.length - (part.start - tile.start)
                self._average(tile._replace(start=part.start, length=rest))
                return

    def _fits(self, tile: Tile) -> bool:
        """Fold what the device has room for; return False if its memory is full."""
        plan, device = self._plan, self._device
        try:
            if self._fold is None:
                wide, widest_bytes = accumulator(plan, device), plan.work.widest_bytes
                self._fold = make_fold(uses(plan), self._elements, wide, device, widest_bytes)
            self._fold_tile(tile, self._fold)
        except RuntimeError as error:
            if device == CPU or not is_out_of_memory(error):
                raise
            return False
        return True

    def _keep(self, tile: Tile) -> None:
        """Copy the bytes of the newest checkpoint."""
        span = tile.span
        assert span.kept_from is not None
        if tile.length > len(self._staging.bytes):
            self._staging = Staging(tile.length)
        data = self._staging.bytes[: tile.length]
        self._job.reader.read_into(span.kept_from, span.sources[0], tile.start, data)
        self._job.count_read(tile.length)
        for target in span.places:
            self._job.write(target.file, data, target.offset + tile.start)

    def _fold_tile(self, tile: Tile, fold: TileFold) -> None:
        span, layout_of = tile.span, self._plan.work.layout_of
        view = TileView(self._plan, tile, self._job.segments.of(tile), self._job.read)
        watching = [watch for monitor in self._job.monitors if (watch := monitor.watch(view))]

        def read(index: int, staging: Staging) -> torch.Tensor:
            if self._job.stopped:  # a tile of a thousand checkpoints takes its time
                raise _StoppedError
            source = span.sources[layout_of[index]]
            return self._job.read(index, source, tile.start, tile.length, staging)

        def read_and_show(index: int, staging: Staging) -> torch.Tensor:
            values = read(index, staging)
            content = staging.bytes[: values.nbytes]
            for watch in watching:
                watch.see(index, content, values)
            return values

        fold.fold(tile.length, read_and_show)
        rest = self._hand_on(view, fold, watching, {*span.dtypes.values()}, only_finite=True)
        if rest:
            fold.fold(tile.length, read, keeping_infinities=True)
            self._hand_on(view, fold, watching, rest, only_finite=False)
        self._job.count_read(span.bytes_read(layout_of, tile.length))

    def _hand_on(
        self,
        view: TileView,
        fold: TileFold,
        watching: Sequence[Watch],
        wanted: Set[str],
        *,
        only_finite: bool,
    ) -> set[str]:
        """Write the averages of a tile in the wanted dtypes; return those that are not finite.

        With `only_finite`, those are not written.
        """
        tile, dtypes = view.tile, view.tile.span.dtypes
        nonfinite = set()
        for name, same in groupby(sorted(dtypes), dtypes.__getitem__):
            if name not in wanted:
                continue
            dtype, numbers = _DTYPES[name], list(same)
            data = fold.rounded(slice(numbers[0], numbers[-1] + 1), tile.length, dtype)
            rounded = torch.frombuffer(data, dtype=dtype)
            if not is_finite(rounded):
                nonfinite.add(name)
                if only_finite:
                    continue
                self._show_nonfinite(view, numbers, rounded)
            rows = rounded.view(len(numbers), tile.length)
            for watch, (average, row) in product(watching, zip(numbers, rows, strict=True)):
                watch.see_average(average, row)
            size_bytes = tile.length * dtype.itemsize
            for target in tile.span.places:
                if target.average in numbers:
                    begin = numbers.index(target.average) * size_bytes
                    offset = target.offset + tile.start * dtype.itemsize
                    self._job.write(target.file, data[begin : begin + size_bytes], offset)
        return nonfinite

    def _show_nonfinite(self, view: TileView, averages: list[int], rounded: torch.Tensor) -> None:
        rows = rounded.view(len(averages), view.tile.length)
        for average, values in zip(averages, rows, strict=True):
            for monitor in () if is_finite(values) else self._job.monitors:
                monitor.see_nonfinite(view, average, values)


def uses(plan: Plan) -> list[list[Use]]:
    """Return how each checkpoint of a plan is used by each of its averages."""
    found: list[list[Use]] = [[] for _ in plan.checkpoints]
    for number, average in enumerate(plan.averages):
        for checkpoint, decay in zip(average.members, (None, *average.decays), strict=True):
            found[checkpoint].append(Use(number, decay))
    return found
