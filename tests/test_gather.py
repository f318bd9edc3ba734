"""Tensors in pieces: any range of any view or set of chunks comes out as the tensor has it."""

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_ema.containers.gather import boxes, gather
from ckpt_ema.containers.specs import MOST_READ_PER_WANTED, Piece, TensorSpec, packed_strides

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@settings(deadline=None)
@given(shapes, st.data())
def test_boxes_cover_a_range_in_order_and_are_few(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    total = torch.Size(shape).numel()
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    strides = packed_strides(shape)
    covered = []
    count = 0
    for starts, sizes in boxes(shape, start, stop):
        count += 1
        for index in product(*(range(a, a + n) for a, n in zip(starts, sizes, strict=True))):
            covered += [sum(i * s for i, s in zip(index, strides, strict=True))]
    assert covered == list(range(start, stop))
    assert count <= max(1, 2 * len(shape) - 1)


def cut(
    shape: tuple[int, ...], data: st.DataObject
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A grid of boxes over a shape, as ranks would share it out."""
    edges = []
    for size in shape:
        inner = sorted(data.draw(st.sets(st.integers(1, max(1, size - 1)), max_size=2)))
        edges.append([0, *(edge for edge in inner if edge < size), size])
    ranges = [list(pairwise(edge)) for edge in edges]
    return [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in product(*ranges)]


@settings(max_examples=300, deadline=None)
@given(shapes, st.data())
def test_a_range_of_chunks_is_that_range_of_the_tensor(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    """Each chunk lies in a file of its own, with a layout of its own."""
    tensor = torch.randint(0, 2**15 - 1, shape, dtype=torch.int16)
    files, pieces = [], []
    for number, (starts, sizes) in enumerate(cut(shape, data)):
        chunk = tensor[tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))]
        order = data.draw(st.permutations(range(len(shape))))
        gap = data.draw(st.integers(1, 12))
        stored = torch.zeros([chunk.shape[axis] for axis in order] + [gap], dtype=torch.int16)
        stored[..., 0] = chunk.permute(order)
        by_axis = dict(zip(order, stored.stride(), strict=False))
        strides = tuple(by_axis[axis] for axis in range(len(shape)))
        pieces.append(Piece(number, 2, starts, sizes, strides))
        files.append(b"??" + bytes(stored.untyped_storage()))
    spec = TensorSpec("I16", shape, 0, 2, tuple(pieces))
    start = data.draw(st.integers(0, tensor.numel() - 1))
    count = data.draw(st.integers(1, tensor.numel() - start))
    reads = []

    def read_into(file: int, part: memoryview, offset: int) -> None:
        part[:] = files[file][offset : offset + len(part)]
        reads.append(len(part))

    values = bytearray(count * 2)
    gather(spec, start, memoryview(values), read_into)
    assert bytes(values) == bytes(tensor.flatten()[start : start + count].clone().untyped_storage())
    assert sum(reads) <= MOST_READ_PER_WANTED * count * 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(
    "view",
    [
        lambda memory: memory[:2400].view(40, 60).T,
        lambda memory: memory[:40].view(40, 1).expand(40, 60),
        lambda memory: memory[:1].expand(40, 60),
        lambda memory: memory[:7200].view(40, 180)[:, 20:100],  # long rows with gaps
        lambda memory: memory.view(10, 20, 36).permute(2, 0, 1)[::3, :, ::2],
    ],
)
def test_a_range_of_a_view_is_that_range_whatever_the_width(
    view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    memory = torch.randint(0, 100, (7200,), dtype=dtype)
    tensor = view(memory)
    name = {1: "U8", 2: "I16", 4: "I32", 8: "I64"}[dtype.itemsize]
    offset = int(tensor.storage_offset()) * dtype.itemsize
    starts, shape = (0,) * tensor.ndim, tuple(tensor.shape)
    piece = Piece(0, offset, starts, shape, tensor.stride())
    file = bytes(memory.untyped_storage())

    def read_into(_: int, part: memoryview, offset: int) -> None:
        part[:] = file[offset : offset + len(part)]

    for start, stop in ((0, tensor.numel()), (1, tensor.numel() - 1), (70, 130)):
        values = bytearray((stop - start) * dtype.itemsize)
        gather(TensorSpec(name, shape, 0, offset, (piece,)), start, memoryview(values), read_into)
        assert torch.frombuffer(values, dtype=dtype).equal(tensor.flatten()[start:stop])


def test_gathering_imports_no_torch() -> None:
    code = """
import sys
from ckpt_ema.containers.gather import gather
from ckpt_ema.containers.specs import Piece, TensorSpec
piece = Piece(0, 0, (0, 0), (2, 3), (1, 2))
values = memoryview(bytearray(12))
gather(TensorSpec("I16", (2, 3), 0, 0, (piece,)), 0, values, lambda *_: None)
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
