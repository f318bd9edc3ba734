"""The one loop: which tile, which thread, which device; the number of threads changes no byte."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext

from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import DTYPE_BITS
from ckpt_ema.errors import Code, FailedError
from ckpt_ema.fold.compiled_fold import CompiledFold, Kernel
from ckpt_ema.fold.hardware import CPU, check_room_for_thread, is_out_of_memory
from ckpt_ema.fold.monitors.protocol import Monitor
from ckpt_ema.fold.native import compiled
from ckpt_ema.fold.tile_fold import StoppedError, TileFold
from ckpt_ema.fold.tiles import Segments, Tile, cut, joined
from ckpt_ema.fold.views import Sink, TileView
from ckpt_ema.planning.plan import Plan
from ckpt_ema.planning.sizing import prefetched_bytes
from ckpt_ema.storage.protocol import Range

_POLL_SECONDS = 0.1  # the longest time before the main thread handles a signal
_WIDEST_TILE = 1 << 20  # elements: neighbours are joined up to that

Finish = Callable[[range], None]  # numbers of tiles whose bytes have all been written


def run(
    plan: Plan,
    tiles: Iterable[Tile],
    device: str,
    sink: Sink,
    finish: Finish,
    monitors: Sequence[Monitor],
    tick: Callable[[int], None],
) -> bool:
    """Fold tiles of `plan` on `device`, and show what was seen to monitors.

    `sink` and `finish` are called from many threads, `tick` from this one, ten times a second, with
    the bytes read so far; what they raise ends the work, and every thread. A thread for which an
    accelerator has no memory left continues on the CPU; returns whether none had to.
    """
    with Reader(plan.storage, [(c.folder, c.specs) for c in plan.inputs]) as reader:
        job = _Job(plan, device, reader, sink, finish, monitors, tiles)
        _run_threads(job, tick)
        reader.verify()
        return job.device_sufficed


class _Job:
    """What the threads share."""

    def __init__(
        self,
        plan: Plan,
        device: str,
        reader: Reader,
        sink: Sink,
        finish: Finish,
        monitors: Sequence[Monitor],
        tiles: Iterable[Tile],
    ) -> None:
        self.plan, self.device, self.reader, self.sink = plan, device, reader, sink
        self.finish, self.monitors = finish, monitors
        self.segments = Segments(plan)
        self.stop = bytearray(1)  # the compiled fold looks at it too
        module = compiled() if plan.engine.accumulate == "float64" else None
        self.kernel = module and Kernel(module, plan, reader, sink, self.stop)
        self.device_sufficed = True
        self.bytes_read = 0
        self._tiles = joined(tiles, _most_joined(plan, device))
        self._requested = deque[Tile]()  # of a remote run, their bytes being fetched
        self.lock = threading.Lock()

    def fold_on(self, device: str) -> TileFold:
        """Return a fold for one thread."""
        if device == CPU and self.kernel:
            return CompiledFold(self.kernel)
        from ckpt_ema.fold.torch_tiles import TorchTiles  # which imports torch

        return TorchTiles(self.plan, self.reader, self.sink, self.stop, device)

    def next_tile(self) -> Tile | None:
        """Return the next tile; None if there are no more, or the work was stopped."""
        with self.lock:
            if self.stop[0]:
                return None
            if not self.plan.storage.is_remote:
                return next(self._tiles, None)
            self._prefetch()
            return self._requested.popleft() if self._requested else None

    def _prefetch(self) -> None:
        """Request the bytes of the next tiles, in the order in which they will be folded."""
        layout_of = self.plan.work.layout_of
        ahead = sum(tile.span.bytes_read(layout_of, tile.length) for tile in self._requested)
        while ahead < prefetched_bytes(self.plan.engine) and (tile := next(self._tiles, None)):
            self.reader.request(self._ranges(tile))
            self._requested.append(tile)
            ahead += tile.span.bytes_read(layout_of, tile.length)

    def held(self, tile: Tile) -> AbstractContextManager[None]:
        """Hold the fetched bytes of a tile of a remote run inside the block."""
        is_remote = self.plan.storage.is_remote
        return self.reader.held(self._ranges(tile)) if is_remote else nullcontext()

    def _ranges(self, tile: Tile) -> Iterator[Range]:
        """Yield the ranges that a tile reads, oldest checkpoint first."""
        span = tile.span
        if span.kept_from is not None:
            yield from self.reader.ranges(span.kept_from, span.sources[0], tile.start, tile.length)
            return
        for checkpoint, layout in enumerate(self.plan.work.layout_of):
            source = span.sources[layout]
            width = DTYPE_BITS[source.dtype] // 8
            where = (tile.start * width, tile.length * width)
            yield from self.reader.ranges(checkpoint, source, *where)

    def count_read(self, size_bytes: int) -> None:
        """Note that bytes were read, for the progress."""
        with self.lock:
            self.bytes_read += size_bytes


def _most_joined(plan: Plan, device: str) -> int:
    """Return how many elements of neighbouring tiles a thread may take at once."""
    if plan.engine.tile_size and device == CPU:
        return plan.tile_elements
    if plan.storage.is_remote:
        return plan.fetched_elements
    if device == CPU:
        return _WIDEST_TILE
    import torch

    from ckpt_ema.fold.devices import elements_at_a_time

    return elements_at_a_time(plan, torch.device(device))


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
            job.stop[0] = True
            job.reader.cancel()


def _started(pool: ThreadPoolExecutor, job: _Job) -> Future[None]:
    try:
        check_room_for_thread()
        return pool.submit(_Worker(job).work)
    except (OSError, RuntimeError) as error:
        message = "The machine can start no more threads."
        hint = "Try --threads 1 and --max-memory 64MiB."
        raise FailedError(message, hint, code=Code.OUT_OF_MEMORY) from error


class _Worker:
    """One thread's part, with memory of its own."""

    def __init__(self, job: _Job) -> None:
        self._job, self._plan, self._device = job, job.plan, job.device
        self._fold: TileFold | None = None  # made for the first averaged tensor
        self._kept = bytearray()  # memory for kept tensors

    def work(self) -> None:
        """Take tiles until there are none."""
        try:
            while (tile := self._job.next_tile()) is not None:
                with self._job.held(tile):
                    if tile.span.averaged:
                        self._average(tile)
                    else:
                        self._keep(tile)
                self._job.finish(tile.numbers)
        except StoppedError:
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = "The machine ran out of memory; nothing was written."
            hint = "Try --max-memory 64MiB."
            raise FailedError(message, hint, code=Code.OUT_OF_MEMORY) from error

    def _average(self, tile: Tile) -> None:
        """Fold a tile of every checkpoint and write each average; if need be, on the CPU."""
        done = 0
        while done < tile.length:
            rest = tile._replace(start=tile.start + done, length=tile.length - done)
            try:
                if self._fold is None:
                    self._fold = self._job.fold_on(self._device)
                part = next(cut(rest, self._fold.most_elements(rest)))
                self._fold_and_show(part, self._fold)
            except RuntimeError as error:
                if self._device == CPU or not is_out_of_memory(error):
                    raise
                self._device, self._fold, self._job.device_sufficed = CPU, None, False
                continue
            done += part.length
            self._job.count_read(tile.span.bytes_read(self._plan.work.layout_of, part.length))

    def _fold_and_show(self, tile: Tile, fold: TileFold) -> None:
        job = self._job
        segments = job.segments.of(tile)
        hashes = any(monitor.wants_hashes() for monitor in job.monitors)
        seen, problems = fold.fold(tile, segments, hashes=hashes)
        is_copy = segments[0].tensor.is_copy  # of what most monitors see elsewhere
        view = TileView(self._plan, tile, segments, job.reader, job.sink)
        averages = range(len(self._plan.averages))  # without their states
        for monitor in (one for one in job.monitors if one.sees_copies or not is_copy):
            for average in problems.keys() & averages:
                monitor.see_problem(view, average, problems[average])
            monitor.look(view, seen)

    def _keep(self, tile: Tile) -> None:
        """Copy the bytes of the newest checkpoint."""
        span = tile.span
        assert span.kept_from is not None
        if tile.length > len(self._kept):
            self._kept = bytearray(tile.length)
        data = memoryview(self._kept)[: tile.length]
        self._job.reader.read_into(span.kept_from, span.sources[0], tile.start, data)
        self._job.count_read(tile.length)
        for place in span.places:
            self._job.sink.write(place.file, data, place.offset + tile.start)
        for monitor in self._job.monitors:
            monitor.see_kept(tile, data)
