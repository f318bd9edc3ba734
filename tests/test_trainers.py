"""Every trainer's run is read as it should be, or refused with the words that help.

The first half goes through the table of `trainer_runs`; the second half takes the cases in which
two readings are possible, and shows that the message names both and that its way out works.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema import RefusedError
from ckpt_ema.output.result import Result
from ckpt_ema.planning.plan import Plan
from tests import trainer_runs as runs
from tests.conftest import read_safetensors, write_shards
from tests.trainer_runs import RUNS, Tensors, TrainerRun, Weights

READ = [run for run in RUNS if run.tier == "read"]
REFUSED = [run for run in RUNS if run.tier != "read"]

# What no average may take along: state of the training, in whatever folder it lies.
STATE = re.compile(
    r"(^|/)(optim(izer)?[_.\d]|optimizer|scheduler\.|rng|random_states|trainer_state|training_args"
    r"|training_state|train_state|sampler|scaler|extra_state|data\.pt|dl_state|merged/|bema/"
    r"|global_step|COMPLETED|STABLE|CHECKPOINT_COMPLETE|critic/)"
)


def by_trainer(run: TrainerRun) -> str:
    return run.trainer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An empty folder for a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def steps(plan: Plan) -> list[int | None]:
    return [checkpoint.step for checkpoint in plan.checkpoints]


def entries(plan: Plan, folder: Path) -> list[str]:
    """The checkpoints by the names that they have in `folder`."""
    return [checkpoint.path.relative_to(folder).parts[0] for checkpoint in plan.checkpoints]


def refusal(paths: Path | Sequence[Path], **options: Any) -> str:
    """The sentence with which a run is refused, before a tensor is read."""
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(paths, **options)
    return str(caught.value)


def said(plan: Plan, pattern: str) -> list[str]:
    """The warnings and notes that match."""
    return [str(one) for one in (*plan.warnings, *plan.notes) if re.search(pattern, str(one))]


def warned(plan: Plan, pattern: str) -> list[str]:
    """The warnings that match."""
    return [str(one) for one in plan.warnings if re.search(pattern, str(one))]


def left_out(plan: Plan) -> dict[str, str]:
    return {entry.name: str(entry.verdict) for entry in plan.left_out}


def offered(message: str) -> list[str]:
    """The patterns that a message offers as ways out."""
    return re.findall(r"--pattern '([^']+)'", message)


def fold(plan: Plan, models: Sequence[Tensors]) -> Tensors:
    """The average by hand: float64, the plan's weights; what is no float is the newest's."""
    shares = plan.averages[0].weights
    return {
        name: sum(
            (share * model[name].double() for share, model in zip(shares, models, strict=True)),
            start=torch.zeros_like(newest, dtype=torch.float64),
        )
        if newest.is_floating_point()
        else newest
        for name, newest in models[-1].items()
    }


def check(actual: Tensors, expected: Tensors, free_prefix: bool = False) -> None:
    """The same names and, but for the rounding to float32, the same numbers."""
    if free_prefix:
        expected = {_twin(name, actual): tensor for name, tensor in expected.items()}
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name].double(), tensor.double(), rtol=1e-6, atol=1e-7)


def _twin(name: str, actual: Tensors) -> str:
    """The one name in `actual` that differs from `name` by a prefix at most."""
    (twin,) = [
        other
        for other in actual
        if f".{other}".endswith(f".{name}") or f".{name}".endswith(f".{other}")
    ]
    return twin


def check_average(
    paths: Path | Sequence[Path],
    expected: Sequence[Weights],
    output: Path,
    free_prefix: bool = False,
    **options: Any,
) -> Result:
    """What is written is the average of `expected`, in files of the same names."""
    result = ckpt_ema.average(paths, output=output, device="cpu", **options)
    assert len(result.plan.checkpoints) == len(expected)
    for name in expected[-1]:
        wanted = fold(result.plan, [weights[name] for weights in expected])
        check(read_safetensors(output / name), wanted, free_prefix)
    return result


# --- the table ---


@pytest.mark.parametrize("case", READ, ids=by_trainer)
def test_the_steps_of_a_run_are_found_in_order(run: Path, case: TrainerRun) -> None:
    expected = case.make(run)
    plan = ckpt_ema.plan(run, **case.options)
    assert len(plan.checkpoints) == len(expected)
    if case.steps is not None:
        assert tuple(steps(plan)) == case.steps
    assert {file.name for file in plan.averages[0].output.files} == set(case.files)
    for file in plan.averages[0].output.files:
        assert len(file.tensors) == len(expected[-1][file.name])
    travelling = {companion.name for companion in plan.averages[0].output.companions}
    assert set(case.travels) <= travelling
    assert {name for name in travelling if STATE.search(name)} == set()


@pytest.mark.parametrize("case", READ, ids=by_trainer)
def test_the_average_of_a_run_is_that_of_its_models(
    run: Path, tmp_path: Path, case: TrainerRun
) -> None:
    expected = case.make(run)
    output = tmp_path / "out"
    check_average(run, expected, output, case.free_prefix, **case.options)
    for name in case.travels:
        assert (output / name).is_file()


@pytest.mark.parametrize("case", REFUSED, ids=by_trainer)
def test_a_run_that_cannot_be_read_is_refused_with_what_helps(run: Path, case: TrainerRun) -> None:
    case.make(run)
    message = refusal(run, **case.options)
    assert message.isprintable()
    for pattern in case.refusal:
        assert re.search(pattern, message), message


# --- names ---


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("checkpoint-500", {"checkpoint": 500}),
        ("checkpoint-12", {"checkpoint": 12}),
        ("checkpoint_3", {"checkpoint": 3}),
        ("checkpoint12", {"checkpoint": 12}),
        ("checkpoint_000003", {"checkpoint": 3}),
        ("ckpt_1000", {"checkpoint": 1000}),
        ("ckpt-12", {"checkpoint": 12}),
        ("checkpoint-180000-epoch-23-val-wer-9.965", {"step": 180000, "epoch": 23}),
        ("checkpoint-180000-epoch-23-val-wer-10.238", {"step": 180000, "epoch": 23}),
        ("checkpoint_1_1000", {"epoch": 1, "step": 1000}),
        ("step_100", {"step": 100}),
        ("step-100", {"step": 100}),
        ("step100", {"step": 100}),
        ("Step_100", {"step": 100}),
        ("step=100", {"step": 100}),
        ("step-00000100", {"step": 100}),
        ("step1000-unsharded", {"step": 1000}),
        ("global_step100", {"step": 100}),
        ("global_step_100", {"step": 100}),
        ("global-step-100", {"step": 100}),
        ("global_step50_hf", {"step": 50}),
        ("best_global_step40", {"step": 40}),
        ("iter_0000100", {"step": 100}),
        ("iter_1000", {"step": 1000}),
        ("iteration_5", {"step": 5}),
        ("model.iter1000", {"step": 1000}),
        ("update_7", {"step": 7}),
        ("updates_7", {"step": 7}),
        ("ba100", {"step": 100}),
        ("ep1-ba100-rank0", {"epoch": 1, "step": 100}),
        ("ep1-ba100", {"epoch": 1, "step": 100}),
        ("epoch=1-step=100", {"epoch": 1, "step": 100}),
        ("epoch=1-step=100-v2", {"epoch": 1, "step": 100}),
        ("epoch=1-step=100-val_loss=0.25", {"epoch": 1, "step": 100}),
        ("epoch=00-val", {"epoch": 0}),
        (
            "megatron--val_loss=1.23-epoch=3-step=1000-consumed_samples=8000.0",
            {"epoch": 3, "step": 1000},
        ),
        ("epoch_0_step_100", {"epoch": 0, "step": 100}),
        ("epoch_12", {"epoch": 12}),
        ("epoch-12", {"epoch": 12}),
        ("epoch10", {"epoch": 10}),
        ("epoch-000010", {"epoch": 10}),
        ("12epoch", {"epoch": 12}),
        ("cat-step00001000", {"step": 1000}),
        ("at-step00000100", {"step": 100}),
        ("base_step_5000", {"step": 5000}),
        ("step500", {"step": 500}),
        ("stage1-step1000-tokens5B", {"step": 1000}),
        ("stage2-ingredient1-step11931-tokens100B", {"step": 11931}),
        ("005000", {"number": 5000}),
        ("0050000", {"number": 50000}),
        ("1000", {"number": 1000}),
        ("timestep_5", {}),
        ("wer-9.965", {}),
        ("step_0.5", {}),
        ("val_loss=1.23", {}),
        ("cat-000010", {}),
        ("cat_000000250", {}),
        ("Llama-3.1-8B-lora-000010", {}),
        ("model_0004999", {}),
        ("model_000100", {}),
        ("model010000", {}),
        ("ema_0.9999_010000", {}),
        ("0000100_adapters", {}),
        ("samples_1234", {}),
        ("network-snapshot-000200", {}),
        ("weights.05-0.23", {}),
        ("model-1-200", {}),
        ("v0-20260102-101112", {}),
        ("model_07", {}),
        ("final", {}),
    ],
)
def test_the_numbers_that_a_name_says(name: str, numbers: dict[str, int]) -> None:
    """Whole numbers with the unit that stands before them; decimals are metrics."""
    from ckpt_ema.find.names import numbers_in

    assert numbers_in(name) == numbers


# --- what is incomplete ---


def cut(name: str, size_bytes: int = -9) -> Callable[[Path], None]:
    """Cut a file short as a full disk does: to a size, or by one where that is negative."""

    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:size_bytes])

    return spoil


def without(name: str) -> Callable[[Path], None]:
    """Take a file away."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()

    return spoil


def marked(name: str) -> Callable[[Path], None]:
    """Leave the mark of a save that has not ended."""

    def spoil(folder: Path) -> None:
        (folder / name).touch()

    return spoil


def marked_beside(folder: Path) -> None:
    folder.with_name(folder.name.removesuffix(".ckpt") + "-unfinished").touch()


def metadata_not_renamed(folder: Path) -> None:
    (folder / ".metadata").rename(folder / ".metadata.tmp")


@dataclass(frozen=True, slots=True)
class Damage:
    """One way in which a save can be incomplete, done to any of three checkpoints."""

    make: runs.Make
    container: str  # where the three checkpoints lie
    names: tuple[str, str, str]
    spoil: Callable[[Path], None]


HF = ("", ("checkpoint-9", "checkpoint-10", "checkpoint-500"))
HF_HUNDREDS = ("", ("checkpoint-100", "checkpoint-200", "checkpoint-300"))
DAMAGES = {
    "cut": Damage(runs.transformers, *HF, cut("model.safetensors")),
    "empty": Damage(runs.transformers, *HF, cut("model.safetensors", 0)),
    "header cut": Damage(runs.transformers, *HF, cut("model.safetensors", 20)),
    "no trainer state": Damage(runs.transformers, *HF, without("trainer_state.json")),
    "preempted": Damage(runs.transformers, *HF, marked("checkpoint-is-incomplete.txt")),
    "no shard": Damage(runs.transformers_sharded, *HF, without(runs.SHARDS[1])),
    "shard cut": Damage(runs.transformers_sharded, *HF, cut(runs.SHARDS[0])),
    "zip cut": Damage(runs.transformers_bin, *HF, cut("pytorch_model.bin", 500)),
    "zip empty": Damage(runs.transformers_bin, *HF, cut("pytorch_model.bin", 0)),
    "dense layer cut": Damage(
        runs.sentence_transformers, *HF_HUNDREDS, cut("2_Dense/model.safetensors")
    ),
    "llama-factory": Damage(
        runs.llama_factory_marked, *HF_HUNDREDS, without("CHECKPOINT_COMPLETE")
    ),
    "open-instruct": Damage(
        runs.open_instruct, "", ("step_100", "step_200", "step_1000"), without("COMPLETED")
    ),
    "prime-rl": Damage(
        runs.prime_rl, "weights", ("step_10", "step_20", "step_30"), without("STABLE")
    ),
    "automodel": Damage(
        runs.automodel,
        "",
        ("epoch_0_step_100", "epoch_0_step_200", "epoch_0_step_300"),
        marked(".incomplete"),
    ),
    "lerobot": Damage(
        runs.lerobot,
        "checkpoints",
        ("005000", "010000", "015000"),
        without("training_state/training_step.json"),
    ),
    "olmo-core": Damage(
        runs.olmo_core, "", ("step1000", "step2000", "step3000"), without(".metadata.json")
    ),
    "torchtitan": Damage(
        runs.torchtitan, "", ("step-100", "step-200", "step-1000"), metadata_not_renamed
    ),
    "distcp cut": Damage(
        runs.torchtitan, "", ("step-100", "step-200", "step-1000"), cut("__0_0.distcp", 100)
    ),
    "no distcp": Damage(
        runs.torchtitan,
        "",
        ("step-100", "step-200", "step-1000"),
        without("__0_0.distcp"),
    ),
    "nemo": Damage(
        runs.nemo,
        "",
        (
            "gpt--val_loss=1.20-epoch=0-step=1000-consumed_samples=1000.0.ckpt",
            "gpt--val_loss=1.21-epoch=1-step=2000-consumed_samples=2000.0.ckpt",
            "gpt--val_loss=1.22-epoch=2-step=3000-consumed_samples=3000.0.ckpt",
        ),
        marked_beside,
    ),
    "speechbrain": Damage(
        runs.speechbrain,
        "",
        (
            "CKPT+2026-10-25+02-50-00+00",
            "CKPT+2026-10-25+02-10-00+00",
            "CKPT+2026-10-25+03-00-00+00",
        ),
        without("CKPT.yaml"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_incomplete_last_checkpoint_is_skipped_with_a_warning(run: Path, damage: Damage) -> None:
    """A run that was stopped while it saved is an everyday thing."""
    damage.make(run)
    if damage.make is runs.nemo:  # its alias would be the better copy
        next(run.glob("*-last.ckpt")).unlink()
    folder = run / damage.container
    last = damage.names[-1]
    damage.spoil(folder / last)
    plan = ckpt_ema.plan(run)
    assert entries(plan, folder) == [*damage.names[:-1]]
    assert warned(plan, re.escape(last))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_incomplete_checkpoint_in_the_middle_is_refused_until_it_is_skipped(
    run: Path, damage: Damage
) -> None:
    damage.make(run)
    folder = run / damage.container
    first, middle, last = damage.names
    damage.spoil(folder / middle)
    message = refusal(run)
    assert middle in message
    assert "--skip-incomplete" in message
    plan = ckpt_ema.plan(run, skip_incomplete=True)
    assert entries(plan, folder) == [first, last]
    assert said(plan, re.escape(middle)) or middle in left_out(plan)


@pytest.mark.parametrize("name", ["checkpoint-10", "checkpoint-500"])
def test_a_folder_of_the_series_without_a_model_is_said(run: Path, name: str) -> None:
    runs.transformers(run)
    (run / name / "model.safetensors").unlink()
    plan = ckpt_ema.plan(run, skip_incomplete=True)
    assert name not in entries(plan, run)
    assert said(plan, name) or name in left_out(plan)


def test_a_missing_shard_is_named(run: Path) -> None:
    runs.transformers_sharded(run)
    (run / "checkpoint-10" / runs.SHARDS[1]).unlink()
    assert runs.SHARDS[1] in refusal(run)


def test_a_tracker_that_has_not_come_so_far_says_that_a_save_did_not_end(run: Path) -> None:
    runs.verl_whole(run)
    runs.text(run / "latest_checkpointed_iteration.txt", "200")
    plan = ckpt_ema.plan(run)
    assert steps(plan) == [100, 200]
    assert warned(plan, "global_step_300")


def test_a_marker_that_no_checkpoint_has_is_not_asked_for(run: Path) -> None:
    """Users who save by their own code write the model and nothing else."""
    runs.transformers(run)
    for path in run.glob("checkpoint-*/trainer_state.json"):
        path.unlink()
    assert steps(ckpt_ema.plan(run)) == [9, 10, 500]


# --- the Hugging Face family ---


def test_siblings_that_are_no_steps_are_left_out_and_said(run: Path) -> None:
    runs.transformers(run)
    for name in ("checkpoint-10-merged", "tmp-checkpoint-600", "checkpoint-700-tmp"):
        runs.pretrained(run / name, runs.state(90))
    plan = ckpt_ema.plan(run)
    assert steps(plan) == [9, 10, 500]
    assert {"checkpoint-10-merged", "tmp-checkpoint-600", "checkpoint-700-tmp"} <= set(
        left_out(plan)
    )


@pytest.mark.parametrize("choice", ["single", "sharded"])
def test_a_stale_file_beside_the_weights_is_never_chosen_by_itself(
    run: Path, tmp_path: Path, choice: str
) -> None:
    single = runs.hugging_face(run, (100, 200))
    sharded = [runs.state(50 + position) for position in range(2)]
    for step, model in zip((100, 200), sharded, strict=True):
        write_shards(run / f"checkpoint-{step}", model, 2)
    message = refusal(run)
    for part in ("checkpoint-100", "model.safetensors", "model.safetensors.index.json"):
        assert part in message
    assert "--form" in message
    assert "single" in message
    assert "sharded" in message
    output = tmp_path / "out"
    result = ckpt_ema.average(run, output=output, device="cpu", form=choice)
    actual: Tensors = {}
    for file in result.plan.averages[0].output.files:
        actual |= read_safetensors(output / file.name)
    check(actual, fold(result.plan, single if choice == "single" else sharded))
    assert sorted(path.name for path in output.glob("*.safetensors*")) == (
        ["model.safetensors"]
        if choice == "single"
        else [*runs.SHARDS, "model.safetensors.index.json"]
    )


@pytest.mark.parametrize("choice", ["adapter", "sharded"])
def test_merged_weights_and_an_adapter_in_one_folder_are_two_models(run: Path, choice: str) -> None:
    runs.torchtune(run)
    for epoch in range(3):
        runs.adapter(run / f"epoch_{epoch}", runs.state(epoch, *runs.LORA))
    message = refusal(run)
    assert "adapter_model.safetensors" in message
    assert "--form" in message
    plan = ckpt_ema.plan(run, form=choice)
    names = runs.ADAPTER if choice == "adapter" else runs.SHARDS
    assert sorted(file.name for file in plan.averages[0].output.files) == list(names)


def test_a_checkpoint_that_was_renamed_is_ordered_only_when_told_how(run: Path) -> None:
    runs.transformers(run)
    runs.write(run / "checkpoint-500", trainer_state__json={"global_step": 8})
    message = refusal(run)
    for part in ("checkpoint-500", "8", "trainer_state.json", "--order"):
        assert part in message
    assert "metadata" in message
    assert "name" in message
    assert steps(ckpt_ema.plan(run, order="metadata")) == [8, 9, 10]
    assert steps(ckpt_ema.plan(run, order="name")) == [9, 10, 500]


def test_the_model_must_be_the_same_in_every_step(run: Path) -> None:
    runs.transformers(run)
    model = {**runs.state(2), "lm_head.weight": torch.zeros(3, 3)}
    runs.safetensors(run / "checkpoint-10" / "model.safetensors", model)
    message = refusal(run)
    for part in ("not the same model", "lm_head.weight", "checkpoint-10"):
        assert part in message
    model = {**runs.state(2), "lm_head.bias": torch.zeros(3)}
    runs.safetensors(run / "checkpoint-10" / "model.safetensors", model)
    message = refusal(run)
    for part in ("not the same model", "lm_head.bias", "checkpoint-10"):
        assert part in message


def test_configurations_that_differ_are_warned_of(run: Path) -> None:
    """But for the fields that say with what the model was saved."""
    runs.transformers(run)
    config = {"architectures": ["Tiny"], "hidden_size": 3}
    later = {**config, "transformers_version": "5.99", "_name_or_path": "elsewhere"}
    runs.write(run / "checkpoint-10", config__json=later)
    assert not warned(ckpt_ema.plan(run), r"config\.json")
    runs.write(run / "checkpoint-10", config__json={**config, "hidden_size": 4})
    assert warned(ckpt_ema.plan(run), r"config\.json.*checkpoint-10.*hidden_size")


def test_tensors_without_elements_are_no_model(run: Path) -> None:
    """What ZeRO stage 3 leaves in the file when the weights are not gathered."""
    for step in (100, 200):
        model = {name: torch.empty(0) for name in runs.NAMES}
        runs.trainer_junk(runs.pretrained(run / f"checkpoint-{step}", model), step)
    assert re.search(r"empty|(no|0|zero|without) elements", refusal(run))


def test_two_identical_steps_are_refused_once_their_bytes_are_read(
    run: Path, tmp_path: Path
) -> None:
    """Published runs exist in which most steps hold the bytes of the last."""
    models = runs.hugging_face(run, (100, 200, 300))
    shutil.copy(
        run / "checkpoint-300" / "model.safetensors", run / "checkpoint-200" / "model.safetensors"
    )
    output = tmp_path / "out"
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.average(run, output=output, device="cpu")
    for part in ("checkpoint-200", "checkpoint-300", "--allow-duplicates"):
        assert part in str(caught.value)
    assert not output.exists()
    expected = runs.in_file([models[0], models[2], models[2]])
    check_average(run, expected, output, allow_duplicates=True)


def test_adapters_of_different_rank_or_scale_are_refused(run: Path) -> None:
    runs.peft(run)
    model = {name: torch.zeros(4, 3) for name in runs.LORA}
    runs.adapter(run / "checkpoint-100", model, r=16)
    message = refusal(run)
    assert re.search(r"\br\b|rank", message)
    assert "16" in message
    runs.adapter(run / "checkpoint-100", runs.state(2, *runs.LORA), lora_alpha=32)
    message = refusal(run)
    assert "lora_alpha" in message
    assert "checkpoint-100" in message


def test_averaging_the_factors_of_an_adapter_is_said_once(run: Path) -> None:
    runs.peft(run)
    plan = ckpt_ema.plan(run)
    assert len(warned(plan, r"\bA\b.*\bB\b|\bBA\b")) == 1


def test_another_adapter_travels_as_it_is(run: Path, tmp_path: Path) -> None:
    runs.peft(run)
    output = tmp_path / "out"
    ckpt_ema.average(run, output=output, device="cpu")
    name = "ref/adapter_model.safetensors"
    assert (output / name).read_bytes() == (run / "checkpoint-150" / name).read_bytes()


def test_a_dense_layer_that_one_step_lacks_is_refused(run: Path) -> None:
    runs.sentence_transformers(run)
    shutil.rmtree(run / "checkpoint-200" / "2_Dense")
    message = refusal(run)
    assert "checkpoint-200" in message
    assert "2_Dense" in message or "linear.weight" in message


def test_the_raw_network_is_taken_and_the_average_beside_it_is_said(
    run: Path, tmp_path: Path
) -> None:
    runs.diffusers(run)
    plan = ckpt_ema.plan(run)
    assert said(plan, "unet_ema")
    name = "diffusion_pytorch_model.safetensors"
    averages = [
        {f"unet_ema/{name}": runs.state(90 + step, "conv_in.weight", "conv_in.bias")}
        for step in (500, 1000, 1500)
    ]
    check_average(run, averages, tmp_path / "out", component="unet_ema")


def test_a_text_encoder_that_was_trained_too_is_averaged_too(run: Path, tmp_path: Path) -> None:
    expected = runs.diffusers(run)
    for position, step in enumerate((500, 1000, 1500)):
        model = runs.state(60 + position, "embeddings.weight")
        path = run / f"checkpoint-{step}" / "text_encoder" / "model.safetensors"
        runs.safetensors(path, model)
        runs.write(path.parent, config__json={})
        expected[position]["text_encoder/model.safetensors"] = model
    check_average(run, expected, tmp_path / "out")


def test_a_number_that_counts_saves_gives_no_distance(run: Path) -> None:
    runs.accelerate(run)
    plan = ckpt_ema.plan(run)
    assert plan.averages[0].gaps == (None, None, None)
    assert said(plan, "index|counts? .*saves?|number of saves|how far apart")


def test_a_configuration_can_come_from_elsewhere(run: Path, tmp_path: Path) -> None:
    runs.accelerate_fsdp(run)
    base = runs.pretrained(tmp_path / "base")
    output = tmp_path / "out"
    ckpt_ema.average(run, output=output, device="cpu", config_from=base)
    assert (output / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_gaps_are_the_distances_between_steps(run: Path) -> None:
    runs.hugging_face(run, (5, 10, 12))
    plan = ckpt_ema.plan(run)
    assert plan.averages[0].gaps == (None, 5, 2)


GAPS = r"[Gg]ap|uneven|irregular|evenly|apart"


@pytest.mark.parametrize("irregular", [(100, 200, 300, 400, 1500), (100, 1500, 1600, 1700, 1800)])
def test_uneven_gaps_are_warned_of(run: Path, tmp_path: Path, irregular: tuple[int, ...]) -> None:
    runs.hugging_face(run, irregular)
    assert warned(ckpt_ema.plan(run), GAPS)
    even = tmp_path / "even"
    runs.hugging_face(even, (100, 200, 300, 400, 500))
    assert not warned(ckpt_ema.plan(even), GAPS)


FEW = r"[Oo]nly \d|few|save_total_limit"


def test_so_few_checkpoints_that_some_were_probably_deleted_are_warned_of(
    run: Path, tmp_path: Path
) -> None:
    runs.hugging_face(run, (100, 200, 300))
    assert warned(ckpt_ema.plan(run), FEW)
    long = tmp_path / "long"
    runs.hugging_face(long, range(100, 700, 100))
    assert not warned(ckpt_ema.plan(long), FEW)


TIMES = r"modif|mtime|written (before|after|earlier|later)|older|newer"


def touch_all(folder: Path, seconds: int) -> None:
    """Set the times of a folder and of everything in it."""
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (seconds, seconds))


def test_steps_that_are_hours_older_than_those_before_them_are_warned_of(run: Path) -> None:
    """The rest of an earlier run in the same folder."""
    runs.hugging_face(run, (100, 200, 300, 400, 500))
    now = 1_800_000_000
    for position, step in enumerate((300, 400, 500, 100, 200)):
        touch_all(run / f"checkpoint-{step}", now + position * 6 * 3600)
    plan = ckpt_ema.plan(run)
    assert steps(plan) == [100, 200, 300, 400, 500]
    assert warned(plan, TIMES)


def test_times_that_a_copy_has_shuffled_are_no_matter(run: Path) -> None:
    runs.hugging_face(run, (100, 200, 300, 400, 500))
    for position, step in enumerate((300, 500, 200, 100, 400)):
        touch_all(run / f"checkpoint-{step}", 1_800_000_000 + position)
    assert not warned(ckpt_ema.plan(run), TIMES)


def test_one_checkpoint_alone_is_its_own_average_and_that_is_said(run: Path) -> None:
    runs.hugging_face(run, (100,))
    assert warned(ckpt_ema.plan(run), "one checkpoint")


# --- folders that can be read in two ways ---


def flat(run: Path, *names: str) -> list[Tensors]:
    """Files of plain weights that say no step inside."""
    models = runs.states(len(names))
    for name, model in zip(names, models, strict=True):
        runs.torch_file(run / name, model)
    return models


def test_nothing_to_average_says_what_was_there(run: Path) -> None:
    runs.write(run, "rollouts/step_1/a.json", "evals/b.json", "notes.txt")
    message = refusal(run)
    for part in ("No checkpoints found", "rollouts/", "evals/", "--pattern"):
        assert part in message


TWO_SERIES: Mapping[str, Callable[[Path], object]] = {
    "steps and epochs": lambda run: flat(
        run, "step_100.pt", "step_200.pt", "epoch_1.pt", "epoch_2.pt"
    ),
    "fairseq": lambda run: [runs.fairseq_updates(run), runs.fairseq(run)],
    "icefall": lambda run: [
        runs.icefall(run),
        *(
            runs.icefall_file(run / f"checkpoint-{batch}.pt", runs.state(batch), batch)
            for batch in (4000, 8000)
        ),
    ],
    "accelerate": lambda run: [
        runs.accelerate_bin(run),
        *(
            runs.torch_file(run / f"epoch_{epoch}" / "pytorch_model.bin", runs.state(epoch))
            for epoch in (0, 1)
        ),
    ],
    "diffusion-pipe": lambda run: [
        runs.diffusion_pipe(run),
        *(runs.adapter(run / f"step{step}", runs.state(step, *runs.LORA)) for step in (500, 1000)),
    ],
    "stages": lambda run: runs.hub_cache(
        run,
        {
            f"{name}-tokens{position}B": runs.state(position)
            for position, name in enumerate(
                (
                    "stage1-step1000",
                    "stage1-step2000",
                    "stage2-ingredient1-step100",
                    "stage2-ingredient1-step11931",
                ),
                start=5,
            )
        },
    ),
}


@pytest.mark.parametrize("make", TWO_SERIES.values(), ids=TWO_SERIES)
def test_two_sets_of_checkpoints_are_refused_and_each_pattern_offered_works(
    run: Path, make: Callable[[Path], object]
) -> None:
    make(run)
    message = refusal(run)
    patterns = offered(message)
    assert len(set(patterns)) >= 2, message
    found = [
        tuple(entry.path for entry in ckpt_ema.plan(run, pattern=p).checkpoints) for p in patterns
    ]
    assert all(len(paths) >= 2 for paths in found)
    assert len({path for paths in found for path in paths}) == sum(map(len, found))


def test_both_series_of_fairseq_by_pattern(run: Path, tmp_path: Path) -> None:
    updates = runs.fairseq_updates(run)
    epochs = runs.fairseq(run)
    options: dict[str, Any] = {"pattern": r"^checkpoint(\d+)\.pt$"}
    result = check_average(run, epochs, tmp_path / "epochs", **options)
    assert steps(result.plan) == [1, 2, 10]
    options = {"pattern": r"^checkpoint_\d+_(?P<step>\d+)\.pt$", "aliases": False}
    result = check_average(run, updates, tmp_path / "updates", **options)
    assert steps(result.plan) == [500, 1000, 1500]


def test_a_pattern_without_a_group_only_chooses(run: Path) -> None:
    runs.transformers(run)
    assert steps(ckpt_ema.plan(run, pattern=r"-\d{1,2}$")) == [9, 10]


def test_a_pattern_reaches_what_is_left_out_otherwise(run: Path, tmp_path: Path) -> None:
    """Whoever wants the averages of the trainer may have them, and is told what they are."""
    models = runs.guided_diffusion(run)
    shifted = [
        {file: {name: tensor + 7 for name, tensor in model.items()} for file, model in one.items()}
        for one in models
    ]
    options: dict[str, Any] = {"pattern": r"^ema_0\.9999_(\d+)\.pt$"}
    result = check_average(run, shifted, tmp_path / "out", **options)
    assert steps(result.plan) == [10_000, 20_000]
    assert warned(result.plan, r"already|twice|again")


def test_what_deepspeed_saved_beside_the_models_is_said(run: Path) -> None:
    runs.diffusion_pipe(run)
    plan = ckpt_ema.plan(run)
    assert said(plan, "global_step") or any("global_step" in name for name in left_out(plan))


def test_deepspeed_is_told_by_names_alone(run: Path) -> None:
    runs.write(
        run,
        *(
            f"checkpoint-{step}/global_step{step}/{name}"
            for step in (100, 200)
            for name in (
                "zero_pp_rank_0_mp_rank_00_model_states.pt",
                "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            )
        ),
    )
    message = refusal(run)
    assert "zero_to_fp32.py" in message
    assert "--safe_serialization" in message


def test_several_runs_are_several_trajectories(run: Path) -> None:
    for version in range(3):
        folder = run / "lightning_logs" / f"version_{version}" / "checkpoints"
        for step in (100, 200):
            path = folder / f"epoch=0-step={step}.ckpt"
            runs.lightning_file(path, runs.state(step), 0, step)
    message = refusal(run)
    for part in ("version_0", "version_1", "version_2"):
        assert part in message
    assert steps(ckpt_ema.plan(run / "lightning_logs" / "version_1")) == [100, 200]


def test_ingredients_of_one_step_are_different_runs(run: Path) -> None:
    names = [
        f"stage2-ingredient{ingredient}-step{step}-tokens5B"
        for ingredient in (1, 2)
        for step in (100, 200)
    ]
    for position, name in enumerate(names):
        runs.pretrained(run / name, runs.state(position))
    refusal(run)
    plan = ckpt_ema.plan(run, pattern=r"ingredient2-step(\d+)")
    assert entries(plan, run) == names[2:]


# --- aliases ---


def test_a_file_whose_place_is_unknown_is_placed_only_by_the_user(run: Path) -> None:
    models = flat(run, "net_1.pt", "net_2.pt", "last.pt")
    flat(run, "best.pt")
    message = refusal(run)
    for part in ("last.pt", "--append last.pt", "--no-aliases"):
        assert part in message
    assert "best.pt" not in message
    plan = ckpt_ema.plan(run, aliases=False)
    assert entries(plan, run) == ["net_1.pt", "net_2.pt"]
    plan = ckpt_ema.plan(run, append=["last.pt"])
    assert entries(plan, run) == ["net_1.pt", "net_2.pt", "last.pt"]
    assert len(plan.checkpoints) == len(models)


def test_a_copy_of_a_step_under_another_name_is_not_counted_twice(run: Path) -> None:
    flat(run, "net_1.pt", "net_2.pt")
    shutil.copy(run / "net_2.pt", run / "last.pt")
    os.link(run / "net_1.pt", run / "model_best.pt")
    assert entries(ckpt_ema.plan(run), run) == ["net_1.pt", "net_2.pt"]


def test_the_last_of_timm_is_appended_and_said(run: Path) -> None:
    runs.timm(run)
    plan = ckpt_ema.plan(run)
    assert entries(plan, run)[-1] == "last.pth.tar"
    assert said(plan, r"last\.pth\.tar")
    assert entries(ckpt_ema.plan(run, aliases=False), run) == [
        f"checkpoint-{epoch}.pth.tar" for epoch in (3, 6, 10)
    ]


def lightning_run(run: Path, *names: str) -> list[Tensors]:
    """Epochs of 50 steps each in files of these names."""
    models = runs.states(len(names))
    for epoch, (name, model) in enumerate(zip(names, models, strict=True)):
        runs.lightning_file(run / name, model, epoch, 50 * (epoch + 1))
    return models


LIGHTNING = ("epoch=0-step=50.ckpt", "epoch=1-step=100.ckpt", "epoch=2-step=150.ckpt")


def test_two_runs_of_lightning_in_one_folder_are_kept_apart(run: Path) -> None:
    lightning_run(run, *LIGHTNING)
    names = [name.replace(".ckpt", "-v1.ckpt") for name in LIGHTNING]
    models = [runs.state(50 + position) for position in range(3)]
    for epoch, (name, model) in enumerate(zip(names, models, strict=True)):
        runs.lightning_file(run / name, model, epoch, 50 * (epoch + 1))
    message = refusal(run)
    assert LIGHTNING[0] in message
    assert names[0] in message
    patterns = offered(message)
    assert patterns, message
    for pattern in patterns:
        found = entries(ckpt_ema.plan(run, pattern=pattern), run)
        assert found in ([*LIGHTNING], names)


@pytest.mark.parametrize("target", [LIGHTNING[0], LIGHTNING[2], "last.ckpt", "gone.ckpt"])
def test_a_link_called_last_is_resolved_or_left_out(run: Path, target: str) -> None:
    """It may lead to the newest, to the best, to nothing or to itself."""
    lightning_run(run, *LIGHTNING)
    runs.link(run / "last.ckpt", target)
    plan = ckpt_ema.plan(run)
    assert entries(plan, run) == [*LIGHTNING]


@pytest.mark.parametrize(
    ("step", "is_appended"), [(150, False), (120, False), (100, False), (190, True)]
)
def test_a_file_called_last_is_placed_by_the_step_inside(
    run: Path, step: int, is_appended: bool
) -> None:
    lightning_run(run, *LIGHTNING)
    runs.lightning_file(run / "last.ckpt", runs.state(9), 2, step)
    plan = ckpt_ema.plan(run)
    assert entries(plan, run) == [*LIGHTNING, *["last.ckpt"] * is_appended]
    if is_appended:
        assert steps(plan) == [50, 100, 150, step]
        assert said(plan, r"last\.ckpt")


def test_a_metric_with_a_slash_in_its_name_makes_folders(run: Path, tmp_path: Path) -> None:
    names = [f"epoch=0{epoch}-val/loss=0.{7 - epoch}.ckpt" for epoch in range(3)]
    models = lightning_run(run, *names)
    result = check_average(run, runs.in_file(models), tmp_path / "out")
    assert entries(result.plan, run) == [name.split("/")[0] for name in names]


def test_the_raw_weights_are_taken_where_lightning_averages_itself(
    run: Path, tmp_path: Path
) -> None:
    raw = runs.states(3)
    averaged = [{name: tensor + 7 for name, tensor in model.items()} for model in raw]
    pairs = zip(LIGHTNING, averaged, raw, strict=True)
    for epoch, (name, average, model) in enumerate(pairs):
        more = {"current_model_state": model, "averaging_state": {"n_averaged": torch.tensor(9)}}
        runs.lightning_file(run / name, average, epoch, 50 * (epoch + 1), **more)
    result = check_average(run, runs.in_file(raw), tmp_path / "raw")
    assert said(result.plan, "current_model_state")
    options: dict[str, Any] = {"key": "state_dict"}
    result = check_average(run, runs.in_file(averaged), tmp_path / "averaged", **options)
    assert warned(result.plan, "already|twice|again")


# --- what lies in one file ---


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (runs.dit, "ema"),
        (runs.k_diffusion, "model_ema"),
        (runs.timm, "state_dict_ema"),
        (runs.icefall, "model_avg"),
    ],
)
def test_the_average_inside_the_files_can_be_had_and_is_called_one(
    run: Path, tmp_path: Path, make: runs.Make, key: str
) -> None:
    expected = make(run)
    assert said(ckpt_ema.plan(run), key)
    shifted = [
        {file: {name: tensor + 7 for name, tensor in model.items()} for file, model in one.items()}
        for one in expected
    ]
    options: dict[str, Any] = {"key": key}
    result = check_average(run, shifted, tmp_path / "out", **options)
    assert warned(result.plan, "already|twice|again")


def mmengine_swapped(run: Path) -> tuple[list[Tensors], list[Tensors]]:
    """The hook that averages swaps the two before each save: the obvious key has the average."""
    raw = runs.states(3)
    averaged = [{name: tensor + 7 for name, tensor in model.items()} for model in raw]
    for epoch, (model, average) in enumerate(zip(raw, averaged, strict=True), start=1):
        content = {
            "meta": {"epoch": epoch, "iter": epoch * 10},
            "state_dict": average,
            "ema_state_dict": {
                "steps": torch.tensor(epoch),
                **{f"module.{name}": tensor for name, tensor in model.items()},
            },
        }
        runs.torch_file(run / f"epoch_{epoch}.pth", content)
    return raw, averaged


def test_an_average_under_the_obvious_key_is_never_averaged_without_a_word(
    run: Path, tmp_path: Path
) -> None:
    raw, averaged = mmengine_swapped(run)
    try:
        plan = ckpt_ema.plan(run)
    except RefusedError as error:
        assert "ema_state_dict" in str(error)
        assert "--key" in str(error)
    else:
        assert said(plan, "ema_state_dict")
    options: dict[str, Any] = {"key": "state_dict"}
    check_average(run, runs.in_file(averaged), tmp_path / "averaged", **options)
    result = ckpt_ema.average(run, output=tmp_path / "raw", device="cpu", key="ema_state_dict")
    actual = read_safetensors(tmp_path / "raw" / "model.safetensors")
    wanted = fold(result.plan, raw)
    check(
        {name.removeprefix("module."): t for name, t in actual.items() if name != "steps"}, wanted
    )


def test_a_key_that_is_not_there_is_refused_with_those_that_are(run: Path) -> None:
    runs.dit(run)
    message = refusal(run, key="weights")
    assert "weights" in message
    assert "model" in message
    assert "ema" in message


def test_several_models_in_one_file_are_told_apart_by_key(run: Path, tmp_path: Path) -> None:
    first, second = runs.states(2), [runs.state(40), runs.state(41)]
    for step, (generator, critic) in enumerate(zip(first, second, strict=True), start=1):
        content = {"net_g": generator, "net_d": critic}
        runs.torch_file(run / f"step_{step}.pt", content)
    message = refusal(run)
    for part in ("net_g", "net_d", "--key"):
        assert part in message
    options: dict[str, Any] = {"key": "net_d"}
    check_average(run, runs.in_file(second), tmp_path / "out", **options)


def test_what_is_skipped_in_a_file_is_named(run: Path) -> None:
    """A namespace of arguments, a numpy scalar: nothing that is needed, and nothing that runs."""
    runs.timm(run)
    plan = ckpt_ema.plan(run)
    assert said(plan, r"argparse\.Namespace")
    assert said(plan, r"numpy")


class Evil:
    """Makes a folder wherever it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_file_does_not_run(run: Path, tmp_path: Path) -> None:
    models = runs.states(2)
    for step, model in enumerate(models, start=1):
        content = {"model": model, "config": Evil(tmp_path / "mark"), "iteration": step}
        runs.torch_file(run / f"step_{step}.pt", content)
    result = check_average(run, runs.in_file(models), tmp_path / "out")
    assert said(result.plan, "mkdir")
    assert not (tmp_path / "mark").exists()


def test_code_in_what_the_steps_are_read_from_does_not_run(run: Path, tmp_path: Path) -> None:
    """Where the place of a file is told by what is in it, that is read as carefully."""
    flat(run, "net_1.pt", "net_2.pt")
    content = {"model": runs.state(3), "iteration": Evil(tmp_path / "mark")}
    runs.torch_file(run / "last.pt", content)
    assert "last.pt" in refusal(run)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("is_whole", [True, False], ids=["all of it", "among the rest"])
def test_code_in_the_metadata_of_a_distributed_checkpoint_does_not_run(
    run: Path, tmp_path: Path, is_whole: bool
) -> None:
    runs.torchtitan(run)
    for path in run.glob("*/.metadata"):
        evil: Any = Evil(tmp_path / "mark")
        if not is_whole:
            metadata = pickle.loads(path.read_bytes())
            metadata.planner_data = evil
            evil = metadata
        path.write_bytes(pickle.dumps(evil))
    message = refusal(run)
    assert ".metadata" in message
    assert not (tmp_path / "mark").exists()


def test_a_last_save_that_is_another_kind_of_model_is_refused(run: Path) -> None:
    """The last save may be for another loader, with names of its own."""
    runs.torchtitan(run)
    folder = run / "step-2000"
    runs.pretrained(folder, runs.state(4))
    message = refusal(run)
    assert "step-2000" in message


def test_a_prefix_that_only_some_steps_have_is_unified_with_a_warning(
    run: Path, tmp_path: Path
) -> None:
    """A run that went on without being compiled."""
    models = runs.states(3)
    for step, model in enumerate(models, start=1):
        prefix = "_orig_mod." if step < 3 else ""
        runs.torch_file(run / f"step_{step}.pt", runs.prefixed(prefix, model))
    result = check_average(run, runs.in_file(models), tmp_path / "out")
    assert warned(result.plan, r"_orig_mod\.")


def test_a_prefix_is_taken_off_on_request(run: Path, tmp_path: Path) -> None:
    models = runs.states(2)
    for step, model in enumerate(models, start=1):
        runs.torch_file(run / f"step_{step}.pt", {"state_dict": runs.prefixed("net.", model)})
    options: dict[str, Any] = {"strip_prefix": "net."}
    check_average(run, runs.in_file(models), tmp_path / "out", **options)
    kept = ckpt_ema.plan(run)
    assert all(
        tensor.name.startswith("net.") for tensor in kept.averages[0].output.files[0].tensors
    )


# --- ranks ---


def test_the_critic_can_be_averaged_instead_of_the_actor(run: Path, tmp_path: Path) -> None:
    runs.verl_whole(run)
    expected = runs.in_file([runs.state(90 + step) for step in (100, 200, 300)])
    options: dict[str, Any] = {"component": "critic"}
    check_average(run, expected, tmp_path / "out", **options)


def test_the_file_of_one_rank_is_refused_under_any_name(run: Path) -> None:
    """It says the shape of the whole and holds a part."""
    for step in (1, 2):
        parts = {name: runs.RankTensor(t[:1], 2) for name, t in runs.state(step).items()}
        runs.torch_file(run / f"step_{step}.pt", parts)
    assert "DTensor" in refusal(run)


def test_files_of_ranks_are_refused_when_they_are_listed_too(run: Path) -> None:
    runs.verl(run)
    paths = [
        run / f"global_step_{step}" / "actor" / "model_world_size_2_rank_0.pt"
        for step in (100, 200)
    ]
    assert re.search("DTensor|rank", refusal(paths))


def test_the_shards_of_a_step_that_is_there_as_a_whole_are_said(run: Path) -> None:
    runs.olmo(run)
    plan = ckpt_ema.plan(run)
    assert said(plan, "step<n>|step1000") or "step1000" in left_out(plan)


def test_the_state_of_a_trainer_is_read_where_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    """The same steps as models for serving, which come first, and as distributed checkpoints."""
    expected = runs.prime_rl(run)
    check_average(run / "checkpoints", expected, tmp_path / "out")


# --- the cache of the Hub ---


def test_revisions_with_the_same_bytes_are_not_counted_twice(run: Path, tmp_path: Path) -> None:
    """Branches exist that are called steps and hold the final model."""
    models = [runs.state(1), runs.state(3), runs.state(3)]
    runs.hub_cache(run, dict(zip(("step1000", "step2000", "step3000"), models, strict=True)))
    try:
        result = ckpt_ema.average(run, output=tmp_path / "out", device="cpu")
    except RefusedError as error:
        assert re.search("identical|same", str(error))
    else:
        assert len(result.plan.checkpoints) == 2
        assert result.plan.left_out


# --- the output ---


def test_an_output_folder_with_weights_in_it_is_refused(run: Path, tmp_path: Path) -> None:
    """Loaders would pick the wrong file."""
    expected = runs.transformers(run)
    output = runs.pretrained(tmp_path / "out", runs.state(9))
    with pytest.raises(RefusedError, match="--overwrite"):
        ckpt_ema.average(run, output=output, device="cpu")
    check_average(run, expected, output, overwrite=True)


def test_the_index_of_shards_names_what_was_written(run: Path, tmp_path: Path) -> None:
    runs.automodel(run)
    output = tmp_path / "out"
    ckpt_ema.average(run, output=output, device="cpu")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00001.safetensors"}
