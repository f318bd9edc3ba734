"""Finding checkpoints: what is a step, in which order, what is left out and what is refused."""

import os
from pathlib import Path
from typing import Any

import pytest

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles, Specs
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.find.checkpoint import Found
from ckpt_ema.find.run import discover as discover_with
from ckpt_ema.find.verdict import Outcome, Reason
from ckpt_ema.options import Reading, Selection
from ckpt_ema.storage.local import Local


class Mute(Source):
    """A source in which no file records its step."""

    def read(self, model: ModelFiles) -> Specs:  # noqa: ARG002
        """Return no tensors."""
        return Specs({}, (), ())


def discover(paths: list[Path], **selection: Any) -> Found:
    """Find checkpoints where no file records its step."""
    return discover_with(paths, Selection(**selection), Mute(Local(), Reading()))


def touch(root: Path, *names: str) -> Path:
    """Make empty files (and the folders they are in) below `root`."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names(found: Found) -> list[str]:
    return [checkpoint.path.name for checkpoint in found.checkpoints]


def left_out(found: Found) -> dict[str, Reason]:
    return {entry.name: entry.verdict.reason for entry in found.left_out}


@pytest.mark.parametrize(
    ("pattern", "inside"),
    [
        ("checkpoint-{}", "model.safetensors"),
        ("step_{}", "model.safetensors.index.json"),
        ("epoch-{}", "pytorch_model.bin"),
        ("epoch_{}", "pytorch_model.bin.index.json"),
        ("global_step{}", "model.safetensors"),
        ("iter_{:07}", "model.safetensors"),
        ("ckpt-{}", "model.safetensors"),
        ("{:08}", "model.safetensors"),
    ],
)
def test_numbered_folders_are_ordered_by_number_not_as_text(
    tmp_path: Path, pattern: str, inside: str
) -> None:
    steps = [9, 10, 200, 1000, 1800]
    for step in steps:
        touch(tmp_path, f"{pattern.format(step)}/{inside}")
    found = discover([tmp_path])
    assert [checkpoint.step for checkpoint in found.checkpoints] == steps
    assert names(found) == [pattern.format(step) for step in steps]
    assert {checkpoint.model.path.name for checkpoint in found.checkpoints} == {inside}


@pytest.mark.parametrize("extension", [".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pth.tar"])
@pytest.mark.parametrize(
    "pattern",
    ["lora-{:06}", "step_{}", "epoch=1-step={}", "12-lora-{}", "model_{}", "{}epoch", "net-0.5-{}"],
)
def test_flat_series_are_ordered_by_their_number(
    tmp_path: Path, pattern: str, extension: str
) -> None:
    steps = [2, 10, 100]
    touch(tmp_path, *(pattern.format(step) + extension for step in steps))
    assert [checkpoint.step for checkpoint in discover([tmp_path]).checkpoints] == steps


def test_modification_times_do_not_matter(tmp_path: Path) -> None:
    for step in (3, 1, 2):
        path = touch(tmp_path, f"checkpoint-{step}/model.safetensors") / f"checkpoint-{step}"
        os.utime(path, (100 - step, 100 - step))
    assert names(discover([tmp_path])) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_step_100_is_not_step_1000_nor_a_copy_of_it(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n}/model.safetensors" for n in ("step_100", "step_1000", "step_1001_hf")))
    found = discover([tmp_path])
    assert names(found) == ["step_100", "step_1000"]
    assert left_out(found) == {"step_1001_hf": Reason.ONLY_ONE}


def test_names_that_start_with_i_n_or_t_are_found(tmp_path: Path) -> None:
    touch(tmp_path, "iter_1.pt", "iter_2.pt")
    assert names(discover([tmp_path])) == ["iter_1.pt", "iter_2.pt"]
    touch(tmp_path / "n", "net_1.pt", "net_2.pt")
    assert names(discover([tmp_path / "n"])) == ["net_1.pt", "net_2.pt"]


def test_what_is_no_step_is_left_out_and_said(tmp_path: Path) -> None:
    for step in (1, 2):
        touch(tmp_path, f"checkpoint-{step}/model.safetensors", f"checkpoint-{step}/optimizer.pt")
    touch(
        tmp_path,
        "model.safetensors",
        "optimizer.pt",
        "rng_state_0.pth",
        "tmp-checkpoint-3/model.safetensors",
        "checkpoint-4-tmp/model.safetensors",
        "checkpoint-5-merged/model.safetensors",
        "checkpoint-6/rollouts.json",
        "checkpoint-7-ema/model.safetensors",
        "averaged-8/model.safetensors",
        "averaged-8/ckpt_ema.json",
        "best.pt",
        "model-00001-of-00002.safetensors",
        "config.json",
        "logs/events.1",
    )
    found = discover([tmp_path])
    assert names(found) == ["checkpoint-1", "checkpoint-2"]
    assert left_out(found) == {
        "model.safetensors": Reason.OWN_MODEL,
        "optimizer.pt": Reason.TRAINING_STATE,
        "rng_state_0.pth": Reason.TRAINING_STATE,
        "tmp-checkpoint-3": Reason.UNFINISHED_NAME,
        "checkpoint-4-tmp": Reason.UNFINISHED_NAME,
        "checkpoint-5-merged": Reason.MERGED,
        "checkpoint-6": Reason.NO_MODEL,
        "checkpoint-7-ema": Reason.AVERAGE,
        "averaged-8": Reason.OWN_OUTPUT,
        "best.pt": Reason.BEST,
    }


def test_every_entry_gets_one_verdict_and_the_rule_that_decided(tmp_path: Path) -> None:
    touch(tmp_path, "step_1.pt", "step_2.pt", "last.pt", "config.json", "wandb/log.pt")
    (tmp_path / "notes_3.txt").touch()
    judged = discover([tmp_path], exclude=("last",)).judged
    assert {one.name: (one.verdict.outcome, one.verdict.rule) for one in judged} == {
        "step_1.pt": (Outcome.STEP, "series"),
        "step_2.pt": (Outcome.STEP, "series"),
        "last.pt": (Outcome.SKIPPED, "not-selected"),
        "config.json": (Outcome.OTHER, "no-weights-by-name"),
        "notes_3.txt": (Outcome.OTHER, "no-model"),
        "wandb": (Outcome.OTHER, "part-of-something"),
    }
    assert {one.path for one in judged} == set(tmp_path.iterdir())


def test_our_own_output_is_never_a_step(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        touch(tmp_path, f"step_{step}/model.safetensors")
    touch(tmp_path, "step_3/ckpt_ema.json")
    found = discover([tmp_path])
    assert names(found) == ["step_1", "step_2"]
    assert left_out(found) == {"step_3": Reason.OWN_OUTPUT}


def test_links_to_a_step_are_not_counted_twice(tmp_path: Path) -> None:
    for step in (1, 2):
        touch(tmp_path, f"checkpoint-{step}/model.safetensors")
    (tmp_path / "checkpoint-3").symlink_to("checkpoint-2")
    (tmp_path / "checkpoint-4").symlink_to("nowhere")
    (tmp_path / "checkpoint-5").symlink_to("checkpoint-5")
    found = discover([tmp_path])
    assert names(found) == ["checkpoint-1", "checkpoint-2"]
    assert left_out(found)["checkpoint-3"] is Reason.SAME_FILE
    flat = touch(tmp_path / "flat", "a-1.pt", "a-2.pt")
    os.link(flat / "a-2.pt", flat / "a-3.pt")
    assert names(discover([flat])) == ["a-1.pt", "a-2.pt"]


def test_a_farm_of_links_is_a_run(tmp_path: Path) -> None:
    """The Hub's cache holds blobs and links to them."""
    touch(tmp_path, "blobs/one", "blobs/two")
    for step, blob in ((1, "one"), (2, "two")):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / blob)
    assert len(discover([tmp_path / "run"]).checkpoints) == 2


def test_a_fifo_is_left_out_and_does_not_hang(tmp_path: Path) -> None:
    touch(tmp_path, "step_1.pt", "step_2.pt")
    os.mkfifo(tmp_path / "step_3.pt")
    found = discover([tmp_path])
    assert names(found) == ["step_1.pt", "step_2.pt"]
    assert left_out(found) == {"step_3.pt": Reason.NOT_REGULAR}


def test_an_explicit_list_keeps_its_order_and_says_when_it_looks_wrong(tmp_path: Path) -> None:
    paths = [tmp_path / f"checkpoint-{step}" for step in (1000, 200, 300)]
    for path in paths:
        touch(path, "model.safetensors")
    found = discover(paths)
    assert [checkpoint.path for checkpoint in found.checkpoints] == paths
    assert [warning.code for warning in found.warnings] == [Code.OUT_OF_ORDER]
    assert not discover([paths[1], paths[2], paths[0]]).warnings


def test_a_model_folder_alone_is_one_checkpoint(tmp_path: Path) -> None:
    """Shards and numbered sub-modules in it are parts of it, not steps."""
    model = touch(
        tmp_path / "model",
        "model.safetensors",
        "2_Dense/model.safetensors",
        "3_Dense/model.safetensors",
        "model-00001-of-00002.safetensors",
    )
    found = discover([model])
    assert [checkpoint.path for checkpoint in found.checkpoints] == [model]
    assert found.checkpoints[0].step is None


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ([], Code.NO_CHECKPOINTS),
        (["logs/a", "notes.txt"], Code.NO_CHECKPOINTS),
        (["optimizer.pt"], Code.NO_CHECKPOINTS),
        (["step_1.pt", "step_2.pt", "epoch_1.pt", "epoch_2.pt"], Code.SEVERAL_SERIES),
        (["step_1.pt", "step_01.pt"], Code.SAME_STEP),
        (["a-1-200.pt", "a-2-400.pt"], Code.UNKNOWN_ORDER),
    ],
)
def test_no_guess_when_there_is_nothing_or_more_than_one_reading(
    tmp_path: Path, files: list[str], code: Code
) -> None:
    with pytest.raises(RefusedError) as caught:
        discover([touch(tmp_path, *files)])
    assert caught.value.code is code
    assert caught.value.path in {str(tmp_path), *(str(tmp_path / file) for file in files)}


def test_paths_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/model.safetensors", "b/readme", "c.txt")
    cases = [
        (["nowhere"], Code.NOT_FOUND),
        (["a", "b"], Code.NOT_A_CHECKPOINT),
        (["c.txt"], Code.NOT_A_CHECKPOINT),
        (["a", "a"], Code.GIVEN_TWICE),
    ]
    for names, code in cases:
        with pytest.raises(RefusedError) as caught:
            discover([tmp_path / name for name in names])
        assert (caught.value.code, caught.value.path) == (code, str(tmp_path / names[-1]))


@pytest.mark.parametrize("folder", ["unet", "huggingface", "."])
def test_a_single_file_and_an_index_obey_form(tmp_path: Path, folder: str) -> None:
    """Also where they are in a folder of the checkpoint."""
    name = "diffusion_pytorch_model.safetensors" if folder == "unet" else "model.safetensors"
    for step in (1, 2):
        inside = tmp_path / f"checkpoint-{step}" / folder
        touch(inside, name, f"{name}.index.json")
    with pytest.raises(RefusedError) as caught:
        discover([tmp_path])
    assert caught.value.code is Code.SEVERAL_MODELS
    assert caught.value.path == str(tmp_path / "checkpoint-1" / folder)
    for form, suffix in (("single", ""), ("sharded", ".index.json")):
        found = discover_with([tmp_path], Selection(), Mute(Local(), Reading(form=form)))
        assert {one.model.path.name for one in found.checkpoints} == {name + suffix}
