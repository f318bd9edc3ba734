"""An average that is written back is in the masters of an optimizer too, or it is said that not."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import Code, RefusedError
from tests.conftest import MakeRun
from tests.makers import dcp_folders, deepspeed_folders
from tests.makers.tensors import raw
from tests.makers.torch_files import archive, hostile_pickles, save

pytestmark = pytest.mark.usefixtures("either_fold")

STEPS = (100, 200, 300)
OPTIONS: dict[str, Any] = {"device": "cpu", "threads": 2, "save_as": "checkpoint"}
Tensor = torch.Tensor


def masters(step: int) -> dict[str, Tensor]:
    """The weights in float32; training changes them by less than bfloat16 can hold."""
    generator = torch.Generator().manual_seed(0)
    base = {"w.in": torch.randn(40, 30, generator=generator), "w.out": torch.ones(7)}
    return {name: tensor + step * 1e-5 for name, tensor in base.items()}


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As training uses them."""
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def fold(run: Path, tensors: list[Tensor]) -> Tensor:
    """The average in float64."""
    [average] = ckpt_ema.plan(run, output=run.parent / "unused", **OPTIONS).averages
    shadow = tensors[0].double()
    for decay, tensor in zip(average.decays, tensors[1:], strict=True):
        shadow = shadow + (1 - decay) * (tensor.double() - shadow)
    return shadow


def is_fold(found: Tensor, run: Path, tensors: list[Tensor]) -> None:
    """The tensor is the average, rounded once."""
    assert raw(found) == raw(fold(run, tensors).to(found.dtype))


def average(run: Path, **options: Any) -> Path:
    """Write the average of a run back."""
    return ckpt_ema.average(run, output=run.parent / "out", **{**OPTIONS, **options}).output


def notices(run: Path) -> tuple[list[str], list[str]]:
    """The warnings of other weights, and the notes on masters."""
    plan = ckpt_ema.plan(run, output=run.parent / "out", **OPTIONS)
    warnings = [one.message for one in plan.warnings if one.code is Code.OTHER_WEIGHTS]
    return warnings, [one.message for one in plan.notes if "optimizer's own copy" in one.message]


def megatron(step: int) -> dict[str, Any]:
    """The flat names of Megatron's distributed checkpoints."""
    own = masters(step)
    return {
        **rounded(own),
        **{f"optimizer.state.fp32_param.{name}": tensor for name, tensor in own.items()},
        **{f"optimizer.state.exp_avg.{name}": torch.randn_like(own[name]) for name in own},
    }


def test_weights_are_rounded_from_the_average_of_masters_with_their_names(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in STEPS:
        dcp_folders.save(run / f"step-{step}", megatron(step))
    found = dcp_folders.tensors(average(run))
    newest = dcp_folders.tensors(run / "step-300")
    for name in masters(1):
        states = [masters(step)[name] for step in STEPS]
        is_fold(found[f"optimizer.state.fp32_param.{name}"], run, states)
        is_fold(found[name], run, states)
        moment = f"optimizer.state.exp_avg.{name}"
        assert raw(found[moment]) == raw(newest[moment])
    warnings, [note] = notices(run)
    assert not warnings
    assert note == (
        "The optimizer's own copy of the weights (.metadata:optimizer.state.fp32_param.w.in,"
        " .metadata:optimizer.state.fp32_param.w.out) is averaged too; its moments, the random"
        " state and the schedule stay the newest."
    )


def test_masters_in_flat_buckets_are_averaged_as_they_are(tmp_path: Path) -> None:
    run = tmp_path / "run"
    bucket = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(bf16, fp32).bucket_idx_0"
    buckets = [torch.cat([t.flatten() for t in masters(step).values()]) for step in STEPS]
    for step, flat in zip(STEPS, buckets, strict=True):
        moments = {f"{bucket}.exp_avg": torch.full_like(flat, float(step))}
        content = {**rounded(masters(step)), f"{bucket}.param": flat, **moments}
        dcp_folders.save(run / f"step-{step}", content)
    found = dcp_folders.tensors(average(run))
    is_fold(found[f"{bucket}.param"], run, buckets)
    assert found[f"{bucket}.exp_avg"].eq(300).all()
    for name in masters(1):
        is_fold(found[name], run, [rounded(masters(step))[name] for step in STEPS])


def test_memory_between_flat_masters_may_hold_anything(tmp_path: Path) -> None:
    run = tmp_path / "run"
    bucket = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(bf16, fp32).bucket_idx_0"
    padding = {100: [float("inf")] * 70000, 200: [float("nan")] * 70000, 300: [0.0] * 70000}
    flats = [torch.cat([masters(step)["w.out"], torch.tensor(padding[step])]) for step in STEPS]
    for step, flat in zip(STEPS, flats, strict=True):
        content = {**rounded(masters(step)), f"{bucket}.param": flat}
        dcp_folders.save(run / f"step-{step}", content)
    found = dcp_folders.tensors(average(run))[f"{bucket}.param"]
    is_fold(found[:7], run, [flat[:7] for flat in flats])
    assert found[7:].isnan().all()


def test_values_of_the_weights_beside_flat_masters_are_looked_at(tmp_path: Path) -> None:
    run = tmp_path / "run"
    bucket = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(bf16, fp32).bucket_idx_0"
    for step in STEPS:
        weights = masters(step)
        weights["w.out"][3] = float("nan") if step == 200 else 1.0
        content = {**rounded(weights), f"{bucket}.param": torch.full((9,), float(step))}
        dcp_folders.save(run / f"step-{step}", content)
    with pytest.raises(RefusedError, match=r"tensor w\.out holds 1 NaN values"):
        average(run)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_masters_in_the_file_of_the_model_are_averaged(tmp_path: Path, form: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for step in STEPS:
        own = [*masters(step).values()]
        optimizer = {"state": {0: {"exp_avg": torch.full((3,), float(step))}}, "param_groups": []}
        kept = {"optimizer": optimizer, "fp32_from_fp16_params": [own[:1], own[1:]]}
        content = {"model": rounded(masters(step)), "optimizer": kept, "iteration": step}
        save(run / f"model_{step}.pt", content, form)
    output = average(run)
    found = torch.load(output / "model_300.pt", weights_only=True)
    for number, name in enumerate(masters(1)):
        [own] = found["optimizer"]["fp32_from_fp16_params"][number]
        is_fold(own, run, [masters(step)[name] for step in STEPS])
        is_fold(found["model"][name], run, [rounded(masters(step))[name] for step in STEPS])
    assert found["optimizer"]["optimizer"]["state"][0]["exp_avg"].eq(300).all()
    assert found["iteration"] == 300


def test_masters_under_tuples_of_dtypes_are_averaged(tmp_path: Path) -> None:
    """As in Megatron's distrib_optim.pt, beside the model."""
    run = tmp_path / "run"
    kinds = (torch.bfloat16, torch.float32)
    for step in STEPS:
        folder = run / f"step_{step}"
        folder.mkdir(parents=True)
        save(folder / "model.pt", {"model": rounded(masters(step))})
        flat = torch.cat([tensor.flatten() for tensor in masters(step).values()])
        bucket = {"param": flat, "exp_avg": torch.full_like(flat, float(step))}
        save(folder / "distrib_optim.pt", {0: {kinds: [bucket]}, 1: {kinds: bucket}})
    found = torch.load(average(run) / "distrib_optim.pt", weights_only=True)
    flats = [torch.cat([t.flatten() for t in masters(step).values()]) for step in STEPS]
    for bucket in (found[0][kinds][0], found[1][kinds]):
        is_fold(bucket["param"], run, flats)
        assert bucket["exp_avg"].eq(300).all()


def test_deepspeed_beside_a_model_in_safetensors_is_averaged_with_it(make_run: MakeRun) -> None:
    """As transformers saves it: what resumes reads DeepSpeed's folder, what loads does not."""
    run = make_run([rounded(masters(step)) for step in STEPS], steps=STEPS)
    saved: dict[str, Any] = {"stage": 2, "ranks": 2, "dtype": torch.bfloat16}
    for step in STEPS:
        folder = run / f"checkpoint-{step}"
        deepspeed_folders.save(folder / f"global_step{step}", masters(step), step=step, **saved)
        (folder / "latest").write_text(f"global_step{step}")
    output = average(run) / "global_step300"
    module = torch.load(output / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    ranks = [deepspeed_folders.partitions(output, rank) for rank in range(2)]
    expected = [
        [deepspeed_folders.partitions(run / f"checkpoint-{s}/global_step{s}", rank) for s in STEPS]
        for rank in range(2)
    ]
    for name in masters(1):
        is_fold(module[name], run, [rounded(masters(step))[name] for step in STEPS])
    for found, states in zip(ranks, expected, strict=True):
        for group, flat in enumerate(found):
            is_fold(flat, run, [state[group] for state in states])
    assert notices(run)[0] == []


# --- What is warned of or refused -----------------------------------------------------------------


def with_optimizer(run: Path, write: Callable[[Path], object]) -> Path:
    """Steps with a file in which Megatron's masters would be."""
    for step in STEPS:
        folder = run / f"step_{step}"
        folder.mkdir(parents=True)
        save(folder / "model.pt", {"model": rounded(masters(step))})
        write(folder / "distrib_optim.pt")
    return run


def test_masters_that_are_not_found_are_warned_of_with_what_ignores_them(tmp_path: Path) -> None:
    run = with_optimizer(tmp_path / "run", lambda path: path.write_bytes(b"something"))
    [warning], notes = notices(run)
    assert not notes
    assert warning == (
        "The optimizer's own copy of the weights (fp32 masters, in distrib_optim.pt) is not"
        " averaged, and a trainer that resumes takes it instead of the average; load the output"
        " with --no-load-optim or --finetune."
    )
    assert (average(run) / "distrib_optim.pt").read_bytes() == b"something"


def test_nothing_in_a_hostile_optimizer_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for number, pickled in enumerate(hostile_pickles(mark).values()):
        run = with_optimizer(tmp_path / f"{number}/run", partial(archive, pickled=pickled))
        assert average(run).exists()
        assert not mark.exists()


def test_steps_with_other_masters_are_refused_by_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in STEPS:
        folder = run / f"step_{step}"
        folder.mkdir(parents=True)
        save(folder / "model.pt", {"model": rounded(masters(step))})
        count = 10 if step == 300 else 9
        save(folder / "distrib_optim.pt", {0: {"param": torch.full((count,), float(step))}})
    with pytest.raises(RefusedError, match=r"distrib_optim.pt:0.param has shape \[9\] in step_100"):
        ckpt_ema.plan(run, output=tmp_path / "out", **OPTIONS)
