"""Work as spans: runs of elements that are contiguous in every checkpoint and output.

The fold is elementwise, so tensors that are neighbours in every file are one span, and a hundred
thousand small tensors cost what one large tensor costs.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from ckpt_ema.containers.specs import COMPLEX, DTYPE_BITS, Specs, TensorSpec, as_real
from ckpt_ema.targets.target import OutputFile


class Place(NamedTuple):
    """Where a span goes in one output; tied tensors give it several."""

    average: int
    file: int  # counted through the files of all averages
    offset: int  # in bytes
    dtype: str


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
    layouts = list(by_identity.values())
    # Tied tensors share their bytes in every checkpoint: they are one span with several places.
    untied: dict[object, Span] = {}
    files = [(j, newest, file) for j, (newest, files) in enumerate(outputs) for file in files]
    for number, (average, newest, file) in enumerate(files):
        for tensor in sorted(file.tensors, key=attrgetter("offset")):
            kept_from = None if tensor.averaged else newest
            specs = layouts if tensor.averaged else [checkpoints[newest]]
            sources = tuple([one.tensors[tensor.key] for one in specs])
            elements, dtype = math.prod(tensor.shape), tensor.dtype
            if tensor.averaged and dtype in COMPLEX:
                elements, dtype = 2 * elements, COMPLEX[dtype]
                sources = tuple(map(as_real, sources))
            place = Place(average, number, tensor.offset, dtype)
            length = elements if tensor.averaged else sources[0].size_bytes
            first = Span(length, kept_from, (place,), sources)
            span = untied.setdefault((kept_from, sources), first) if elements else first
            if span is not first:
                untied[kept_from, sources] = span._replace(places=(*span.places, place))
    layout_of = tuple(number_of[id(specs.tensors)] for specs in checkpoints)
    return Work(tuple(_joined(untied.values())), layout_of)


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    """Yield the spans, those that follow each other as one."""
    joined = last = None
    was_alone = False
    for span in spans:
        # Tied names and pieces are never joined.
        has_tied = len(span.places) > 1 and len(span.dtypes) < len(span.places)
        is_alone = has_tied or span.in_pieces
        if joined and last and not (is_alone or was_alone) and _follows(last, span):
            joined = joined._replace(length=joined.length + span.length)
        else:
            if joined:
                yield joined
            joined = span
        last, was_alone = span, is_alone
    if joined:
        yield joined


def _follows(span: Span, other: Span) -> bool:
    """Return whether `other` begins where `span` ends, in every checkpoint and in every output."""
    if span.kept_from != other.kept_from or len(span.places) != len(other.places):
        return False
    averaged, length = span.averaged, span.length
    before: tuple[Place | TensorSpec, ...] = span.places + span.sources
    after: tuple[Place | TensorSpec, ...] = other.places + other.sources
    for one, next_one in zip(before, after, strict=True):
        size_bytes = length * DTYPE_BITS[one.dtype] // 8 if averaged else length
        if one.file != next_one.file or one.offset + size_bytes != next_one.offset:
            return False
        if averaged and one.dtype != next_one.dtype:
            return False
    return True
