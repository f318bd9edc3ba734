"""The sums over all that a plan averages, each byte read once, by all threads together."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import DTYPE_BITS
from ckpt_ema.errors import Code, OptionError
from ckpt_ema.fold.passing import Needs, Pass, StoppedError, run_threads
from ckpt_ema.measure.summing import summing
from ckpt_ema.measure.sums import (
    STRIP,
    Block,
    Summing,
    Sums,
    every_of,
    members_of,
    merged,
)
from ckpt_ema.planning.plan import Plan
from ckpt_ema.planning.sizing import prefetched_bytes
from ckpt_ema.planning.work import Span
from ckpt_ema.storage.protocol import Range

_BLOCK_BYTES = 1 << 22  # of all checkpoints: a core's cache and a few calls of Python's
_READ_BYTES = 1 << 16  # of one checkpoint, where there are many of them
_MOST_BYTES = 1 << 24  # that a thread has in memory
_ALIGNED = 64  # bytes: where the elements of a checkpoint begin


class Tile(NamedTuple):
    """Elements of a span, in all checkpoints."""

    span: Span
    start: int
    length: int
    strip: int  # the number of its first strip, counted through the whole pass


def elements_of(plan: Plan, *, in_bytes: bool = False) -> int:
    """Return how many elements each checkpoint has, or the bytes to read of all of them."""
    layout_of = plan.work.layout_of
    sizes = (one.bytes_read(layout_of) if in_bytes else one.length for one in _spans(plan))
    return sum(sizes)


def sums_of(plan: Plan, progress: Callable[[int, int], None]) -> Sums:
    """Return the sums over all averaged elements, with the weights of the first average.

    `progress` is called with the bytes read so far and in all, ten times a second.
    """
    total = elements_of(plan, in_bytes=True)
    with Reader(plan.storage, [(one.folder, one.specs) for one in plan.checkpoints]) as reader:
        job = _Job(plan, reader)
        run_threads(
            job.tiles, job.worker, plan.threads, [reader], lambda read: progress(read, total)
        )
    count = len(plan.checkpoints)
    return merged(job.parts or [job.summing()], count, len(members_of(count)))


class _Job:
    """What the threads share."""

    def __init__(self, plan: Plan, reader: Reader) -> None:
        self.plan, self.reader = plan, reader
        self.parts: list[Summing] = []  # of each thread
        needs = self._needs if plan.storage.is_remote else None
        self.tiles = Pass(_tiles(plan), needs, prefetched_bytes(plan.engine))

    def summing(self) -> Summing:
        """Return empty totals."""
        count = len(self.plan.checkpoints)
        every = every_of(count, elements_of(self.plan))
        return summing(self.plan.averages[0].weights, members_of(count), every)

    def worker(self) -> Callable[[Tile], None]:
        """Return what measures a tile, with memory of its own."""
        sums, content = self.summing(), bytearray()
        self.parts.append(sums)

        def measure(tile: Tile) -> None:
            nonlocal content
            if len(content) < (needed := sum(_sizes(self.plan, tile))):
                content = bytearray(needed)
            places = self._read(tile, memoryview(content))
            sums.add(Block(content, places, tile.length, tile.strip))
            self.tiles.count_read(tile.span.bytes_read(self.plan.work.layout_of, tile.length))

        return measure

    def _read(self, tile: Tile, content: memoryview) -> list[tuple[str, int]]:
        """Read a tile of every checkpoint; return the dtype and the place of each."""
        places, begin = [], 0
        sizes = _sizes(self.plan, tile)
        for number, (layout, size) in enumerate(zip(self.plan.work.layout_of, sizes, strict=True)):
            if self.tiles.stop[0]:
                raise StoppedError
            source = tile.span.sources[layout]
            width = DTYPE_BITS[source.dtype] // 8
            own = content[begin : begin + tile.length * width]
            self.reader.read_into(number, source, tile.start * width, own)
            places.append((source.dtype, begin))
            begin += size
        return places

    def _needs(self, tile: Tile) -> Needs:
        return [(self.reader, [*self._ranges(tile)])]

    def _ranges(self, tile: Tile) -> Iterator[Range]:
        for number, layout in enumerate(self.plan.work.layout_of):
            source = tile.span.sources[layout]
            width = DTYPE_BITS[source.dtype] // 8
            yield from self.reader.ranges(number, source, tile.start * width, tile.length * width)


def _sizes(plan: Plan, tile: Tile) -> list[int]:
    """Return the bytes in memory of each checkpoint's elements, to the next aligned place."""
    dtypes = (tile.span.sources[layout].dtype for layout in plan.work.layout_of)
    sizes = (tile.length * DTYPE_BITS[dtype] // 8 for dtype in dtypes)
    return [-(-size // _ALIGNED) * _ALIGNED for size in sizes]


def _spans(plan: Plan) -> list[Span]:
    """Return what is averaged, each element once."""
    return [one for one in plan.work.spans if one.averaged and not one.places[0].is_copy]


def _tiles(plan: Plan) -> Iterator[Tile]:
    """Return the tiles of all that is measured; raises `OptionError` for too little memory."""
    lengths = [(span, _most_elements(plan, span)) for span in _spans(plan)]
    return _cut(lengths)


def _cut(lengths: Sequence[tuple[Span, int]]) -> Iterator[Tile]:
    strip = 0
    for span, most in lengths:
        for start in range(0, span.length, most):
            length = min(most, span.length - start)
            yield Tile(span, start, length, strip)
            strip += -(-length // STRIP)


def _most_elements(plan: Plan, span: Span) -> int:
    """Return how many elements are read of each checkpoint at a time: whole strips."""
    each = span.bytes_read(plan.work.layout_of, 1)
    wanted = max(_BLOCK_BYTES // each, _READ_BYTES // plan.work.widest_bytes)
    if plan.storage.is_remote:
        wanted = plan.fetched_elements
    room = max(_MOST_BYTES, plan.storage.is_remote * wanted * each)
    if plan.engine.max_memory:
        wide = 8 * STRIP * (len(plan.checkpoints) + 2)  # a strip in float64
        room = plan.engine.max_memory // plan.threads - wide
        if room < each * STRIP:
            least = -(-plan.threads * (wide + each * STRIP) // 1024)
            message = f"--max-memory is {plan.engine.max_memory} bytes; inspecting"
            message = f"{message} {len(plan.checkpoints)} checkpoints needs at least {least}KiB."
            raise OptionError(message, code=Code.INVALID_OPTION)
    return max(1, min(wanted, room // each) // STRIP) * STRIP
