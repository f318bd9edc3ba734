"""The work in tiles, numbered in the order of the output's bytes: a share is a range of a file."""

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from ckpt_ema.containers.specs import DTYPE_BITS
from ckpt_ema.errors import Code, OptionError
from ckpt_ema.planning.plan import Plan
from ckpt_ema.planning.sizing import KEPT_BYTES
from ckpt_ema.planning.work import Span
from ckpt_ema.targets.target import OutputTensor


class Tile(NamedTuple):
    """A range of a span: elements if it is averaged, bytes if it is kept."""

    numbers: range  # one, or those of the neighbours that it joins
    span: Span
    start: int
    length: int


class Share(NamedTuple):
    """One of several shares of the work, counted from 1."""

    part: int = 1
    of: int = 1


WHOLE = Share()


def share_from(text: str) -> Share:
    """Parse a share such as "3/64"; raises `OptionError` for anything else.

    >>> share_from("3/64")
    Share(part=3, of=64)
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    share = Share(*map(int, match.groups())) if match else Share(0)
    if not 1 <= share.part <= share.of:
        message = f"--part is {text!r}; it must be 1/64 for the first of 64 parts, up to 64/64."
        raise OptionError(message, code=Code.INVALID_OPTION)
    return share


def tiles(plan: Plan, share: Share = WHOLE) -> Iterator[Tile]:
    """Yield the tiles of a share, in order; shares have equal bytes to within a tile."""
    # The bits read and written for each unit of a span's length are the bytes of eight.
    costs = [s.bytes_read(plan.work.layout_of, 8) + s.bytes_written(8) for s in plan.work.spans]
    total = sum(cost * span.length for cost, span in zip(costs, plan.work.spans, strict=True))
    number, before = 0, 0
    for span, cost in zip(plan.work.spans, costs, strict=True):
        limit = plan.tile_elements * (1 if span.averaged else KEPT_BYTES)
        for start in range(0, span.length, limit):
            length = min(limit, span.length - start)
            if before * share.of // total == share.part - 1:
                yield Tile(range(number, number + 1), span, start, length)
            number += 1
            before += cost * length


def joined(tiles: Iterable[Tile], most: int) -> Iterator[Tile]:
    """Yield the tiles, averaged neighbours joined to one of at most `most` elements."""
    wide: Tile | None = None
    for tile in tiles:
        follows = wide and wide.span is tile.span and wide.start + wide.length == tile.start
        if wide and follows and tile.span.averaged and wide.length + tile.length <= most:
            numbers = range(wide.numbers.start, tile.numbers.stop)
            wide = Tile(numbers, tile.span, wide.start, wide.length + tile.length)
            continue
        if wide:
            yield wide
        wide = tile
    if wide:
        yield wide


def cut(tile: Tile, most: int) -> Iterator[Tile]:
    """Yield the ranges of a tile, each of at most `most` elements or bytes."""
    for start in range(0, tile.length, most):
        yield tile._replace(start=tile.start + start, length=min(most, tile.length - start))


class Segment(NamedTuple):
    """The part of one tensor that lies in a tile; elements count from the tile's first."""

    tensor: OutputTensor
    start: int
    stop: int
    begins: bool  # the tensor's first element is in the tile
    ends: bool  # and its last one

    @property
    def is_whole(self) -> bool:
        """Whether all of the tensor is in the tile."""
        return self.begins and self.ends and not self.tensor.is_part

    @property
    def is_vector(self) -> bool:
        """Whether the tensor has one axis, but for those of size 1."""
        return is_vector(self.tensor.shape)


# What is known of a segment before it is read; the other flags are in `views`.
IS_VECTOR = 32  # its tensor has one axis
IS_WHOLE = 64  # it is all of its tensor


class TileSegments(Sequence[Segment]):
    """The segments of a tile in order, by the names in its first average's output."""

    def __init__(self, file: "_File", begin: int, end: int, first: int, tile: Tile) -> None:
        """Tensors from number `begin` to `end` overlap a tile that begins at bit `first`."""
        self._tensors, self._kinds = file.tensors[begin:end], file.kinds[begin:end]
        self._first, self._length = first, tile.length
        self._bits = DTYPE_BITS[tile.span.places[0].dtype]

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, number: Any) -> Any:
        tensor = self._tensors[number]
        start = self._start(tensor)
        stop = start + tensor.size_bytes * 8 // self._bits
        inside = max(start, 0), min(stop, self._length)
        return Segment(tensor, *inside, start >= 0, stop <= self._length)

    def names(self) -> Iterator[str]:
        """Yield the names of their tensors."""
        return (tensor.name for tensor in self._tensors)

    def bounds(self) -> "array[int]":
        """Return where each segment begins, and the end."""
        bounds = array("q", map(self._start, self._tensors))
        bounds[0] = 0
        bounds.append(self._length)
        return bounds

    def kinds(self) -> bytearray:
        """Return IS_VECTOR and IS_WHOLE of each segment."""
        kinds = bytearray(self._kinds)
        for number in (0, -1):
            if not self[number].is_whole:
                kinds[number] &= ~IS_WHOLE
        return kinds

    def _start(self, tensor: OutputTensor) -> int:
        return (tensor.offset * 8 - self._first) // self._bits


class Segments:
    """Which tensors the tiles of a plan hold."""

    def __init__(self, plan: Plan) -> None:
        files = [file for one in plan.foldings for file in one.files]
        self._files = [_File(file.tensors) for file in files]

    def of(self, tile: Tile) -> TileSegments:
        """Return the segments of a tile."""
        place = tile.span.places[0]
        file, bits = self._files[place.file], DTYPE_BITS[place.dtype]
        first = place.offset * 8 + tile.start * bits  # in bits
        begin = bisect_right(file.offsets, first // 8) - 1
        end = bisect_left(file.offsets, (first + tile.length * bits) // 8)
        return TileSegments(file, begin, end, first, tile)


class _File:
    """The tensors of an output file that are not empty, in the order of their bytes."""

    def __init__(self, tensors: Iterable[OutputTensor]) -> None:
        filled = (tensor for tensor in tensors if 0 not in tensor.shape)
        self.tensors = sorted(filled, key=attrgetter("offset"))
        self.offsets = [tensor.offset for tensor in self.tensors]
        # Those at a tile's ends may be in part outside; all between are whole.
        self.kinds = bytes(
            IS_VECTOR * is_vector(one.shape) | IS_WHOLE * (not one.is_part) for one in self.tensors
        )


def is_vector(shape: Sequence[int]) -> bool:
    """Return whether a tensor has one axis, but for those of size 1."""
    return sum(size > 1 for size in shape) == 1 if len(shape) != 1 else shape[0] > 1
