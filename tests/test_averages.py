"""Several averages in one pass: each has the bytes that it has alone, and all appear or none."""

import itertools
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema import OptionError, RefusedError
from ckpt_ema.errors import Code
from ckpt_ema.output.manifest import Result
from tests.conftest import MakeRun, noise, read_safetensors, series, write_safetensors
from tests.makers.faulty_storage import watching_reads
from tests.makers.folds import by_torch, bytes_read_by_this_process

NUMBERS = itertools.count()


def mixed(count: int) -> list[dict[str, torch.Tensor]]:
    """States with every kind of tensor that is treated in its own way."""
    return series(
        count,
        a=noise(count, 50, dtype=torch.bfloat16),
        b=noise(count, 7, 9),
        double=noise(count, 5, dtype=torch.float64),
        half=noise(count, 11, dtype=torch.float16),
        frozen=torch.tensor([-0.0, 0.0, 1.5]),
        mask=torch.tensor([-math.inf, 0.0]),
        steps=[torch.tensor([number, 2**60 + number]) for number in range(count)],
        flags=[torch.tensor([number % 2 == 0]) for number in range(count)],
    )


def model_files(folder: Path) -> dict[str, bytes]:
    """The model files and indexes in a folder."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if ".safetensors" in path.name or path.name == "config.json"
    }


def check_alone(run: Path, together: Result, alone: list[dict[str, Any]]) -> None:
    """Check that each average of several is what the options for it alone give."""
    assert len(together.outputs) == len(alone)
    for number, (output, options) in enumerate(zip(together.outputs, alone, strict=True)):
        single = run.parent / f"alone-{number}"
        made = ckpt_ema.average(run, output=single, device="cpu", overwrite=True, **options)
        assert model_files(output) == model_files(made.output), options


@pytest.mark.parametrize(
    ("together", "alone"),
    [
        ({"decay": "0.2,0.28,0.9"}, [{"decay": d} for d in (0.2, 0.28, 0.9)]),
        (
            {"schedule": "constant", "decay": [0.1, 0.5, 0.51, 0.9, 0.2]},
            [{"schedule": "constant", "decay": d} for d in (0.1, 0.5, 0.51, 0.9, 0.2)],
        ),
        (
            {"decay": 0.2, "half_life": "1,5", "sigma_rel": 0.1, "decay_per_step": 0.9},
            [
                *({"decay": 0.2}, {"sigma_rel": 0.1}, {"decay_per_step": 0.9}),
                *({"half_life": 1}, {"half_life": 5}),
            ],
        ),
        (
            {"last": "2,4,6", "half_life": "3,8"},
            [{"last": n, "half_life": h} for n in (2, 4, 6) for h in (3, 8)],
        ),
        (
            {"best": "1,2,3", "metric": "loss", "schedule": "uniform"},
            [{"best": n, "metric": "loss", "schedule": "uniform"} for n in (1, 2, 3)],
        ),
        (
            {"weights": {"3": 0.25, "checkpoint-5": 0.75}, "decay": 0.2},
            [{"decay": 0.2}, {"weights": {"3": 0.25, "checkpoint-5": 0.75}}],
        ),
    ],
    ids=["caps", "constants", "rules", "selections", "best", "explicit"],
)
@pytest.mark.parametrize("shards", [0, 3])
def test_each_average_is_what_it_is_alone_byte_for_byte(
    make_run: MakeRun, together: dict[str, Any], alone: list[dict[str, Any]], shards: int
) -> None:
    run = make_run(mixed(6), shards=shards)
    for number, loss in enumerate([3.0, 1.0, 2.0, 1.0, 5.0, 4.0], start=1):
        (run / f"checkpoint-{number}/metrics.json").write_text(json.dumps({"loss": loss}))
    made = ckpt_ema.average(run, device="cpu", tile_size=64, threads=3, **together)
    check_alone(run, made, alone)


def test_averages_that_end_at_other_dtypes_and_shards_are_what_they_are_alone(
    make_run: MakeRun,
) -> None:
    """Each takes dtypes, shards and order from its own newest checkpoint."""
    wide = noise(4, 60)
    values = [*wide[:2], *(tensor.bfloat16() for tensor in wide[2:])]
    run = make_run(series(4, x=noise(4, 3), w=values), shards=2)
    for number in (1, 2):
        folder = run / f"checkpoint-{number}"
        (folder / "model.safetensors.index.json").unlink()
        for shard in folder.glob("model-*"):
            shard.unlink()
        state = {"w": values[number - 1], "x": noise(4, 3)[number - 1]}
        write_safetensors(folder / "model.safetensors", state)
    explicit: dict[str, Any] = {"weights": {"1": 0.5, "2": 0.5}}
    made = ckpt_ema.average(run, device="cpu", decay=0.2, tile_size=28, **explicit)
    check_alone(run, made, [{"decay": 0.2}, explicit])


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_averages_are_what_they_are_alone(make_run: MakeRun, data: st.DataObject) -> None:
    """Any selections and decays, on either side of a half, in any order."""
    count = data.draw(st.integers(2, 6))
    name = f"run-{next(NUMBERS)}"
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    run = make_run(series(count, w=noise(count, 40, dtype=dtype)), name=name)
    lasts = data.draw(st.lists(st.integers(1, count), min_size=1, max_size=3, unique=True))
    decays = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True))
    options: dict[str, Any] = {"schedule": data.draw(st.sampled_from(["dynamic", "constant"]))}
    tile = data.draw(st.sampled_from([20, 100, 8000]))
    made = ckpt_ema.average(
        run, device="cpu", last=lasts, decay=decays, tile_size=tile, threads=2, **options
    )
    alone = [{"last": n, "decay": d, **options} for n in lasts for d in decays]
    check_alone(run, made, alone)


def test_the_average_of_several_on_the_newest_of_each(make_run: MakeRun) -> None:
    """Integers keep the value of the newest checkpoint that takes part in that average."""
    run = make_run(mixed(4))
    (run / "weights.txt").write_text("checkpoint-1 0.5\ncheckpoint-2 0.5\n")
    made = ckpt_ema.average(
        run, device="cpu", schedule=None, decay=0.2, weights=run / "weights.txt"
    )
    ema, explicit = (read_safetensors(o / "model.safetensors") for o in made.outputs)
    assert ema["steps"].tolist() == [3, 2**60 + 3]
    assert explicit["steps"].tolist() == [1, 2**60 + 1]
    assert (ema["flags"].item(), explicit["flags"].item()) == (False, False)


def weights(count: int) -> list[torch.Tensor]:
    """Six tensors that do not cancel, as noise does, which is looked at again."""
    return [1 + one / 10 for one in noise(6, count)]


def test_every_byte_is_read_once_whatever_the_number_of_averages(make_run: MakeRun) -> None:
    run = make_run(series(6, w=weights(500), n=torch.arange(3)))
    reads: list[tuple[Path, int, int]] = []
    plan = ckpt_ema.plan(run, last="2,4", half_life="1,2,3")
    assert len(plan.averages) == 6
    assert len(plan.checkpoints) == 4  # the oldest two are in none of them
    assert plan.bytes_read == 4 * 500 * 4 + 3 * 8
    with by_torch(), watching_reads(lambda *read: reads.append(read)):
        ckpt_ema.average(run, device="cpu", last="2,4", half_life="1,2,3", tile_size=256)
    assert len(set(reads)) == len(reads)
    assert sum(size for _, _, size in reads) == plan.bytes_read


def test_the_compiled_fold_reads_every_byte_once_whatever_the_number_of_averages(
    make_run: MakeRun, compiled_module: ModuleType
) -> None:
    run = make_run(series(6, w=weights(1 << 20), n=torch.arange(3)))
    options: dict[str, Any] = {"last": "2,4", "half_life": "1,2,3", "tile_size": 1 << 20}
    ckpt_ema.average(
        run, output=run.parent / "first", device="cpu", **options
    )  # modules are imported, too
    before = bytes_read_by_this_process()
    made = ckpt_ema.average(run, device="cpu", **options)
    read = bytes_read_by_this_process() - before
    assert made.plan.bytes_read == 4 * 4 * (1 << 20) + 3 * 8
    both = made.plan.bytes_read + made.plan.bytes_written  # for the CRC of what was written
    assert made.plan.bytes_read <= read < 1.01 * both  # and headers


def test_one_average_is_the_output_and_several_are_folders_in_it(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(series(4, w=noise(4, 5)))
    one = ckpt_ema.average(run, device="cpu", half_life=2)
    assert one.outputs == (one.output,) == (run.parent / "run-ema",)
    out = tmp_path / "out"
    several = ckpt_ema.average(run, device="cpu", half_life="1,2", last="2,3", output=out)
    names = ["half-life-1-last-2", "half-life-2-last-2"]
    names += ["half-life-1-last-3", "half-life-2-last-3"]
    assert several.outputs == tuple(out / name for name in names)
    assert {path.name for path in out.iterdir()} == set(names)
    for output, manifest in zip(several.outputs, several.manifests, strict=True):
        assert json.loads((output / "ckpt_ema.json").read_text()) == manifest
        assert manifest["name"] == output.name
        assert manifest["half_life"] == float(output.name.split("-")[2])
        assert len(manifest["checkpoints"]) == int(output.name[-1])
        assert (output / "config.json").is_file()


def test_several_are_up_to_date_together_and_other_ones_are_not(make_run: MakeRun) -> None:
    run = make_run(series(4, w=noise(4, 5)))
    assert not ckpt_ema.average(run, device="cpu", decay="0.2,0.25").is_up_to_date
    assert ckpt_ema.average(run, device="cpu", decay="0.2,0.25").is_up_to_date
    for decay in ("0.2,0.24", "0.2,0.25,0.24", 0.2):
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.average(run, device="cpu", decay=decay)
        assert caught.value.code is Code.OUTPUT_EXISTS
    made = ckpt_ema.average(run, device="cpu", decay="0.24,0.25", overwrite=True)
    assert {path.name for path in made.output.iterdir()} == {"dynamic-0.24", "dynamic-0.25"}


def test_a_folder_of_averages_with_something_else_in_it_is_not_replaced(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 5)))
    output = ckpt_ema.average(run, device="cpu", decay="0.1,0.2").output
    (output / "notes").mkdir()
    with pytest.raises(RefusedError, match=r"--overwrite would delete .*notes"):
        ckpt_ema.average(run, device="cpu", decay="0.1,0.3", overwrite=True)
    assert (output / "dynamic-0.1/model.safetensors").is_file()


def test_averages_in_a_folder_of_averages_are_never_steps(make_run: MakeRun) -> None:
    run = make_run(series(4, w=noise(4, 5)))
    output = ckpt_ema.average(run, device="cpu", last="2,3").output
    with pytest.raises(RefusedError):
        ckpt_ema.plan(output)


def test_nan_in_one_of_several_publishes_none(make_run: MakeRun) -> None:
    weights = noise(4, 50)
    weights[0][7] = math.nan
    run = make_run(series(4, w=weights))
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.average(run, device="cpu", last="2,4")
    assert (caught.value.path, caught.value.tensor) == (str(run / "checkpoint-1"), "w")
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]
    assert len(ckpt_ema.average(run, device="cpu", last="2,3").outputs) == 2  # which lack it


def test_a_state_that_is_there_twice_is_seen_between_the_neighbours_of_each(
    make_run: MakeRun,
) -> None:
    """1 and 3 are alike; only an average without 2 has them side by side."""
    tensors = noise(3, 50)
    run = make_run(series(3, w=[tensors[0], tensors[1], tensors[0]]))
    ckpt_ema.average(run, device="cpu")
    several: list[dict[str, Any]] = [
        {"steps": "1,3"},
        {"weights": {"1": 0.5, "3": 0.5}, "decay": 0.2},
    ]
    for options in several:
        with pytest.raises(RefusedError, match="checkpoint-1 and checkpoint-3"):
            ckpt_ema.average(run, device="cpu", output=run.parent / "other", **options)


def test_one_file_cannot_hold_several_and_none_is_made_twice(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 5)))
    with pytest.raises(OptionError):
        ckpt_ema.plan(run, decay="0.1,0.2", output=run.parent / "one.safetensors")
    with pytest.raises(OptionError):
        ckpt_ema.plan(run, decay="0.2,0.20")
    with pytest.raises(OptionError):
        ckpt_ema.plan(run, last="2,2")


def test_averages_whose_tensors_would_have_other_names_are_made_one_at_a_time(
    make_run: MakeRun,
) -> None:
    """The second ends at a checkpoint from before a wrapper was added."""
    run = make_run(series(3, w=noise(3, 5)))
    state = {"_orig_mod.w": noise(1, 5)[0]}
    write_safetensors(run / "checkpoint-3/model.safetensors", state)
    options: dict[str, Any] = {"weights": {"1": 0.5, "2": 0.5}, "decay": 0.2}
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run, **options)
    assert caught.value.code is Code.DIFFERENT_NAMES
    assert len(ckpt_ema.plan(run, strip_prefix="_orig_mod.", **options).averages) == 2


def test_a_weighted_mean_by_hand(make_run: MakeRun) -> None:
    """0.25 * 1 + 0.75 * 3, and (1 + 2 + 3) / 3."""
    run = make_run(series(3, w=[torch.tensor([x]) for x in (1.0, 2.0, 3.0)]))
    made = ckpt_ema.average(
        run, device="cpu", weights={"1": 0.25, "3": 0.75}, half_life=1e12, overwrite=True
    )
    old, explicit = (read_safetensors(o / "model.safetensors")["w"].item() for o in made.outputs)
    assert (explicit, round(old, 6)) == (2.5, 1.0)


def test_memory_of_a_plan_does_not_grow_with_the_number_of_averages(make_run: MakeRun) -> None:
    """The tile shrinks with the number, so each extra one adds less than one accumulator."""
    run = make_run(series(3, w=noise(3, 5)))
    values = [n / 100 for n in range(1, 17)]
    one, two, eight, sixteen = (
        ckpt_ema.plan(run, decay=values[:n], threads=1).memory_bytes for n in (1, 2, 8, 16)
    )
    tile_bytes = (1 << 18) * 8
    assert eight - one <= 7 * tile_bytes
    assert sixteen <= eight <= two
