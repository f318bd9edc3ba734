"""Writing an average back also averages the optimizer's masters, or warns that it does not."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

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


def notices(run: Path, **options: Any) -> tuple[list[str], list[str]]:
    """The warnings of other weights, and the notes on masters."""
    plan = ckpt_ema.plan(run, output=run.parent / "out", **OPTIONS, **options)
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
        " .metadata:optimizer.state.fp32_param.w.out) is averaged too; moments, random state and"
        " schedule are the newest checkpoint's."
    )


def test_weights_are_not_made_of_masters_with_fewer_bits(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in STEPS:
        named = {f"optimizer.state.param.{n}": t for n, t in rounded(masters(step)).items()}
        dcp_folders.save(run / f"step-{step}", {**masters(step), **named})
    found = dcp_folders.tensors(average(run))
    for name in masters(1):
        is_fold(found[name], run, [masters(step)[name] for step in STEPS])
        states = [rounded(masters(step))[name] for step in STEPS]
        is_fold(found[f"optimizer.state.param.{name}"], run, states)


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


@pytest.mark.parametrize(
    "place", ["fp32_from_fp16_params", "fp32_from_fp16", "fp32_groups", "master_param"]
)
def test_masters_of_every_optimizer_are_found(tmp_path: Path, place: str) -> None:
    """Megatron's, apex's, DeepSpeed's without ZeRO, and TransformerEngine's."""
    run = tmp_path / "run"
    run.mkdir()
    for step in STEPS:
        own = [*masters(step).values()]
        state = {n: {"exp_avg": torch.zeros(2), place: one} for n, one in enumerate(own)}
        optimizer = {"state": state} if place == "master_param" else {place: [own]}
        save(run / f"model_{step}.pt", {"model": rounded(masters(step)), "optimizer": optimizer})
    found = torch.load(average(run) / "model_300.pt", weights_only=True)["optimizer"]
    of_all = (
        [one[place] for one in found["state"].values()] if "state" in found else found[place][0]
    )
    for name, tensor in zip(masters(1), of_all, strict=True):
        is_fold(tensor, run, [masters(step)[name] for step in STEPS])
    assert notices(run)[0] == []


@pytest.mark.parametrize("options", [{"which": "ema"}, {"key": "ema"}, {}, {"key": "model"}])
def test_an_average_of_the_trainers_own_is_not_read_from_the_masters(
    tmp_path: Path, options: Any
) -> None:
    """Masters are those of the raw weights, whatever the names."""
    run = tmp_path / "run"
    for step in STEPS:
        own, average_of = masters(step), {n: t.bfloat16() / 2 for n, t in masters(step).items()}
        named = {f"optimizer.state.fp32_param.{name}": tensor for name, tensor in own.items()}
        content = {"model": rounded(own), "ema": average_of, **named}
        dcp_folders.save(run / f"step-{step}", content)
    found = dcp_folders.tensors(average(run, **options))
    states = [dcp_folders.tensors(run / f"step-{step}") for step in STEPS]
    is_ema = "ema" in options.values()
    for name in masters(1):
        chosen, other = ("ema", "model") if is_ema else ("model", "ema")
        is_fold(found[f"{chosen}.{name}"], run, [one[f"{chosen}.{name}"] for one in states])
        assert raw(found[f"{other}.{name}"]) == raw(states[-1][f"{other}.{name}"])
        master = f"optimizer.state.fp32_param.{name}"
        if is_ema:
            assert raw(found[master]) == raw(states[-1][master])
        else:
            is_fold(found[master], run, [one[master] for one in states])
    warnings, _ = notices(run, **options)
    assert any("not averaged, and a trainer that resumes" in one for one in warnings) is is_ema


def test_masters_of_weights_that_are_dropped_keep_the_newest_value(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in STEPS:
        dcp_folders.save(run / f"step-{step}", megatron(step))
    found, newest = (
        dcp_folders.tensors(one) for one in (average(run, drop=["w.in"]), run / "step-300")
    )
    for name in ("w.in", "optimizer.state.fp32_param.w.in"):
        assert raw(found[name]) == raw(newest[name])
    is_fold(found["w.out"], run, [masters(step)["w.out"] for step in STEPS])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_partitions_of_weights_that_are_dropped_keep_the_newest_value(
    tmp_path: Path, stage: int
) -> None:
    run = tmp_path / "run"
    saved: dict[str, Any] = {"stage": stage, "dtype": torch.bfloat16}
    for step in STEPS:
        deepspeed_folders.save(run / f"global_step{step}", masters(step), step=step, **saved)
    # Only the group of w.out changes: it has the vectors, the other one the matrices.
    output = average(run, drop=["w.in"])
    for path in sorted(output.glob("*optim_states.pt")):
        now, before = (
            deepspeed_folders.optimizer(one) for one in (path, run / "global_step300" / path.name)
        )
        flats = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        assert raw(now[flats][0]) == raw(before[flats][0])
        assert raw(now[flats][1]) != raw(before[flats][1])
    for path in output.glob("mp_rank_*"):
        module, newest = (
            torch.load(one, weights_only=True)["module"]
            for one in (path, run / "global_step300" / path.name)
        )
        assert raw(module["w.in"]) == raw(newest["w.in"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_buffers_of_each_rank_are_averaged_by_themselves(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """With ZeRO-3, each rank saves its own statistics of batches."""
    run, name = tmp_path / "run", "zero_pp_rank_1_mp_rank_00_model_states.pt"
    for step in STEPS:
        model = {**masters(step), "mean": torch.full((5,), float(step))}
        folder = run / f"global_step{step}"
        deepspeed_folders.save(folder, model, stage=3, step=step, buffers=["mean"])
        content = torch.load(folder / name, weights_only=True)
        content["module"]["mean"] = (content["module"]["mean"] * 7).to(dtype)
        torch.save(content, folder / name)
    output = average(run)
    for factor, path in enumerate(sorted(output.glob("zero_pp*model_states.pt"))):
        states = [torch.full((5,), float(step * (7 if factor else 1))) for step in STEPS]
        found = torch.load(path, weights_only=True)["module"]["mean"]
        assert found.dtype == (dtype if factor else torch.float32)
        is_fold(found, run, states)


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
        " averaged, and a trainer that resumes uses it instead of the average; load the output"
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


@pytest.mark.parametrize("lacking", [100, 300])
def test_masters_that_not_every_step_has_keep_the_newest_value(
    tmp_path: Path, lacking: int
) -> None:
    """Runs lose the optimizers of older steps, and the last save may have none."""
    run = with_optimizer(tmp_path / "run", lambda path: save(path, {0: {"param": torch.ones(9)}}))
    (run / f"step_{lacking}/distrib_optim.pt").unlink()
    warnings, notes = notices(run)
    assert not notes
    assert warnings == [
        "The optimizer's own copy of the weights (distrib_optim.pt:0.param) keeps the values of"
        " step_300, since step_100 has none; a trainer that resumes uses it instead of the"
        " average."
    ] * (lacking == 100)
    own = [rounded(masters(step))["w.in"] for step in STEPS]
    is_fold(torch.load(average(run) / "model.pt", weights_only=True)["model"]["w.in"], run, own)


def test_masters_of_weights_that_are_kept_are_warned_of_if_not_known(tmp_path: Path) -> None:
    run = with_optimizer(tmp_path / "run", lambda path: save(path, {0: {"param": torch.ones(9)}}))
    assert notices(run, keep=["w.in"])[0] == [
        "Further copies of the weights (distrib_optim.pt:0.param) are averaged in full, even"
        " where --keep or --drop matches a weight."
    ]


def test_weights_are_looked_at_although_a_copy_of_them_comes_first(tmp_path: Path) -> None:
    """Without mixed precision, the module and the partition of one rank are alike."""
    run = tmp_path / "run"
    for step in STEPS:
        deepspeed_folders.save(run / f"global_step{step}", masters(step), ranks=1, step=step)
    assert average(run).exists()  # not taken for one state three times
    spoiled = masters(200)
    spoiled["w.in"][3, 3] = torch.nan
    deepspeed_folders.save(run / "global_step200", spoiled, ranks=1, step=200)
    with pytest.raises(RefusedError, match=r"tensor w\.in holds 1 NaN"):
        ckpt_ema.average(run, output=tmp_path / "other", **OPTIONS)


def test_another_model_beside_it_is_copied_with_its_masters_and_warned_of(tmp_path: Path) -> None:
    """As the critic of PPO beside the actor."""
    run = tmp_path / "run"
    for step in STEPS:
        actor = run / f"step_{step}/actor"
        actor.mkdir(parents=True)
        save_file(rounded(masters(step)), actor / "model.safetensors", {"format": "pt"})
        critic = run / f"step_{step}/critic"
        saved: dict[str, Any] = {"stage": 2, "ranks": 1, "dtype": torch.bfloat16}
        deepspeed_folders.save(critic / f"global_step{step}", masters(step), step=step, **saved)
    output = average(run, component="actor")
    plan = ckpt_ema.plan(run, output=tmp_path / "other", component="actor", **OPTIONS)
    [warning] = [one.message for one in plan.warnings if one.code is Code.OTHER_WEIGHTS]
    assert "Other weights in step_300 are copied as they are (critic/)" in warning
    for path in (run / "step_300/critic").rglob("*.pt"):
        assert (output / path.relative_to(run / "step_300")).read_bytes() == path.read_bytes()
