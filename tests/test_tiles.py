"""The work is cut into tiles and shared out: nothing twice, nothing forgotten, equal in bytes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema.errors import Code, OptionError
from ckpt_ema.fold.tiles import Share, Tile, cut, joined, share_from, tiles
from ckpt_ema.planning.plan import Plan
from tests.conftest import MakeRun, noise, series


def cost(plan: Plan, tile: Tile) -> int:
    """Bytes that a tile reads and writes."""
    read = tile.span.bytes_read(plan.work.layout_of, tile.length)
    return read + tile.span.bytes_written(tile.length)


@pytest.fixture
def plan(make_run: MakeRun) -> Plan:
    """Three averages of three checkpoints with shards, ties in dtype, and integers."""
    states = series(
        3,
        a=noise(3, 41, 7),
        b=noise(3, 1000, dtype=torch.bfloat16),
        n=torch.arange(999),
        z=noise(3, 5),
    )
    return ckpt_ema.plan(make_run(states, shards=2), decay="0.1,0.2,0.3", tile_size=64)


@pytest.mark.parametrize("of", [1, 2, 3, 8, 64, 1000])
def test_shares_are_all_tiles_once_and_equal_to_within_a_tile(plan: Plan, of: int) -> None:
    everything = list(tiles(plan))
    assert [tile.numbers for tile in everything] == [
        range(n, n + 1) for n in range(len(everything))
    ]
    shares = [list(tiles(plan, Share(part, of))) for part in range(1, of + 1)]
    assert [tile for share in shares for tile in share] == everything
    total = sum(cost(plan, tile) for tile in everything)
    largest = max(cost(plan, tile) for tile in everything)
    for share in shares:
        assert abs(sum(cost(plan, tile) for tile in share) - total / of) <= largest


def test_the_tiles_are_all_bytes_of_the_plan(plan: Plan) -> None:
    read = sum(t.span.bytes_read(plan.work.layout_of, t.length) for t in tiles(plan))
    assert read == plan.bytes_read == 3 * (41 * 7 * 4 + 2000 + 20) + 999 * 8
    written = sum(tile.span.bytes_written(tile.length) for tile in tiles(plan))
    assert written == 3 * (41 * 7 * 4 + 2000 + 20 + 999 * 8)
    headers = sum(
        len(chunk.content)
        for average in plan.averages
        for file in average.output.files
        for chunk in file.chunks
    )
    assert written + headers == plan.bytes_written


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(of=st.integers(1, 3000), data=st.data())
def test_any_tile_is_in_one_share(plan: Plan, of: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(1, of))
    mine = {tile.numbers for tile in tiles(plan, Share(part, of))}
    others = {
        tile.numbers
        for other in {max(1, part - 1), min(of, part + 1)} - {part}
        for tile in tiles(plan, Share(other, of))
    }
    assert not mine & others


@pytest.mark.parametrize("most", [1, 16, 40, 100, 10**6])
@pytest.mark.parametrize("left_out", [set(), {3, 66, 67, 100}])
def test_neighbours_are_joined_and_cut_again_without_a_loss(
    plan: Plan, most: int, left_out: set[int]
) -> None:
    """For a device that holds more, or less, than a tile; some tiles are done already."""
    given = [tile for tile in tiles(plan) if tile.numbers.start not in left_out]
    wide = list(joined(given, most))
    assert [number for tile in wide for number in tile.numbers] == [
        number for tile in given for number in tile.numbers
    ]
    # The tiles here have 16 elements, but for the last of a span.
    assert all(tile.length <= max(most, 16) for tile in wide if tile.span.averaged)
    if most == 10**6:
        runs = 1 + sum(
            not one.span.averaged or one.span is not two.span or one.numbers.stop not in two.numbers
            for one, two in pairwise(given)
        )
        assert len(wide) == runs
    for tile in wide:
        parts = list(cut(tile, most))
        assert [part.start for part in parts] == list(
            range(tile.start, tile.start + tile.length, most)
        )
        assert sum(part.length for part in parts) == tile.length
        assert max(part.length for part in parts) <= most


def test_a_plan_without_a_byte_has_no_tiles(make_run: MakeRun) -> None:
    run = make_run(series(2, w=torch.empty(0, 3)))
    assert list(tiles(ckpt_ema.plan(run))) == []
    output = ckpt_ema.average(run, device="cpu").output
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/0", "-1/4", "1/4/2", "", "1 / 4"])
def test_what_is_no_part_is_a_usage_error(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        share_from(text)
    assert caught.value.code is Code.INVALID_OPTION


def test_parts_are_counted_from_1() -> None:
    assert [share_from(text) for text in ("1/1", "1/64", "64/64")] == [(1, 1), (1, 64), (64, 64)]
