"""Models that are averaged file by file and written back, whatever their sharding."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckpt_ema
from ckpt_ema.errors import Code, OptionError, RefusedError
from tests.conftest import read_safetensors
from tests.makers.tensors import raw
from tests.makers.torch_files import archive, hostile_pickles, save

pytestmark = pytest.mark.usefixtures("either_fold")

STEPS = (100, 200, 300)
HALF = torch.bfloat16
Tensor = torch.Tensor
Files = Mapping[str, Any]  # the content of the files of one step; bytes are of no torch file


def weight(step: int, part: int, dtype: torch.dtype = HALF) -> Tensor:
    """The part of a weight in one file."""
    generator = torch.Generator().manual_seed(10 * step + part)
    return torch.randn(4, 5, generator=generator).to(dtype)


def megatron(step: int) -> Files:
    """Two tensor-parallel ranks with the nested names of older releases, and masters."""
    files: dict[str, Any] = {}
    for rank in range(2):
        language = {
            "embedding": {"word": {"weight": weight(step, rank)}},
            "norm.bias": torch.ones(3),
        }
        masters = [[weight(step, rank, torch.float32)]]
        files[f"mp_rank_0{rank}/model_optim_rng.pt"] = {
            "iteration": step,
            "model": {"language_model": language},
            "optimizer": {"optimizer": {"state": {}}, "fp32_from_fp16_params": masters},
            "rng_state": [{"cpu": torch.arange(9) + step}],
        }
    return files


def virtual_pipeline(step: int) -> Files:
    """Two chunks of the model on each rank."""
    chunks = {f"model{n}": {"layer.weight": weight(step, n)} for n in range(2)}
    return {"mp_rank_00_000/model_optim_rng.pt": {"iteration": step, **chunks}}


def neox(step: int) -> Files:
    """A file for each layer, and ZeRO-1's masters."""
    layers = {
        f"layer_0{n}-model_00-model_states.pt": {"mlp.weight": weight(step, n)} for n in range(2)
    }
    flat = torch.cat([weight(step, n, torch.float32).flatten() for n in range(2)])
    state = {"single_partition_of_fp32_groups": [flat], "partition_count": [1]}
    return {
        **layers,
        "mp_rank_00_model_states.pt": {"module": None, "global_steps": step, "args": {"tp": 1}},
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": {"optimizer_state_dict": state},
        "configs/tiny.yml": b"layers: 2",
    }


def experts(step: int) -> Files:
    """A mixture of experts of DeepSpeed."""
    return {
        "mp_rank_00_model_states.pt": {"module": {"w": weight(step, 0)}, "global_steps": step},
        "layer_0_expert_0_mp_rank_00_model_states.pt": {"expert.w": weight(step, 1)},
        "expp_rank_0_mp_rank_00_optim_states.pt": {
            "optimizer": {"fp32_groups_flat": [weight(step, 1, torch.float32)]}
        },
    }


LAYOUTS = {
    "iter_{:07}": [megatron, virtual_pipeline],
    "global_step{}": [neox, experts],
}
CASES = [(name, make) for name, makes in LAYOUTS.items() for make in makes]


def make_run(folder: Path, name: str, make: Any) -> Path:
    """Save three steps."""
    for step in STEPS:
        for file, content in make(step).items():
            path = folder / name.format(step) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content) if isinstance(content, bytes) else save(path, content)
    return folder


def tensors(content: Any, place: str = "") -> dict[str, Tensor]:
    """Every tensor in dicts and lists, by its path."""
    if isinstance(content, Tensor):
        return {place: content}
    if not isinstance(content, dict | list):
        return {}
    items = content.items() if isinstance(content, dict) else enumerate(content)
    return {k: t for key, one in items for k, t in tensors(one, f"{place}.{key}").items()}


def fold(values: list[Tensor]) -> Tensor:
    """The average in float64, rounded once."""
    shadow = values[0].double()
    for n, value in enumerate(values[1:], start=1):
        shadow = shadow + (1 - (1 + n) / (10 + n)) * (value.double() - shadow)
    return shadow.to(values[0].dtype)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_the_weights_and_masters_in_every_file_are_averaged(
    tmp_path: Path, name: str, make: Any
) -> None:
    """By default, since no other format would be loaded; all else is the newest's."""
    run = make_run(tmp_path / "run", name, make)
    result = ckpt_ema.average(run, output=tmp_path / "out", device="cpu")
    assert result.plan and any("(--save-as checkpoint)" in one.message for one in result.plan.notes)
    assert not result.plan.warnings
    count = 0
    for file, content in make(300).items():
        if isinstance(content, bytes):
            assert (tmp_path / "out" / file).read_bytes() == content
            continue
        found = tensors(torch.load(tmp_path / "out" / file, weights_only=True))
        states = [tensors(make(step)[file]) for step in STEPS]
        assert found.keys() == states[-1].keys()
        for path, tensor in found.items():
            is_weight = tensor.is_floating_point()
            expected = fold([state[path] for state in states]) if is_weight else states[-1][path]
            assert raw(tensor) == raw(expected), (file, path)
            count += is_weight and tensor.numel() == 20
    assert count >= 2


def test_each_tensor_of_nanotron_is_averaged_in_its_file(tmp_path: Path) -> None:
    run = tmp_path / "run"
    names = [f"model_weight_pp-rank-0-of-1_tp-rank-{n}-of-2.safetensors" for n in range(2)]
    for step in STEPS:
        folder = run / f"{step}/model/model/decoder"
        folder.mkdir(parents=True)
        for number, name in enumerate(names):
            save_file({"data": weight(step, number)}, folder / name, {"version": "1.4"})
        (run / f"{step}/checkpoint_metadata.json").write_text('{"metas": {}}')
    (run / "latest.txt").write_text("300")
    output = ckpt_ema.average(run, output=tmp_path / "out", device="cpu").output
    for number, name in enumerate(names):
        found = read_safetensors(output / "300/model/model/decoder" / name)
        assert raw(found["data"]) == raw(fold([weight(step, number) for step in STEPS]))
    assert (output / "300/checkpoint_metadata.json").read_text() == '{"metas": {}}'
    assert (output / "latest.txt").read_text() == "300"


def test_digests_of_the_files_are_left_out(tmp_path: Path) -> None:
    """They would not be those of the average, and its trainer would refuse it."""
    run = make_run(tmp_path / "run", "iter_{:07}", megatron)
    for step in STEPS:
        (run / f"iter_{step:07}/integrity.json").write_text("{}")
    output = ckpt_ema.average(run, output=tmp_path / "out", device="cpu").output
    assert sorted(path.name for path in output.iterdir()) == [
        "ckpt_ema.json",
        "mp_rank_00",
        "mp_rank_01",
    ]


def beside_the_model(step: int) -> Files:
    """Floating point that is no weight, and an average of the trainer's own."""
    return {
        "mp_rank_00/model_optim_rng.pt": {
            "iteration": step,
            "model": {"w": weight(step, 0)},
            "ema": {"w": weight(step, 1)},
            "rerun_state_machine": {"statistics": {"loss": weight(step, 2)}},
        },
        "mp_rank_01/model_optim_rng.pt": {
            "iteration": step,
            "module": None,
            "client": {"loss": weight(step, 3)},
        },
    }


@pytest.mark.parametrize(
    ("options", "averaged"),
    [({}, {"model"}), ({"key": "model"}, {"model"}), ({"which": "ema"}, {"ema"})],
)
def test_only_the_model_in_a_file_is_averaged(
    tmp_path: Path, options: Any, averaged: set[str]
) -> None:
    """Statistics, losses and what a client saves keep the newest value."""
    run = make_run(tmp_path / "run", "iter_{:07}", beside_the_model)
    ckpt_ema.average(run, output=tmp_path / "out", device="cpu", **options)
    for file, content in beside_the_model(300).items():
        found = tensors(torch.load(tmp_path / "out" / file, weights_only=True))
        for path, newest in tensors(content).items():
            is_newest = raw(found[path]) == raw(newest)
            assert is_newest is not (path.split(".")[1] in averaged), path


def test_a_key_that_no_file_has_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "iter_{:07}", megatron)
    assert refused(run, key="nonsense").code is Code.NO_MODEL


def test_parts_and_threads_make_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "iter_{:07}", megatron)
    made: list[dict[Path, bytes]] = []
    ways: list[Any] = [{"threads": 1, "tile_size": 8}, {"threads": 3}]
    for number, options in enumerate(ways):
        output = tmp_path / f"{number}"
        ckpt_ema.average(run, output=output, device="cpu", **options)
        made.append({p.relative_to(output): p.read_bytes() for p in output.rglob("*.pt")})
    for part in ("1/3", "2/3", "3/3"):
        ckpt_ema.average_part(run, part, output=tmp_path / "parts", device="cpu")
    output = ckpt_ema.finish(tmp_path / "parts").output
    made.append({p.relative_to(output): p.read_bytes() for p in output.rglob("*.pt")})
    assert len(made[0]) == 2
    assert made[0] == made[1] == made[2]


# --- What is refused ------------------------------------------------------------------------------


def refused(run: Path, **options: Any) -> RefusedError:
    """The error of a plan."""
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run, output=run.parent / "out", device="cpu", **options)
    return caught.value


def test_safetensors_are_refused_with_the_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "global_step{}", neox)
    error = refused(run, save_as="safetensors")
    assert error.code is Code.UNSUPPORTED_FORMAT
    assert "--save-as checkpoint, or convert each step first" in str(error.hint)
    with pytest.raises(OptionError, match="--dtype cannot be used with --save-as checkpoint"):
        ckpt_ema.plan(run, output=tmp_path / "out", dtype="float32")


@pytest.mark.parametrize(("name", "make"), [c for c in CASES if c[1] is not virtual_pipeline])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str, make: Any) -> None:
    run = make_run(tmp_path / "run", name, make)
    first = next(iter(make(300)))
    (run / name.format(300) / first).unlink()
    assert first.split("/")[-1] in str(refused(run))


def test_a_view_with_gaps_is_refused_with_a_way_out_that_exists(tmp_path: Path) -> None:
    def strided(step: int) -> Files:
        view = torch.full((4, 10), float(step))[:, ::2]
        return {"mp_rank_00/model_optim_rng.pt": {"iteration": step, "model": {"w": view}}}

    hint = str(refused(make_run(tmp_path / "run", "iter_{:07}", strided)).hint)
    assert hint.startswith("Convert each step first")


def test_files_of_two_saves_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "iter_{:07}", megatron)
    stale = "mp_rank_01/model_optim_rng.pt"
    (run / "iter_0000300" / stale).write_bytes((run / "iter_0000200" / stale).read_bytes())
    error = refused(run)
    assert "records step 200" in str(error)
    assert "of two saves" in str(error)


def test_nothing_in_a_hostile_file_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for number, pickled in enumerate(hostile_pickles(mark).values()):
        run = make_run(tmp_path / f"{number}/run", "iter_{:07}", megatron)
        archive(run / "iter_0000300/mp_rank_01/model_optim_rng.pt", pickled)
        refused(run)
        assert not mark.exists()


@pytest.mark.parametrize(("name", "make"), CASES)
def test_such_a_run_is_inspected_and_compared(name: str, make: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name, make)
    found = ckpt_ema.inspect(run)
    assert [one.step for one in found.checkpoints] == [*STEPS]
    assert all(one.norm for one in found.checkpoints)
    assert ckpt_ema.compare(f"{run}@100", f"{run}@100").is_equal
    between = ckpt_ema.compare(f"{run}@100", f"{run}@200").distance.relative_distance
    assert 1 < (between or 0) < 2  # independent noise
