"""Screening, by torch and by the compiled fold, clears no tensor at which a monitor must look."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import FOLDED
from ckpt_ema.fold.compiled_fold import CompiledFold, Kernel
from ckpt_ema.fold.native import compiled
from ckpt_ema.fold.tiles import Segment, Segments, cut, tiles
from ckpt_ema.fold.torch_tiles import TorchTiles
from ckpt_ema.fold.views import (
    EMPTIED,
    FEW_VALUES,
    SHRUNK,
    UNIT,
    Content,
    Seen,
    TileView,
)
from ckpt_ema.planning.plan import Plan
from ckpt_ema.storage.local import Local
from tests.conftest import MakeRun, series
from tests.makers.faulty_storage import FewFiles

NUMBERS = count()
SHAPES = [(), (1,), (2,), (9,), (300,), (1, 500, 1), (40_000,), (70, 100), (300, 300)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Files:
    """A sink of averages: plain files."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        folder.mkdir()
        numbers = {place.file for span in plan.work.spans for place in span.places}
        flags = os.O_RDWR | os.O_CREAT
        self._fds = {number: os.open(folder / str(number), flags) for number in numbers}

    def write(self, file: int, data: memoryview, offset: int) -> None:
        """See `Sink.write`."""
        assert os.pwrite(self._fds[file], data, offset) == len(data)

    @contextmanager
    def descriptors(self, files: Sequence[int]) -> Iterator[list[int]]:
        """See `Sink.descriptors`."""
        yield [self._fds[file] for file in files]

    def written(self, file: int, offset: int, size_bytes: int) -> None:
        """See `Sink.written`."""

    def read_into(self, file: int, view: memoryview, offset: int) -> None:
        """See `Sink.read_into`."""
        assert os.preadv(self._fds[file], [view], offset) == len(view)

    def close(self) -> None:
        """Close them."""
        for fd in self._fds.values():
            os.close(fd)


def noise(steps: int, shape: Sequence[int]) -> torch.Tensor:
    """Values of several steps, of which no two are alike."""
    return torch.randn(steps, *shape, dtype=torch.float64)


def unit(steps: int, shape: Sequence[int]) -> torch.Tensor:
    """Directions."""
    values = noise(steps, shape).reshape(steps, -1)
    return torch.nn.functional.normalize(values).view(steps, *shape)


def cancelling(steps: int, shape: Sequence[int]) -> torch.Tensor:
    """Values whose sign changes with every step."""
    signs = torch.tensor([(-1.0) ** step for step in range(steps)])
    return noise(1, shape) * signs.view(-1, *[1] * len(shape))


def emptied(steps: int, shape: Sequence[int]) -> torch.Tensor:
    """Zeros in the middle."""
    values = noise(steps, shape)
    values[steps // 2] *= 0  # -0.0 among them
    return values


def cut_off(steps: int, shape: Sequence[int]) -> torch.Tensor:
    """Zeros at the end of the last one."""
    values = noise(steps, shape)
    flat = values[-1].view(-1)
    flat[len(flat) // 2 :] = 0
    return values


KINDS = {
    "noise": noise,
    "mask": lambda steps, shape: (noise(steps, shape) > 0).double(),
    "signs": lambda steps, shape: noise(steps, shape).sign(),
    "zeros": lambda steps, shape: noise(steps, shape) * 0.0,
    "unit": unit,
    "cancelling": cancelling,
    "emptied": emptied,
    "cut off": cut_off,
}


def numbers(content: Content) -> torch.Tensor:
    """Elements in float64."""
    return torch.frombuffer(content.data, dtype=getattr(torch, FOLDED[content.dtype])).double()


class Truth:
    """What is in a tile that has been folded, by an oracle in float64."""

    def __init__(self, view: TileView) -> None:
        length, plan = view.tile.length, view.plan
        contents = [view.read_again(n, 0, length) for n in range(len(plan.checkpoints))]
        self.data = [content.data for content in contents]
        self.values = [numbers(content) for content in contents]
        self.averages = [
            numbers(view.read_average(n, 0, length)) for n in range(len(plan.averages))
        ]
        self.newest = [self.values[average.newest] for average in plan.averages]

    def last_nonzero(self) -> list[int]:
        """The last element of each checkpoint of which not all bits are zero."""
        bits = [values.view(torch.int64) for values in self.values]
        return [max(one.nonzero().flatten().tolist(), default=-1) for one in bits]

    def is_emptied(self, one: Segment) -> bool:
        zero = [not values[one.start : one.stop].any() for values in self.values]
        return any(now and not before for before, now in pairwise(zero))

    def has_two_values(self, one: Segment) -> bool:
        return len({*self.values[0][one.start : one.stop].tolist()}) <= 2

    def is_unit(self, one: Segment) -> bool:
        """A vector that has norm 1 in every checkpoint, or a part of one."""
        norms = [float(values[one.start : one.stop].norm()) for values in self.values]
        least = 0.9991 if one.is_whole else 0.0
        return one.is_vector and all(least < norm < 1.0009 for norm in norms)

    def is_shrunk(self, one: Segment) -> bool:
        """No element has half of its newest value, but for zeros: no part has kept its norm."""
        return any(
            bool((average.abs() <= 0.49 * newest.abs())[one.start : one.stop].all())
            for average, newest in zip(self.averages, self.newest, strict=True)
        )


def check(view: TileView, seen: Seen) -> None:
    """Check what was seen in a tile against the truth."""
    truth = Truth(view)
    assert [*seen.last_nonzero] == truth.last_nonzero()
    for (one, mine), (other, theirs) in combinations(zip(seen.hashes, truth.data, strict=True), 2):
        assert (one == other) == (mine == theirs)
    for segment, flags in zip(view.segments, seen.flags, strict=True):
        assert bool(flags & EMPTIED) == truth.is_emptied(segment)
        assert flags & FEW_VALUES or not truth.has_two_values(segment)
        assert flags & UNIT or not truth.is_unit(segment)
        assert flags & SHRUNK or not truth.is_shrunk(segment)


@pytest.fixture(autouse=True)
def thread_setting() -> Iterator[None]:
    """Give back torch's number of threads, which its fold sets for the thread that it is in."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[None, *(module.vectors() if (module := compiled()) else ())])
def vector(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Each vector unit of this machine that the compiled fold can use; None for torch."""
    module = compiled()
    if module and request.param:
        before = module.vector()
        module.use_vector(request.param)
        yield request.param
        module.use_vector(before)
    else:
        yield None


@settings(
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from([*KINDS]), st.sampled_from(SHAPES), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=6,
    ),
    steps=st.integers(2, 11),
    tile_size=st.sampled_from([None, 1000, 50_000]),
    storage=st.sampled_from([Local(), FewFiles()]),
    seed=st.integers(0, 1 << 32),
)
def test_no_tensor_is_cleared_that_is_no_weight(
    make_run: MakeRun,
    vector: str | None,
    kinds: list[tuple[str, tuple[int, ...], torch.dtype]],
    steps: int,
    tile_size: int | None,
    storage: Local,
    seed: int,
) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        tensors = {
            f"{number}": [*KINDS[kind](steps, shape).to(dtype)]
            for number, (kind, shape, dtype) in enumerate(kinds)
        }
    run = make_run(series(steps, **tensors), name=f"run-{next(NUMBERS)}")
    options: dict[str, Any] = {"schedule": "constant", "decay": [0.5, 0.9], "threads": 1}
    plan = ckpt_ema.plan(run, device="cpu", tile_size=tile_size, **options)
    files, stop = Files(run.parent / f"{run.name}-out", plan), bytearray(1)
    with Reader(storage, [(one.folder, one.specs) for one in plan.checkpoints]) as reader:
        fold: Any = TorchTiles(plan, reader, files, stop, "cpu")
        if vector and (module := compiled()):
            fold = CompiledFold(Kernel(module, plan, reader, files, stop))
        for tile in tiles(plan):
            for part in cut(tile, fold.most_elements(tile)):
                segments = Segments(plan).of(part)
                seen, problems = fold.fold(part, segments, hashes=True)
                assert not problems
                check(TileView(plan, part, segments, reader, files), seen)
    files.close()
