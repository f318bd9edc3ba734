"""Weights that turn to zeros from one checkpoint to the next are told, and no others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema.errors import FailedError
from ckpt_ema.fold.monitors.zeros import TileZeros
from ckpt_ema.output import publish
from ckpt_ema.output.result import Result
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, series

OPTIONS: dict[str, Any] = {"device": "cpu", "tile_size": 400}


def told(result: Result) -> list[str]:
    """The warnings of reading in the manifest."""
    found: list[str] = result.manifests[0]["warnings_of_reading"]
    return found


def test_by_hand() -> None:
    zeros = TileZeros()
    contents = [bytes(40), b"\1" + bytes(39), bytes(40), bytes(40), b"\1" * 20 + bytes(20)]
    contents += [b"\1" * 8 + bytes(32), b"\1" * 40, bytes(40)]
    newly = [zeros.newly(memoryview(content), 4) for content in contents]
    assert newly[:5] == [range(0), range(1, 0), range(1), range(0), range(5, 0)]
    assert newly[5:] == [range(2, 5), range(10, 2), range(10)]


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=12, max_size=12), max_size=8),
    st.sampled_from([2, 4, 8]),
)
def test_of_any_contents_the_end_is_new_that_is_zero_and_was_not(
    contents: list[list[int]], element_bytes: int
) -> None:
    zeros, before = TileZeros(), None
    for content in contents:
        elements = [number.to_bytes(element_bytes, "little") for number in content]
        found = zeros.newly(memoryview(b"".join(elements)), element_bytes)
        text = "".join(map(str, content))
        end = len(text) - len(text.rstrip("0"))
        if end * element_bytes < 16:
            end = 0  # too little to look at
        assert list(found) == list(range(12 - end, 12 - (end if before is None else before)))
        before = end


@pytest.fixture
def states() -> list[dict[str, torch.Tensor]]:
    """Four states; masks are zero in all, and a fresh adapter's factor is zero in the first."""
    states = series(
        4,
        a=noise(4, 500),
        b=noise(4, 30, 20, dtype=torch.bfloat16),
        mask=torch.zeros(300),
        lora_b=noise(4, 200),
    )
    states[0]["lora_b"] = torch.zeros(200)
    return states


def test_nothing_is_said_of_zeros_that_were_always_there(
    make_run: MakeRun, states: list[dict[str, torch.Tensor]]
) -> None:
    assert told(ckpt_ema.average(make_run(states), **OPTIONS)) == []


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("number", [1, 3])
def test_the_end_of_a_file_that_was_never_written_is_told(
    make_run: MakeRun, states: list[dict[str, torch.Tensor]], number: int, threads: int
) -> None:
    """The bytes of safetensors lie as the dict has them: all after the middle of `b` is zeros."""
    states[number]["b"][15:] = 0
    states[number]["lora_b"].zero_()
    result = ckpt_ema.average(make_run(states), threads=threads, **OPTIONS)
    assert told(result) == [
        f"checkpoint-{number + 1} turns to zeros in tensor b, which were none in the checkpoint"
        " before: was its save interrupted?"
    ]


def test_a_tensor_that_shares_its_tile_is_told(make_run: MakeRun) -> None:
    """All of it must have turned, not half, as that of checkpoint-2."""
    states = series(4, a=noise(4, 500), b=noise(4, 60), c=noise(4, 70))
    states[1]["c"][35:] = 0
    states[2]["b"][30:] = 0
    states[2]["c"].zero_()
    [warning] = told(ckpt_ema.average(make_run(states), device="cpu"))
    assert warning.startswith("checkpoint-3 turns to zeros in tensor c, ")


def test_a_run_that_is_taken_up_remembers_it(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, states: list[dict[str, torch.Tensor]]
) -> None:
    states[3]["a"].zero_()
    run, options = make_run(states), {**OPTIONS, "threads": 1, "resume": True}
    real = publish.StagedOutput.write

    def failing(staged: Any, file: int, data: memoryview, offset: int) -> None:
        if offset > 2500:
            raise FailedError("The disk is gone.")
        real(staged, file, data, offset)

    monkeypatch.setattr(publish.StagedOutput, "write", failing)
    with pytest.raises(FailedError):
        ckpt_ema.average(run, **options)
    monkeypatch.setattr(publish.StagedOutput, "write", real)
    [warning] = told(ckpt_ema.average(run, **options))
    assert warning.startswith("checkpoint-4 turns to zeros in tensor a, ")


def test_parts_and_the_command_tell_it(
    make_run: MakeRun, states: list[dict[str, torch.Tensor]]
) -> None:
    for tensor in states[3].values():
        tensor.zero_()
    run = make_run(states)
    output = run.parent / "parts"
    for part in ("1/2", "2/2"):
        ckpt_ema.average_part(run, part, output=output, **OPTIONS)
    done = command("finish", output)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert done.returncode == 0
    assert warnings[0].startswith("warning: checkpoint-4 turns to zeros in tensor a, ")


def test_the_command_tells_it(make_run: MakeRun, tmp_path: Path) -> None:
    weights = [*noise(2, 5), torch.zeros(5)]
    done = command("average", make_run(series(3, w=weights)), "--device", "cpu")
    assert done.returncode == 0
    assert "\nwarning: checkpoint-3 turns to zeros in tensor w, " in done.stderr
