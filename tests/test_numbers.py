"""The numbers contract of a whole average: exact values, kept bits, independence of the cutting."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema.options import make_options
from tests.conftest import MakeRun, noise, raw, read_safetensors, series, write_safetensors

pytestmark = pytest.mark.usefixtures("either_fold")

NO_DEADLINE = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def averaged(run: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Average on the CPU and read the output with the safetensors library."""
    result = ckpt_ema.average(run, device="cpu", overwrite=True, **options)
    return read_safetensors(result.output / "model.safetensors")


def decays(count: int, **options: Any) -> list[float]:
    """The decays of so many checkpoints, one step apart."""
    (rule,) = make_options(options).weighting.rules
    return rule.decays(range(1, count + 1))


def exact_fold(values: Sequence[float], shares: Sequence[float]) -> Fraction:
    """The fold in rational arithmetic, with the very floats that are the decays."""
    shadow = Fraction(values[0])
    for value, decay in zip(values[1:], shares, strict=True):
        shadow += (1 - Fraction(decay)) * (Fraction(value) - shadow)
    return shadow


def nearest(exact: Fraction, dtype: torch.dtype) -> set[float]:
    """The value of `dtype` nearest to `exact`; both, if float64 cannot tell which is."""
    spread = abs(exact) * Fraction(1, 2**48)
    return {
        torch.tensor(float(exact + shift), dtype=torch.float64).to(dtype).item()
        for shift in (-spread, Fraction(0), spread)
    }


def test_three_checkpoints_by_hand(make_run: MakeRun) -> None:
    """1, 2, 3 with decays 2/11 and 1/4: 2/44 * 1 + 9/44 * 2 + 3/4 * 3 = 119/44."""
    run = make_run(series(3, w=[torch.tensor([x]) for x in (1.0, 2.0, 3.0)]))
    assert averaged(run)["w"].item() == torch.tensor(119 / 44).item()


@pytest.mark.parametrize(
    ("schedule", "decay", "value"),
    [
        ("dynamic", 0.999, 4.5004995005),
        ("dynamic", 0.30, 4.5834090909),
        ("constant", 0.999, 1.0099900050),
        ("constant", 0.9, 1.9049000000),
    ],
)
def test_golden_values(make_run: MakeRun, schedule: str, decay: float, value: float) -> None:
    thetas = [torch.tensor([float(x)], dtype=torch.float64) for x in range(1, 6)]
    result = averaged(make_run(series(5, w=thetas)), schedule=schedule, decay=decay)
    assert result["w"].item() == pytest.approx(value, abs=5e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_the_exact_average_rounded_once(
    make_run: MakeRun, dtype: torch.dtype
) -> None:
    values = noise(9, 400, dtype=dtype)
    result = averaged(make_run(series(9, w=values)), tile_size=256)["w"]
    assert result.dtype == dtype
    for index in range(400):
        column = [value[index].item() for value in values]
        exact = exact_fold(column, decays(9))
        assert result[index].item() in nearest(exact, dtype)


@given(
    columns=st.lists(
        st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4
        ),
        min_size=1,
        max_size=20,
    ),
    decay=st.floats(0, 1),
    schedule=st.sampled_from(["dynamic", "constant"]),
)
@NO_DEADLINE
def test_any_float32_values_average_to_the_exact_value_rounded_once(
    tmp_path_factory: pytest.TempPathFactory,
    columns: list[list[float]],
    decay: float,
    schedule: str,
) -> None:
    run = tmp_path_factory.mktemp("exact") / "run"
    for index in range(4):
        folder = run / f"checkpoint-{index}"
        folder.mkdir(parents=True)
        state = {"w": torch.tensor([column[index] for column in columns])}
        write_safetensors(folder / "model.safetensors", state)
    result = averaged(run, decay=decay, schedule=schedule, allow_duplicates=True)["w"]
    for element, column in zip(result.tolist(), columns, strict=True):
        exact = exact_fold(column, decays(4, schedule=schedule, decay=decay))
        # Cancellation leaves an error of float64's own size relative to the largest value.
        slack = max(map(abs, column)) * 2**-50
        expected = [
            torch.tensor(float(exact) + s, dtype=torch.float64).float().item()
            for s in (-slack, 0.0, slack)
        ]
        assert min(expected) <= element <= max(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_frozen_tensors_come_back_bit_for_bit(make_run: MakeRun, dtype: torch.dtype) -> None:
    frozen = torch.cat([noise(1, 1000, dtype=dtype)[0], torch.tensor([-0.0, 0.0]).to(dtype)])
    run = make_run(series(7, frozen=frozen, moving=noise(7, 10)))
    assert raw(averaged(run)["frozen"]) == raw(frozen)


def test_identical_checkpoints_average_to_themselves(make_run: MakeRun) -> None:
    state = {"a": noise(1, 31, dtype=torch.bfloat16)[0], "b": noise(1, 7)[0]}
    result = averaged(make_run([state] * 5), decay=0.5, schedule="constant", allow_duplicates=True)
    assert {name: raw(tensor) for name, tensor in result.items()} == {
        name: raw(tensor) for name, tensor in state.items()
    }


def test_everything_but_floats_keeps_the_newest_value(make_run: MakeRun) -> None:
    numbers = [torch.tensor([16777217 + i, 2**53 + 1 + i]) for i in range(3)]
    flags = [torch.tensor([i == 2, True]) for i in range(3)]
    run = make_run(
        series(
            3,
            w=noise(3, 5),
            n=numbers,
            flag=flags,
            byte=[torch.tensor([250 + i], dtype=torch.uint8) for i in range(3)],
            f8=torch.tensor([2.0]).to(torch.float8_e4m3fn),
        )
    )
    result = averaged(run)
    assert result["n"].dtype == torch.int64
    assert result["n"].tolist() == [16777219, 2**53 + 3]
    assert result["flag"].tolist() == [True, True]
    assert result["byte"].tolist() == [252]
    assert result["f8"].float().item() == 2.0
    notes = " ".join(map(str, ckpt_ema.plan(run).notes))
    for dtype in ("I64", "BOOL", "U8", "F8_E4M3"):
        assert f"{dtype} tensors are not averaged" in notes


@pytest.mark.parametrize("torch_files", [False, True])
def test_neither_tiles_nor_threads_change_a_byte(make_run: MakeRun, torch_files: bool) -> None:
    states = series(
        5,
        a=noise(5, 50, 21, dtype=torch.bfloat16),
        b=noise(5, 333),
        mask=torch.full((65,), -math.inf),
        empty=torch.zeros(0, 3),
        scalar=noise(5, dtype=torch.float16),
        n=torch.arange(40),
    )
    run = make_run(states, torch_files=torch_files)
    outputs = set()
    for tile_size, threads in ((1, 1), (28, 3), (256, 2), (4000, 1), (1 << 20, 5)):
        result = ckpt_ema.average(
            run, device="cpu", overwrite=True, tile_size=tile_size, threads=threads
        )
        outputs.add((result.output / "model.safetensors").read_bytes())
        (result.output / "ckpt_ema.json").unlink()  # else the second is up to date
    assert len(outputs) == 1


def test_a_shadow_in_memory_gives_the_bytes_that_the_engine_writes(make_run: MakeRun) -> None:
    states = series(
        6,
        w=noise(6, 1000, dtype=torch.bfloat16),
        x=noise(6, 10, 10),
        n=torch.tensor(3),
        mask=torch.tensor([-math.inf]),
    )
    shadow = ckpt_ema.Shadow(0.4)
    for state in states:
        shadow.apply(state)
    batch = averaged(make_run(states), decay=0.4)
    for name, tensor in shadow.state_dict().items():
        assert tensor.dtype == batch[name].dtype
        assert raw(tensor) == raw(batch[name])


def test_small_steps_in_bfloat16_do_not_stall(make_run: MakeRun) -> None:
    """With a shadow in bfloat16 the second value would never be seen."""
    values = [torch.ones(4, dtype=torch.bfloat16)] + [
        torch.full((4,), 1.0078125, dtype=torch.bfloat16)
    ] * 99
    run = make_run(series(100, w=values))
    result = averaged(run, decay=0.97, schedule="constant", allow_duplicates=True)
    assert result["w"].tolist() == [1.0078125] * 4


def test_float32_accumulators_are_close_and_said_to_be_less_exact(make_run: MakeRun) -> None:
    run = make_run(series(8, w=noise(8, 4000)))
    exact, fast = averaged(run)["w"], averaged(run, accumulate="float32")["w"]
    assert not torch.equal(exact, fast)
    torch.testing.assert_close(exact, fast, rtol=1e-5, atol=1e-6)


def test_a_wider_dtype_among_the_checkpoints_is_averaged_and_said(make_run: MakeRun) -> None:
    values = [noise(3, 50)[0], noise(3, 50)[1].bfloat16(), noise(3, 50)[2].bfloat16()]
    run = make_run(series(3, w=values))
    expected = ckpt_ema.Shadow(0.999)
    for value in values:
        expected.apply({"w": value})
    assert averaged(run)["w"].dtype == torch.bfloat16
    assert raw(averaged(run)["w"]) == raw(expected.average("w"))
    assert any("another dtype" in str(warning) for warning in ckpt_ema.plan(run).warnings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_output_dtype_can_be_chosen(make_run: MakeRun, dtype: str) -> None:
    run = make_run(
        series(3, odd=noise(3, 3, dtype=torch.bfloat16), n=torch.arange(3), w=noise(3, 5))
    )
    same, other = averaged(run), averaged(run, dtype=dtype)
    assert other["n"].dtype == torch.int64
    for name in ("odd", "w"):
        assert other[name].dtype == getattr(torch, dtype)
        torch.testing.assert_close(other[name].float(), same[name].float(), rtol=2**-7, atol=2**-7)


def test_neighbours_of_other_dtypes_are_not_joined(make_run: MakeRun) -> None:
    """F32 beside F16 become neighbours of one dtype, but are not in the checkpoints."""
    states = series(3, a=noise(3, 6), b=noise(3, 6, dtype=torch.float16))
    result = averaged(make_run(states), dtype="bfloat16")
    shadow = ckpt_ema.Shadow(0.999)
    for state in states:
        shadow.apply({name: tensor.float() for name, tensor in state.items()})
    for name, tensor in result.items():
        assert raw(tensor) == raw(shadow.average(name).bfloat16())


def test_narrow_tensors_do_not_leave_wide_ones_misaligned(make_run: MakeRun) -> None:
    states = series(2, a=noise(2, 3), n=torch.arange(5))
    assert averaged(make_run(states), dtype="float16")["n"].tolist() == [0, 1, 2, 3, 4]
