"""What is copied beside the weights: the model's own files, the run's configuration, a pipeline."""

import json
from pathlib import Path

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.planning.plan import Plan
from tests.conftest import MakeRun, noise, read_safetensors, series, write_safetensors


def write(folder: Path, **texts: str) -> Path:
    """Text files in a folder; `__` in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def copied(plan: Plan) -> dict[str, str]:
    """Each companion, and the folder that it comes from."""
    companions = plan.averages[0].output.companions
    return {companion.name: companion.source.parent.name for companion in companions}


@pytest.fixture
def bare(make_run: MakeRun) -> Path:
    """A run whose checkpoints hold weights only, as accelerate saves them."""
    run = make_run(series(3, w=noise(3, 5)), pattern="checkpoint_{}")
    for checkpoint in run.iterdir():
        (checkpoint / "config.json").unlink()
    return run


def test_without_a_configuration_the_run_gives_its_own(bare: Path) -> None:
    write(bare, config__json="{}", tokenizer_config__json="{}", notes__txt="no", train__log="no")
    assert copied(ckpt_ema.plan(bare)) == {
        "config.json": "run",
        "tokenizer_config.json": "run",
    }


def test_a_checkpoints_own_configuration_wins_over_the_runs(make_run: MakeRun) -> None:
    """A tokenizer is taken from the run only where the checkpoint has none."""
    run = make_run(series(2, w=noise(2, 5)))
    write(run, config__json="{}", vocab__json="{}", hparams__yaml="no")
    assert copied(ckpt_ema.plan(run)) == {"config.json": "checkpoint-2", "vocab.json": "run"}
    write(run / "checkpoint-2", tokenizer__json="{}")
    assert copied(ckpt_ema.plan(run)) == {
        "config.json": "checkpoint-2",
        "tokenizer.json": "checkpoint-2",
    }


def test_what_was_asked_for_wins_over_the_checkpoints_own(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(series(2, w=noise(2, 5)))
    base = write(tmp_path / "base", config__json="{}")
    write(base / "data", train__json="[]")
    assert copied(ckpt_ema.plan(run, config_from=base)) == {"config.json": "base"}
    for path in (write(tmp_path / "empty"), tmp_path / "nowhere"):
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.plan(run, config_from=path)
        assert (caught.value.code, caught.value.path) == (Code.NOT_FOUND, str(path))


def test_a_list_from_several_folders_takes_nothing_from_above(tmp_path: Path) -> None:
    paths = []
    for step, folder in enumerate(("one", "two")):
        write(tmp_path / folder, config__json="{}")
        write_safetensors(tmp_path / folder / f"m_{step}.safetensors", {"w": torch.ones(2) * step})
        paths.append(tmp_path / folder / f"m_{step}.safetensors")
    write(tmp_path, config__json="{}")
    assert copied(ckpt_ema.plan(paths, output=tmp_path / "out")) == {}


def test_logs_beside_the_weights_stay_behind(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 5)))
    for folder in ("wandb", "logs", "runs", "custom"):
        write(run / "checkpoint-2" / folder, some__txt="")
    assert set(copied(ckpt_ema.plan(run))) == {"config.json", "custom/some.txt"}


def test_config_from_gives_every_file_but_weights_and_state(bare: Path, tmp_path: Path) -> None:
    base = write(tmp_path / "base", config__json="{}", tokenizer__json="{}", optimizer__pt="no")
    write_safetensors(base / "model.safetensors", {"w": torch.zeros(5)})
    output = ckpt_ema.average(bare, config_from=base, device="cpu").output
    assert {path.name for path in output.iterdir()} == {
        "ckpt_ema.json",
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert read_safetensors(output / "model.safetensors")["w"].any()


def test_the_configuration_is_part_of_what_is_up_to_date(bare: Path, tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, config__json=name) for name in ("one", "second"))
    assert not ckpt_ema.average(bare, config_from=one, device="cpu").is_up_to_date
    assert ckpt_ema.average(bare, config_from=one, device="cpu").is_up_to_date
    with pytest.raises(RefusedError):
        ckpt_ema.average(bare, config_from=two, device="cpu")


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline of diffusers with a unet, a vae, a scheduler and things that are not its own."""
    root = tmp_path / "pipeline"
    listed = {name: ["diffusers", "Some"] for name in ("unet", "vae", "scheduler")}
    write(root, model_index__json=json.dumps({"_class_name": "P", **listed}), README__md="card")
    for component in ("unet", "vae"):
        write(root / component, config__json=component)
        weights = root / component / "diffusion_pytorch_model.safetensors"
        write_safetensors(weights, {"w": torch.zeros(3)})
    write(root / "scheduler", scheduler_config__json="{}")
    write(root / "logs", events__txt="no")
    return root


def checkpoints_of_a_unet(run: Path) -> None:
    for step in (10, 20):
        folder = write(run / f"checkpoint-{step}" / "unet", config__json="newer")
        state = {"w": torch.full((3,), float(step))}
        write_safetensors(folder / "diffusion_pytorch_model.safetensors", state)
        (run / f"checkpoint-{step}" / "optimizer.bin").touch()


PIPELINE = {
    "ckpt_ema.json",
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.mark.parametrize("where", ["the run is the pipeline", "--config-from names it"])
def test_a_component_is_written_inside_its_pipeline(
    pipeline: Path, tmp_path: Path, where: str
) -> None:
    run = pipeline if where.startswith("the run") else tmp_path / "run"
    checkpoints_of_a_unet(run)
    config_from = None if run == pipeline else pipeline
    output = ckpt_ema.average(
        run, output=tmp_path / "out", config_from=config_from, device="cpu"
    ).output
    found = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert found == PIPELINE
    assert (output / "unet/config.json").read_text() == "newer"
    average = read_safetensors(output / "unet/diffusion_pytorch_model.safetensors")["w"]
    assert average[0].item() == pytest.approx(20 - 10 * 2 / 11)
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (output / vae).read_bytes() == (pipeline / vae).read_bytes()


def test_a_component_without_its_pipeline_is_written_alone(tmp_path: Path) -> None:
    checkpoints_of_a_unet(tmp_path / "run")
    plan = ckpt_ema.plan(tmp_path / "run")
    assert [file.name for file in plan.averages[0].output.files] == [
        "unet/diffusion_pytorch_model.safetensors"
    ]
    assert copied(plan) == {"unet/config.json": "unet"}


def test_a_list_of_components_that_is_broken_is_refused(pipeline: Path) -> None:
    checkpoints_of_a_unet(pipeline)
    for text in ("{", "[]"):
        (pipeline / "model_index.json").write_text(text)
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.plan(pipeline)
        assert caught.value.code is Code.WRONG_FORMAT
        assert caught.value.path == str(pipeline / "model_index.json")
