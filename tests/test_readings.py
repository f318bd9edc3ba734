"""Folders that can be read in two ways: the right reading, or a refusal with the way out."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import Code, OptionError, RefusedError
from ckpt_ema.find.verdict import Reason
from ckpt_ema.planning.plan import Plan
from tests.conftest import MakeRun, noise, series, write_safetensors, write_shards


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), float(value)), "b": torch.full((2,), float(value))}


def flat(run: Path, *names: str, **inside: Any) -> Path:
    """Torch files of these names, each with values of its own; `inside` goes beside the model."""
    run.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        model = state(number + 1)
        torch.save({"model": model, **inside} if inside else model, run / name)
    return run


def loras(run: Path, **steps: int) -> Path:
    """Safetensors files that say their step in their header, as kohya's do."""
    run.mkdir(exist_ok=True)
    for name, step in steps.items():
        file = run / f"{name.replace('__', '-')}.safetensors"
        write_safetensors(file, state(step), {"ss_steps": str(step)})
    return run


def names(plan: Plan) -> list[str]:
    return [checkpoint.name for checkpoint in plan.checkpoints]


def steps(plan: Plan) -> list[int | None]:
    return [checkpoint.step for checkpoint in plan.checkpoints]


def left_out(plan: Plan) -> dict[str, Reason]:
    return {entry.name: entry.verdict.reason for entry in plan.left_out}


def warned(plan: Plan, text: str) -> bool:
    """Whether a warning has this text."""
    return any(text in str(warning) for warning in plan.warnings)


def refused(run: Path | list[Path], **options: Any) -> Code:
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run, **options)
    return caught.value.code


# --- Several runs in one folder ---


def test_two_models_of_one_trainer_are_not_one_run(tmp_path: Path) -> None:
    run = loras(
        tmp_path / "run", alice__000001=10, alice__000002=20, bob__000001=15, bob__000002=25
    )
    assert refused(run) is Code.SEVERAL_SERIES
    assert names(ckpt_ema.plan(run, pattern="^bob")) == [
        "bob-000001.safetensors",
        "bob-000002.safetensors",
    ]


def test_seeds_and_folds_are_runs_and_not_steps(tmp_path: Path) -> None:
    run = flat(tmp_path / "run", "model_seed1.pt", "model_seed2.pt", "model_seed3.pt")
    assert refused(run) is Code.SEVERAL_RUNS
    assert steps(ckpt_ema.plan(run, pattern="([0-9]+)")) == [1, 2, 3]


def test_versions_of_lightning_are_two_runs_also_where_no_step_is_there_twice(
    tmp_path: Path,
) -> None:
    files = ("epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt", "epoch=0-step=15-v1.ckpt")
    run = flat(tmp_path / "run", *files)
    assert refused(run) is Code.SEVERAL_RUNS
    assert steps(ckpt_ema.plan(run, pattern=r"(?<!-v1)\.ckpt$")) == [10, 20]


def test_epochs_that_fall_while_steps_rise_are_refused(tmp_path: Path) -> None:
    run = flat(
        tmp_path / "run", "epoch_0_step_900.pt", "epoch_1_step_100.pt", "epoch_2_step_500.pt"
    )
    assert refused(run) is Code.CONTRADICTORY_STEPS
    by_epoch = ckpt_ema.plan(run, pattern=r"epoch[-_=]?(?P<step>[0-9]+)")
    assert steps(by_epoch) == [0, 1, 2]
    assert steps(ckpt_ema.plan(run, order="name")) == [100, 500, 900]


# --- Names ---


@pytest.mark.parametrize(
    "metrics",
    [
        ("val_loss=0.25", "val_loss=inf", "val_loss=9.9e-05"),
        ("acc=1", "acc=0.75", "acc=0.5"),
        ("reward=-3.21", "reward=1.50", "reward=0"),
    ],
)
def test_a_metric_does_not_hide_a_checkpoint(tmp_path: Path, metrics: tuple[str, ...]) -> None:
    files = [f"epoch={epoch}-{metric}.ckpt" for epoch, metric in enumerate(metrics)]
    assert steps(ckpt_ema.plan(flat(tmp_path / "run", *files))) == [0, 1, 2]


@pytest.mark.parametrize("word", ["final-lora", "mychar_best_v2", "style_rank64", "last.try"])
def test_a_word_that_all_names_have_is_part_of_the_models_name(tmp_path: Path, word: str) -> None:
    run = flat(tmp_path / "run", f"{word}-000001.pt", f"{word}-000002.pt")
    for pattern in (None, r"-(\d+)"):
        assert steps(ckpt_ema.plan(run, pattern=pattern)) == [1, 2]


def test_a_lone_name_that_seems_to_be_later_is_warned_of(tmp_path: Path) -> None:
    run = flat(tmp_path / "run", "step_1.pt", "step_2.pt", "step_3_fixed.pt")
    plan = ckpt_ema.plan(run)
    assert steps(plan) == [1, 2]
    assert warned(plan, "No other name is like step_3_fixed.pt")
    assert warned(plan, "step_3_fixed.pt seems to be later than step_2.pt")


# --- Aliases ---


def test_the_plain_loop_that_saves_last_beside_epochs(tmp_path: Path) -> None:
    """torch.save writes the name of its file into each, so that no two files are equal."""
    run = flat(tmp_path / "run", "epoch_1.pt", "epoch_2.pt")
    torch.save(state(2), run / "last.pt")
    plan = ckpt_ema.plan(run)
    assert steps(plan) == [1, 2]
    [copy] = plan.left_out
    assert (copy.name, copy.verdict.reason) == ("last.pt", Reason.COPY)
    assert copy.verdict.detail == "a copy of epoch_2.pt"
    torch.save(state(3), run / "last.pt")
    assert refused(run) is Code.UNKNOWN_ORDER
    assert names(ckpt_ema.plan(run, append=["last.pt"])) == ["epoch_1.pt", "epoch_2.pt", "last.pt"]
    assert steps(ckpt_ema.plan(run, aliases=False)) == [1, 2]


def test_a_sharded_final_is_compared_by_its_tensors_and_not_by_its_index(make_run: MakeRun) -> None:
    run = make_run([state(1), state(2)], shards=2)
    (run / "final").mkdir()
    write_shards(run / "final", state(3), 2)
    assert refused(run) is Code.UNKNOWN_ORDER
    write_shards(run / "final", state(2), 2)
    assert left_out(ckpt_ema.plan(run))["final"] is Reason.COPY


def test_what_is_appended_is_not_measured_by_the_markers_of_steps(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 5)))
    for step in (1, 2):
        text = json.dumps({"global_step": step})
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (run / "final").mkdir()
    write_safetensors(run / "final/model.safetensors", {"w": torch.ones(5)})
    assert names(ckpt_ema.plan(run, append=["final"])) == ["checkpoint-1", "checkpoint-2", "final"]
    listed = [run / "checkpoint-1", run / "checkpoint-2", run / "final"]
    assert len(ckpt_ema.plan(listed).checkpoints) == 3


def test_aliases_are_placed_by_what_they_say_whatever_their_names(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name, step in (("step_100", 100), ("step_200", 200), ("final", 300), ("last", 275)):
        torch.save({"model": state(step), "step": step}, run / f"{name}.pt")
    plan = ckpt_ema.plan(run)
    assert steps(plan) == [100, 200, 275, 300]


def test_an_alias_in_another_unit_has_no_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name, epoch in (("step_100", 1), ("step_200", 2), ("last", 3)):
        torch.save({"model": state(epoch), "epoch": epoch}, run / f"{name}.pt")
    plan = ckpt_ema.plan(run)
    assert steps(plan) == [100, 200, None]
    assert plan.averages[0].gaps == (None, 100, None)


def test_steps_that_start_again_in_each_epoch_do_not_order(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name, epoch, step in (("epoch_1", 1, 500), ("epoch_2", 2, 480), ("last", 3, 120)):
        torch.save({"model": state(epoch), "epoch": epoch, "step": step}, run / f"{name}.pt")
    assert steps(ckpt_ema.plan(run)) == [1, 2, 3]


def test_the_last_of_a_series_may_have_the_name_of_a_model(tmp_path: Path) -> None:
    run = loras(tmp_path / "run", model__000001=10, model__000002=20, model=30)
    assert steps(ckpt_ema.plan(run)) == [10, 20, 30]


def test_a_model_of_another_kind_is_no_step(make_run: MakeRun) -> None:
    run = make_run(series(2, lora=noise(2, 5)))
    (run / "final").mkdir()
    write_safetensors(run / "final/model.safetensors", {"merged": torch.ones(5)})
    assert left_out(ckpt_ema.plan(run))["final"] is Reason.ANOTHER_MODEL


# --- Lists ---


def test_a_glob_is_ordered_as_given_and_warned_of(tmp_path: Path) -> None:
    run = flat(tmp_path / "run", "model_1.pt", "model_10.pt", "model_2.pt")
    plan = ckpt_ema.plan(sorted(run.iterdir()))
    assert steps(plan) == [1, 10, 2]
    assert warned(plan, "a shell sorts names as text")


def test_checkpoints_of_one_name_are_called_by_their_folders(make_run: MakeRun) -> None:
    run = make_run([state(1), state(2)], steps=[500, 1000], pattern="checkpoint-{}/model")
    plan = ckpt_ema.plan([run / "checkpoint-500/model", run / "checkpoint-1000/model"])
    assert names(plan) == ["checkpoint-500", "checkpoint-1000"]
    assert steps(plan) == [500, 1000]


def test_what_a_list_cannot_be_asked_for(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run([state(1), state(2)], shards=2)
    listed = [run / "checkpoint-1", run / "checkpoint-2"]
    asked: list[dict[str, Any]] = [
        {"pattern": "1"},
        {"append": ["last"]},
        {"order": "name"},
        {"aliases": False},
    ]
    for options in asked:
        with pytest.raises(OptionError) as caught:
            ckpt_ema.plan(listed, **options)
        assert caught.value.code is Code.CONFLICTING_OPTIONS
    shard = "model-00001-of-00002.safetensors"
    assert refused([path / shard for path in listed]) is Code.NOT_A_CHECKPOINT
    wrong: list[dict[str, Any]] = [{"append": "last"}, {"pattern": ""}, {"output": "out.pt"}]
    for options in wrong:
        with pytest.raises(OptionError):
            ckpt_ema.plan(run, **options)


# --- Completeness ---


def test_markers_that_somebody_cleaned_up_are_not_asked_for(make_run: MakeRun) -> None:
    run = make_run(series(4, w=noise(4, 5)))
    (run / "checkpoint-4/trainer_state.json").write_text('{"global_step": 4}')
    assert steps(ckpt_ema.plan(run)) == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["zeros", "gone", "cut"])
def test_an_unfinished_newest_file_is_left_out(make_run: MakeRun, damage: str) -> None:
    run = make_run(series(3, w=noise(3, 500)))
    file = run / "checkpoint-3/model.safetensors"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
        file.symlink_to("nowhere")
    else:
        file.write_bytes(bytes(len(content)) if damage == "zeros" else content[:-1])
    plan = ckpt_ema.plan(run)
    assert steps(plan) == [1, 2]
    assert warned(plan, "checkpoint-3 is incomplete and left out")
    assert left_out(plan) == {"checkpoint-3": Reason.INCOMPLETE}


# --- Weights ---


def test_a_loss_beside_the_model_is_not_the_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for epoch in (1, 2):
        content = {"epoch": epoch, "net_g": state(epoch), "loss": torch.tensor(0.1), "opt": {}}
        torch.save(content, run / f"epoch_{epoch}.pt")
    [file] = ckpt_ema.plan(run).averages[0].output.files
    assert {tensor.name for tensor in file.tensors} == {"w", "b"}


def test_dicts_of_tensors_inside_the_model_are_not_dropped(tmp_path: Path) -> None:
    model = {"enc": state(1), "dec": state(2), "temperature": torch.ones(())}
    run = tmp_path / "run"
    run.mkdir()
    for epoch in (1, 2):
        torch.save({"model": model}, run / f"epoch_{epoch}.pt")
    with pytest.raises(RefusedError, match=r"model.enc \(2 entries\), model.dec \(2 entries\)"):
        ckpt_ema.plan(run)
    [file] = ckpt_ema.plan(run, key="model.dec").averages[0].output.files
    assert {tensor.name for tensor in file.tensors} == {"w", "b"}


def test_several_models_cannot_share_the_names_of_one_file(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / "run" / f"checkpoint_{step}"
        folder.mkdir(parents=True)
        write_safetensors(folder / "model.safetensors", state(step))
        write_safetensors(folder / "model_1.safetensors", state(step + 5))
    run = tmp_path / "run"
    with pytest.raises(RefusedError):
        ckpt_ema.plan(run, output=tmp_path / "one.safetensors")
    assert [file.name for file in ckpt_ema.plan(run).averages[0].output.files] == [
        "model.safetensors",
        "model_1.safetensors",
    ]


def test_a_part_of_a_checkpoint_by_its_name(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = flat(tmp_path / f"step_{step}", "actor.pt", "critic.pt")
        assert folder.is_dir()
    both = ckpt_ema.plan(tmp_path, allow_duplicates=True).averages[0].output.files
    assert [file.name for file in both] == ["actor.safetensors", "critic.safetensors"]
    files = [tmp_path / f"step_{step}/critic.pt" for step in (1, 2)]
    assert refused(files, component="critic") is Code.NOT_A_CHECKPOINT
    [file] = (
        ckpt_ema.plan(tmp_path, component="critic", allow_duplicates=True).averages[0].output.files
    )
    assert file.name == "critic.safetensors"


def test_base_models_at_other_places_are_warned_of_and_other_ranks_refused(
    make_run: MakeRun,
) -> None:
    run = make_run(series(2, w=noise(2, 5)))
    for step, base in ((1, "/scratch/a"), (2, "/scratch/b")):
        config = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": base}
        (run / f"checkpoint-{step}/adapter_config.json").write_text(json.dumps(config))
    assert warned(ckpt_ema.plan(run), "base_model_name_or_path")
    (run / "checkpoint-1/adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}')
    with pytest.raises(RefusedError, match="16"):
        ckpt_ema.plan(run)


# --- What a second reader found ---


def test_a_part_that_checkpoints_share_does_not_make_them_one(tmp_path: Path) -> None:
    """A frozen text encoder is one file by several names in caches and linked backups."""
    run = tmp_path / "run"
    for step in (100, 200):
        folder = run / f"checkpoint-{step}"
        for part in ("text_encoder", "unet"):
            (folder / part).mkdir(parents=True)
        write_safetensors(folder / "unet/diffusion_pytorch_model.safetensors", state(step))
        frozen = run / "checkpoint-100/text_encoder/model.safetensors"
        if step == 100:
            write_safetensors(frozen, state(1))
        else:
            (folder / "text_encoder/model.safetensors").hardlink_to(frozen)
    assert steps(ckpt_ema.plan(run)) == [100, 200]


@pytest.mark.parametrize(
    ("model", "place"),
    [(torch.nn.Linear(2, 2), ""), ({"g": {"sd": state(1)}}, "model.g.sd"), ([state(1)], "model.0")],
    ids=["a pickled module", "deep in dicts", "in a list"],
)
def test_a_lone_tensor_is_never_taken_for_a_model_that_is_elsewhere(
    tmp_path: Path, model: Any, place: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for epoch in (1, 2):
        content = {"epoch": epoch, "model": model, "loss": torch.tensor(0.1)}
        torch.save(content, run / f"epoch_{epoch}.pt")
    if place:
        plan = ckpt_ema.plan(run, allow_duplicates=True)
        assert set(plan.checkpoints[-1].specs.tensors) == set(state(1))
        assert any(f"The model is taken from {place}." in note.message for note in plan.notes)
    else:
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.plan(run)
        assert "loss" not in str(caught.value)


def test_numbers_in_the_models_own_name(tmp_path: Path) -> None:
    run = loras(tmp_path / "a", style_rank64__000001=10, style_rank64__000002=20, style_rank64=30)
    assert steps(ckpt_ema.plan(run)) == [10, 20, 30]
    run = flat(tmp_path / "b", "resnet50_epoch_1.pt", "resnet50_epoch_2.pt", "resnet50.pt")
    assert refused(run) is Code.UNKNOWN_ORDER
    assert left_out(ckpt_ema.plan(run, aliases=False)) == {"resnet50.pt": Reason.NO_ALIASES}
    run = loras(tmp_path / "c", model__000001=10, model=20)
    assert steps(ckpt_ema.plan(run)) == [10, 20]
    run = flat(tmp_path / "d", "opt125m-lora-000001.pt", "opt125m-lora-000002.pt")
    assert steps(ckpt_ema.plan(run)) == [1, 2]


def test_a_last_that_counts_from_zero_is_compared_by_its_bytes(tmp_path: Path) -> None:
    run = flat(tmp_path / "run", "epoch_1.pt", "epoch_2.pt")
    torch.save({"model": state(9), "epoch": 2}, run / "last.pt")
    assert refused(run) is Code.UNKNOWN_ORDER
    torch.save({"model": state(2), "epoch": 1}, run / "last.pt")
    assert left_out(ckpt_ema.plan(run)) == {"last.pt": Reason.COPY}


def test_unfinished_files_beside_aliases_stop_nothing(tmp_path: Path) -> None:
    run = flat(tmp_path / "run", "step_1.pt", "step_2.pt", "step_3.pt")
    torch.save(state(2), run / "last.pt")
    (run / "step_3.pt").write_bytes((run / "step_3.pt").read_bytes()[:200])
    plan = ckpt_ema.plan(run)
    assert steps(plan) == [1, 2]
    assert left_out(plan) == {"last.pt": Reason.COPY, "step_3.pt": Reason.INCOMPLETE}
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:200])
    assert left_out(ckpt_ema.plan(run))["last.pt"] is Reason.INCOMPLETE


def test_what_lies_beside_a_model_does_not_refuse_it(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / "run" / f"step_{step}"
        folder.mkdir(parents=True)
        torch.save(state(step), folder / "weights.pt")
        for name in ("vocab.pkl", "predictions.npz"):
            (folder / name).touch()
    assert steps(ckpt_ema.plan(tmp_path / "run")) == [1, 2]


def test_folders_beside_files_of_their_names_are_left_out(tmp_path: Path) -> None:
    run = flat(tmp_path / "run", "epoch_1.pt", "epoch_2.pt")
    for epoch in (1, 2):
        (run / f"epoch_{epoch}").mkdir()
        torch.save(state(7), run / f"epoch_{epoch}/preds.pt")
    plan = ckpt_ema.plan(run)
    assert steps(plan) == [1, 2]
    assert left_out(plan)["epoch_1"] is Reason.BESIDE_FILE
    assert not warned(plan, "unfinished")


def test_a_model_above_the_folder_of_checkpoints_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    flat(run / "checkpoints", "step_1.pt", "step_2.pt")
    torch.save(state(3), run / "last.pt")
    plan = ckpt_ema.plan(run)
    assert steps(plan) == [1, 2]
    assert warned(plan, "also holds last.pt")
    assert names(ckpt_ema.plan(run, append=["last.pt"])) == ["step_1.pt", "step_2.pt", "last.pt"]
    torch.save(state(9), run / "resnet50.pt")
    assert steps(ckpt_ema.plan(run)) == [1, 2]


def test_a_folder_of_runs_is_not_called_by_what_one_of_them_holds(tmp_path: Path) -> None:
    for name in ("one", "two"):
        context = tmp_path / name / "gpt-step=1000/context"
        context.mkdir(parents=True)
        (context / "model.yaml").touch()
    assert refused(tmp_path) is Code.NO_CHECKPOINTS
    for name in ("one", "one/gpt-step=1000"):
        assert refused(tmp_path / name) is Code.UNSUPPORTED_FORMAT


# --- What is appended, what is ours, what is listed ----------------------------------------------


def test_appending_what_is_there_already_is_refused(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 5)))
    (run / "checkpoint-2").rename(run / "final")
    assert refused(run, append=["final", "final"]) is Code.GIVEN_TWICE
    assert refused(run, append=["final", "elsewhere"]) is Code.NOT_FOUND
    with pytest.raises(OptionError) as caught:
        ckpt_ema.plan(run, append=["final"], exclude=["fin*"])
    assert caught.value.code is Code.CONFLICTING_OPTIONS
    only_last = ckpt_ema.plan(run, append=["final"], include=["*-3"])
    assert names(only_last) == ["checkpoint-3", "final"]


def test_appending_a_step_of_its_own_number_is_said(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 5)))
    plan = ckpt_ema.plan(run, append=["checkpoint-2"])
    assert names(plan) == ["checkpoint-1", "checkpoint-3", "checkpoint-2"]
    assert warned(plan, "--append checkpoint-2 puts it after checkpoint-3")


def test_files_that_we_wrote_are_no_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2, 3):
        write_safetensors(run / f"step_{step}.safetensors", state(step))
    made = ckpt_ema.average(run, device="cpu", output=tmp_path / "step_4.safetensors").output
    made.rename(run / "step_4.safetensors")
    plan = ckpt_ema.plan(run)
    assert names(plan) == [f"step_{step}.safetensors" for step in (1, 2, 3)]
    assert left_out(plan) == {"step_4.safetensors": Reason.OWN_OUTPUT}
    listed = ckpt_ema.plan([run / "step_3.safetensors", run / "step_4.safetensors"])
    assert warned(listed, "step_4.safetensors")
    for step in (1, 2, 3):
        (run / f"step_{step}.safetensors").unlink()
    assert refused(run) is Code.NO_CHECKPOINTS


def test_listed_checkpoints_have_names_of_their_own(make_run: MakeRun) -> None:
    runs = [make_run(series(1, w=noise(2, 5)[n]), name=f"run{n}") for n in (0, 1)]
    given = [runs[0] / "checkpoint-1/model.safetensors", runs[1] / "checkpoint-1"]
    assert names(ckpt_ema.plan(given)) == ["run0", "run1"]


@pytest.mark.parametrize("run", ["", [], [""], ["", "."]])
def test_an_empty_name_is_not_the_current_folder(run: Any) -> None:
    with pytest.raises(OptionError):
        ckpt_ema.plan(run)


def test_files_whose_times_contradict_their_steps_are_said(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 5)))
    for step, hours in ((1, 2.0), (2, 1.5), (3, 0.25)):
        file = run / f"checkpoint-{step}/model.safetensors"
        os.utime(file, (3600 * hours, 3600 * hours))
    assert warned(ckpt_ema.plan(run), "checkpoint-3 was written before checkpoint-2")


@pytest.mark.parametrize(
    "name",
    [
        *("q.lora_A.weight", "q.lora_B.default.weight", "x.lora_down.weight", "x.lora_a"),
        *("to_q_lora.up.weight", "x.hada_w1_a", "x.lokr_w2", "x.oft_blocks", "q.oft_R.weight"),
    ],
)
def test_adapters_are_said_to_be_averaged_factor_by_factor(make_run: MakeRun, name: str) -> None:
    def is_said(tensor: str) -> bool:
        run = make_run([{tensor: value} for value in noise(2, 5)], name=tensor)
        notes = ckpt_ema.plan(run).notes
        return any(note.code is Code.ADAPTER_FACTORS for note in notes)

    assert is_said(name)
    assert not is_said("x.lora_alpha")
