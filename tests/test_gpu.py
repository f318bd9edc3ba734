"""Averages made on real hardware; skipped where there is none, and told so by pytest.

`test_accelerator` shows that nothing is lost or late; what only hardware shows is its rounding.
"""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_ema import RefusedError, average
from ckpt_ema.fold import torch_fold, torch_tiles
from ckpt_ema.fold.shadow import widest_float
from ckpt_ema.fold.torch_fold import DeviceFold, Uses
from tests.conftest import MakeRun, noise, read_safetensors, series

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator here"),
]

CHECKPOINTS = 9


@pytest.fixture
def device() -> torch.device:
    """The accelerator of this machine."""
    found = torch.accelerator.current_accelerator(check_available=True)
    assert found is not None
    return found


def _averaged(run: Path, output: str, **options: Any) -> dict[str, torch.Tensor]:
    folder = average(run, output=run.parent / output, **options).output
    return read_safetensors(folder / "model.safetensors")


def _ordinals(tensor: torch.Tensor) -> torch.Tensor:
    """Integers that count the floating-point numbers from zero on: neighbours differ by one."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    bits = tensor.view(integers).long()
    return torch.where(bits < 0, torch.iinfo(integers).min - bits, bits)


def _assert_rounded_alike(
    found: torch.Tensor, expected: torch.Tensor, accumulator: torch.dtype
) -> None:
    """Equal but for roundings that a device may do otherwise, one for each fold.

    A dtype narrower than the accumulator hides them, but where the average lies all but halfway
    between two numbers: there it may be the other one, in 1 of 1000 elements at most.
    """
    if expected.dtype.itemsize < accumulator.itemsize:
        apart = (_ordinals(found) - _ordinals(expected)).abs()
        assert int(apart.max()) <= 1
        assert int(apart.count_nonzero()) <= len(apart) // 1000
    else:
        tolerance = CHECKPOINTS * torch.finfo(accumulator).eps * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("max_memory", [100_000, None])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_the_device_differs_from_the_cpu_by_its_rounding_alone(
    device: torch.device,
    make_run: MakeRun,
    dtype: torch.dtype,
    max_memory: int | None,
    threads: int,
) -> None:
    accumulator = widest_float(device)
    run = make_run(series(CHECKPOINTS, weight=noise(CHECKPOINTS, 5003, dtype=dtype)))
    accumulate = str(accumulator).removeprefix("torch.")
    expected = _averaged(run, "cpu", device="cpu", accumulate=accumulate)
    options = {"device": str(device), "max_memory": max_memory, "threads": threads}
    found = _averaged(run, "device", **options)
    _assert_rounded_alike(found["weight"], expected["weight"], accumulator)


def test_what_never_changes_comes_back_bit_for_bit(device: torch.device, make_run: MakeRun) -> None:
    frozen = {
        "mask": torch.zeros(40, 40).masked_fill_(torch.ones(40, 40).triu(1).bool(), float("-inf")),
        "negative_zero": torch.full((11,), -0.0),
        "single": noise(1, 3000)[0],
        "brain": noise(1, 3000, dtype=torch.bfloat16)[0],
        "counter": torch.arange(7),
    }
    run = make_run(series(CHECKPOINTS, **frozen))
    found = _averaged(run, "device", device=str(device), max_memory=100_000)
    for name, tensor in frozen.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_nan_is_refused_by_name(device: torch.device, make_run: MakeRun) -> None:
    weights = noise(3, 100)
    weights[1][7] = float("nan")
    run = make_run(series(3, weight=weights))
    with pytest.raises(RefusedError, match=r"checkpoint-2.*weight"):
        average(run, output=run.parent / "device", device=str(device))


def test_device_memory_grows_neither_with_the_tensors_nor_with_their_number(
    device: torch.device, make_run: MakeRun
) -> None:
    module = torch.get_device_module(device)
    if not hasattr(module, "reset_peak_memory_stats"):
        pytest.skip(f"torch does not tell the peak memory of {device.type}")
    peaks: list[int] = []
    for count, elements in ((2, 9000), (2, 9000), (20, 9000), (2, 20_000), (20, 20_000)):
        run = make_run(series(count, weight=noise(count, elements)), name=f"run{len(peaks)}")
        gc.collect()  # tracebacks of other tests hold tensors
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        _averaged(run, f"device{len(peaks)}", device=str(device), max_memory=100_000, threads=1)
        peaks.append(module.max_memory_allocated() - before)
    assert 0 < peaks[1] <= 100_000 + 20 * 512  # torch hands memory out in blocks of 512 bytes
    # The first run of a process may also make what the device's libraries keep.
    assert peaks[2:] == peaks[1:2] * 3


def test_a_full_device_is_done_without(
    device: torch.device, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch really raises where a device has no memory left is taken for that."""

    def make_fold(uses: Uses, capacity: int, *rest: Any) -> DeviceFold:
        wide, on, widest_bytes = rest
        if on.type != "cpu":
            torch.empty(1 << 50, dtype=torch.uint8, device=on)  # no device has so much
        return torch_fold.make_fold(uses, capacity, wide, on, widest_bytes)

    run = make_run(series(3, weight=noise(3, 5003)))
    expected = _averaged(run, "cpu", device="cpu")
    monkeypatch.setattr(torch_tiles, "make_fold", make_fold)
    made = average(run, output=run.parent / "device", device=str(device))
    assert made.manifests[0]["device"].endswith("which ran out of memory, and cpu")
    found = read_safetensors(made.output / "model.safetensors")
    assert torch.equal(found["weight"], expected["weight"])
