"""Files of ranks: whichever rank saved a part, each element is found, and nothing ever runs.

Parts are torch's own DTensors and ShardedTensors, saved by torch.save; what is broken in them is
broken by saving other parts.
"""

import random
import re
import zipfile
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.source import read_specs
from ckpt_ema.containers.specs import Member, ModelFiles, Specs
from ckpt_ema.errors import CkptEmaError, Code, IncompleteError, RefusedError
from ckpt_ema.options import Reading
from ckpt_ema.storage.local import Local
from tests.command import run_together
from tests.conftest import MakeRun
from tests.makers.limits import cheap
from tests.makers.rank_files import SHARDED, VERL, playing, save
from tests.makers.safetensors_files import read_safetensors
from tests.makers.tensors import DTYPES, raw
from tests.makers.torch_files import archive, hostile_pickles, records

ONE = "model.rank_{rank}.pt"  # without the number of ranks
STEPS = (100, 200, 300)


def state(step: int) -> dict[str, torch.Tensor]:
    """A whole model, with sizes that no number of ranks divides."""
    noise = torch.Generator().manual_seed(step)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise)

    return {
        "rows": normal(7, 3),
        "columns": normal(3, 5),
        "inner": normal(2, 5, 3),
        "half": normal(11, 4).to(torch.bfloat16),
        "few": normal(1, 2),
        "scalar": normal(),
        "copies": normal(5),
        "plain": normal(4, 2),
        "count": torch.tensor(step),
        "empty": normal(0, 3),
    }


DIMS: Mapping[str, int | None] = {
    **dict.fromkeys(("rows", "half", "few", "empty"), 0),
    "columns": 1,
    "inner": 1,
    "scalar": None,
    "copies": None,
}
FLAT = {name: (dim,) for name, dim in DIMS.items()}
HYBRID = {name: (None, dim) for name, dim in DIMS.items()}
FSDP1 = dict.fromkeys(("rows", "half", "few", "inner"), SHARDED)
# The outer axis splits, as where FSDP's mesh has an axis of tensor parallelism after it.
OUTER = {name: (dim, None) for name, dim in DIMS.items()}
BOTH = {**HYBRID, "rows": (0, 1), "inner": (2, 0)}
LAYOUTS: dict[str, tuple[Mapping[str, Any], tuple[int, ...]]] = {
    "one rank": (FLAT, (1,)),
    "two ranks": (FLAT, (2,)),
    "four ranks": (FLAT, (4,)),
    "more ranks than rows": (FLAT, (8,)),
    "hybrid": (HYBRID, (2, 3)),
    "outer axis": (OUTER, (3, 2)),
    "both axes": (BOTH, (2, 2)),
    "FSDP1": (FSDP1, (3,)),
    "FSDP1, hybrid": (FSDP1, (2, 2)),
}


def first_of(folder: Path) -> str:
    """The name of the first rank's file."""
    return min(path.name for path in folder.iterdir() if re.search(r"rank_0\.", path.name))


def read(folder: Path, **reading: Any) -> Specs:
    """What our reader says of the model."""
    return read_specs(ModelFiles(folder, (Member(first_of(folder)),)), Local(), Reading(**reading))


def refusal(folder: Path) -> RefusedError:
    """The error with which it is refused, quickly and with little memory."""
    with cheap(1 << 22), pytest.raises(RefusedError) as caught:
        read(folder)
    return caught.value


def check(folder: Path, whole: Mapping[str, torch.Tensor], **reading: Any) -> Specs:
    """Every tensor is found with its dtype, shape and bytes, in any range."""
    specs = read(folder, **reading)
    assert list(specs.tensors) == list(whole)
    with Reader(Local(), [(folder, specs)]) as reader:
        for name, tensor in whole.items():
            spec, width = specs.tensors[name], tensor.element_size()
            assert (spec.dtype, spec.shape) == (DTYPES[tensor.dtype], tuple(tensor.shape)), name
            for start, stop in ((0, tensor.numel()), (1, 3), (tensor.numel() // 2, tensor.numel())):
                if start < stop <= tensor.numel():
                    values = bytearray((stop - start) * width)
                    reader.read_into(0, spec, start * width, memoryview(values))
                    assert values == raw(tensor)[start * width : stop * width], name
    return specs


@pytest.mark.parametrize(("layout", "mesh"), LAYOUTS.values(), ids=LAYOUTS)
class TestLayouts:
    def test_every_element_is_found(
        self, layout: Mapping[str, Any], mesh: tuple[int, ...], tmp_path: Path
    ) -> None:
        specs = check(save(tmp_path, state(1), layout, mesh), state(1))
        assert specs.notes == specs.warnings == ()

    def test_the_average_is_that_of_whole_files(
        self, layout: Mapping[str, Any], mesh: tuple[int, ...], tmp_path: Path, make_run: MakeRun
    ) -> None:
        """By the weights of the plan, and bit for bit for any tile as of one file a step."""
        run = tmp_path / "ranks"
        for step in STEPS:
            save(run / f"global_step_{step}/actor", state(step), layout, mesh)
        whole = make_run([state(step) for step in STEPS], steps=STEPS)
        options: dict[str, Any] = {"decay": 0.9, "device": "cpu"}
        expected = average_of(whole, output=tmp_path / "whole", **options)
        weights = ckpt_ema.plan(run, **options).averages[0].weights
        for name in ("rows", "inner"):
            fold = sum(w * state(s)[name].double() for w, s in zip(weights, STEPS, strict=True))
            assert isinstance(fold, torch.Tensor)
            torch.testing.assert_close(expected[name], fold.float(), rtol=1e-7, atol=1e-12)
        for tile, threads in product((20, 1 << 20), (1, 3)):
            output = tmp_path / f"{tile}-{threads}"
            found = average_of(run, output=output, tile_size=tile, threads=threads, **options)
            assert {n: raw(t) for n, t in found.items()} == {n: raw(t) for n, t in expected.items()}


def average_of(run: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The tensors of an average."""
    result = ckpt_ema.average(run, **options)
    return read_safetensors(result.output / "model.safetensors")


@pytest.mark.parametrize(("layout", "mesh"), [(FLAT, (3,)), (HYBRID, (2, 3))])
def test_an_average_is_written_back_into_the_parts_and_every_copy(
    tmp_path: Path, layout: Mapping[str, Any], mesh: tuple[int, ...]
) -> None:
    """The files are those that the ranks would have saved of the average."""
    run = tmp_path / "ranks"
    for step in STEPS:
        save(run / f"global_step_{step}/actor", state(step), layout, mesh)
    options: dict[str, Any] = {"decay": 0.9, "device": "cpu", "tile_size": 20}
    average = average_of(run, output=tmp_path / "whole", **options)
    output = ckpt_ema.average(run, output=tmp_path / "out", save_as="checkpoint", **options).output
    expected = save(tmp_path / "expected", {n: average[n].clone() for n in state(1)}, layout, mesh)
    for path in expected.iterdir():
        assert records(output / "actor" / path.name) == records(path)


def test_what_a_rank_has_of_its_own_is_averaged_by_itself(tmp_path: Path) -> None:
    """Experts, and statistics of batches, are plain tensors that differ from rank to rank."""
    run, name = tmp_path / "run", VERL.format(ranks=2, rank=1)
    for step in STEPS:
        folder = save(run / f"global_step_{step}", state(step), FLAT)
        content = torch.load(folder / name, weights_only=False)
        content["plain"].fill_(step)
        torch.save(content, folder / name)
    output = ckpt_ema.average(
        run, output=tmp_path / "out", save_as="checkpoint", decay=0.5, schedule="constant"
    ).output
    found = torch.load(output / name, weights_only=False)["plain"]
    assert found.unique().tolist() == [0.25 * 100 + 0.25 * 200 + 0.5 * 300]
    first = torch.load(output / VERL.format(ranks=2, rank=0), weights_only=False)["plain"]
    assert first.unique().numel() == first.numel()


def test_what_a_rank_has_of_its_own_is_kept_if_a_step_was_of_other_ranks(tmp_path: Path) -> None:
    run, (first, *_, last) = tmp_path / "run", STEPS
    for step in STEPS:
        save(run / f"global_step_{step}", state(step), FLAT, (2 if step == first else 3,))
    result = ckpt_ema.average(run, output=tmp_path / "out", save_as="checkpoint")
    name = VERL.format(ranks=3, rank=2)
    kept = torch.load(result.output / name, weights_only=False)["plain"]
    assert raw(kept) == raw(state(last)["plain"])
    assert result.plan
    assert any("of different numbers of ranks" in n.message for n in result.plan.warnings)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_model_beside_other_things_is_found(tmp_path: Path, form: str) -> None:
    root = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, "step": 7}
    save(tmp_path, state(1), FLAT, name=ONE, root=root, form=form)
    assert check(tmp_path, state(1)).recorded == {"step": 7}


def test_a_view_that_is_not_contiguous_is_found(tmp_path: Path) -> None:
    transposed = {"w": torch.arange(12.0).reshape(3, 4).t()}
    check(save(tmp_path, transposed, {"w": (1,)}, (3,)), transposed)


# --- as FSDP2 saves it ----------------------------------------------------------------------------


def _save_as_rank(folder: Path, rank: int) -> None:
    """What one of two ranks does: divide a module, train it a step, save its part."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    module(torch.randn(4, 5)).sum().backward()
    parts = module.state_dict()
    torch.save(parts, folder / VERL.format(ranks=2, rank=rank))
    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in parts.items()}
    if rank == 0:
        torch.save(whole, folder / "whole.pt")
    dist.destroy_process_group()


def test_what_fsdp_saves_on_two_ranks_is_found(tmp_path: Path) -> None:
    run_together(_save_as_rank, [(tmp_path, rank) for rank in (0, 1)])
    specs = check(tmp_path, torch.load(tmp_path / "whole.pt"))
    assert len(specs.tensors["0.weight"].pieces) == 2


# --- what is refused ------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Load what the ranks in a fake group saved, change it, and save it again."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


class TestRefused:
    @pytest.mark.parametrize("rank", [1, 2])
    def test_a_rank_that_is_missing_is_named(self, tmp_path: Path, rank: int) -> None:
        save(tmp_path, state(1), FLAT, (3,))
        (tmp_path / VERL.format(ranks=3, rank=rank)).unlink()
        error = refusal(tmp_path)
        assert isinstance(error, IncompleteError)
        assert VERL.format(ranks=3, rank=rank) in error.message

    @pytest.mark.parametrize("layout", [FLAT, FSDP1])
    def test_the_last_rank_is_missed_where_no_name_counts_them(
        self, tmp_path: Path, layout: Mapping[str, Any]
    ) -> None:
        save(tmp_path, state(1), layout, (3,), ONE)
        (tmp_path / ONE.format(rank=2)).unlink()
        error = refusal(tmp_path)
        assert isinstance(error, IncompleteError)
        assert "a rank is missing" in error.message

    def test_files_of_two_numbers_of_ranks(self, tmp_path: Path) -> None:
        for mesh in ((2,), (3,)):
            save(tmp_path, state(1), FLAT, mesh)
        error = refusal(tmp_path)
        assert error.code is Code.SEVERAL_MODELS
        assert "world_size_2" in error.message
        assert "world_size_3" in error.message

    def test_ranks_of_two_saves_by_their_step(self, tmp_path: Path) -> None:
        for folder, step in (("a", 100), ("b", 200)):
            save(tmp_path / folder, state(step), FLAT, name=ONE, root={"step": step})
        (tmp_path / "b" / ONE.format(rank=1)).replace(tmp_path / "a" / ONE.format(rank=1))
        error = refusal(tmp_path / "a")
        assert "step 200" in error.message
        assert "100: they are of two saves" in error.message

    def test_ranks_of_two_saves_by_their_shapes(self, tmp_path: Path) -> None:
        for folder, rows in (("a", 6), ("b", 8)):
            save(tmp_path / folder, {"w": torch.ones(rows, 2)}, {"w": (0,)})
        name = VERL.format(ranks=2, rank=1)
        (tmp_path / "b" / name).replace(tmp_path / "a" / name)
        assert "two saves" in refusal(tmp_path / "a").message

    def test_plain_tensors_of_other_shapes(self, tmp_path: Path) -> None:
        save(tmp_path, state(1), FLAT)
        with playing(1, 2):
            rewritten(
                tmp_path / VERL.format(ranks=2, rank=1),
                lambda parts: parts.update(plain=torch.ones(3)),
            )
        assert "tensor plain differs" in refusal(tmp_path).message

    def test_a_rank_without_one_of_the_tensors(self, tmp_path: Path) -> None:
        save(tmp_path, state(1), FLAT)
        with playing(1, 2):
            rewritten(tmp_path / VERL.format(ranks=2, rank=1), lambda parts: parts.pop("rows"))
        assert "do not have the same tensors: rows" in refusal(tmp_path).message

    def test_flat_parameters(self, tmp_path: Path) -> None:
        name = "_fsdp_wrapped_module._flat_param"
        for layout in ({}, {name: SHARDED}):
            save(tmp_path, {name: torch.ones(8), "w": torch.ones(2)}, layout)
            error = refusal(tmp_path)
            assert (error.code, error.tensor) == (Code.UNREADABLE_TENSOR, name)
            assert "FULL_STATE_DICT" in error.hint

    def test_tensor_parallelism_along_the_same_dimension(self, tmp_path: Path) -> None:
        save(tmp_path, {"w": torch.ones(8, 2)}, {"w": (0, 0)}, (2, 2))
        error = refusal(tmp_path)
        assert error.code is Code.UNREADABLE_TENSOR
        assert "split twice along one dimension" in error.message

    def test_sums_that_are_not_added_up(self, tmp_path: Path) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Partial

        for rank in (0, 1):
            with playing(rank, 2):
                mesh = init_device_mesh("cpu", (2,))
                part = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
                torch.save({"w": part}, tmp_path / VERL.format(ranks=2, rank=rank))
        assert "the placement Partial" in refusal(tmp_path).message

    def test_the_file_of_another_rank_alone(self, tmp_path: Path) -> None:
        save(tmp_path, state(1), FLAT)
        model = ModelFiles(tmp_path, (Member(VERL.format(ranks=2, rank=1)),))
        with pytest.raises(RefusedError, match="holds the part of rank 1"):
            read_specs(model, Local(), Reading())


# --- damaged and hostile --------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_in_a_hostile_pickle_runs(tmp_path: Path, rank: int) -> None:
    mark = tmp_path / "mark"
    for number, pickled in enumerate(hostile_pickles(mark).values()):
        folder = save(tmp_path / str(number), {"w": torch.ones(4)}, {"w": (0,)})
        archive(folder / VERL.format(ranks=2, rank=rank), pickled)
        with cheap(1 << 22), pytest.raises(CkptEmaError):
            read(folder)
        assert not mark.exists()


@pytest.mark.parametrize("layout", [FLAT, FSDP1], ids=["DTensor", "ShardedTensor"])
def test_nothing_but_a_refusal_comes_of_wrong_bytes(
    tmp_path: Path, layout: Mapping[str, Any]
) -> None:
    """And no element outside of the files."""
    save(tmp_path, {"rows": torch.ones(5, 2), "columns": torch.ones(2, 3)}, layout)
    path, noise = tmp_path / VERL.format(ranks=2, rank=1), random.Random(3)
    with zipfile.ZipFile(path) as saved:
        prefix = saved.namelist()[0].split("/")[0]
        content = saved.read(f"{prefix}/data.pkl")
        data = {f"_{n}": saved.read(f"{prefix}/data/{n}") for n in range(len(saved.namelist()) - 6)}
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(noise.randint(1, 3)):
            damaged[noise.randrange(len(damaged))] = noise.randrange(256)
        archive(path, bytes(damaged), **data)
        try:
            specs = read(tmp_path)
        except CkptEmaError:
            continue
        with Reader(Local(), [(tmp_path, specs)]) as reader:
            for spec in specs.tensors.values():
                reader.read_into(0, spec, 0, memoryview(bytearray(spec.size_bytes)))


WRONG: dict[str, Any] = {
    "offsets that are negative": ("shard_offsets", [-1, 0]),
    "offsets of another rank": ("shard_offsets", [3]),
    "offsets beyond the shape": ("shard_offsets", [4, 0]),
    "offsets that overlap": ("shard_offsets", [2, 0]),
    "offsets that are no numbers": ("shard_offsets", ["3", 0]),
    "sizes of another shape": ("shard_sizes", [1, 2]),
}


@pytest.mark.parametrize(("attribute", "value"), WRONG.values(), ids=WRONG)
def test_a_shard_in_a_wrong_place(tmp_path: Path, attribute: str, value: Any) -> None:
    save(tmp_path, {"w": torch.ones(5, 2)}, {"w": SHARDED})
    with playing(1, 2):
        rewritten(
            tmp_path / VERL.format(ranks=2, rank=1),
            lambda parts: setattr(parts["w"].local_shards()[0].metadata, attribute, value),
        )
    assert refusal(tmp_path).tensor == "w"


def test_a_pickle_that_says_less_than_a_tensor_needs(tmp_path: Path) -> None:
    """A wrapper without a state, and one whose state is another object's."""
    save(tmp_path, {"w": torch.ones(4)}, {"w": (0,)})
    path = tmp_path / VERL.format(ranks=2, rank=0)
    with zipfile.ZipFile(path) as saved:
        content = saved.read(f"{saved.namelist()[0].split('/')[0]}/data.pkl")
    for name in (b"_local_tensor", b"_spec", b"placements", b"_coordinate_on_dim", b"dim"):
        old, new = (len(text).to_bytes(4, "little") + text for text in (name, name[::-1]))
        assert old in content
        archive(path, content.replace(old, new), _0=bytes(8), _1=bytes(8))
        assert refusal(tmp_path).tensor == "w"
