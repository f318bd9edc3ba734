"""What monitors find: twins, tensors that end in zeros, values that are not finite."""

import json
import math
import operator
from collections.abc import Sequence
from itertools import combinations, pairwise, takewhile
from typing import Any, cast

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema import FailedError, RefusedError
from ckpt_ema.containers.reader import Reader
from ckpt_ema.errors import Code
from ckpt_ema.fold.monitors import make_monitors, watched
from ckpt_ema.fold.monitors.protocol import Monitor, Watched
from ckpt_ema.fold.monitors.twins import Twins
from ckpt_ema.fold.monitors.zeros import Zeros
from ckpt_ema.fold.screen import Screen
from ckpt_ema.fold.tiles import Segments, tiles
from ckpt_ema.fold.views import Seen, TileView
from ckpt_ema.output.manifest import Result
from ckpt_ema.planning.plan import Plan
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, raw, read_safetensors, series, write_safetensors
from tests.makers.faulty_os import faulty

pytestmark = pytest.mark.usefixtures("either_fold")

OPTIONS: dict[str, Any] = {"device": "cpu", "tile_size": 400}


class Contents:
    """Checkpoints in memory, of one tensor each, which monitors read again."""

    def __init__(self, contents: Sequence[bytes]) -> None:
        self._contents = contents

    def read_into(self, checkpoint: int, _tensor: object, start: int, buffer: memoryview) -> None:
        """See `Reader.read_into`."""
        buffer[:] = self._contents[checkpoint][start : start + len(buffer)]


def show(
    monitor: Monitor, plan: Plan, contents: list[bytes], dtype: torch.dtype = torch.float32
) -> None:
    """Show a monitor the first tile of a plan, whose checkpoints hold these bytes."""
    tile, anything = next(tiles(plan)), cast(Any, None)
    segments = Segments(plan).of(tile)
    screen = Screen(plan, segments, tile.length, hashes=True)
    for number, content in enumerate(contents):
        values = torch.frombuffer(bytearray(content), dtype=dtype)
        screen.see(number, memoryview(content), values)
    read_again = cast(Reader, Contents(contents))
    monitor.look(TileView(plan, tile, segments, read_again, anything), screen.seen())


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_monitor_that_gets_the_state_of_another_has_its_verdict(
    make_run: MakeRun, number: int
) -> None:
    """As the monitors of a resumed run do, and those of `finish`."""
    plan = ckpt_ema.plan(make_run(series(3, w=noise(3, 10))), allow_zeros=True)
    seen, other = (make_monitors(watched(plan))[number] for _ in range(2))
    show(seen, plan, [b"\1" * 40, b"\2" * 40, bytes(40)])
    other.merge(json.loads(json.dumps(seen.state())))
    assert other.verdict() == seen.verdict()
    assert other.state() == seen.state()


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), min_size=2, max_size=6), st.data()
)
def test_exactly_the_pairs_that_are_equal_are_found(
    checkpoints: list[list[int]], data: st.DataObject
) -> None:
    all_pairs = list(combinations(range(len(checkpoints)), 2))
    pairs = data.draw(st.lists(st.sampled_from(all_pairs), unique=True))
    monitor = Twins(Watched((), tuple(pairs), (), False, False, False, False))
    anything: Any = None
    for tile in data.draw(st.permutations(range(3))):
        hashes = [values[tile] for values in checkpoints] if monitor.wants_hashes() else []
        monitor.look(anything, Seen([], [], hashes))
    assert monitor.state() == [(a, b) for a, b in pairs if checkpoints[a] != checkpoints[b]]


def test_a_mislabelled_copy_is_refused_and_leaves_nothing(make_run: MakeRun) -> None:
    tensors = noise(3, 1000)
    run = make_run(series(3, w=[tensors[0], tensors[1], tensors[1]], frozen=torch.ones(5)))
    with pytest.raises(RefusedError, match="checkpoint-2 and checkpoint-3") as caught:
        ckpt_ema.average(run, device="cpu", tile_size=256, threads=3)
    assert "--allow-duplicates" in caught.value.hint
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    output = ckpt_ema.average(run, device="cpu", allow_duplicates=True).output
    assert read_safetensors(output / "model.safetensors")["frozen"].tolist() == [1.0] * 5


def test_frozen_tensors_are_no_twins(make_run: MakeRun) -> None:
    run = make_run(series(4, frozen=noise(1, 4000)[0], w=noise(4, 3)))
    ckpt_ema.average(run, device="cpu", tile_size=400)


def test_where_nothing_is_averaged_nothing_is_a_copy(make_run: MakeRun) -> None:
    run = make_run(series(3, seen=[torch.tensor([n]) for n in range(3)], w=torch.empty(0, 4)))
    output = ckpt_ema.average(run, device="cpu").output
    assert read_safetensors(output / "model.safetensors")["seen"].tolist() == [2]


def zeros_of(result: Result) -> list[str]:
    """The warnings of checkpoints with new zeros, which the manifest has too."""
    described = [warning.described() for warning in result.warnings]
    assert result.manifests[0]["warnings_of_reading"] == described
    assert all(warning.code is Code.ZEROS for warning in result.warnings)
    return [str(warning) for warning in result.warnings]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Plan]:
    """Plans of eight checkpoints with one tensor of twelve elements, by the size of these."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        run = tmp_path_factory.mktemp("run")
        for step, tensor in enumerate(noise(8, 12, dtype=dtype)):
            write_safetensors(run / f"step_{step}.safetensors", {"w": tensor})
        found[dtype.itemsize] = ckpt_ema.plan(run)
    return found


@example([[0] * 12, [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]], 2)
@example([[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], [0] * 12], 4)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=12, max_size=12), min_size=1, max_size=8),
    st.sampled_from([2, 4, 8]),
)
def test_zeros_are_new_if_they_end_a_tensor_and_the_neighbour_has_fewer(
    plans: dict[int, Plan], contents: list[list[int]], itemsize: int
) -> None:
    monitor = Zeros(watched(plans[itemsize]))
    contents += contents[-1:] * (8 - len(contents))
    values = [b"".join(n.to_bytes(itemsize, "little") for n in content) for content in contents]
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    show(monitor, plans[itemsize], values, dtype)
    at_end = [len(list(takewhile(operator.not_, reversed(one)))) for one in contents]
    # All of it may have become zero, or only more of its end.
    new = {
        later
        for later, (before, now) in enumerate(pairwise(at_end), start=1)
        if now - before >= 8 or now == 12 > before
    }
    if 12 > at_end[0] >= at_end[1] + 8:  # not zero as a whole
        new.add(0)
    assert {onset.checkpoint for onset in monitor.state()} == new


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


def test_zeros_that_were_always_there_are_no_warning(
    make_run: MakeRun, states: list[dict[str, torch.Tensor]]
) -> None:
    assert zeros_of(ckpt_ema.average(make_run(states), **OPTIONS)) == []


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("number", [1, 3])
def test_the_end_of_a_file_that_was_never_written_is_refused_or_a_warning(
    make_run: MakeRun, states: list[dict[str, torch.Tensor]], number: int, threads: int
) -> None:
    """Safetensors has the order of the dict: all bytes after the middle of `b` are zero."""
    states[number]["b"][15:] = 0
    states[number]["lora_b"].zero_()
    run, options = make_run(states), {**OPTIONS, "threads": threads}
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.average(run, **options)
    assert (caught.value.code, caught.value.tensor) == (Code.ZEROS, "b")
    assert "--allow-zeros" in caught.value.hint
    [warning] = zeros_of(ckpt_ema.average(run, allow_zeros=True, **options))
    assert f"checkpoint-{number + 1}: tensor b holds zeros from byte 600 to its end" in warning


def test_a_tensor_that_shares_its_tile_is_named(make_run: MakeRun) -> None:
    """Zeros must end a tensor, which those of `a` in checkpoint-2 do not."""
    states = series(4, a=noise(4, 500), b=noise(4, 60), c=noise(4, 70))
    states[1]["a"][100:400] = 0
    states[2]["b"][30:] = 0
    states[2]["c"].zero_()
    [warning] = zeros_of(ckpt_ema.average(make_run(states), device="cpu", allow_zeros=True))
    assert "checkpoint-3: tensor c holds zeros from byte 0 to its end" in warning


def test_a_run_that_resumes_remembers_what_was_seen(
    make_run: MakeRun, states: list[dict[str, torch.Tensor]]
) -> None:
    states[3]["a"].zero_()
    run, options = make_run(states), {**OPTIONS, "threads": 1, "resume": True, "allow_zeros": True}
    with faulty("pwrite", 10, suffix=".safetensors"), pytest.raises(FailedError):
        ckpt_ema.average(run, **options)
    [warning] = zeros_of(ckpt_ema.average(run, **options))
    assert "checkpoint-4: tensor a holds zeros" in warning


def test_parts_and_the_command_warn_once_of_each_checkpoint(
    make_run: MakeRun, states: list[dict[str, torch.Tensor]]
) -> None:
    for tensor in states[3].values():
        tensor.zero_()
    run = make_run(states)
    output = run.parent / "parts"
    for part in ("1/2", "2/2"):
        ckpt_ema.average_part(run, part, output=output, allow_zeros=True, **OPTIONS)
    whole = command("average", run, "--device", "cpu", "--allow-zeros")
    for done in (command("finish", output), whole):
        warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        assert done.returncode == 0
        assert len([line for line in warnings if "checkpoint-4: tensor a holds zeros" in line]) == 1


def refusal(run: Any, **options: Any) -> RefusedError:
    """The error of a run, which leaves nothing."""
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.average(run, device="cpu", **options)
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    return caught.value


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_or_infinity_in_a_checkpoint_is_counted_and_named(
    make_run: MakeRun, bad: float
) -> None:
    values = noise(4, 300)
    values[2][[7, 200]] = bad
    run = make_run(series(4, fine=noise(4, 90), w=values))
    error = refusal(run, tile_size=400)
    assert (error.code, error.path, error.tensor) == (
        Code.NONFINITE,
        str(run / "checkpoint-3"),
        "w",
    )
    kind = "2 NaN" if math.isnan(bad) else "2 infinite"
    assert f"holds {kind} values (of 300)" in error.message
    assert "--allow-nonfinite" in error.hint
    output = ckpt_ema.average(run, device="cpu", allow_nonfinite=True).output
    tensors = read_safetensors(output / "model.safetensors")
    assert not tensors["w"][7].isfinite()
    assert tensors["w"][8].isfinite()
    assert tensors["fine"].isfinite().all()


def test_nan_is_not_blamed_on_a_mask_that_never_changes(make_run: MakeRun) -> None:
    values = noise(4, 9)
    values[2][5] = math.nan
    run = make_run(series(4, a_mask=torch.full((8,), -math.inf), w=values))
    error = refusal(run)
    assert (error.path, error.tensor) == (str(run / "checkpoint-3"), "w")
    assert "1 NaN values (of 9)" in error.message


def test_overflow_of_a_narrow_output_is_named(make_run: MakeRun) -> None:
    error = refusal(make_run(series(2, w=torch.tensor([70000.0]))), dtype="float16")
    assert (error.code, error.tensor) == (Code.OVERFLOW, "w")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_infinities_that_never_change_are_kept(make_run: MakeRun, dtype: torch.dtype) -> None:
    mask = torch.tensor([[0.0, -math.inf], [math.inf, 1.5]]).to(dtype)
    run = make_run(series(4, mask=mask, w=noise(4, 100, dtype=dtype)))
    output = ckpt_ema.average(run, device="cpu").output
    assert raw(read_safetensors(output / "model.safetensors")["mask"]) == raw(mask)
