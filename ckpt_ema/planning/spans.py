"""The work as spans: runs of elements that lie one after the other in every checkpoint and output.

The fold is elementwise, so where one tensor ends and the next begins does not matter to it.
Neighbours that are neighbours in every file are one span, and a hundred thousand small tensors cost
what one large tensor costs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ckpt_ema.formats.specs import DTYPE_BITS, Specs, TensorSpec
from ckpt_ema.planning.outputs import OutputFile, OutputTensor


class Span(NamedTuple):
    """A run of elements of one dtype in each file that takes part."""

    length: int  # elements if averaged, bytes if kept
    averaged: bool
    dtype: str  # of the output
    targets: tuple[tuple[int, int], ...]  # (output file, offset); several for tied tensors
    sources: tuple[TensorSpec, ...]  # of the first tensor, for each layout; the newest's if kept

    @property
    def in_pieces(self) -> bool:
        """Whether some checkpoint has it in pieces; such a span is one tensor."""
        return any(source.pieces for source in self.sources)


class Work(NamedTuple):
    """All spans of an average; checkpoint j has its tensors where layout `layout_of[j]` says."""

    spans: tuple[Span, ...]
    layout_of: tuple[int, ...]

    def dtypes(self) -> set[str]:
        """Every dtype that is averaged, in a checkpoint or in the output."""
        spans = [span for span in self.spans if span.averaged]
        read = {source.dtype for span in spans for source in span.sources}
        return read | {span.dtype for span in spans}

    def bytes_read(self) -> int:
        """Bytes of tensor data that the whole average reads, each once."""
        total = 0
        for span in self.spans:
            if span.averaged:
                bits = [DTYPE_BITS[source.dtype] for source in span.sources]
                total += span.length * sum(bits[layout] for layout in self.layout_of) // 8
            else:
                total += span.length
        return total


def make_work(checkpoints: Sequence[Specs], files: Sequence[OutputFile]) -> Work:
    """Join the output's tensors to spans, in the order of the output's bytes."""
    by_identity = {id(specs.tensors): specs for specs in checkpoints}
    number_of = {identity: number for number, identity in enumerate(by_identity)}
    layouts = list(by_identity.values())
    layout_of = [number_of[id(specs.tensors)] for specs in checkpoints]
    newest = checkpoints[-1]
    # Tied tensors share their bytes in every checkpoint: they are one span with several targets.
    untied: dict[tuple[object, ...], Span] = {}
    for number, file in enumerate(files):
        for tensor in sorted(file.tensors, key=lambda tensor: tensor.offset):
            if not math.prod(tensor.shape):
                continue
            span = _span(tensor, number, layouts if tensor.averaged else [newest])
            place = (tensor.averaged, *span.sources)
            twin = untied.get(place)
            untied[place] = twin._replace(targets=twin.targets + span.targets) if twin else span
    spans: list[Span] = []
    for span in untied.values():
        if spans and _follows(spans[-1], span):
            spans[-1] = spans[-1]._replace(length=spans[-1].length + span.length)
        else:
            spans.append(span)
    return Work(tuple(spans), tuple(layout_of))


def _span(tensor: OutputTensor, file: int, layouts: Sequence[Specs]) -> Span:
    sources = tuple(layout.tensors[tensor.key] for layout in layouts)
    count = math.prod(tensor.shape) if tensor.averaged else sources[0].size_bytes
    return Span(count, tensor.averaged, tensor.dtype, ((file, tensor.offset),), sources)


def _follows(span: Span, other: Span) -> bool:
    """Whether `other` begins where `span` ends, in every checkpoint and in the output."""
    if span.averaged != other.averaged or len(span.targets) + len(other.targets) > 2:
        return False
    if span.in_pieces or other.in_pieces or (span.averaged and span.dtype != other.dtype):
        return False
    ends = [(span.targets[0], _bytes(span, span.dtype), other.targets[0])]
    for source, following in zip(span.sources, other.sources, strict=True):
        if span.averaged and source.dtype != following.dtype:
            return False
        place = (source.file, source.offset)
        ends.append((place, _bytes(span, source.dtype), (following.file, following.offset)))
    return all((file, offset + size) == begin for (file, offset), size, begin in ends)


def _bytes(span: Span, dtype: str) -> int:
    return span.length * DTYPE_BITS[dtype] // 8 if span.averaged else span.length
