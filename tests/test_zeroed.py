"""Weights that turn to zeros from one checkpoint to the next are told, and no others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema.folding.zeroed import TileZeros
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
    contents = [bytes(40), b"\1" + bytes(39), bytes(40), bytes(40), b"\1" * 40, bytes(40)]
    turned = [zeros.turns(memoryview(content)) for content in contents]
    assert turned == [False, False, True, False, False, True]


@given(st.lists(st.binary(min_size=1, max_size=40) | st.just(bytes(20)), max_size=8))
def test_of_any_contents_those_turn_whose_bytes_are_all_zero_after_some_that_are_not(
    contents: list[bytes],
) -> None:
    zeros = TileZeros()
    for before, content in zip([b"\0", *contents], contents, strict=False):
        assert zeros.turns(memoryview(content)) == (not any(content) and any(before))


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
