"""What people's own files hold: everything with weights is averaged, refused or warned of by name.

The letters are those of the kinds of reports; each test states what is promised.
"""

import argparse
import gzip
import json
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import Code, RefusedError
from tests.makers.dcp_folders import save as save_distributed
from tests.makers.safetensors_files import read_safetensors, write_safetensors
from tests.makers.torch_files import archive, save, sharded_pickle

Content = Callable[[float], Any]


def full(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape or (4, 4), float(value))


def layers(value: float, *names: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": full(value) for name in names or ("layers.0", "layers.1")}


def files(run: Path, content: Content, name: str = "model_{}.pt") -> Path:
    """Write three files of a run, whose tensors have the values 1, 2 and 3."""
    for number in (1, 2, 3):
        path = run / name.format(number * 100)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, content(number))
    return run


def folders(run: Path, **content: Content) -> Path:
    """Write three folders with files (`_` before the ending stands for its dot)."""
    for number in (1, 2, 3):
        folder = run / f"checkpoint-{number * 100}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": number * 100}))
        for name, of in content.items():
            stem, _, ending = name.rpartition("_")
            write(folder / f"{stem}.{ending}", of(number))
    return run


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        write_safetensors(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path, content)


class Averaged:
    """The output of a run of three, averaged uniformly, and what was said."""

    def __init__(self, run: Path, **options: Any) -> None:
        plan = ckpt_ema.plan(run, schedule="uniform", output=run.parent / "out", **options)
        self.warnings = {notice.code: notice.message for notice in plan.warnings}
        self.notes = " ".join(notice.message for notice in plan.notes)
        output = run.parent / "out"
        ckpt_ema.average(run, schedule="uniform", output=output, overwrite=True, **options)
        found = sorted(p for p in output.rglob("*.safetensors*") if p.suffix != ".json")
        self.files = {str(one.relative_to(output)): read_safetensors(one) for one in found}

    def values(self, file: str = "model.safetensors") -> dict[str, float]:
        """Return the one value that each tensor of a file has throughout."""
        tensors = self.files[file]
        assert all((one == one.flatten()[0]).all() for one in tensors.values())
        return {name: one.flatten()[0].item() for name, one in tensors.items()}


def refusal(run: Path, **options: Any) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run, output=run.parent / "out", **options)
    return caught.value


# --- I: parts of a model in one file ---


@pytest.mark.parametrize(
    "parts",
    [
        ("model", "classifier"),
        ("generator", "discriminator"),
        ("state_dict", "heads"),
        ("model", "resampler"),
        ("encoder", "decoder"),
        ("model", "generator"),
    ],
    ids=" ".join,
)
def test_a_file_of_several_models_is_refused_by_their_names_and_key_takes_all(
    tmp_path: Path, parts: tuple[str, str]
) -> None:
    run = files(tmp_path / "run", lambda i: {part: {"w": full(i)} for part in parts})
    error = refusal(run)
    assert error.code is Code.SEVERAL_MODELS
    assert all(part in error.message for part in parts)
    every = ",".join(parts)
    assert f"--key {every}" in error.hint
    done = Averaged(run, key=every)
    assert done.values() == {f"{part}.w": 2.0 for part in parts}
    assert Averaged(run, key=parts[0]).values() == {"w": 2.0}


def test_dicts_inside_a_dict_are_one_model_by_its_key(tmp_path: Path) -> None:
    run = files(tmp_path / "run", lambda i: {"net": {"a": {"w": full(i)}, "b": {"w": full(i)}}})
    assert "--key net" in refusal(run).hint
    assert Averaged(run, key="net").values() == {"a.w": 2.0, "b.w": 2.0}


def test_tensors_beside_a_dict_of_tensors_are_refused_and_a_dot_takes_all(tmp_path: Path) -> None:
    run = files(tmp_path / "run", lambda i: {"w": full(i), "head": {"w": full(i)}})
    error = refusal(run)
    assert error.code is Code.SEVERAL_MODELS
    assert "the top level" in error.message
    assert "head" in error.message
    assert Averaged(run, key=".").values() == {"w": 2.0, "head.w": 2.0}


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        ({"criterion": {"weight": full(1)}}, "criterion"),
        ({"dino_loss": {"center": full(1)}}, "dino_loss"),
        ({"center": full(1)}, "center"),
        ({"anchors": [full(1), full(2)]}, "anchors"),
    ],
    ids=["criterion", "dino-loss", "lone", "list"],
)
def test_lesser_tensors_beside_a_known_model_are_warned_of_by_name(
    tmp_path: Path, beside: Mapping[str, Any], name: str
) -> None:
    done = Averaged(files(tmp_path / "run", lambda i: {"model": {"w": full(i)}, **beside}))
    assert done.values() == {"w": 2.0}
    assert name in done.warnings[Code.OTHER_WEIGHTS]


@pytest.mark.parametrize(
    "beside",
    [
        {"opt": {"state": {0: {"exp_avg": full(1)}}, "param_groups": []}},
        {"g_optim": {"exp": full(1)}, "lrScheduler": {"base": full(1)}},
        {"fit_loop": {"x": full(1)}, "gradScaler": {"scale": full(1)}, "sampler": {"x": full(1)}},
        {"best_loss": torch.tensor(0.5), "cuda_rng": torch.zeros(8, dtype=torch.uint8)},
        {"metrics": {"loss": torch.tensor(0.5), "accuracy": torch.tensor([0.9])}},
        {"obs_mean": numpy.zeros(3), "history": {"loss": numpy.zeros(3)}},
        {"net": None, "args": argparse.Namespace(lr=1)},
    ],
)
def test_training_state_and_numbers_beside_a_model_are_not_warned_of(
    tmp_path: Path, beside: Mapping[str, Any]
) -> None:
    done = Averaged(files(tmp_path / "run", lambda i: {"model": {"w": full(i)}, **beside}))
    assert done.values() == {"w": 2.0}
    assert Code.OTHER_WEIGHTS not in done.warnings


@pytest.mark.parametrize("key", [None, "model", "model.inner"])
def test_a_numpy_array_among_tensors_is_refused_by_name_and_drop_leaves_it_out(
    tmp_path: Path, key: str | None
) -> None:
    def content(value: float) -> Any:
        state: Any = {"w": full(value), "b": full(value).numpy()}
        for one in reversed((key or "").split(".")):
            state = {one: state} if one else state
        return state

    run = files(tmp_path / "run", content)
    error = refusal(run)
    assert error.code is Code.UNREADABLE_TENSOR
    assert "tensor b is a numpy array" in error.message
    assert "--drop b" in error.hint
    assert Averaged(run, drop=["b"]).values() == {"w": 2.0}


# --- J: averages that a trainer made ---

RAW_AND_AVERAGE = [
    ("params", "params_ema"),
    ("g", "g_ema"),
    ("student", "teacher"),
    ("model_state_dict", "ema_model_state_dict"),
    ("model", "averaged_model"),
    ("model", "swa_model"),
    ("net", "modelEMA"),
    ("model", "shadow"),
    ("state_dict", "callbacks.EMA.ema_weights"),
    ("model", "ema.params"),
]


def nested(place: str, value: Any) -> Any:
    for one in reversed(place.split(".")):
        value = {one: value}
    return value


@pytest.mark.parametrize(("raw", "average"), RAW_AND_AVERAGE)
def test_of_raw_weights_and_their_average_the_raw_ones_are_taken_and_which_ema_turns_it(
    tmp_path: Path, raw: str, average: str
) -> None:
    run = files(
        tmp_path / "run",
        lambda i: {**nested(raw, {"w": full(i)}), **nested(average, {"w": full(i + 10)})},
    )
    done = Averaged(run)
    assert done.values() == {"w": 2.0}
    assert Code.ALREADY_AVERAGED not in done.warnings
    assert average in done.notes or "callbacks" in average
    done = Averaged(run, which="ema")
    assert done.values() == {"w": 12.0}
    assert Code.ALREADY_AVERAGED not in done.warnings


@pytest.mark.parametrize("average", [average for _, average in RAW_AND_AVERAGE[:8]])
def test_an_average_alone_is_averaged_with_a_warning_and_without_one_on_purpose(
    tmp_path: Path, average: str
) -> None:
    run = files(tmp_path / "run", lambda i: nested(average, {"w": full(i)}))
    done = Averaged(run)
    assert done.values() == {"w": 2.0}
    assert average in done.warnings[Code.ALREADY_AVERAGED]
    assert Code.ALREADY_AVERAGED not in Averaged(run, which="ema").warnings


def test_an_average_asked_for_that_is_not_there_is_refused_with_what_is(tmp_path: Path) -> None:
    run = files(tmp_path / "run", lambda i: {"model": {"layers.schema.weight": full(i)}})
    error = refusal(run, which="ema")
    assert error.code is Code.NO_MATCH
    assert "layers.schema.weight" in error.message


@pytest.mark.parametrize(
    ("raw", "average"),
    [
        ("model.diffusion_model.in.0.weight", "model_ema.diffusion_modelin0weight"),
        ("student.backbone.weight", "teacher.backbone.weight"),
        ("net.layers.0.weight", "net_ema.layers.0.weight"),
        ("layers.0.weight", "ema_model.module.layers.0.weight"),
        ("module.layers.0.weight", "module.ema.layers.0.weight"),
    ],
)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_an_average_under_a_prefix_inside_one_dict_is_left_out_or_takes_the_raw_names(
    tmp_path: Path, raw: str, average: str, ending: str
) -> None:
    run = tmp_path / "run"
    for i in (1, 2, 3):
        content = {raw: full(i), average: full(i + 10), "first_stage.weight": full(i)}
        prefix = "module.ema" if average.startswith("module") else average.partition(".")[0]
        content[f"{prefix}.num_updates"] = torch.tensor(i)
        write(run / f"model_{i}.{ending}", content)
    done = Averaged(run)
    file = next(iter(done.files))
    assert done.values(file) == {raw: 2.0, "first_stage.weight": 2.0}
    assert f"{prefix}.* holds an average" in done.notes
    assert Averaged(run, which="ema").values(file) == {raw: 12.0, "first_stage.weight": 2.0}


def test_an_average_in_the_names_that_mmcv_gives_it_is_left_out_but_a_lone_buffer_is_not(
    tmp_path: Path,
) -> None:
    run = files(
        tmp_path / "a",
        lambda i: {**layers(i), **{f"ema_layers_{n}_weight": full(i + 10) for n in (0, 1)}},
    )
    assert Averaged(run).values() == dict.fromkeys(layers(1), 2.0)
    assert Averaged(run, which="ema").values() == dict.fromkeys(layers(1), 12.0)
    run = files(tmp_path / "b", lambda i: {**layers(i), "embed": full(i), "ema_embed": full(i)})
    assert "ema_embed" in Averaged(run).values()


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state, optimizer: [state, optimizer],
        lambda state, optimizer: (state, optimizer, 3),
        lambda state, optimizer: {"checkpoint": {"nested": {"sd": state}, "opt": optimizer}},
        lambda state, _: {"student": state, "dino_loss": {"center": full(1)}},
    ],
    ids=["list", "tuple", "deep", "beside a loss"],
)
def test_the_one_dict_of_weights_is_found_wherever_it_is(tmp_path: Path, wrapped: Any) -> None:
    optimizer = {"state": {0: {"exp_avg": full(1)}}, "param_groups": []}
    run = files(tmp_path / "run", lambda i: wrapped({"w": full(i)}, optimizer))
    done = Averaged(run)
    assert done.values() == {"w": 2.0}
    assert "The model is taken from" in done.notes


def test_modules_with_such_a_word_that_have_no_raw_twin_are_a_part_of_the_model(
    tmp_path: Path,
) -> None:
    content = {"avg_pool.conv.weight": 1, "teacher.weight": 2, "layers.weight": 3}
    run = files(
        tmp_path / "run", lambda i: {name: full(i, size + 1) for name, size in content.items()}
    )
    assert Averaged(run).values() == dict.fromkeys(content, 2.0)


# --- N: first bytes that two formats share ---


@pytest.mark.parametrize("length", [640, 640 + (1 << 16), 0x8B1F, 0x5A42])
def test_a_header_whose_length_looks_like_another_format_is_believed(
    tmp_path: Path, length: int
) -> None:
    for i in (1, 2, 3):
        path = tmp_path / "run" / f"model_{i}.safetensors"
        write(path, layers(i))
        old = path.read_bytes()
        size = int.from_bytes(old[:8], "little")
        header = old[8 : 8 + size].rstrip().ljust(length)
        path.write_bytes(length.to_bytes(8, "little") + header + old[8 + size :])
    done = Averaged(tmp_path / "run")
    assert done.values("model_3.safetensors") == dict.fromkeys(layers(1), 2.0)


def test_a_torch_file_under_a_safetensors_name_is_still_called_one(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        save(tmp_path / f"model_{i}.safetensors", layers(i))
    assert "is a torch file under a safetensors name" in refusal(tmp_path).message


# --- E: further files of weights beside the model ---


def adapter(value: float) -> dict[str, torch.Tensor]:
    return {f"base_model.model.q.lora_{one}.weight": full(value) for one in "AB"}


def shards_of(value: float) -> dict[str, torch.Tensor]:
    return {"tower.weight": full(value)}


@pytest.mark.parametrize(
    ("main", "file", "output"),
    [
        ("adapter_model_safetensors", "non_lora_trainables_bin", "non_lora_trainables"),
        ("model_safetensors", "vit_safetensors", "vit"),
        ("pytorch_model_bin", "spk_dict_pt", "spk_dict"),
        ("model_safetensors", "medusa_lm_head_safetensors", "medusa_lm_head"),
        ("model_safetensors", "reward_head_pth", "reward_head"),
        ("pytorch_model_bin", "learned_embeds_bin", "learned_embeds"),
    ],
)
def test_a_file_of_weights_that_every_checkpoint_has_is_averaged_under_its_own_name(
    tmp_path: Path, main: str, file: str, output: str
) -> None:
    run = folders(tmp_path / "run", **{main: adapter, file: lambda i: {"head.weight": full(i)}})
    done = Averaged(run)
    assert done.values(f"{output}.safetensors") == {"head.weight": 2.0}
    assert len(done.files) == 2
    assert file.rpartition("_")[0] in done.notes
    assert Code.OTHER_WEIGHTS not in done.warnings
    alone = Averaged(run, component=output)
    assert {"head.weight": 2.0} in [alone.values(name) for name in alone.files]


def test_several_further_files_and_a_sharded_one_are_averaged(tmp_path: Path) -> None:
    content = {"model_safetensors": layers, "vit_safetensors": layers, "spk_dict_pt": layers}
    run = folders(tmp_path / "run", **content)
    for number in (1, 2, 3):
        folder = run / f"checkpoint-{number}00"
        for shard in (1, 2):
            name = f"tower-{shard:05}-of-00002.safetensors"
            write(folder / name, {f"t.{shard}": full(number)})
        shards = {f"t.{shard}": f"tower-{shard:05}-of-00002.safetensors" for shard in (1, 2)}
        (folder / "tower.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    done = Averaged(run)
    assert set(done.files) == {
        *("model.safetensors", "spk_dict.safetensors", "vit.safetensors"),
        *("tower-00001-of-00002.safetensors", "tower-00002-of-00002.safetensors"),
    }
    assert all(set(done.values(name).values()) == {2.0} for name in done.files)


def test_weights_that_only_some_checkpoints_have_are_warned_of_by_name(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", model_safetensors=layers, vit_safetensors=layers)
    (run / "checkpoint-100/vit.safetensors").unlink()
    done = Averaged(run)
    assert set(done.files) == {"model.safetensors"}
    assert "vit.safetensors holds weights" in done.warnings[Code.OTHER_WEIGHTS]
    done = Averaged(run, last=2)
    assert done.values("vit.safetensors") == dict.fromkeys(layers(1), 2.5)
    assert Code.OTHER_WEIGHTS not in done.warnings


def test_tensors_beside_the_model_that_grow_are_warned_of_and_no_reason_to_stop(
    tmp_path: Path,
) -> None:
    run = folders(
        tmp_path / "run",
        model_safetensors=layers,
        replay_buffer_pt=lambda i: {"observations": full(i, int(i), 4)},
    )
    done = Averaged(run)
    assert set(done.files) == {"model.safetensors"}
    assert "replay_buffer.pt" in done.warnings[Code.OTHER_WEIGHTS]


def test_further_weights_that_cannot_be_one_model_are_warned_of_by_name(tmp_path: Path) -> None:
    run = folders(
        tmp_path / "run",
        model_safetensors=layers,
        heads_pt=lambda i: {"left": {"w": full(i)}, "right": {"w": full(i)}},
    )
    assert "heads.pt" in Averaged(run).warnings[Code.OTHER_WEIGHTS]


@pytest.mark.parametrize(
    "content",
    [
        {"state": {0: {"exp_avg": full(1)}}, "param_groups": []},
        {"cpu": torch.zeros(64, dtype=torch.uint8), "step": 3},
        {"last_epoch": 3, "base_lrs": [0.1]},
        argparse.Namespace(lr=0.1),
        b"no torch file at all",
        {"seen": torch.arange(9)},
    ],
    ids=["adam", "random numbers", "schedule", "arguments", "another format", "counters"],
)
def test_state_under_any_name_is_not_averaged_and_not_warned_of(
    tmp_path: Path, content: Any
) -> None:
    run = folders(tmp_path / "run", model_safetensors=layers, things_bin=lambda _: content)
    done = Averaged(run)
    assert set(done.files) == {"model.safetensors"}
    assert Code.OTHER_WEIGHTS not in done.warnings


def test_a_newest_checkpoint_whose_further_file_is_cut_short_is_left_out(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", model_safetensors=layers, vit_safetensors=layers)
    path = run / "checkpoint-300/vit.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert "checkpoint-300" in Averaged(run).warnings[Code.INCOMPLETE]


# --- J: averages in files and folders of their own ---


def test_an_average_in_a_file_of_its_own_is_taken_on_purpose_alone(tmp_path: Path) -> None:
    for ending in ("safetensors", "bin"):
        run = folders(
            tmp_path / ending / "run",
            **{"model_safetensors": layers, f"model_ema_{ending}": lambda i: layers(i + 10)},
        )
        assert Averaged(run).values() == dict.fromkeys(layers(1), 2.0)
        done = Averaged(run, which="ema")
        assert [set(done.values(name).values()) for name in done.files] == [{12.0}]
        assert Code.ALREADY_AVERAGED not in done.warnings


@pytest.mark.parametrize("name", ["ema", "model_ema", "swa-model", "averaged_model"])
def test_an_average_in_a_folder_of_its_own_is_taken_on_purpose_alone(
    tmp_path: Path, name: str
) -> None:
    run = folders(tmp_path / "run", model_safetensors=layers)
    for number in (1, 2, 3):
        write(run / f"checkpoint-{number}00/{name}/model.safetensors", layers(number + 10))
    assert Averaged(run).values() == dict.fromkeys(layers(1), 2.0)
    assert Averaged(run, which="ema").values() == dict.fromkeys(layers(1), 12.0)
    done = Averaged(run, component=name)
    assert done.values() == dict.fromkeys(layers(1), 12.0)
    assert Code.ALREADY_AVERAGED in done.warnings


@pytest.mark.parametrize("name", ["unet_ema", "ema_unet"])
def test_of_a_pipeline_the_averaged_component_is_taken_on_purpose_alone(
    tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    file = "diffusion_pytorch_model.safetensors"
    for number in (1, 2, 3):
        folder = run / f"checkpoint-{number}00"
        write(folder / "unet" / file, layers(number))
        write(folder / name / file, layers(number + 10))
    assert set(Averaged(run).values(f"unet/{file}").values()) == {2.0}
    for options in ({"which": "ema"}, {"which": "ema", "component": "unet"}):
        done = Averaged(run, **options)
        assert [set(done.values(one).values()) for one in done.files] == [{12.0}]
        assert Code.ALREADY_AVERAGED not in done.warnings
    assert Code.ALREADY_AVERAGED in Averaged(run, component=name).warnings


@pytest.mark.parametrize("name", ["model_ema_{}.pt", "step{}-EMA.safetensors", "ema_0.99_{}.pt"])
def test_of_averages_beside_the_raw_files_either_series_is_taken(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    for number in (100, 200, 300):
        write(run / name.format(number), layers(number + 7))
    assert Code.ALREADY_AVERAGED in Averaged(run).warnings  # alone
    for number in (100, 200, 300):
        write(run / name.replace("EMA", "x").replace("ema", "x").format(number), layers(number))
    done = Averaged(run)
    assert [set(done.values(one).values()) for one in done.files] == [{200.0}]
    assert Code.ALREADY_AVERAGED not in done.warnings
    done = Averaged(run, which="ema")
    assert [set(done.values(one).values()) for one in done.files] == [{207.0}]
    assert Code.ALREADY_AVERAGED not in done.warnings


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_average_that_is_all_there_is_in_a_folder_is_taken_with_a_warning(
    tmp_path: Path, ending: str
) -> None:
    run = folders(tmp_path / "run", **{f"ema_model_{ending}": layers})
    done = Averaged(run)
    assert [set(done.values(name).values()) for name in done.files] == [{2.0}]
    assert f"ema_model.{ending}" in done.warnings[Code.ALREADY_AVERAGED]


# --- P: shards without an index, or with a stale one ---

SHARDS = ("model-{:05}-of-00002.safetensors", "pytorch_model-{:05}-of-00002.bin")
OTHER_SHARDS = (
    "model.safetensors-{:05}-of-00002",
    "model_{:05}-of-00002.safetensors",
    "llama-{:05}-of-00002.safetensors",
)


def sharded(run: Path, name: str, first: int = 1) -> Path:
    for number in (1, 2, 3):
        folder = run / f"checkpoint-{number}00"
        for shard, layer in ((first, "a"), (first + 1, "b")):
            tensors = {f"{layer}.weight": full(number)}
            folder.mkdir(parents=True, exist_ok=True)
            if ".safetensors" in name:
                write_safetensors(folder / name.format(shard), tensors)
            else:
                save(folder / name.format(shard), tensors)
    return run


@pytest.mark.parametrize("name", [*SHARDS, *OTHER_SHARDS])
def test_shards_that_are_all_there_are_read_without_an_index(tmp_path: Path, name: str) -> None:
    done = Averaged(sharded(tmp_path / "run", name))
    both = {key: value for file in done.files for key, value in done.values(file).items()}
    assert both == {"a.weight": 2.0, "b.weight": 2.0}
    assert "2 shards are all there" in done.notes


@pytest.mark.parametrize("name", [*SHARDS, OTHER_SHARDS[2]])
def test_a_stale_index_beside_a_complete_set_is_warned_of_with_both(
    tmp_path: Path, name: str
) -> None:
    run = sharded(tmp_path / "run", name)
    index = name.replace("-{:05}-of-00002", "") + ".index.json"
    stale = {"weight_map": {"a.weight": name.format(1).replace("2.", "4.").replace("02.", "04.")}}
    for folder in run.iterdir():
        (folder / index).write_text(json.dumps(stale))
    done = Averaged(run)
    warning = done.warnings[Code.LEFT_OUT]
    assert index in warning
    assert "-of-00004" in warning
    assert "-of-00002" in warning


def test_a_shard_too_few_is_refused_and_so_are_two_sets_and_shards_that_overlap(
    tmp_path: Path,
) -> None:
    run = sharded(tmp_path / "a", SHARDS[0])
    (run / "checkpoint-200/model-00001-of-00002.safetensors").unlink()
    assert refusal(run).code is Code.INCOMPLETE
    run = sharded(tmp_path / "b", SHARDS[0])
    write(run / "checkpoint-200/model-00001-of-00001.safetensors", layers(1))
    assert refusal(run).code is Code.SEVERAL_MODELS
    run = sharded(tmp_path / "c", SHARDS[0])
    for folder in run.iterdir():
        write(folder / "model-00002-of-00002.safetensors", {"a.weight": full(1)})
    assert refusal(run).code is Code.SEVERAL_MODELS


# --- S: endings ---


@pytest.mark.parametrize(
    "name",
    [
        *("checkpoint_{}", "g_{:08}", "model_{}.th", "model-{}.tar", "net_{}.model"),
        *("ckpt_{}.chkpt", "iter_{}.pkl", "epoch{}.weights", "step_{}.v2"),
    ],
)
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_of_weights_is_one_whatever_its_ending(tmp_path: Path, name: str, form: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for number in (1000, 2000, 3000):
        path = run / name.format(number)
        if form == "safetensors":
            write_safetensors(path, layers(number))
        else:
            save(path, {"state_dict": layers(number), "iteration": number}, form)
    (run / "events.out.tfevents.1700000000.host").write_bytes(b"no weights")
    (run / "sample_1000.png").write_bytes(b"no weights")
    assert Averaged(run).values() == dict.fromkeys(layers(1), 2000.0)
    (run / "notes_1.txt").write_text("no weights")
    listed = [run / name.format(number) for number in (1000, 2000)]
    [average] = ckpt_ema.plan(listed, output=tmp_path / "o").averages
    assert average.steps == (1000, 2000)


def test_a_listed_file_is_tried_whatever_its_name(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("first.txt", "second.png", "third")]
    for number, path in enumerate(paths, start=1):
        save(path, layers(number))
    ckpt_ema.average(paths, schedule="uniform", output=tmp_path / "out")
    [tensors] = [read_safetensors(one) for one in (tmp_path / "out").rglob("*.safetensors")]
    assert all((one == 2).all() for one in tensors.values())


def test_what_is_packed_is_called_what_it_is_with_what_unpacks_it(tmp_path: Path) -> None:
    packed = tmp_path / "a"
    archives = tmp_path / "b"
    nemo = tmp_path / "c"
    for folder in (packed, archives, nemo):
        folder.mkdir()
    for number in (1, 2, 3):
        save(tmp_path / "model_weights.ckpt", layers(number))
        content = (tmp_path / "model_weights.ckpt").read_bytes()
        with gzip.open(packed / f"model_{number}.pt.gz", "wb") as file:
            file.write(content)
        for path in (archives / f"model_{number}.tar", nemo / f"model_{number}.nemo"):
            with tarfile.open(path, "w") as archive:
                archive.add(tmp_path / "model_weights.ckpt", "model_weights.ckpt")
    for run, words in (
        (packed, ("a gzip file", "gunzip")),
        (archives, ("a tar archive", "tar -xf")),
        (nemo, ("archive of NeMo", "model_weights.ckpt")),
        ([packed / "model_1.pt.gz"], ("a gzip file", "gunzip")),
    ):
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.plan(run, output=tmp_path / "out")
        assert all(word in str(caught.value) for word in words)


def test_a_pickle_that_torch_did_not_write_is_called_one(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"model_{number}.pkl").write_bytes(pickle.dumps({"w": [1.0] * number}))
    error = refusal(tmp_path)
    assert error.code is Code.UNSUPPORTED_FORMAT
    assert "a pickle that torch.save did not write" in error.message


# --- T: files of ranks ---

RANKS = ("model_{:07}.rank_{}.pth", "ckpt-{}-rank{}.pt", "step_{}.rank{}.ckpt")


@pytest.mark.parametrize("name", RANKS)
def test_the_first_ranks_file_alone_is_the_model_and_so_are_copies_of_it(
    tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    for number in (1, 2, 3):
        write(run / name.format(number * 100, 0), {"model": layers(number)})
    assert Averaged(run).values() == dict.fromkeys(layers(1), 2.0)
    for number in (1, 2, 3):
        write(run / name.format(number * 100, 1), {"model": layers(number)})
    assert Averaged(run).values() == dict.fromkeys(layers(1), 2.0)
    for number in (1, 2, 3):
        write(run / name.format(number * 100, 1), {"rng": torch.zeros(8, dtype=torch.uint8)})
    assert Averaged(run).values() == dict.fromkeys(layers(1), 2.0)


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("part", ["in a run", "in folders", "listed"])
def test_files_of_ranks_that_differ_are_refused_with_their_count(
    tmp_path: Path, name: str, part: str
) -> None:
    run = tmp_path / "run"
    for number in (100, 200, 300):
        folder = run / f"step_{number}" if part == "in folders" else run
        for rank in (0, 1):
            write(folder / name.format(number, rank), {"model": layers(number + rank)})
    paths: Any = [run / name.format(number, 0) for number in (100, 200)]
    error = refusal(run) if part != "listed" else None
    if error is None:
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.plan(paths, output=tmp_path / "out")
        error = caught.value
    assert error.code is Code.UNSUPPORTED_FORMAT
    assert "2 ranks" in error.message


def test_one_rank_of_verl_holds_the_whole_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (100, 200, 300):
        actor = run / f"global_step_{number}/actor"
        write(actor / "model_world_size_1_rank_0.pt", layers(number))
        write(actor / "optim_world_size_1_rank_0.pt", {"state": {}, "param_groups": []})
        write(actor / "extra_state_world_size_1_rank_0.pt", {"lr": 1})
    assert Averaged(run).values() == dict.fromkeys(layers(1), 200.0)


# --- U: folders under a file's name ---


@pytest.mark.parametrize("outer", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("index", [True, False])
def test_shards_in_a_folder_that_is_called_as_a_file_are_read(
    tmp_path: Path, outer: str, index: bool
) -> None:
    run = tmp_path / "run"
    for number in (1, 2, 3):
        inside = run / f"checkpoint-{number}00" / outer
        names = [f"pytorch_model-{shard:05}-of-00002.bin" for shard in (1, 2)]
        for shard, name in enumerate(names):
            write(inside / name, {f"{shard}.weight": full(number)})
        weight_map = {f"{shard}.weight": name for shard, name in enumerate(names)}
        if index:
            text = json.dumps({"weight_map": weight_map})
            (inside / "pytorch_model.bin.index.json").write_text(text)
        (inside.parent / "config.json").write_text("{}")
    done = Averaged(run)
    assert all("/" not in name for name in done.files)
    both = {key: value for file in done.files for key, value in done.values(file).items()}
    assert both == {"0.weight": 2.0, "1.weight": 2.0}
    assert (tmp_path / "out/config.json").exists()


def test_one_file_in_a_folder_that_is_called_as_a_file_is_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (1, 2, 3):
        write(run / f"checkpoint-{number}/pytorch_model.bin/pytorch_model.bin", layers(number))
    assert Averaged(run).values() == dict.fromkeys(layers(1), 2.0)


# --- V: advice that works ---


def test_the_raw_model_in_edm2s_training_state_is_read(tmp_path: Path) -> None:
    run = files(
        tmp_path / "run",
        lambda i: {"net": layers(i), "optimizer": {"state": {}, "param_groups": []}},
        "training-state-{:07}.pt",
    )
    (run / "network-snapshot-0000100-0.050.pkl").write_bytes(b"\x80\x04N.")
    assert Averaged(run).values() == dict.fromkeys(layers(1), 2.0)


def test_deepspeed_without_zero_is_read_and_of_several_ranks_written_back_only(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    for number in (100, 200, 300):
        content = {"module": layers(number), "optimizer": {"state": {}, "param_groups": []}}
        write(run / f"global_step{number}/mp_rank_00_model_states.pt", content)
    (run / "latest").write_text("global_step300")
    assert Averaged(run).values() == dict.fromkeys(layers(1), 200.0)
    for number in (100, 200, 300):
        write(run / f"global_step{number}/mp_rank_01_model_states.pt", {"module": layers(1)})
    error = refusal(run, save_as="safetensors")
    assert error.code is Code.UNSUPPORTED_FORMAT
    assert "zero_to_fp32" not in str(error)


def test_a_last_folder_of_lightning_is_a_step_by_its_meta_file(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name, step in (("epoch=0-step=10", 10), ("epoch=0-step=20", 20), ("last", 30)):
        save_distributed(run / f"{name}.ckpt", {"state_dict": layers(step)})
        save(run / f"{name}.ckpt/meta.pt", {"epoch": 0, "global_step": step})
    assert Averaged(run).values() == dict.fromkeys(layers(1), 20.0)


@pytest.mark.parametrize("inside", [True, False])
def test_tensors_of_one_rank_are_called_so(tmp_path: Path, inside: bool) -> None:
    for number in (1, 2, 3):
        path = tmp_path / f"model_{number}.pt"
        pickled = sharded_pickle()
        if not inside:  # the model itself is such a tensor
            start = pickled.index(b"ctorch._tensor")
            pickled = b"\x80\x02}X\x05\x00\x00\x00model" + pickled[start:]
        archive(path, pickled)
    error = refusal(tmp_path)
    assert error.code is Code.UNREADABLE_TENSOR
    assert "of which each rank's file holds a part" in error.message


def test_a_file_beside_all_shards_of_another_model_is_refused_until_a_form_is_chosen(
    tmp_path: Path,
) -> None:
    run = sharded(tmp_path / "run", SHARDS[0])
    for folder in run.iterdir():
        write(folder / "model.safetensors", layers(7))
    error = refusal(run)
    assert error.code is Code.SEVERAL_MODELS
    assert "--form" in error.hint
    assert set(Averaged(run, form="sharded").files) == {
        name.format(i) for name in SHARDS[:1] for i in (1, 2)
    }


@pytest.mark.parametrize("name", ["weights", "model.th", "state"])
def test_the_only_file_of_a_folder_is_its_model_whatever_its_ending(
    tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    for number in (1, 2, 3):
        write(run / f"step_{number}" / name, {"model": layers(number)})
        (run / f"step_{number}/notes").write_text("no weights")
    assert Averaged(run).values() == dict.fromkeys(layers(1), 2.0)


def test_an_average_in_a_file_of_its_own_is_named_in_a_note(tmp_path: Path) -> None:
    content = {"model_safetensors": layers, "ema_pt": layers, "projector_pt": layers}
    run = folders(tmp_path / "run", **content)
    assert "ema.pt holds an average by its name" in Averaged(run).notes
    assert "projector.safetensors" in Averaged(run, which="ema").files
    nested = tmp_path / "nested"
    for number in (1, 2, 3):
        write(nested / f"step_{number}/model.safetensors", layers(number))
        write(nested / f"step_{number}/ema/weights.safetensors", layers(number + 10))
    [values] = Averaged(nested, which="ema").files.values()
    assert all((one == 12).all() for one in values.values())


def test_files_of_ranks_are_parts_with_a_pattern_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for number in (1, 2, 3):
        for rank in range(2):
            part = {"layers.0.weight": number + torch.arange(16.0).view(4, 4)[rank::2]}
            save(run / f"w-step{number}-shard{rank}of2.pt", {"model": part})
    for pattern in (None, r"w-step(\d+)-shard0of2"):
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.plan(run, pattern=pattern)
        assert "rank" in str(caught.value)


def test_every_tensor_of_a_file_means_those_in_lists_too(tmp_path: Path) -> None:
    def content(number: float) -> Any:
        return {"model": layers(number), "prototypes": [full(number), full(number + 1)]}

    run = files(tmp_path / "run", content)
    assert any("prototypes" in str(one) for one in ckpt_ema.plan(run).warnings)
    names = {
        tensor.name for tensor in ckpt_ema.plan(run, key=".").averages[0].output.files[0].tensors
    }
    assert names >= {"model.layers.0.weight", "prototypes.0", "prototypes.1"}


def test_a_missing_shard_without_an_index_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (1, 2, 3):
        for shard in (1, 2):
            path = run / f"step-{number}/model-0000{shard}-of-00002.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, layers(number, f"layers.{shard}"))
    (run / "step-2/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run)
    assert "lacks shards (number 2 of 2)" in caught.value.message


def test_steps_that_hold_files_of_ranks_alone_are_said_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (1, 2, 3):
        for rank in (0, 1):
            path = run / f"step-{number}/consolidated.0{rank}.pth"
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path, layers(number))
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run)
    assert "files of ranks, which have to be merged first" in caught.value.message


def test_a_header_that_ends_in_zeros_is_cut_short(tmp_path: Path) -> None:
    run = folders(tmp_path / "run", model_safetensors=layers)
    path = run / "checkpoint-200/model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes(len(content) - 40))
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run)
    assert "--exclude checkpoint-200" in caught.value.hint
    assert "its header ends in zeros" in caught.value.message
