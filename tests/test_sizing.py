"""How large tiles are and how many threads fold: what is asked for, within a limit of memory."""

import gc
import tracemalloc
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema.containers.reader import Reader
from ckpt_ema.errors import Code, OptionError
from ckpt_ema.fold.compiled_fold import CompiledFold, Kernel
from ckpt_ema.fold.tile_fold import uses
from ckpt_ema.fold.torch_fold import make_fold
from ckpt_ema.fold.views import Sink
from ckpt_ema.options import Engine
from tests.conftest import MakeRun, noise, series

MIB = 1024**2


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("64MiB", 64 * MIB),
        ("64mib", 64 * MIB),
        ("64M", 64 * MIB),
        ("64MB", 64_000_000),
        (" 1.5 GiB ", 1536 * MIB),
        ("2k", 2048),
        ("1TB", 10**12),
        ("5000", 5000),
        ("5000B", 5000),
        (5000, 5000),
        (5000.0, 5000),
        (None, None),
    ],
)
def test_sizes_are_read_as_people_write_them(text: Any, size_bytes: int | None) -> None:
    assert Engine(max_memory=text).max_memory == size_bytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "64iB", "64 MiB each", "-1", "1e6", "0", 0, -5, 2.5, True]
)
def test_what_is_no_size_is_a_usage_error(text: Any) -> None:
    for name in ("max_memory", "tile_size"):
        with pytest.raises(OptionError) as caught:
            Engine(**{name: text})
        assert caught.value.code is Code.INVALID_OPTION


@pytest.mark.parametrize(
    ("dtype", "output", "elements"),
    [
        (torch.float64, "same", 125),
        (torch.float32, "same", 250),
        (torch.bfloat16, "same", 500),
        (torch.bfloat16, "float32", 250),
    ],
)
def test_the_size_of_a_tile_is_that_of_what_is_widest(
    make_run: MakeRun, dtype: torch.dtype, output: str, elements: int
) -> None:
    run = make_run(series(2, w=torch.ones(7, dtype=dtype), n=torch.arange(3)))
    assert ckpt_ema.plan(run, tile_size=1000, dtype=output).tile_elements == elements
    assert ckpt_ema.plan(run, tile_size=1, dtype=output).tile_elements == 1


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None
)
@given(
    max_memory=st.integers(50_000, 2**34),
    averages=st.integers(1, 20),
    threads=st.none() | st.integers(1, 1024),
    tile_size=st.none() | st.integers(1, 2**31),
    accumulate=st.sampled_from(["float64", "float32"]),
)
def test_no_limit_is_passed_and_the_tiles_do_not_depend_on_the_threads(
    run: Any, max_memory: int, averages: int, threads: int | None, **options: Any
) -> None:
    options["decay"] = [number / 20 for number in range(averages)]
    free = ckpt_ema.plan(run, threads=threads, **options)
    try:
        held = ckpt_ema.plan(run, threads=threads, max_memory=max_memory, **options)
    except OptionError as error:
        least = 1024 * int(str(error).split("at least ")[1].removesuffix("KiB."))
        assert least > max_memory
        assert ckpt_ema.plan(run, max_memory=least, **options).memory_bytes <= least
        return
    assert held.memory_bytes <= max_memory
    assert held.threads >= 1
    assert held.tile_elements <= free.tile_elements
    assert held.threads <= free.threads
    if free.memory_bytes // free.threads * 4 <= max_memory and free.threads <= 4:
        assert (held.tile_elements, held.threads) == (free.tile_elements, free.threads)
    other = ckpt_ema.plan(run, threads=3, max_memory=max_memory, **options)
    assert other.tile_elements == held.tile_elements


@pytest.fixture
def run(make_run: MakeRun) -> Any:
    """Three checkpoints in float32."""
    return make_run(series(3, w=noise(3, 5)))


def tensors() -> dict[int, torch.Tensor]:
    """Every tensor that there is, by its identity."""
    return {id(one): one for one in gc.get_objects() if type(one) is torch.Tensor}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("averages", [1, 5])
@pytest.mark.parametrize("accumulate", ["float64", "float32"])
def test_the_plan_holds_the_memory_that_the_fold_takes(
    make_run: MakeRun, dtype: torch.dtype, averages: int, accumulate: str
) -> None:
    """With what infinities that stay, and tensors that are kept, would take: 20 bytes at most."""
    run = make_run(series(3, w=noise(3, 5, dtype=dtype)))
    decays = [number / 10 for number in range(averages)]
    plan = ckpt_ema.plan(run, decay=decays, accumulate=accumulate, threads=1)
    wide, cpu = getattr(torch, accumulate), torch.device("cpu")
    before = tensors()
    fold = make_fold(uses(plan), plan.tile_elements, wide, cpu, plan.work.widest_bytes)
    made = [tensor for key, tensor in tensors().items() if key not in before]
    memory = [tensor.untyped_storage() for tensor in made]
    taken = sum({one.data_ptr(): one.nbytes() for one in memory}.values())
    assert taken < plan.memory_bytes <= taken + 20 * plan.tile_elements
    del fold


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("averages", [1, 5, 20])
@pytest.mark.parametrize("max_memory", [None, "512KiB", "64MiB"])
def test_the_compiled_fold_takes_no_more_than_the_plan_holds(
    make_run: MakeRun,
    compiled_module: ModuleType,
    dtype: torch.dtype,
    averages: int,
    max_memory: str | None,
) -> None:
    run = make_run(series(3, w=noise(3, 5, dtype=dtype)))
    decays = [number / 20 for number in range(averages)]
    plan = ckpt_ema.plan(run, decay=decays, threads=1, max_memory=max_memory)
    opened = [(one.folder, one.specs) for one in plan.checkpoints]
    nowhere = cast(Sink, None)
    with Reader(plan.storage, opened) as reader:
        kernel = Kernel(compiled_module, plan, reader, nowhere, bytearray(1))
        tracemalloc.start()
        fold = CompiledFold(kernel)
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert 256 * 8 < taken <= plan.memory_bytes
        del fold
