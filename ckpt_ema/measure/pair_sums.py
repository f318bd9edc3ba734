"""The sums of each tensor that two checkpoints have, read side by side by several threads."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import DTYPE_BITS, TensorSpec
from ckpt_ema.fold.native import compiled
from ckpt_ema.fold.passing import Needs, Pass, StoppedError, run_threads
from ckpt_ema.measure.pairs import Pair
from ckpt_ema.measure.summing import summing
from ckpt_ema.measure.sums import STRIP, Block, Row, merged
from ckpt_ema.storage import Storage
from ckpt_ema.storage.protocol import Range

_PART_BYTES = 1 << 21  # of a tensor of one checkpoint
_ITEM_BYTES = 1 << 22  # of small tensors that are taken together, both sides
_AHEAD_BYTES = 1 << 26  # fetched ahead from a remote storage
_ALIGNED = 64  # bytes: where the elements of the other side begin
_NOTHING = Row(0, 0, 0, 0, 0, 0, 0)


class Difference(NamedTuple):
    """What was found in a tensor, or in a part of it."""

    own: Row  # of the first checkpoint
    other: Row  # of the second: its changes are from the first
    different: int | None  # elements with other bytes; None for another dtype


class Part(NamedTuple):
    """A part of a tensor: numbers if it has any, else bytes."""

    number: int  # of its pair
    start: int
    length: int


class Side(NamedTuple):
    """One of the two checkpoints; its reader has no other."""

    storage: Storage
    reader: Reader


def differences(
    pairs: Sequence[Pair],
    sides: Sequence[Side],
    threads: int,
    progress: Callable[[int, int], None],
) -> list[Difference]:
    """Return the difference of each pair; `progress` is called with bytes read and to be read."""
    total = sum(side.size_bytes for pair in pairs for side in (pair.own, pair.other))
    job = _Job(pairs, sides)
    readers = [side.reader for side in sides]
    run_threads(job.items, job.worker, threads, readers, lambda read: progress(read, total))
    of_pair: list[list[Difference]] = [[] for _ in pairs]
    for number, found in job.found:
        of_pair[number].append(found)
    return [joined(found) for found in of_pair]


def joined(found: Sequence[Difference]) -> Difference:
    """Return the difference of all of some parts, whatever their order."""
    if len(found) == 1:  # as of nearly all tensors, of which there may be many
        return found[0]
    counts = [one.different for one in found if one.different is not None]
    is_counted = len(counts) == len(found)
    rows = (_sum([one.own for one in found]), _sum([one.other for one in found]))
    return Difference(*rows, sum(counts) if is_counted else None)


def _sum(rows: Sequence[Row]) -> Row:
    if not rows:
        return _NOTHING
    total = Row(*map(math.fsum, zip(*rows, strict=True)))
    return total._replace(largest=max(row.largest for row in rows))


class _Job:
    """What the threads share."""

    def __init__(self, pairs: Sequence[Pair], sides: Sequence[Side]) -> None:
        self.pairs, self.sides = pairs, sides
        self.found: list[tuple[int, Difference]] = []
        is_remote = any(side.storage.is_remote for side in sides)
        self.items = Pass(_items(pairs), self._needs if is_remote else None, _AHEAD_BYTES)

    def worker(self) -> Callable[[Sequence[Part]], None]:
        """Return what compares the parts of an item, with memory of its own."""
        content = bytearray()

        def compare(parts: Sequence[Part]) -> None:
            nonlocal content
            for part in parts:
                if self.items.stop[0]:
                    raise StoppedError
                pair = self.pairs[part.number]
                places = [_bytes_of(part, pair, tensor) for tensor in pair.sides]
                begin = -(-places[0][1] // _ALIGNED) * _ALIGNED  # of the other side
                if len(content) < begin + places[1][1]:
                    content = bytearray(begin + places[1][1])
                found = self._compared(part, places, content, begin)
                self.found.append((part.number, found))

        return compare

    def _compared(
        self, part: Part, places: Sequence[tuple[int, int]], content: bytearray, begin: int
    ) -> Difference:
        """Read a part of both sides, from these places and of these sizes, and compare them."""
        pair, view = self.pairs[part.number], memoryview(content)
        rows = zip(self.sides, pair.sides, places, (0, begin), strict=True)
        for side, tensor, (start, size), at in rows:
            side.reader.read_into(0, tensor, start, view[at : at + size])
            self.items.count_read(size)
        different = None
        if pair.own.dtype == pair.other.dtype:
            different = differing(content, begin, places[0][1] // pair.width, pair.width)
        if not pair.has_numbers:
            return Difference(_NOTHING, _NOTHING, different)
        sums = summing((1.0, 0.0))
        dtypes = [(tensor.dtype, at) for tensor, at in zip(pair.sides, (0, begin), strict=True)]
        sums.add(Block(content, dtypes, part.length))
        own, other = merged([sums], 2).rows
        return Difference(own, other, different)

    def _needs(self, parts: Sequence[Part]) -> Needs:
        needs = []
        for number, side in enumerate(self.sides):
            ranges: list[Range] = []
            for part in parts if side.storage.is_remote else ():
                pair = self.pairs[part.number]
                tensor = pair.sides[number]
                ranges += side.reader.ranges(0, tensor, *_bytes_of(part, pair, tensor))
            needs.append((side.reader, ranges))
        return needs


def _bytes_of(part: Part, pair: Pair, tensor: TensorSpec) -> tuple[int, int]:
    """Return where a part begins in a tensor, and its size, in bytes."""
    width = DTYPE_BITS[tensor.dtype] // 8 if pair.has_numbers else 1
    return part.start * width, part.length * width


def _items(pairs: Sequence[Pair]) -> Iterator[list[Part]]:
    """Yield the parts of all tensors, small ones together."""
    item: list[Part] = []
    held = 0
    for number, pair in enumerate(pairs):
        real = pair.sides[0]
        width = DTYPE_BITS[real.dtype] // 8 if pair.has_numbers else 1
        most = _PART_BYTES // max(width, 1) // STRIP * STRIP
        length = real.size_bytes // width
        for start in range(0, length, most):
            part = Part(number, start, min(most, length - start))
            item.append(part)
            held += 2 * part.length * width
            if held >= _ITEM_BYTES:
                yield item
                item, held = [], 0
    if item:
        yield item


def differing(content: bytearray, begin: int, count: int, width: int) -> int:
    """Return how many of the first `count` elements differ from those at `begin`, in any bit."""
    if module := compiled():
        found: int = module.differing(content, begin, count, width)
        return found
    view, size = memoryview(content), count * width
    one, other = view[:size].tobytes(), view[begin : begin + size].tobytes()
    if one == other:
        return 0
    starts = range(0, size, width)
    return sum(one[start : start + width] != other[start : start + width] for start in starts)
