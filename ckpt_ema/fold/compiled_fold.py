"""Folding a tile by the compiled module: what it needs is packed into arrays of numbers.

One call reads a tile of as many checkpoints as there may be open files, folds them, and writes the
averages. `native/fold.c` has the same structures, under the same names.
"""

import math
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from types import ModuleType

from ckpt_ema.containers.gather import boxes, has_some
from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import DTYPE_BITS, Piece, TensorSpec
from ckpt_ema.fold.native import DTYPES
from ckpt_ema.fold.passing import StoppedError
from ckpt_ema.fold.tile_fold import Folded, Use, uses
from ckpt_ema.fold.tiles import IS_VECTOR, Tile, TileSegments
from ckpt_ema.fold.views import UNIT, Seen, Sink
from ckpt_ema.planning.plan import Plan
from ckpt_ema.planning.sizing import element_bytes
from ckpt_ema.planning.work import Span

_BLOCK_BYTES = 1 << 16  # in memory of each checkpoint: a group of them stays in a core's cache
_STRIP = 256  # elements; a block is whole strips
_TILE_ELEMENTS = 1 << 20  # of one call: larger ones take no more memory, and fewer calls
_TILE_BYTES = 1 << 26  # read in one call, so that progress is shown and monitors see values soon
_HEAT = 3  # numbers that threads share of each file
_READ, _WRITE, _STOPPED = 1, 2, 3  # what ended a call
_FIRST, _SKIP, _COPY, _FROM_SHADOW, _FROM_VALUE = range(5)  # kinds of use

File = tuple[int, int]  # a checkpoint, and the number of one of its files


class Kernel:
    """What the threads of a job share."""

    def __init__(
        self, module: ModuleType, plan: Plan, reader: Reader, sink: Sink, stop: bytearray
    ) -> None:
        """For a plan; a call ends soon after `stop[0]` is set."""
        self.module, self.plan, self.reader, self.sink, self.stop = module, plan, reader, sink, stop
        self.checkpoints, self.averages = len(plan.inputs), len(plan.foldings)
        self.job = _packed_job(plan)
        files = [len(checkpoint.specs.files) for checkpoint in plan.inputs]
        self._first_file = [0, *accumulate(files)]  # of each checkpoint, counted through all
        self.heat = bytearray(8 * _HEAT * max(1, sum(files)))
        self.block = _block_elements(plan, module)
        self.most_files = max(1, reader.most_open // plan.threads)  # in one call

    def number_of(self, file: File) -> int:
        """Return the number of a file, counted through all checkpoints."""
        return self._first_file[file[0]] + file[1]


class CompiledFold:
    """A `TileFold` for one thread."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel, self._plan = kernel, kernel.plan
        sizes = (kernel.checkpoints, kernel.averages, kernel.block)
        self._scratch = bytearray(kernel.module.scratch_bytes(*sizes))
        # The last ones, and the span, start and length that they are for.
        self._calls: tuple[tuple[Span, int, int] | None, list[_Call]] = (None, [])

    def most_elements(self, tile: Tile) -> int:
        """See `TileFold.most_elements`."""
        kernel, plan = self._kernel, self._plan
        most = plan.tile_elements
        if not plan.engine.tile_size:
            bytes_each = max(1, tile.span.bytes_read(plan.work.layout_of, 1))
            most = max(most, min(_TILE_ELEMENTS, _TILE_BYTES // bytes_each))
        most = min(most, tile.length)
        if len(self._calls_of(tile._replace(length=most))) > 1:
            most = min(most, kernel.block)  # between calls, the shadow of one block is kept
        while most > 1 and self._most_files(tile._replace(length=most)) > kernel.most_files:
            most //= 2  # fewer elements lie in fewer files
        return most

    def _most_files(self, tile: Tile) -> int:
        return max(len(call.files) for call in self._calls_of(tile))

    def fold(self, tile: Tile, segments: TileSegments, *, hashes: bool) -> Folded:
        """See `TileFold.fold`."""
        results = _Results(self._kernel, segments, hashes)
        self._run(tile, segments, results)
        if any(results.nonfinite):
            results = _Results(self._kernel, segments, hashes)
            self._run(tile, segments, results, keeping_infinities=True)
        for place in tile.span.places:  # once, by which time they are what they will be
            width = DTYPE_BITS[place.dtype] // 8
            offset = place.offset + tile.start * width
            self._kernel.sink.written(place.file, offset, tile.length * width)
        return results.folded()

    def _run(
        self,
        tile: Tile,
        segments: TileSegments,
        results: "_Results",
        *,
        keeping_infinities: bool = False,
    ) -> None:
        kernel, span = self._kernel, tile.span
        bounds = segments.bounds().tobytes()
        how = (kernel.block, kernel.reader.ahead_bytes, keeping_infinities)
        with kernel.sink.descriptors(_outputs(span)) as outputs:
            for call in self._calls_of(tile):
                with kernel.reader.descriptors(call.files) as descriptors:
                    files = zip(descriptors, map(kernel.number_of, call.files), strict=True)
                    what, number, code, offset = kernel.module.fold(
                        kernel.job,
                        call.span,
                        _packed(tile.start, tile.length, call.first, call.count, *how),
                        bounds,
                        _packed(*chain.from_iterable(files)),
                        _packed(*outputs),
                        kernel.heat,
                        *results.arrays(),
                        kernel.stop,
                        self._scratch,
                    )
                if what == _STOPPED:
                    raise StoppedError
                if what == _READ:
                    raise kernel.reader.failure(call.files[number], code, offset)
                if what == _WRITE:
                    raise OSError(code, os.strerror(code))

    def _calls_of(self, tile: Tile) -> "list[_Call]":
        """Return the calls for a tile; they are the same for all tiles of contiguous tensors."""
        of = (tile.span, tile.start, tile.length) if tile.span.in_pieces else (tile.span, 0, 0)
        if self._calls[0] != of:
            self._calls = (of, list(_calls(self._kernel, tile)))
        return self._calls[1]


class _Results:
    """What the module fills in."""

    def __init__(self, kernel: Kernel, segments: TileSegments, hashes: bool) -> None:
        # A vector may have norm 1 until some checkpoint shows otherwise.
        self.flags = segments.kinds().translate(_AT_FIRST)
        self.ends = bytearray(b"\xff" * 8 * kernel.checkpoints)
        self.hashes = bytearray(8 * kernel.checkpoints * hashes)
        counted = kernel.checkpoints + kernel.averages
        self.sums = bytearray(8 * counted * kernel.plan.keeps_state)
        self.problems = bytearray(b"\xff" * 8 * kernel.averages)
        self.nonfinite = bytearray(kernel.averages)

    def arrays(self) -> tuple[bytearray, ...]:
        """Return them in the order of the module's arguments."""
        return self.flags, self.ends, self.hashes, self.sums, self.problems, self.nonfinite

    def folded(self) -> Folded:
        """Return what was found."""
        ends, hashes, problems = (
            memoryview(one).cast("q").tolist() for one in (self.ends, self.hashes, self.problems)
        )
        found = {average: first for average, first in enumerate(problems) if first >= 0}
        sums = memoryview(self.sums).cast("Q").tolist()
        return Folded(Seen(self.flags, ends, hashes, sums), found)


_AT_FIRST = bytes(flag | UNIT * bool(flag & IS_VECTOR) for flag in range(256))


class _Call:
    """The checkpoints of one call, the span as packed for it, and the files that it reads."""

    def __init__(self, first: int, count: int, span: bytes, files: Sequence[File]) -> None:
        self.first, self.count, self.span, self.files = first, count, span, files


def _calls(kernel: Kernel, tile: Tile) -> Iterator[_Call]:
    """Yield the calls for a tile; each reads as many checkpoints as open files allow, or one."""
    span, layout_of = tile.span, kernel.plan.work.layout_of
    sources = [_without_far_pieces(span.sources[layout], tile) for layout in layout_of]
    first, files = 0, dict[File, int]()
    for checkpoint, source in enumerate(sources):
        own = {(checkpoint, file) for file in _files_of(source)}
        if files and len(files) + len(own) > kernel.most_files:
            packed = _packed_span(kernel, span, sources, files)
            yield _Call(first, checkpoint - first, packed, list(files))
            first, files = checkpoint, {}
        for one in sorted(own):
            files[one] = len(files)
    packed = _packed_span(kernel, span, sources, files)
    yield _Call(first, len(sources) - first, packed, list(files))


def _files_of(source: TensorSpec) -> set[int]:
    return {piece.file for piece in source.pieces} or {source.file}


def _without_far_pieces(source: TensorSpec, tile: Tile) -> TensorSpec:
    """Return a tensor without the pieces that have no element of a tile."""
    stop = tile.start + tile.length
    wanted = [*boxes(source.shape, tile.start, stop)] if source.pieces else []
    near = [
        piece
        for piece in source.pieces
        if _is_near(piece, source.shape, tile.start, stop)
        and any(has_some(piece, *box) for box in wanted)
    ]
    return source._replace(pieces=tuple(near))


def _is_near(piece: Piece, shape: Sequence[int], start: int, stop: int) -> bool:
    """Return whether a piece may have some of the elements from `start` to `stop` of a tensor.

    It is quick, and rejects most of many pieces.
    """
    for axis, (begin, size) in enumerate(zip(piece.starts, piece.sizes, strict=True)):
        row = math.prod(shape[axis + 1 :])
        first, last = start // row, (stop - 1) // row
        if begin > last or begin + size <= first:
            return False
        if first != last:
            return True
        start, stop = start - first * row, stop - first * row
    return True


def _packed_span(
    kernel: Kernel, span: Span, sources: Sequence[TensorSpec], files: dict[File, int]
) -> bytes:
    """Pack where the elements of some checkpoints are, those whose files are given."""
    outputs = _outputs(span)
    places = [(p.average, outputs.index(p.file), p.offset) for p in span.places]
    dtypes = [DTYPES.index(span.dtypes[average]) for average in range(kernel.averages)]
    begins, packed = [], list[int]()
    for checkpoint, source in enumerate(sources):
        begins.append(len(packed))
        shape, pieces = source.shape or (1,), source.pieces
        if not pieces:  # contiguous, as the whole span is then
            shape = (span.length,)
            pieces = (Piece(source.file, source.offset, (0,), shape, (1,)),)
        known = [piece for piece in pieces if (checkpoint, piece.file) in files]
        packed += [DTYPES.index(source.dtype), len(shape), len(known), *shape]
        for piece in known:
            scalar = (0, 1, 1)  # start, size and stride of what has no axis
            box = (*piece.starts, *piece.sizes, *piece.strides) or scalar
            packed += [files[checkpoint, piece.file], piece.offset, *box]
    header = (*dtypes, len(places), *chain.from_iterable(places), *begins)
    return _packed(*header, *packed)


def _outputs(span: Span) -> list[int]:
    return sorted({place.file for place in span.places})


def _packed(*numbers: int) -> bytes:
    return array("q", numbers).tobytes()


def _packed_job(plan: Plan) -> bytes:
    """Pack how each checkpoint is used by each average."""
    of_checkpoint = uses(plan)
    newest = [one.newest for one in plan.foldings]
    begins = [0, *accumulate(map(len, of_checkpoint))]
    header = _packed(len(of_checkpoint), len(newest), *newest, *begins)
    packed = [struct.pack("=qqd", *_packed_use(use)) for one in of_checkpoint for use in one]
    return b"".join([header, *packed])


def _packed_use(use: Use) -> tuple[int, int, float]:
    """Return the average, the kind and the weight, which is rounded as torch's lerp rounds it."""
    average, decay = use
    if decay is None:
        return average, _FIRST, 0.0
    if decay in (0.0, 1.0):
        return average, _SKIP if decay else _COPY, 0.0
    if decay > 0.5:
        return average, _FROM_SHADOW, 1.0 - decay
    return average, _FROM_VALUE, 1.0 - (1.0 - decay)


def _block_elements(plan: Plan, module: ModuleType) -> int:
    """Return the elements of a block: what a cache holds, and the memory that the plan allows."""
    sizes = (len(plan.inputs), len(plan.foldings))
    each: int = module.scratch_bytes(*sizes, 1) - module.scratch_bytes(*sizes, 0)
    allowed = plan.tile_elements * element_bytes(plan.engine, plan.work, sizes[1]) // each
    strips = min(allowed, _BLOCK_BYTES // plan.work.widest_bytes) // _STRIP
    return _STRIP * max(1, strips)
