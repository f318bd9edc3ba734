"""Averages made on a fake accelerator: the CPU's bytes, no race, no memory that grows.

The fake (see `fake_accelerator`) stays registered with torch once it is, but `torch.accelerator`
finds it only inside of the `npu` fixture: `--device auto` means the CPU in all other tests, in
whatever order they run. A process of its own would cost another import of torch for the same.
"""

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ckpt_ema import FailedError, RefusedError, average, average_part, finish
from ckpt_ema import plan as make_plan
from ckpt_ema.errors import Code
from ckpt_ema.fold.devices import resolve_device
from ckpt_ema.fold.shadow import widest_float
from ckpt_ema.fold.tile_fold import Use
from ckpt_ema.fold.torch_fold import PlainFold, StreamedFold, device_element_bytes, make_fold
from tests.conftest import MakeRun, noise, series
from tests.makers import fake_accelerator
from tests.makers.fake_accelerator import (
    FAKE,
    FakeAccelerator,
    FakeEvent,
    FakeStream,
    Record,
    install,
)
from tests.makers.faulty_os import faulty
from tests.makers.faulty_storage import watching_reads
from tests.makers.folds import by_torch

State = dict[str, torch.Tensor]
Seed = Callable[[pytest.MonkeyPatch], None]

TWO = [[Use(0, None)], [Use(0, 0.5)]]  # an average of two checkpoints


@pytest.fixture
def npu() -> Iterator[FakeAccelerator]:
    """The fake accelerator, with nothing queued and nothing counted."""
    if torch.accelerator.is_available():
        pytest.skip("a real accelerator is here, and torch has room for one")
    try:
        install()
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this torch has no backends in Python: {error}")
    FAKE.reset(available=True)
    yield FAKE
    FAKE.reset(available=False)


def _mixed(count: int) -> list[State]:
    """All averaged dtypes, two kept tensors, masks that never change, -0.0, something empty."""
    mask = torch.zeros(5, 9).masked_fill_(torch.ones(5, 9).triu(1).bool(), float("-inf"))
    return series(
        count,
        counter=[torch.tensor([1, 2, 3]) * step for step in range(1, count + 1)],
        double=noise(count, 41, dtype=torch.float64),
        single=noise(count, 8, 15),
        brain=noise(count, 13, 7, dtype=torch.bfloat16),
        half=noise(count, 99, dtype=torch.float16),
        mask=mask,
        brain_mask=mask.bfloat16(),
        negative_zero=torch.full((11,), -0.0),
        scalar=[torch.tensor(float(step)) for step in range(count)],
        empty=torch.zeros(0, 3),
        flags=torch.tensor([True, False, True]),
    )


def _leave_room(
    npu: FakeAccelerator, elements: int, threads: int = 1, averages: int = 1, widest_bytes: int = 8
) -> None:
    """Give the device so little memory that each thread has room for so many elements."""
    each = device_element_bytes(averages, torch.float64, widest_bytes)
    npu.memory_bytes = 4 * elements * threads * each


def _bytes(run: Path, output: str, **options: object) -> dict[str, bytes]:
    """Average `run` into its sibling `output`; the bytes of every model file there."""
    folder = average(run, output=run.parent / output, **options).output  # type: ignore[arg-type]
    found = folder.rglob("*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("elements", [7, 1000, 1 << 18])
def test_the_device_gives_the_bytes_of_the_cpu(
    npu: FakeAccelerator, make_run: MakeRun, elements: int, threads: int, count: int
) -> None:
    run = make_run(_mixed(count))
    expected = _bytes(run, "cpu", device="cpu")
    _leave_room(npu, elements, threads)
    found = _bytes(run, "npu", device="npu", threads=threads)
    assert found == expected
    assert npu.record.bytes_to_device > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_device_converts_as_the_cpu_does(
    npu: FakeAccelerator, make_run: MakeRun, dtype: str
) -> None:
    run = make_run(_mixed(4))
    expected = _bytes(run, "cpu", device="cpu", dtype=dtype)
    _leave_room(npu, 50)
    assert _bytes(run, "npu", device="npu", dtype=dtype, threads=1) == expected


@pytest.mark.parametrize("elements", [7, 1 << 18])
def test_shards_torch_files_and_strides_give_the_bytes_of_the_cpu(
    npu: FakeAccelerator, make_run: MakeRun, elements: int
) -> None:
    """A strided tensor comes in one piece, larger than a tile."""
    states = _mixed(3)
    for state in states:
        state["transposed"] = state["brain"].t()
    runs = [
        make_run(states, name="torch", torch_files=True),
        make_run(_mixed(3), name="sharded", shards=2),
    ]
    for run in runs:
        expected = _bytes(run, f"{run.name}-cpu", device="cpu")
        _leave_room(npu, elements, threads=2)
        assert _bytes(run, f"{run.name}-npu", device="npu", threads=2) == expected


def test_checkpoints_that_change_their_dtype_give_the_bytes_of_the_cpu(
    npu: FakeAccelerator, make_run: MakeRun
) -> None:
    dtypes = [torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.float32]
    values = [value.to(dtype) for value, dtype in zip(noise(5, 60), dtypes, strict=True)]
    run = make_run(series(5, weight=values))
    expected = _bytes(run, "cpu", device="cpu")
    _leave_room(npu, 25)
    assert _bytes(run, "npu", device="npu", threads=1) == expected


def test_auto_takes_the_device(npu: FakeAccelerator, make_run: MakeRun, tmp_path: Path) -> None:
    result = average(make_run(_mixed(2)), output=tmp_path / "out")
    assert result.manifests[0]["device"] == "npu"


@pytest.mark.parametrize("elements", [7, 1000])
def test_several_averages_are_those_of_the_cpu_and_cost_no_copy_more(
    npu: FakeAccelerator, make_run: MakeRun, elements: int
) -> None:
    options = {"decay": [0.1, 0.26, 0.9], "last": [2, 5], "schedule": "constant", "threads": 1}
    run = make_run(_mixed(5))
    expected = _bytes(run, "cpu", device="cpu", **options)
    assert len(expected) == 6
    _leave_room(npu, elements, averages=6)
    assert _bytes(run, "npu", device="npu", **options) == expected
    npu.reset(available=True)
    plain = make_run(series(5, weight=noise(5, 300)), name="plain")
    _bytes(plain, "again", device="npu", **options)
    assert npu.record.bytes_to_device == 5 * 300 * 4
    assert npu.record.bytes_to_host == 6 * 300 * 4


def test_auto_is_the_cpu_where_the_device_is_not_available(
    npu: FakeAccelerator, make_run: MakeRun, tmp_path: Path
) -> None:
    """What all other tests rely on, once the fake is registered."""
    npu.available = False
    result = average(make_run(_mixed(2)), output=tmp_path / "out")
    assert result.manifests[0]["device"] == "cpu"
    assert npu.record.log == []


def _staging_used_again_too_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "synchronize", lambda _: None)


def _landing_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    _lose_waits(monkeypatch, of_copies=True)


def _no_wait_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    _lose_waits(monkeypatch, of_copies=False)


def _lose_waits(monkeypatch: pytest.MonkeyPatch, of_copies: bool) -> None:
    """Make `FakeEvent.wait` do nothing on streams that copy to the device, or on all others."""
    wait = FakeEvent.wait

    def wait_or_not(event: FakeEvent, stream: FakeStream | None = None) -> None:
        waiting = stream or FAKE.current_stream()
        if waiting.has_copied_to_device != of_copies:
            wait(event, stream)

    monkeypatch.setattr(FakeEvent, "wait", wait_or_not)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "seed", [None, _staging_used_again_too_soon, _landing_overwritten, _no_wait_for_the_copy]
)
def test_these_tests_see_every_wait_that_is_missing(
    npu: FakeAccelerator,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    seed: Seed | None,
    threads: int,
) -> None:
    """Each of the three waits is taken away in turn: the bytes differ, every time.

    With none taken away they are the CPU's. It needs five checkpoints or more: only then is a
    landing buffer written to for the second time before the first fold out of it.
    """
    run = make_run(series(7, weight=noise(7, 200), brain=noise(7, 200, dtype=torch.bfloat16)))
    options = {"threads": threads, "allow_nonfinite": True}
    _leave_room(npu, 64, threads)
    expected = _bytes(run, "cpu", device="cpu", **options)
    if seed is not None:
        seed(monkeypatch)
    for attempt in range(3):
        found = _bytes(run, f"npu{attempt}", device="npu", **options)
        assert (found == expected) == (seed is None)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_goes_to_the_device_once_and_from_pinned_memory(
    npu: FakeAccelerator, make_run: MakeRun, threads: int
) -> None:
    states = [
        {name: tensor for name, tensor in state.items() if "mask" not in name}
        for state in _mixed(5)  # a tile with infinities is folded twice
    ]
    run = make_run(states)
    planned = make_plan(run)
    averaged = sum(t.nbytes for state in states for t in state.values() if t.is_floating_point())
    kept = sum(t.nbytes for t in states[-1].values() if not t.is_floating_point())
    written = sum(t.nbytes for t in states[-1].values() if t.is_floating_point())
    _leave_room(npu, 30, threads)
    _bytes(run, "npu", device="npu", threads=threads)
    assert npu.record.bytes_to_device == averaged == planned.bytes_read - kept
    assert npu.record.pageable_bytes_to_device == 0
    assert npu.record.bytes_to_host == written


def test_a_checkpoint_is_read_and_its_copy_queued_before_the_one_before_is_folded(
    npu: FakeAccelerator, make_run: MakeRun
) -> None:
    count = 8
    log = npu.record.log
    run = make_run(series(count, weight=noise(count, 50)))
    with watching_reads(lambda path, *_: log.append(("read", path.parent.name))):
        _bytes(run, "npu", device="npu", threads=1)
    reads = [log.index(("read", f"checkpoint-{step}")) for step in range(1, count + 1)]
    copies = [place for place, entry in enumerate(log) if entry == ("queued", "copy to the device")]
    # The first checkpoint initialises the shadow; each of the others is one lerp.
    folds = [place for place, (when, what) in enumerate(log) if when == "done" and "lerp" in what]
    assert len(copies) == len(reads) == count
    assert len(folds) == count - 1
    for checkpoint in range(1, count - 1):
        following = checkpoint + 1
        assert reads[following] < copies[following] < folds[checkpoint - 1]


def test_the_fake_does_nothing_that_nobody_waits_for(npu: FakeAccelerator) -> None:
    """What the two tests above rest on."""
    torch.empty(3, device="npu").fill_(1.0)
    done = ("done", "aten.fill_.Scalar")
    assert done not in npu.record.log
    npu.synchronize()
    assert done in npu.record.log


def test_the_fake_refuses_to_mix_devices_as_a_real_one_does(npu: FakeAccelerator) -> None:
    with pytest.raises(RuntimeError, match=r"npu.* cpu"):
        torch.lerp(torch.empty(3, device="npu"), torch.zeros(3), 0.5)


def _peak(make_run: MakeRun, count: int, elements: int, **options: object) -> int:
    """The most device memory at a time, in bytes, of a run."""
    FAKE.record = Record()
    weights = noise(count, elements)
    for weight in weights:
        weight[0] = float("inf")  # folding infinities takes the most memory
    name = f"run-{count}-{elements}"
    _bytes(make_run(series(count, weight=weights), name=name), f"{name}-npu", **options)
    gc.collect()
    assert FAKE.record.live_bytes == 0
    return FAKE.record.peak_bytes


def test_device_memory_grows_neither_with_the_tensors_nor_with_their_number(
    npu: FakeAccelerator, make_run: MakeRun
) -> None:
    options = {"max_memory": 100_000, "threads": 1}
    peak = _peak(make_run, 2, 9000, **options)
    assert 50_000 < peak <= 100_000
    assert _peak(make_run, 20, 9000, **options) == peak
    assert _peak(make_run, 2, 20_000, **options) == peak
    assert _peak(make_run, 20, 20_000, **options) == peak


@pytest.mark.parametrize("averages", [1, 7])
@pytest.mark.parametrize("accumulate", ["float64", "float32"])
def test_device_memory_is_a_quarter_of_what_is_free_for_all_threads_together(
    npu: FakeAccelerator,
    make_run: MakeRun,
    averages: int,
    accumulate: str,
) -> None:
    npu.memory_bytes = 800_000
    taken = torch.empty(400_000, dtype=torch.uint8, device="npu")  # by somebody else
    begun, met = threading.Barrier(3), threading.local()

    def together(*_: object) -> None:
        if not hasattr(met, "others"):
            met.others = begun.wait(20)

    options = {"decay": [number / 10 for number in range(averages)], "accumulate": accumulate}
    run = make_run(series(3, weight=noise(3, 30_000)))
    with watching_reads(together):
        _bytes(run, "npu", device="npu", threads=3, tile_size=400, **options)
    assert 50_000 < FAKE.record.peak_bytes - taken.nbytes <= 100_000


@pytest.mark.parametrize("memory_bytes", [0, 1000, 2500, 20_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_device_that_runs_out_of_memory_is_done_without(
    npu: FakeAccelerator,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    memory_bytes: int,
    threads: int,
) -> None:
    """Whether that is before all, before the first tensor, or when infinities need a copy."""
    run = make_run(_mixed(5))
    expected = _bytes(run, "cpu", device="cpu")
    _leave_room(npu, 60, threads)
    told = npu.mem_get_info()
    monkeypatch.setattr(npu, "mem_get_info", lambda _: told)
    npu.memory_bytes = memory_bytes
    made = average(run, output=run.parent / "npu", device="npu", tile_size=240, threads=threads)
    assert (made.output / "model.safetensors").read_bytes() == expected["model.safetensors"]
    assert made.manifests[0]["device"] == (
        "npu" if memory_bytes == 20_000 else "npu, which ran out of memory, and cpu"
    )


def test_a_full_device_is_not_taken_for_one_without_float64(npu: FakeAccelerator) -> None:
    """It may have room again a moment later, and would fold in float32 without a word."""
    npu.memory_bytes = 0
    assert widest_float(torch.device("npu")) == torch.float64


@pytest.mark.parametrize("place", ["probe", "mem_get_info"])
def test_a_device_whose_memory_is_full_from_the_start_is_done_without(
    npu: FakeAccelerator, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """As CUDA says it where not even a context fits in."""

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    npu.memory_bytes = 0
    if place == "mem_get_info":
        monkeypatch.setattr(npu, "mem_get_info", full)
    else:
        monkeypatch.setattr(fake_accelerator, "Block", full)
    run = make_run(_mixed(2))
    made = average(run, output=run.parent / "npu", device="auto")
    assert made.manifests[0]["device"] == "npu, which ran out of memory, and cpu"


def test_the_end_of_memory_on_the_cpu_is_the_end(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate"
                           " memory: you tried to allocate 8 bytes.")  # fmt: skip

    monkeypatch.setattr(PlainFold, "fold", full)
    with by_torch(), pytest.raises(FailedError) as caught:
        average(make_run(_mixed(2)), output=tmp_path / "out", device="cpu")
    assert caught.value.code is Code.OUT_OF_MEMORY
    assert not (tmp_path / "out").exists()


def test_another_error_of_the_device_is_not_taken_for_the_end_of_its_memory(
    npu: FakeAccelerator, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(StreamedFold, "fold", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        average(make_run(_mixed(2)), output=tmp_path / "out", device="npu")
    assert not (tmp_path / "out").exists()


def test_no_copy_is_under_way_when_a_fold_has_failed(
    npu: FakeAccelerator, make_run: MakeRun
) -> None:
    """Its memory may be given to somebody else."""
    run = make_run(_mixed(4))

    def failing(path: Path, *_: object) -> None:
        if path.parent.name == "checkpoint-3":
            raise FailedError("The disk is gone.", code=Code.READ_FAILED)

    with watching_reads(failing), pytest.raises(FailedError, match="The disk is gone"):
        _bytes(run, "npu", device="npu", threads=2)
    copying = [stream for stream in npu.streams if stream.has_copied_to_device]
    assert copying
    assert all(stream.query() for stream in copying)


def test_a_part_on_the_device_fits_one_on_the_cpu(npu: FakeAccelerator, make_run: MakeRun) -> None:
    """How much the device folds at a time does not show in how the work is shared out."""
    run = make_run(series(3, a=noise(3, 5000), b=noise(3, 3000, dtype=torch.float64)))
    expected = _bytes(run, "cpu", device="cpu", tile_size=160)
    output = run.parent / "parts"
    average_part(run, "1/2", output=output, device="npu", tile_size=160)
    average_part(run, "2/2", output=output, device="cpu", tile_size=160)
    finished = finish(output)
    assert (output / "model.safetensors").read_bytes() == expected["model.safetensors"]
    assert finished.manifests[0]["device"] == "cpu, npu"


def test_what_the_device_has_done_is_not_done_again(
    npu: FakeAccelerator, make_run: MakeRun
) -> None:
    run = make_run(series(3, weight=noise(3, 8000)))
    expected = _bytes(run, "cpu", device="cpu")
    options = {"output": run.parent / "npu", "tile_size": 400, "threads": 1, "resume": True}
    _leave_room(npu, 2000, widest_bytes=4)
    # The header and two of four pieces are written.
    with faulty("pwrite", 4, suffix=".safetensors"), pytest.raises(FailedError):
        average(run, device="npu", **options)  # type: ignore[arg-type]
    read: list[int] = []
    made = average(run, device="cpu", progress=lambda done, _: read.append(done), **options)  # type: ignore[arg-type]
    assert (made.output / "model.safetensors").read_bytes() == expected["model.safetensors"]
    assert read[-1] == 3 * 4 * (8000 - 2 * 2000)


def test_processes_of_one_machine_take_its_devices_by_turns(
    npu: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(resolve_device("auto", 3)) == "npu"
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert [str(resolve_device("auto", place)) for place in (0, 3, 5)] == [
        "npu:0",
        "npu:3",
        "npu:1",
    ]
    assert str(resolve_device("npu", 2)) == "npu:2"
    assert str(resolve_device("npu:1", 2)) == "npu:1"
    assert str(resolve_device("cpu", 2)) == "cpu"


def test_a_thread_reads_while_another_copies_back(npu: FakeAccelerator, make_run: MakeRun) -> None:
    """The second thread is held up in its reading until the first one's average is on the host."""
    run = make_run(series(2, weight=noise(2, 100)))
    expected = _bytes(run, "cpu", device="cpu")
    _leave_room(npu, 50, threads=2)
    begun = threading.Barrier(2)
    first = min(_offsets(run))

    def held_up(path: Path, offset: int, _size: int) -> None:
        if path.parent.name == "checkpoint-1":
            begun.wait(20)
            deadline = time.monotonic() + 20
            while offset > first and ("done", "copy to the host") not in npu.record.log:
                assert time.monotonic() < deadline
                time.sleep(0.001)

    with watching_reads(held_up):
        assert _bytes(run, "npu", device="npu", threads=2, tile_size=200) == expected


def _offsets(run: Path) -> list[int]:
    """Where the tensors of a run are in their files."""
    tensors = make_plan(run).checkpoints[0].specs.tensors.values()
    return [tensor.offset for tensor in tensors]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_checkpoint_that_holds_nan_is_refused_by_name_as_on_the_cpu(
    npu: FakeAccelerator, make_run: MakeRun, tmp_path: Path, value: str
) -> None:
    states = _mixed(5)
    states[2]["single"][3, 4] = float(value)
    run = make_run(states)
    messages = []
    for device in ("cpu", "npu"):
        with pytest.raises(RefusedError) as caught:
            average(run, output=tmp_path / "out", device=device)
        assert caught.value.tensor == "single"
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert not (tmp_path / "out").exists()


def test_nan_that_is_allowed_comes_out_as_on_the_cpu(
    npu: FakeAccelerator, make_run: MakeRun
) -> None:
    states = _mixed(4)
    states[1]["brain"][0, 0] = float("nan")
    run = make_run(states)
    expected = _bytes(run, "cpu", device="cpu", allow_nonfinite=True)
    assert _bytes(run, "npu", device="npu", allow_nonfinite=True) == expected


def test_a_device_without_float64_folds_as_the_cpu_does_in_float32(
    npu: FakeAccelerator, make_run: MakeRun
) -> None:
    npu.has_float64 = False
    states = [
        {name: tensor for name, tensor in state.items() if name != "double"} for state in _mixed(5)
    ]
    run = make_run(states)
    expected = _bytes(run, "cpu", device="cpu", accumulate="float32")
    _leave_room(npu, 30)
    assert _bytes(run, "npu", device="npu", threads=1) == expected
    manifest = json.loads((run.parent / "npu/ckpt_ema.json").read_text())
    assert manifest["accumulate"] == "float32"


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_what_was_folded_in_float32_is_not_up_to_date_as_float64(
    npu: FakeAccelerator, make_run: MakeRun, tmp_path: Path, name: str
) -> None:
    run = make_run(series(3, w=noise(3, 50)))
    npu.has_float64 = False
    average(run, output=tmp_path / name, device="npu")
    npu.has_float64 = True
    with pytest.raises(RefusedError) as caught:
        average(run, output=tmp_path / name, device="npu")
    assert caught.value.code is Code.OUTPUT_EXISTS


def test_a_device_without_float64_takes_float64_checkpoints(
    npu: FakeAccelerator, make_run: MakeRun
) -> None:
    npu.has_float64 = False
    run = make_run(_mixed(5))
    expected = _bytes(run, "cpu", device="cpu", accumulate="float32")
    _leave_room(npu, 30)
    assert _bytes(run, "npu", device="npu", threads=1) == expected


@pytest.mark.parametrize("has_float64", [True, False])
def test_a_device_without_streams_gives_the_bytes_of_the_cpu(
    npu: FakeAccelerator, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, has_float64: bool
) -> None:
    monkeypatch.delattr(FakeAccelerator, "Stream")
    npu.has_float64 = has_float64
    assert isinstance(
        make_fold(TWO, 10, torch.float32, torch.device("npu"), widest_bytes=4), PlainFold
    )
    run = make_run(_mixed(5))
    accumulate = "float64" if has_float64 else "float32"
    expected = _bytes(run, "cpu", device="cpu", accumulate=accumulate)
    _leave_room(npu, 30, threads=2)
    assert _bytes(run, "npu", device="npu", threads=2) == expected


def test_a_device_with_streams_is_given_streams(npu: FakeAccelerator) -> None:
    fold = make_fold(TWO, 10, torch.float64, torch.device("npu"), widest_bytes=8)
    assert isinstance(fold, StreamedFold)
