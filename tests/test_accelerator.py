"""Averages made on a fake accelerator: the CPU's bytes, no race, no memory that grows.

The fake (see `fake_accelerator`) stays registered with torch once it is, but `torch.accelerator`
finds it only inside of the `npu` fixture: `--device auto` means the CPU in all other tests, in
whatever order they run. A process of its own would cost another import of torch for the same.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ckpt_ema import FailedError, RefusedError, average
from ckpt_ema import plan as make_plan
from ckpt_ema.folding.sources import Sources
from ckpt_ema.folding.tile_fold import PlainFold, StreamedFold, Use, make_fold
from tests.conftest import MakeRun, noise, series
from tests.fake_accelerator import FAKE, FakeAccelerator, FakeEvent, FakeStream, install

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


def _bytes(run: Path, output: str, **options: object) -> dict[str, bytes]:
    """Average `run` into its sibling `output`; the bytes of every model file there."""
    folder = average(run, output=run.parent / output, **options).output  # type: ignore[arg-type]
    found = folder.rglob("*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tile_elements", [7, 1000, 1 << 18])
def test_the_device_gives_the_bytes_of_the_cpu(
    npu: FakeAccelerator, make_run: MakeRun, tile_elements: int, threads: int, count: int
) -> None:
    run = make_run(_mixed(count))
    expected = _bytes(run, "cpu", device="cpu")
    found = _bytes(run, "npu", device="npu", tile_elements=tile_elements, threads=threads)
    assert found == expected
    assert npu.record.bytes_to_device > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_device_converts_as_the_cpu_does(
    npu: FakeAccelerator, make_run: MakeRun, dtype: str
) -> None:
    run = make_run(_mixed(4))
    expected = _bytes(run, "cpu", device="cpu", dtype=dtype)
    assert _bytes(run, "npu", device="npu", dtype=dtype, tile_elements=50) == expected


@pytest.mark.parametrize("tile_elements", [7, 1 << 18])
def test_shards_torch_files_and_strides_give_the_bytes_of_the_cpu(
    npu: FakeAccelerator, make_run: MakeRun, tile_elements: int
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
        options = {"device": "npu", "tile_elements": tile_elements, "threads": 2}
        assert _bytes(run, f"{run.name}-npu", **options) == expected


def test_checkpoints_that_change_their_dtype_give_the_bytes_of_the_cpu(
    npu: FakeAccelerator, make_run: MakeRun
) -> None:
    dtypes = [torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.float32]
    values = [value.to(dtype) for value, dtype in zip(noise(5, 60), dtypes, strict=True)]
    run = make_run(series(5, weight=values))
    expected = _bytes(run, "cpu", device="cpu")
    assert _bytes(run, "npu", device="npu", tile_elements=25) == expected


def test_auto_takes_the_device(npu: FakeAccelerator, make_run: MakeRun, tmp_path: Path) -> None:
    result = average(make_run(_mixed(2)), output=tmp_path / "out")
    assert result.manifests[0]["device"] == "npu"


@pytest.mark.parametrize("tile_elements", [7, 1000])
def test_several_averages_are_those_of_the_cpu_and_cost_no_copy_more(
    npu: FakeAccelerator, make_run: MakeRun, tile_elements: int
) -> None:
    options = {
        "decay": [0.1, 0.26, 0.9],
        "last": [2, 5],
        "schedule": "constant",
        "tile_elements": tile_elements,
    }
    run = make_run(_mixed(5))
    expected = _bytes(run, "cpu", device="cpu", **options)
    assert len(expected) == 6
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
    options = {"tile_elements": 64, "threads": threads, "allow_nonfinite": True}
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
    _bytes(run, "npu", device="npu", tile_elements=30, threads=threads)
    assert npu.record.bytes_to_device == averaged == planned.bytes_read - kept
    assert npu.record.pageable_bytes_to_device == 0
    assert npu.record.bytes_to_host == written


def test_a_checkpoint_is_read_and_its_copy_queued_before_the_one_before_is_folded(
    npu: FakeAccelerator, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 8
    values = Sources.values

    def recorded(sources: Sources, checkpoint: int, *rest: object) -> torch.Tensor:
        npu.record.log.append(("read", str(checkpoint)))
        return values(sources, checkpoint, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Sources, "values", recorded)
    _bytes(make_run(series(count, weight=noise(count, 50))), "npu", device="npu", threads=1)
    log = npu.record.log
    reads = [log.index(("read", str(checkpoint))) for checkpoint in range(count)]
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


def _peak(make_run: MakeRun, count: int, elements: int) -> int:
    """The most device memory at a time, in bytes, of a run on one thread."""
    FAKE.reset(available=True)
    weights = noise(count, elements)
    for weight in weights:
        weight[0] = float("inf")  # folding infinities takes the most memory
    run = make_run(series(count, weight=weights), name=f"run-{count}-{elements}")
    _bytes(run, f"npu-{count}-{elements}", device="npu", tile_elements=100, threads=1)
    assert FAKE.record.live_bytes == 0
    return FAKE.record.peak_bytes


def test_device_memory_grows_neither_with_the_tensors_nor_with_their_number(
    npu: FakeAccelerator, make_run: MakeRun
) -> None:
    peak = _peak(make_run, 2, 200)
    assert 0 < peak < 100 * 100  # a hundred bytes for each element of a tile
    assert _peak(make_run, 20, 200) == peak
    assert _peak(make_run, 2, 2000) == peak
    assert _peak(make_run, 20, 2000) == peak


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_checkpoint_that_holds_nan_is_refused_by_name_as_on_the_cpu(
    npu: FakeAccelerator, make_run: MakeRun, tmp_path: Path, value: str
) -> None:
    states = _mixed(5)
    states[2]["single"][3, 4] = float(value)
    run = make_run(states)
    messages = []
    for device in ("cpu", "npu"):
        with pytest.raises(RefusedError, match=r"checkpoint-3.*single") as caught:
            average(run, output=tmp_path / "out", device=device, tile_elements=30)
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
    assert _bytes(run, "npu", device="npu", tile_elements=30) == expected


def test_a_device_without_float64_takes_float64_checkpoints(
    npu: FakeAccelerator, make_run: MakeRun
) -> None:
    npu.has_float64 = False
    run = make_run(_mixed(5))
    expected = _bytes(run, "cpu", device="cpu", accumulate="float32")
    assert _bytes(run, "npu", device="npu", tile_elements=30) == expected


@pytest.mark.parametrize("has_float64", [True, False])
def test_a_device_without_streams_gives_the_bytes_of_the_cpu(
    npu: FakeAccelerator, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, has_float64: bool
) -> None:
    monkeypatch.delattr(FakeAccelerator, "Stream")
    npu.has_float64 = has_float64
    assert isinstance(
        make_fold(TWO, 10, torch.float32, torch.device("npu"), holds_float64=False), PlainFold
    )
    run = make_run(_mixed(5))
    accumulate = "float64" if has_float64 else "float32"
    expected = _bytes(run, "cpu", device="cpu", accumulate=accumulate)
    assert _bytes(run, "npu", device="npu", tile_elements=30, threads=2) == expected


def test_a_device_with_streams_is_given_streams(npu: FakeAccelerator) -> None:
    fold = make_fold(TWO, 10, torch.float64, torch.device("npu"), holds_float64=True)
    assert isinstance(fold, StreamedFold)


def test_a_device_that_runs_out_of_memory_is_named(
    npu: FakeAccelerator, make_run: MakeRun, tmp_path: Path
) -> None:
    npu.memory_bytes = 10_000
    with pytest.raises(FailedError, match=r"device npu ran out of memory.*--device cpu"):
        average(make_run(_mixed(2)), output=tmp_path / "out", device="npu")
    assert not (tmp_path / "out").exists()
