"""Work as spans: runs of elements that are contiguous in every checkpoint and output.

The fold is elementwise, so tensors that are neighbours in every file are one span, and a hundred
thousand small tensors cost what one large tensor costs.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import compress, count, pairwise
from operator import add, attrgetter, ne
from typing import NamedTuple

from ckpt_ema.containers.specs import (
    COMPLEX,
    DTYPE_BITS,
    Role,
    Specs,
    TensorSpec,
    as_real,
    packed_bytes,
)
from ckpt_ema.targets.target import OutputFile, OutputTensor


class Place(NamedTuple):
    """Where a span goes in one output; tied tensors give it several."""

    average: int
    file: int  # counted through the files of all averages
    offset: int  # in bytes
    dtype: str
    is_copy: bool = False  # of a tensor that is written elsewhere too


class Span(NamedTuple):
    """A run of elements of one dtype in each file that takes part."""

    length: int  # elements if averaged, bytes if kept
    kept_from: int | None  # the checkpoint whose bytes are kept; None if it is averaged
    places: tuple[Place, ...]
    sources: tuple[TensorSpec, ...]  # of the first tensor, for each layout; that of `kept_from`

    @property
    def averaged(self) -> bool:
        """Whether all checkpoints are read and folded."""
        return self.kept_from is None

    @property
    def dtypes(self) -> dict[int, str]:
        """The dtype of each average's output."""
        return {place.average: place.dtype for place in self.places}

    def bytes_read(self, layout_of: Sequence[int], length: int | None = None) -> int:
        """Return the bytes to read for all or `length` of its units; `layout_of` as in `Work`."""
        length = self.length if length is None else length
        if not self.averaged:
            return length
        bits = [DTYPE_BITS[source.dtype] for source in self.sources]
        return length * sum(bits[layout] for layout in layout_of) // 8

    def requests(self, layout_of: Sequence[int], tile: int, most_bytes: int) -> int:
        """Return how many reads of at most `most_bytes` fetch all tiles of `tile` units."""
        bits = [8]
        if self.averaged:
            bits = [DTYPE_BITS[self.sources[layout].dtype] for layout in layout_of]
        whole, rest = divmod(self.length, tile)
        each = (whole * -(-tile * one // 8 // most_bytes) for one in bits)
        last = (-(-rest * one // 8 // most_bytes) for one in bits)
        return sum(each) + sum(last)

    def bytes_written(self, length: int) -> int:
        """Return the bytes to write for `length` of its units."""
        if not self.averaged:
            return length * len(self.places)
        return length * sum(DTYPE_BITS[place.dtype] for place in self.places) // 8

    @property
    def in_pieces(self) -> bool:
        """Whether some checkpoint has it in pieces; such a span is one tensor."""
        return any(source.pieces for source in self.sources)


class Work(NamedTuple):
    """All spans of a plan; checkpoint j has its tensors where layout `layout_of[j]` says."""

    spans: tuple[Span, ...]
    layout_of: tuple[int, ...]

    def dtypes(self) -> set[str]:
        """Return every dtype that is averaged, in a checkpoint or in an output."""
        spans = [span for span in self.spans if span.averaged]
        read = {source.dtype for span in spans for source in span.sources}
        return read | {place.dtype for span in spans for place in span.places}

    @property
    def widest_bytes(self) -> int:
        """The bytes of an element of the widest dtype that is averaged."""
        return max((DTYPE_BITS[dtype] // 8 for dtype in self.dtypes()), default=8)


def make_work(
    checkpoints: Sequence[Specs], outputs: Sequence[tuple[int, Sequence[OutputFile]]]
) -> Work:
    """Join the tensors of the outputs to spans, in the order of the first output's bytes.

    `outputs` has, for each average, the number of its newest checkpoint and its files.
    """
    by_identity = {id(specs.tensors): specs for specs in checkpoints}
    number_of = {identity: number for number, identity in enumerate(by_identity)}
    numbers = count()
    laid_out = [
        _laid_out(zip(files, numbers), [*by_identity.values()], checkpoints[newest])  # noqa: B905
        for newest, files in outputs
    ]
    # What begins a span in one output does so in all, and is folded for all in one pass.
    firsts = {key for one in laid_out for key in _firsts(one)}
    spans: dict[object, Span] = {}
    for average, (newest, _) in enumerate(outputs):
        dtypes: dict[object, list[str]] = {}  # in which this average has the same elements
        for span in _spans(laid_out[average], average, newest, firsts):
            elements = (span.kept_from, span.sources, span.length)
            known = dtypes.setdefault(elements, [])
            if span.places[0].dtype not in known:
                known.append(span.places[0].dtype)
            key = (elements, known.index(span.places[0].dtype))
            same = spans.setdefault(key, span)
            if same is not span:
                # Monitors look at the first place, and do not look at copies.
                places = sorted(same.places + span.places, key=attrgetter("average", "is_copy"))
                spans[key] = same._replace(places=tuple(places))
    layout_of = tuple(number_of[id(specs.tensors)] for specs in checkpoints)
    return Work(tuple(spans.values()), layout_of)


class _LaidOut(NamedTuple):
    """The tensors of one average that have elements, in the order of their bytes."""

    files: list[int]  # of each, counted through the files of all averages
    tensors: list[OutputTensor]
    sources: list[list[TensorSpec]]  # by layout; what is kept has the newest's in all of them


def _laid_out(
    files: Iterable[tuple[OutputFile, int]], layouts: Sequence[Specs], newest: Specs
) -> _LaidOut:
    filled = [(n, *one) for file, n in files for one in _filled(file)]
    sources = []
    for specs in layouts:
        tensors = (
            copied or (specs if one.role is Role.AVERAGED else newest).tensors[one.key]
            for _, one, copied in filled
        )
        regions = [one.region for _, one, _ in filled]
        pairs = zip(regions, tensors, strict=True)
        sources.append([region.of(tensor) if region else tensor for region, tensor in pairs])
    return _LaidOut([number for number, *_ in filled], [one for _, one, _ in filled], sources)


def _filled(file: OutputFile) -> Iterable[tuple[OutputTensor, TensorSpec | None]]:
    """Return the tensors of a file that have elements, and what is copied as tensors of bytes."""
    filled = [(one, None) for one in file.tensors if 0 not in one.shape]
    if not file.copied:
        return filled
    copied = []
    for offset, size_bytes, number in file.copied:
        one = OutputTensor("", "", "U8", (size_bytes,), offset, Role.KEPT)
        copied.append((one, TensorSpec("U8", (size_bytes,), number, offset)))
    return sorted([*filled, *copied], key=lambda row: row[0].offset)


def _firsts(one: _LaidOut) -> Iterator[str]:
    """Yield the keys of tensors that somewhere do not start where the previous one ends.

    Tensors in pieces, and those that share their bytes, always start anew.
    """
    roles = [tensor.role for tensor in one.tensors]
    jumps = {0, *_changes(roles), *_changes(one.files), *_jumps(one.tensors, roles)}
    jumps.update(_changes([tensor.is_copy for tensor in one.tensors]))
    alone = set[int]()
    for column in one.sources:
        jumps.update(_jumps(column, roles), _changes([source.file for source in column]))
        alone.update(number for number, source in enumerate(column) if source.pieces)
    if all(len({*column}) < len(column) for column in one.sources):
        rows = [*zip(*one.sources, strict=True)]
        counts = Counter(rows)
        alone.update(number for number, row in enumerate(rows) if counts[row] > 1)
    jumps |= alone | {number + 1 for number in alone}
    return (tensor.key for number, tensor in enumerate(one.tensors) if number in jumps)


def _jumps(
    column: Sequence[OutputTensor] | Sequence[TensorSpec], roles: Sequence[Role]
) -> Iterator[int]:
    """Yield the indexes of items that do not start where the previous one ends.

    Averaged items of another dtype than the previous one count too: they are folded differently.
    """
    dtypes, offsets = [one.dtype for one in column], [one.offset for one in column]
    kinds = [*zip(dtypes, (one.shape for one in column), strict=True)]
    bytes_of = {kind: packed_bytes(*kind) for kind in {*kinds}}
    ends = map(add, offsets, map(bytes_of.__getitem__, kinds))
    yield from compress(count(1), map(ne, ends, offsets[1:]))
    for number in _changes(dtypes):
        one, other = (COMPLEX.get(dtype, dtype) for dtype in dtypes[number - 1 : number + 1])
        if one != other and roles[number] is Role.AVERAGED:
            yield number


def _changes(values: Sequence[object]) -> Iterator[int]:
    """Yield the indexes of values that differ from the previous one."""
    return compress(count(1), map(ne, values, values[1:]))


def _spans(one: _LaidOut, average: int, newest: int, firsts: Container[str]) -> Iterator[Span]:
    """Yield a span for each of the `firsts` of one average, with all that follow it."""
    starts = [number for number, tensor in enumerate(one.tensors) if tensor.key in firsts]
    for start, end in pairwise([*starts, len(one.tensors)]):
        tensor, last = one.tensors[start], one.tensors[end - 1]
        size_bytes = last.offset + last.size_bytes - tensor.offset
        sources = tuple(column[start] for column in one.sources)
        place = Place(average, one.files[start], tensor.offset, tensor.dtype, tensor.is_copy)
        if tensor.averaged:
            place = place._replace(dtype=COMPLEX.get(tensor.dtype, tensor.dtype))
            length = size_bytes * 8 // DTYPE_BITS[place.dtype]
            yield Span(length, None, (place,), tuple(map(as_real, sources)))
        else:
            yield Span(size_bytes, newest, (place,), sources[:1])
