"""torch is asked for an accelerator only where there may be one, and people hear who folds."""

import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError

import pytest

import ckpt_ema
from ckpt_ema.errors import Code
from ckpt_ema.fold import hardware
from ckpt_ema.fold.hardware import is_out_of_memory, needs_torch
from ckpt_ema.planning.plan import Plan
from tests.conftest import MakeRun, noise, series
from tests.makers.folds import by_torch

NVIDIA, AMD, INTEL = "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dri/renderD*"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> "Machine":
    """A machine whose devices and torch a test chooses; torch is not imported yet."""
    monkeypatch.delitem(sys.modules, "torch")
    return Machine(monkeypatch)


class Machine:
    """What is on a machine: a PC that runs Linux, unless a test says otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.has(())

    def has(
        self,
        devices: Collection[str],
        torch: str | None = "2.13.0",
        kind: tuple[str, str] = ("Linux", "x86_64"),
    ) -> None:
        """Give it devices, by the patterns of their files, and a version of torch."""

        def version(name: str) -> str:
            if torch is None:
                raise PackageNotFoundError(name)
            return torch

        self._monkeypatch.setattr(hardware, "glob", lambda one: [one] if one in devices else [])
        self._monkeypatch.setattr("importlib.metadata.version", version)
        self._monkeypatch.setattr("platform.system", lambda: kind[0])
        self._monkeypatch.setattr("platform.machine", lambda: kind[1])


@pytest.mark.parametrize(
    ("devices", "torch", "is_asked"),
    [
        ((), "2.13.0", False),
        ((NVIDIA,), "2.13.0", True),
        ((NVIDIA,), "2.13.0+cu128", True),
        ((NVIDIA,), "2.13.0+cpu", False),
        ((NVIDIA,), None, False),
        ((AMD,), "2.13.0+rocm7.0", True),
        ((INTEL,), "2.13.0", False),  # the graphics of nearly every PC
        ((INTEL,), "2.13.0+xpu", True),
    ],
)
def test_torch_is_asked_where_device_files_and_its_build_go_together(
    machine: Machine, devices: Collection[str], torch: str | None, is_asked: bool
) -> None:
    machine.has(devices, torch)
    assert needs_torch("auto") is is_asked
    assert not needs_torch("cpu")
    assert not needs_torch("cpu:0")
    assert needs_torch("cuda:1")


@pytest.mark.parametrize(("torch", "is_asked"), [("2.13.0", True), (None, False)])
def test_an_apple_processor_is_an_accelerator(
    machine: Machine, torch: str | None, is_asked: bool
) -> None:
    machine.has((), torch, ("Darwin", "arm64"))
    assert needs_torch("auto") is is_asked


def test_a_torch_that_is_imported_knows_better_than_device_files(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Torch:
        class accelerator:  # noqa: N801 - as torch calls it
            found: str | None = None

            @classmethod
            def current_accelerator(cls, check_available: bool) -> str | None:
                assert check_available
                return cls.found

    machine.has((NVIDIA,))
    monkeypatch.setitem(sys.modules, "torch", Torch)
    assert not needs_torch("auto")
    Torch.accelerator.found = "cuda"
    assert needs_torch("auto")


def test_who_folds_is_noted_if_it_is_slower_than_need_be(make_run: MakeRun) -> None:
    """Once, with what to do about it, and nothing else is said of it."""
    run = make_run(series(3, w=noise(3, 40)))
    plans: list[Plan] = []
    with by_torch():
        ckpt_ema.average(run, device="cpu", started=plans.append)
    [plan] = plans
    [note] = [one for one in plan.notes if one.code is Code.NOT_COMPILED]
    assert note.message == (
        "torch folds on the CPU, with the same result but more slowly (no compiled module: install"
        " from a wheel, or with a C compiler)."
    )
    ckpt_ema.average(run, device="cpu", overwrite=True, decay=0.1, started=plans.append)
    assert note not in plans[1].notes


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), True),
        (RuntimeError("HIP out of memory. Tried to allocate"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_a_full_device_is_told_from_other_errors(error: RuntimeError, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory
