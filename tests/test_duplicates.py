"""Two steps with one state are told, whatever order tiles come in; frozen parts alone are not."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema.errors import RefusedError
from ckpt_ema.fold.monitors.twins import TileTwins, Twins
from tests.conftest import MakeRun, noise, read_safetensors, series


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), min_size=2, max_size=6), st.data()
)
def test_exactly_the_pairs_that_are_alike_are_found(
    checkpoints: list[list[int]], data: st.DataObject
) -> None:
    all_pairs = list(combinations(range(len(checkpoints)), 2))
    pairs = data.draw(st.lists(st.sampled_from(all_pairs), unique=True))
    twins = Twins(pairs)
    for tile in data.draw(st.permutations(range(3))):
        seen = TileTwins(twins)
        for number, values in enumerate(checkpoints):
            seen.see(number, memoryview(bytes([values[tile]])))
    assert twins.found == [(a, b) for a, b in pairs if checkpoints[a] == checkpoints[b]]


def test_a_mislabelled_copy_is_refused_and_leaves_nothing(make_run: MakeRun) -> None:
    tensors = noise(3, 1000)
    run = make_run(series(3, w=[tensors[0], tensors[1], tensors[1]], frozen=torch.ones(5)))
    message = "checkpoint-2 and checkpoint-3 hold the same model weights.*--allow-duplicates"
    with pytest.raises(RefusedError, match=message):
        ckpt_ema.average(run, device="cpu", tile_size=256, threads=3)
    assert not Path(f"{run}-ema").exists()
    output = ckpt_ema.average(run, device="cpu", allow_duplicates=True).output
    assert read_safetensors(output / "model.safetensors")["frozen"].tolist() == [1.0] * 5


def test_frozen_tensors_are_no_reason(make_run: MakeRun) -> None:
    run = make_run(series(4, frozen=noise(1, 4000)[0], w=noise(4, 3)))
    ckpt_ema.average(run, device="cpu", tile_size=400)


def test_where_nothing_is_averaged_nothing_is_a_copy(make_run: MakeRun) -> None:
    run = make_run(series(3, seen=[torch.tensor([n]) for n in range(3)], w=torch.empty(0, 4)))
    output = ckpt_ema.average(run, device="cpu").output
    assert read_safetensors(output / "model.safetensors")["seen"].tolist() == [2]
