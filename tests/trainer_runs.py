"""Tiny runs as the trainers write them: real files of every format, and the clutter beside them.

A function makes one trainer's run in a folder and returns the weights that belong in the average,
oldest first; `RUNS` says of each what must be found in it, or with what it must be refused. It is
longer than other modules because there are that many trainers; each function stands by itself.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tests.conftest import write_safetensors, write_shards

Tensors = dict[str, torch.Tensor]
Weights = dict[str, Tensors]  # name of an output file -> its tensors
Make = Callable[[Path], list[Weights]]

NAMES = ("model.layer.weight", "model.layer.bias", "lm_head.weight")
LORA = (
    "base_model.model.layer.lora_A.weight",
    "base_model.model.layer.lora_B.weight",
)


# --- tensors ---


def state(position: int, *names: str) -> Tensors:
    """The model at one position of a run: other values at every position, the same every time."""
    generator = torch.Generator().manual_seed(position)
    return {name: torch.randn(2, 3, generator=generator) for name in names or NAMES}


def states(count: int, *names: str) -> list[Tensors]:
    """The model at the positions 1 to `count`."""
    return [state(position, *names) for position in range(1, count + 1)]


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    """The same tensors under longer names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def in_file(models: Sequence[Tensors], name: str = "model.safetensors") -> list[Weights]:
    """What is expected where the output is one file."""
    return [{name: model} for model in models]


# --- files ---


def write(folder: Path, *empty: str, **contents: object) -> Path:
    """Write files below a folder: empty ones by name, and `stem__extension` ones as JSON."""
    for name in empty:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content))
    return folder


def text(path: Path, content: str) -> Path:
    """Write a text file and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def safetensors(path: Path, tensors: Tensors, **metadata: str) -> Path:
    """Write a safetensors file and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors, {"format": "pt", **metadata})
    return path


def torch_file(path: Path, content: object) -> Path:
    """Write a file with torch.save; classes of packages that are not here are importable for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _importable(*_FOREIGN):
        torch.save(content, path)
    return path


def dcp(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write a distributed checkpoint from this one process."""
    from torch.distributed.checkpoint import state_dict_saver

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is what is wanted
        state_dict_saver.save(dict(content), checkpoint_id=folder, no_dist=True)
    return folder


def link(path: Path, target: str) -> Path:
    """Make a symbolic link."""
    path.symlink_to(target)
    return path


# --- objects of packages that are not installed here ---

_FOREIGN: list[Any] = []


def _foreign(module: str, name: str, *bases: type) -> Any:
    """A class that pickle stores as `module.name`."""
    made = type(name, bases or (object,), {"__module__": module})
    _FOREIGN.append(made)
    return made


def _foreign_function(module: str, name: str) -> Any:
    """A function that pickle stores as `module.name`."""

    def function(*arguments: object) -> None:
        raise AssertionError("foreign code ran")

    function.__module__, function.__qualname__, function.__name__ = module, name, name
    _FOREIGN.append(function)
    return function


@contextlib.contextmanager
def _importable(*objects: Any) -> Iterator[None]:
    """For as long as this lasts, the objects are found in the modules that they name."""
    before: dict[str, types.ModuleType | None] = {}
    for thing in objects:
        parts = thing.__module__.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in before and (name not in sys.modules or end == len(parts)):
                before[name] = real = sys.modules.get(name)
                sys.modules[name] = stand_in = types.ModuleType(name)
                vars(stand_in).update(vars(real) if real else {})
        setattr(sys.modules[thing.__module__], thing.__name__, thing)
    try:
        yield
    finally:
        for name, real in before.items():
            if real is None:
                del sys.modules[name]
            else:
                sys.modules[name] = real


_NUMPY_DTYPE = _foreign("numpy", "dtype")
_NUMPY_SCALAR = _foreign_function("numpy._core.multiarray", "scalar")
_NUMPY_RECONSTRUCT = _foreign_function("numpy._core.multiarray", "_reconstruct")
_DTENSOR = _foreign("torch.distributed.tensor", "DTensor")
_DTENSOR_SPEC = _foreign("torch.distributed.tensor._dtensor_spec", "DTensorSpec")
_TRAINING_ARGUMENTS = _foreign("transformers.training_args", "TrainingArguments")
_DICT_CONFIG = _foreign("omegaconf.dictconfig", "DictConfig")
_HISTORY_BUFFER = _foreign("mmengine.logging.history_buffer", "HistoryBuffer")
_TORCH_VERSION = _foreign("torch.torch_version", "TorchVersion", str)
_DETECTION_MODEL = _foreign("ultralytics.nn.tasks", "DetectionModel", torch.nn.Module)
_EDM_NETWORK = _foreign("torch_utils.persistence", "EDMPrecond", torch.nn.Module)


class NumpyScalar:
    """Pickled as a numpy float64 is."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _NUMPY_SCALAR, (_NUMPY_DTYPE(), b"\x00" * 8)


class NumpyArray:
    """Pickled as a numpy array is."""

    def __reduce__(self) -> tuple[Any, ...]:
        state = (1, (3,), _NUMPY_DTYPE(), False, b"\x00" * 24)
        return _NUMPY_RECONSTRUCT, (_NUMPY_DTYPE, (0,), b"b"), state


class RankTensor:
    """Pickled as one rank's part of a DTensor is: a global shape around a local tensor."""

    def __init__(self, local: torch.Tensor, ranks: int) -> None:
        self.local, self.ranks = local, ranks

    def __reduce__(self) -> tuple[Any, ...]:
        shape = (self.local.shape[0] * self.ranks, *self.local.shape[1:])
        strides = self.local.stride()
        layout = (_DTENSOR, torch.float32, shape, strides, 0, None, torch.device("cpu"), False)
        parts = {"_local_tensor": self.local, "_spec": _DTENSOR_SPEC()}
        rebuild = vars(torch._utils)["_rebuild_wrapper_subclass"]
        return vars(torch._tensor)["_rebuild_from_type_v2"], (rebuild, _DTENSOR, layout, parts)


# --- what many trainers write alike ---


def optimizer(model: Tensors) -> dict[str, Any]:
    """The state of an Adam optimizer, as state_dict() gives it."""
    moments = {
        index: {"step": torch.tensor(1.0), "exp_avg": tensor + 1, "exp_avg_sq": tensor * tensor}
        for index, tensor in enumerate(model.values())
    }
    return {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}


def trainer_junk(folder: Path, step: int | None = None) -> Path:
    """What the Trainer of transformers saves after the model, its state last."""
    torch_file(folder / "optimizer.pt", optimizer(state(0)))
    torch_file(folder / "scheduler.pt", {"last_epoch": step})
    numpy_state = ("MT19937", NumpyArray(), 624, 0, 0.0)
    rng = {"python": random.getstate(), "numpy": numpy_state, "cpu": torch.get_rng_state()}
    torch_file(folder / "rng_state.pth", rng)
    torch_file(folder / "training_args.bin", _TRAINING_ARGUMENTS())
    if step is not None:
        write(folder, trainer_state__json={"global_step": step, "epoch": step / 100})
    return folder


def pretrained(folder: Path, model: Tensors | None = None) -> Path:
    """The files around a model of the Hugging Face family, and the model if there is one."""
    write(
        folder,
        config__json={"architectures": ["Tiny"], "hidden_size": 3},
        generation_config__json={"eos_token_id": 2},
        tokenizer__json={"version": "1.0"},
        tokenizer_config__json={"model_max_length": 8},
    )
    text(folder / "chat_template.jinja", "{{ messages }}")
    if model is not None:
        safetensors(folder / "model.safetensors", model)
    return folder


PRETRAINED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def adapter(folder: Path, model: Tensors, **changes: object) -> Path:
    """A PEFT adapter."""
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "tiny/base"}
    write(folder, adapter_config__json={**config, "target_modules": ["layer"], **changes})
    text(folder / "README.md", "---\nbase_model: tiny/base\n---\n")
    safetensors(folder / "adapter_model.safetensors", model)
    return folder


def clutter(run: Path) -> None:
    """What lies in a run's folder besides checkpoints."""
    write(run, "runs/Jan01_host/events.out.tfevents.1.host", "wandb/run-20260101_120000/files/a")
    write(run, "logs/step_1.log", all_results__json={"loss": 1.0})


def hugging_face(run: Path, steps: Sequence[int], root: int | None = None) -> list[Tensors]:
    """A run of the Trainer of transformers; the folder itself is the model at position `root`."""
    models = states(len(steps))
    for step, model in zip(steps, models, strict=True):
        trainer_junk(pretrained(run / f"checkpoint-{step}", model), step)
    if root is not None:
        pretrained(run, models[root])
        write(run, trainer_state__json={"global_step": steps[-1]})
        torch_file(run / "training_args.bin", _TRAINING_ARGUMENTS())
    clutter(run)
    return models


# --- the Hugging Face family ---


def transformers(run: Path) -> list[Weights]:
    """The folder itself holds the best model, which is not the last."""
    return in_file(hugging_face(run, (9, 10, 500), root=1))


def transformers_sharded(run: Path) -> list[Weights]:
    expected: list[Weights] = []
    for step, model in zip((9, 10, 500), states(3), strict=True):
        folder = trainer_junk(pretrained(run / f"checkpoint-{step}"), step)
        write_shards(folder, model, 2)
        expected.append(
            {
                f"model-{shard + 1:05}-of-00002.safetensors": {
                    name: model[name] for name in list(model)[shard::2]
                }
                for shard in range(2)
            }
        )
    return expected


def transformers_bin(run: Path) -> list[Weights]:
    models = states(3)
    for step, model in zip((9, 10, 500), models, strict=True):
        folder = trainer_junk(pretrained(run / f"checkpoint-{step}"), step)
        torch_file(folder / "pytorch_model.bin", collections.OrderedDict(model))
    return in_file(models)


def transformers_fsdp(run: Path) -> list[Weights]:
    """SHARDED_STATE_DICT: no config beside the weights."""
    models = states(2)
    for step, model in zip((100, 200), models, strict=True):
        folder = trainer_junk(run / f"checkpoint-{step}", step)
        dcp(folder / "pytorch_model_fsdp_0", {"model": model})
        dcp(folder / "optimizer_0", {"optimizer": optimizer(model)})
    pretrained(run)
    return in_file(models)


def transformers_zero3(run: Path) -> list[Weights]:
    """ZeRO stage 3 without gathering: each step holds only the partitions of the ranks."""
    for step in (100, 200):
        folder = trainer_junk(pretrained(run / f"checkpoint-{step}"), step)
        _zero_partitions(folder / f"global_step{step}", stage=3)
        text(folder / "latest", f"global_step{step}")
        text(folder / "zero_to_fp32.py", "print('converts')\n")
    return []


def peft(run: Path) -> list[Weights]:
    """Preference training: the reference adapter lies in a folder of its own."""
    models = states(3, *LORA)
    for step, model in zip((50, 100, 150), models, strict=True):
        folder = trainer_junk(adapter(run / f"checkpoint-{step}", model), step)
        adapter(folder / "ref", state(99, *LORA))
        write(folder, tokenizer__json={"version": "1.0"})
    return in_file(models, "adapter_model.safetensors")


def peft_bin(run: Path) -> list[Weights]:
    models = states(2, *LORA)
    for step, model in zip((50, 100), models, strict=True):
        folder = trainer_junk(adapter(run / f"checkpoint-{step}", model), step)
        (folder / "adapter_model.safetensors").unlink()
        torch_file(folder / "adapter_model.bin", model)
    return in_file(models, "adapter_model.safetensors")


def trl(run: Path) -> list[Weights]:
    """A merged copy inside each checkpoint, and the trainer's own average beside them."""
    models = hugging_face(run, (100, 200, 300), root=2)
    for step in (100, 200, 300):
        pretrained(run / f"checkpoint-{step}" / "merged", state(98))
    pretrained(run / "bema", state(97))
    text(run / "README.md", "# Model card\n")
    return in_file(models)


def unsloth(run: Path) -> list[Weights]:
    models = states(2, *LORA)
    for step, model in zip((60, 120), models, strict=True):
        trainer_junk(adapter(run / f"checkpoint-{step}", model), step)
    write(run, "unsloth_compiled_cache/UnslothSFTTrainer.py")
    return in_file(models, "adapter_model.safetensors")


def llama_factory(run: Path) -> list[Weights]:
    models = hugging_face(run, (100, 200), root=1)
    pretrained(run / "checkpoint-200-merged", state(98))
    adapter(run / "pissa_init", state(97, *LORA))
    write(run, "training_loss.png", trainer_log__jsonl={"current_steps": 10})
    return in_file(models)


def llama_factory_marked(run: Path) -> list[Weights]:
    """The newer trainer says that a save is whole by an empty file."""
    models = states(3)
    for step, model in zip((100, 200, 300), models, strict=True):
        folder = pretrained(run / f"checkpoint-{step}", model)
        write(folder, "CHECKPOINT_COMPLETE", "dataloader/rank_0.pt")
        torch_file(folder / "optimizer.pt", optimizer(model))
    return in_file(models)


def llama_factory_reward(run: Path) -> list[Weights]:
    """A reward model: the head on top is a second file of weights."""
    heads = states(2, "v_head.summary.weight")
    adapters = states(2, *LORA)
    for step, model, head in zip((100, 200), adapters, heads, strict=True):
        folder = trainer_junk(adapter(run / f"checkpoint-{step}", model), step)
        safetensors(folder / "value_head.safetensors", head)
    return [
        {"adapter_model.safetensors": model, "value_head.safetensors": head}
        for model, head in zip(adapters, heads, strict=True)
    ]


def ms_swift(run: Path) -> list[Weights]:
    version = run / "v0-20260102-101112"
    models = states(2)
    for step, model in zip((40, 80), models, strict=True):
        folder = trainer_junk(pretrained(version / f"checkpoint-{step}", model), step)
        write(folder, args__json={"model": "tiny"})
    write(version, "images/train_loss.png", "runs/events.out.tfevents.1", args__json={})
    return in_file(models)


def megatron_swift(run: Path) -> list[Weights]:
    for step in (40, 80):
        folder = write(run / f"checkpoint-{step}", args__json={"model": "tiny"})
        _torch_dist(folder / f"iter_{step:07}", state(step))
        text(folder / "latest_checkpointed_iteration.txt", str(step))
    return []


def axolotl(run: Path) -> list[Weights]:
    """FSDP 2 in shards; the configuration is in the run's folder."""
    models = states(3)
    for step, model in zip((100, 200, 300), models, strict=True):
        folder = trainer_junk(run / f"checkpoint-{step}", step)
        dcp(folder / "pytorch_model_fsdp_0", {"model": model})
        write(folder, tokens_state__json={"total": step})
    pretrained(run)
    pretrained(run / "merged", state(98))
    text(run / "config.yml", "base_model: tiny\n")
    return in_file(models)


def sentence_transformers(run: Path) -> list[Weights]:
    """The dense layer on top is a second file of weights."""
    bodies, heads = states(3), states(3, "linear.weight", "linear.bias")
    for step, body, head in zip((100, 200, 300), bodies, heads, strict=True):
        folder = trainer_junk(pretrained(run / f"checkpoint-{step}", body), step)
        kinds = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ]
        write(folder, modules__json=modules, config_sentence_transformers__json={})
        write(folder, sentence_bert_config__json={"max_seq_length": 8})
        write(folder / "1_Pooling", config__json={"pooling_mode_mean_tokens": True})
        safetensors(write(folder / "2_Dense", config__json={}) / "model.safetensors", head)
    return [
        {"model.safetensors": body, "2_Dense/model.safetensors": head}
        for body, head in zip(bodies, heads, strict=True)
    ]


def diffusers(run: Path) -> list[Weights]:
    """The folder itself becomes the pipeline, whose network is already an average."""
    models = states(3, "conv_in.weight", "conv_in.bias")
    name = "diffusion_pytorch_model.safetensors"
    for step, model in zip((500, 1000, 1500), models, strict=True):
        folder = run / f"checkpoint-{step}"
        safetensors(folder / "unet" / name, model)
        write(folder / "unet", config__json={"_class_name": "UNet2DConditionModel"})
        safetensors(folder / "unet_ema" / name, state(90 + step, *model))
        write(folder / "unet_ema", config__json={"decay": 0.9999, "optimization_step": step})
        torch_file(folder / "optimizer.bin", optimizer(model))
        torch_file(folder / "scheduler.bin", {"last_epoch": step})
        write(folder, "random_states_0.pkl", "sampler.bin", "scaler.pt")
    safetensors(run / "unet" / name, state(96, *models[0]))
    safetensors(run / "vae" / name, state(95, "decoder.weight"))
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    scheduler = {"scheduler": ["diffusers", "DDPMScheduler"]}
    write(run, model_index__json={"_class_name": "StableDiffusionPipeline", **parts, **scheduler})
    write(run / "scheduler", scheduler_config__json={})
    write(run, "samples/step_100.png", "logs/train/events.out.tfevents.1")
    return [{f"unet/{name}": model} for model in models]


def diffusers_lora(run: Path) -> list[Weights]:
    models = states(2, "unet.down.lora_A.weight", "unet.down.lora_B.weight")
    for step, model in zip((500, 1000), models, strict=True):
        folder = run / f"checkpoint-{step}"
        safetensors(folder / "pytorch_lora_weights.safetensors", model)
        torch_file(folder / "optimizer.bin", optimizer(model))
        write(folder, "random_states_0.pkl", "scheduler.bin")
    safetensors(run / "pytorch_lora_weights.safetensors", models[-1])
    return in_file(models, "pytorch_lora_weights.safetensors")


def accelerate(run: Path) -> list[Weights]:
    """Two models, whose tensors have the same names; the number counts the saves."""
    generators, critics = states(3, "layer.weight"), states(3, "layer.weight", "layer.bias")
    for index, (first, second) in enumerate(zip(generators, critics, strict=True), start=9):
        folder = run / "checkpoints" / f"checkpoint_{index}"
        safetensors(folder / "model.safetensors", first)
        safetensors(folder / "model_1.safetensors", second)
        torch_file(folder / "optimizer.bin", optimizer(first))
        torch_file(folder / "optimizer_1.bin", optimizer(second))
        numpy_state = ("MT19937", NumpyArray(), 624, 0, 0.0)
        torch_file(
            folder / "random_states_0.pkl", {"step": index, "numpy_random_seed": numpy_state}
        )
        torch_file(folder / "custom_checkpoint_0.pkl", {"epoch": 1})
        write(folder, "scheduler.bin", "sampler.bin", "dl_state_dict.bin")
    return [
        {"model.safetensors": first, "model_1.safetensors": second}
        for first, second in zip(generators, critics, strict=True)
    ]


def accelerate_bin(run: Path) -> list[Weights]:
    """Folders that the user has named, tied tensors under both names."""
    expected = []
    for step, model in zip((100, 200), states(2, "emb.weight"), strict=True):
        model["head.weight"] = model["emb.weight"]
        torch_file(run / f"step_{step}" / "pytorch_model.bin", model)
        torch_file(run / f"step_{step}" / "optimizer.bin", optimizer(model))
        expected.append(model)
    return in_file(expected)


def accelerate_fsdp(run: Path) -> list[Weights]:
    models = states(2)
    for index, model in enumerate(models):
        folder = run / "checkpoints" / f"checkpoint_{index}"
        dcp(folder / "pytorch_model_fsdp_0", {"model": model})
        dcp(folder / "optimizer_0", {"optimizer": optimizer(model)})
        write(folder, "random_states_0.pkl", "scheduler.bin")
    return in_file(models)


def accelerate_deepspeed(run: Path) -> list[Weights]:
    for index in range(2):
        folder = run / "checkpoints" / f"checkpoint_{index}"
        _zero_partitions(folder / "pytorch_model", stage=2)
        text(folder / "latest", "pytorch_model")
        text(folder / "zero_to_fp32.py", "print('converts')\n")
    return []


# --- Lightning and NeMo ---


def lightning_file(path: Path, model: Tensors, epoch: int, step: int, **more: object) -> Path:
    """One checkpoint of Lightning, with the hyper-parameters of a user of OmegaConf."""
    content = {
        "epoch": epoch,
        "global_step": step,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": model,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": epoch}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer(model)],
        "lr_schedulers": [],
        "hyper_parameters": {"config": _DICT_CONFIG(), "lr": NumpyScalar()},
        **more,
    }
    return torch_file(path, content)


def lightning(run: Path) -> list[Weights]:
    """Metrics in the names, and a link to the newest."""
    folder = run / "lightning_logs" / "version_0" / "checkpoints"
    models = states(3, "net.layer.weight", "net.layer.bias")
    for epoch, model in enumerate(models):
        step = 50 * (epoch + 1)
        name = f"epoch={epoch}-step={step}-val_loss=0.{25 - epoch}.ckpt"
        lightning_file(folder / name, model, epoch, step)
    link(folder / "last.ckpt", name)
    text(folder.parent / "hparams.yaml", "lr: 0.1\n")
    write(folder.parent, "events.out.tfevents.1.host", "metrics.csv")
    return in_file(models)


def lightning_without_units(run: Path) -> list[Weights]:
    """`auto_insert_metric_name=False`: numbers of which only the position tells what they are."""
    models = states(3)
    for epoch, model in zip((7, 10, 100), models, strict=True):
        lightning_file(run / f"model_{epoch:02}.ckpt", model, epoch, 50 * epoch)
    return in_file(models)


def lightning_fsdp(run: Path) -> list[Weights]:
    """Folders that end in .ckpt."""
    for epoch in range(2):
        folder = run / f"epoch={epoch}-step={epoch + 3}.ckpt"
        dcp(folder, {"state_dict": state(epoch)})
        torch_file(folder / "meta.pt", {"epoch": epoch, "global_step": epoch + 3})
    return []


def nemo(run: Path) -> list[Weights]:
    """The metric comes first in the names; the last is saved twice, its average beside it."""
    models = states(3)
    for epoch, model in enumerate(models):
        step = 1000 * (epoch + 1)
        name = f"gpt--val_loss=1.2{epoch}-epoch={epoch}-step={step}-consumed_samples={step}.0"
        lightning_file(run / f"{name}.ckpt", model, epoch, step)
        lightning_file(run / f"{name}-EMA.ckpt", state(90 + epoch), epoch, step)
    shutil.copy(run / f"{name}.ckpt", run / f"{name}-last.ckpt")
    return in_file(models)


def nemo_exported(run: Path) -> list[Weights]:
    """NeMo 2 with the model exported beside its own weights."""
    models = states(2)
    for epoch, model in enumerate(models):
        folder = run / f"gpt--val_loss=1.2{epoch}-epoch={epoch}-step={1000 * (epoch + 1)}"
        _torch_dist(folder / "weights", state(90 + epoch))
        write(folder / "context", "model.yaml", "io.json")
        pretrained(folder / "hf_weights", model)
    return in_file(models)


def nemo_2(run: Path) -> list[Weights]:
    for epoch in range(2):
        folder = run / f"gpt--val_loss=1.2{epoch}-epoch={epoch}-step={1000 * (epoch + 1)}"
        _torch_dist(folder / "weights", state(epoch))
        write(folder / "context", "model.yaml", "io.json")
    return []


def nemo_archive(run: Path) -> list[Weights]:
    import tarfile

    write(run)
    for step in (100, 200):
        weights = torch_file(run / "model_weights.ckpt", state(step))
        with tarfile.open(run / f"conformer-step={step}.nemo", "w") as archive:
            archive.add(weights, "model_weights.ckpt")
        weights.unlink()
    return []


def nemo_rl(run: Path) -> list[Weights]:
    models = states(2)
    for step, model in zip((10, 20), models, strict=True):
        folder = run / f"step_{step}"
        pretrained(folder / "policy" / "weights", model)
        write(folder / "policy" / "tokenizer", "tokenizer.json")
        dcp(folder / "policy" / "optimizer", {"optim": optimizer(model)})
        write(folder, training_info__json={"step": step, "consumed_samples": step * 8})
        text(folder / "config.yaml", "policy: tiny\n")
        torch_file(folder / "train_dataloader.pt", {"position": step})
    write(run, "tmp_step_30/policy/weights/config.json")
    return in_file(models)


def nemo_rl_dcp(run: Path) -> list[Weights]:
    models = states(2)
    for step, model in zip((10, 20), models, strict=True):
        dcp(run / f"step_{step}" / "policy" / "weights", {"model": model})
        write(run / f"step_{step}", training_info__json={"step": step})
    return in_file(models)


def nemo_rl_megatron(run: Path) -> list[Weights]:
    """Every step holds a folder of the same name."""
    for step in (10, 20):
        _torch_dist(run / f"step_{step}" / "policy" / "weights" / "iter_0000000", state(step))
        write(run / f"step_{step}", training_info__json={"step": step})
    return []


def automodel(run: Path) -> list[Weights]:
    models = states(3)
    name = "model-00001-of-00001.safetensors"
    for step, model in zip((100, 200, 300), models, strict=True):
        folder = run / f"epoch_0_step_{step}"
        write_shards(pretrained(folder / "model" / "consolidated"), model, 1)
        safetensors(folder / "model" / "shard-00001-model-00001-of-00001.safetensors", model)
        dcp(folder / "optim", {"optim": optimizer(model)})
        write(folder, losses__json={"train_loss": 1.0})
        text(folder / "config.yaml", "model: tiny\n")
        torch_file(folder / "rng.pt", {"cpu": torch.get_rng_state()})
    link(run / "LATEST", "epoch_0_step_300")
    return in_file(models, name)


def automodel_dcp(run: Path) -> list[Weights]:
    """Names that begin with `model.` at the top, and one that does not: no `model` is nested."""
    models = states(2)
    for epoch, model in enumerate(models):
        folder = run / f"epoch_{epoch}_step_{100 * (epoch + 1)}"
        dcp(folder / "model", model)
        dcp(folder / "optim", {"optim": optimizer(model)})
    return in_file(models)


# --- image trainers ---

KOHYA = ("lora_unet_down.lora_down.weight", "lora_unet_down.lora_up.weight")


def kohya_file(path: Path, model: Tensors, epoch: int, step: int) -> Path:
    """One LoRA with the header that the trainer writes on every save."""
    alpha = {"lora_unet_down.alpha": torch.tensor(4.0)}
    return safetensors(
        path,
        {**model, **alpha},
        ss_steps=str(step),
        ss_epoch=str(epoch),
        ss_network_module="networks.lora",
        ss_network_dim="8",
        sshs_model_hash="0" * 64,
    )


def _kohya(run: Path, epochs: str, steps: str, final: str) -> list[Weights]:
    models = {step: state(step, *KOHYA) for step in (100, 150, 200, 250, 300)}
    kohya_file(run / epochs.format(1), models[100], 1, 100)
    kohya_file(run / epochs.format(2), models[200], 2, 200)
    for step in (150, 200, 250):  # one coincides with the end of an epoch
        kohya_file(run / steps.format(step), models[step], step // 100, step)
    kohya_file(run / final, models[300], 3, 300)
    stem = epochs.format(2).removesuffix(".safetensors")
    safetensors(run / f"{stem}-state" / "model.safetensors", state(90, *KOHYA))
    write(run / f"{stem}-state", "optimizer.bin", "random_states_0.pkl", "train_state.json")
    alpha = {"lora_unet_down.alpha": torch.tensor(4.0)}
    return in_file([{**model, **alpha} for model in models.values()], final)


def kohya(run: Path) -> list[Weights]:
    """Epochs, steps and the final one without a number are one series, by their headers."""
    return _kohya(run, "cat-{:06}.safetensors", "cat-step{:08}.safetensors", "cat.safetensors")


def kohya_unnamed(run: Path) -> list[Weights]:
    return _kohya(run, "epoch-{:06}.safetensors", "at-step{:08}.safetensors", "last.safetensors")


def ai_toolkit(run: Path) -> list[Weights]:
    """The final one has no number; its header has."""
    models = states(3, "transformer.block.lora_A.weight", "transformer.block.lora_B.weight")
    names = ("cat_000000250", "cat_000000500", "cat")
    for name, step, model in zip(names, (250, 500, 600), models, strict=True):
        information = json.dumps({"step": step, "epoch": 1})
        path = run / f"{name}.safetensors"
        safetensors(path, model, training_info=information, name="cat", software="{}")
    torch_file(run / "optimizer.pt", optimizer(models[0]))
    safetensors(run / "CRITIC_cat_000000500.safetensors", state(90, "critic.weight"))
    write(run, "samples/1700000000000__000000250_0.jpg")
    text(run / "config.yaml", "job: extension\n")
    return in_file(models, "cat.safetensors")


def timm_file(path: Path, model: Tensors, epoch: int) -> Path:
    """One checkpoint of timm."""
    content = {
        "epoch": epoch,
        "arch": "tiny",
        "state_dict": model,
        "state_dict_ema": {name: tensor + 7 for name, tensor in model.items()},
        "optimizer": optimizer(model),
        "version": 2,
        "args": argparse.Namespace(lr=0.1, model="tiny"),
        "metric": NumpyScalar(),
    }
    return torch_file(path, content)


def timm(run: Path) -> list[Weights]:
    """The best ones are kept; the best is linked, and the last is nowhere else."""
    models = states(4, "stem.weight", "head.bias")
    for epoch, model in zip((3, 6, 10), models, strict=False):
        timm_file(run / f"checkpoint-{epoch}.pth.tar", model, epoch)
    timm_file(run / "last.pth.tar", models[3], 11)
    os.link(run / "checkpoint-3.pth.tar", run / "model_best.pth.tar")
    timm_file(run / "recovery-11-40.pth.tar", state(90, *models[0]), 11)
    text(run / "args.yaml", "lr: 0.1\n")
    write(run, "summary.csv")
    return in_file(models)


def ultralytics(run: Path) -> list[Weights]:
    """Half-precision modules, and nothing but the average in them."""
    for epoch in (0, 10, 20):
        model = _DETECTION_MODEL()
        model.layer = torch.nn.Linear(3, 2).half()
        content = {"epoch": epoch, "model": None, "ema": model, "updates": epoch, "train_args": {}}
        torch_file(run / "weights" / f"epoch{epoch}.pt", content)
    for name in ("last.pt", "best.pt"):
        shutil.copy(run / "weights" / "epoch20.pt", run / "weights" / name)
    text(run / "args.yaml", "model: tiny\n")
    write(run, "results.csv")
    return []


def mmengine(run: Path) -> list[Weights]:
    models = states(3, "backbone.weight", "backbone.bias")
    for epoch, model in zip((1, 2, 12), models, strict=True):
        content = {
            "meta": {"epoch": epoch, "iter": epoch * 1000, "cfg": "model = dict()", "seed": 1},
            "state_dict": collections.OrderedDict(model),
            "message_hub": {"log_scalars": {"train/loss": _HISTORY_BUFFER()}},
            "optimizer": optimizer(model),
            "param_schedulers": [],
        }
        torch_file(run / f"epoch_{epoch}.pth", content)
    shutil.copy(run / "epoch_2.pth", run / "best_coco_bbox_mAP_epoch_2.pth")
    text(run / "last_checkpoint", "/gone/work_dirs/tiny/epoch_12.pth")
    write(run, "20260101_120000/20260101_120000.log", "tiny.py")
    return in_file(models)


def detectron2(run: Path) -> list[Weights]:
    models = states(3, "backbone.weight", "backbone.bias")
    for step, model in zip((4999, 9999, 14999), models, strict=True):
        content = {"model": model, "optimizer": optimizer(model), "iteration": step}
        torch_file(run / f"model_{step:07}.pth", content)
    torch_file(run / "model_final.pth", {"model": models[-1], "iteration": 14999})
    text(run / "last_checkpoint", "model_final.pth")
    text(run / "config.yaml", "MODEL: tiny\n")
    write(run, "metrics.json", "events.out.tfevents.1.host")
    return in_file(models)


def dit(run: Path) -> list[Weights]:
    models = states(2, "blocks.0.weight", "blocks.0.bias")
    for step, model in zip((50_000, 100_000), models, strict=True):
        average = {name: tensor + 7 for name, tensor in model.items()}
        arguments = argparse.Namespace(model="DiT-S/2")
        content = {"model": model, "ema": average, "opt": optimizer(model), "args": arguments}
        torch_file(run / "checkpoints" / f"{step:07}.pt", content)
    text(run / "log.txt", "(step=0050000) Train Loss: 0.1\n")
    return in_file(models)


def guided_diffusion(run: Path) -> list[Weights]:
    models = states(2, "out.weight", "out.bias")
    for step, model in zip((10_000, 20_000), models, strict=True):
        torch_file(run / f"model{step:06}.pt", model)
        average = {name: tensor + 7 for name, tensor in model.items()}
        torch_file(run / f"ema_0.9999_{step:06}.pt", average)
        torch_file(run / f"opt{step:06}.pt", optimizer(model))
    write(run, "progress.csv", "log.txt")
    return in_file(models)


def k_diffusion(run: Path) -> list[Weights]:
    models = states(2, "inner_model.weight", "inner_model.bias")
    for step, model in zip((10_000, 20_000), models, strict=True):
        content = {
            "model": model,
            "model_ema": {name: tensor + 7 for name, tensor in model.items()},
            "opt": optimizer(model),
            "ema_sched": {"last_epoch": step},
            "epoch": 1,
            "step": step,
        }
        torch_file(run / f"cat_{step:08}.pth", content)
    write(run, state__json={"latest_checkpoint": "cat_00020000.pth"})
    return in_file(models)


def edm(run: Path) -> list[Weights]:
    """Whole networks with the source of their classes."""
    write(run, training_options__json={})
    for images in (200, 400):
        content = {"ema": _EDM_NETWORK(), "dataset_kwargs": {}}
        with _importable(*_FOREIGN), open(run / f"network-snapshot-{images:06}.pkl", "wb") as file:
            pickle.dump(content, file)
        torch_file(run / f"training-state-{images:06}.pt", {"net": _EDM_NETWORK()})
    return []


# --- trainers of large models ---


def _zero_partitions(folder: Path, stage: int) -> Path:
    """DeepSpeed's own files: what is whole is low-precision, the rest is cut among the ranks."""
    model = {name: tensor.bfloat16() for name, tensor in state(1).items()}
    module = model if stage < 3 else {name: torch.empty(0) for name in model}
    content = {"module": module, "ds_config": {"stage": stage}, "shared_params": {}}
    first = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else ""
    torch_file(folder / (first or "mp_rank_00_model_states.pt"), content)
    for rank in range(2):
        flat = {"optimizer_state_dict": {"fp32_flat_groups": [torch.zeros(9)], "zero_stage": stage}}
        torch_file(folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", flat)
    return folder


def _torch_dist(folder: Path, model: Tensors) -> Path:
    """Megatron's distributed checkpoint."""
    dcp(folder, {**prefixed("decoder.", model), "checkpoint_version": 3.0})
    torch_file(folder / "common.pt", {"args": argparse.Namespace(tp=1), "iteration": 1})
    return write(
        folder, metadata__json={"sharded_backend": "torch_dist", "common_backend": "torch"}
    )


def verl(run: Path) -> list[Weights]:
    """Files of two ranks; the folder that could hold a whole model holds its configuration."""
    _verl(run, whole=False)
    return []


def verl_whole(run: Path) -> list[Weights]:
    """The same with `hf_model` among what is saved."""
    return in_file(_verl(run, whole=True))


def _verl(run: Path, whole: bool) -> list[Tensors]:
    models = states(3)
    for step, model in zip((100, 200, 300), models, strict=True):
        for role in ("actor", "critic"):
            folder = run / f"global_step_{step}" / role
            kept = model if role == "actor" else state(90 + step)
            pretrained(folder / "huggingface", kept if whole else None)
            for rank in range(2):
                parts = {name: RankTensor(tensor[:1], 2) for name, tensor in kept.items()}
                torch_file(folder / f"model_world_size_2_rank_{rank}.pt", parts)
                torch_file(folder / f"optim_world_size_2_rank_{rank}.pt", {"state": {}})
                torch_file(
                    folder / f"extra_state_world_size_2_rank_{rank}.pt", {"rng": NumpyArray()}
                )
            write(folder, fsdp_config__json={"world_size": 2})
        torch_file(run / f"global_step_{step}" / "data.pt", {"position": step})
    text(run / "latest_checkpointed_iteration.txt", "300")
    return models


def deepspeed(run: Path) -> list[Weights]:
    for step in (100, 200):
        _zero_partitions(run / f"global_step{step}", stage=2)
    text(run / "latest", "global_step200")
    text(run / "zero_to_fp32.py", "print('converts')\n")
    return []


def openrlhf(run: Path) -> list[Weights]:
    for step in (50, 100):
        _zero_partitions(run / "_actor" / f"global_step{step}", stage=2)
    text(run / "_actor" / "latest", "global_step100")
    text(run / "_actor" / "zero_to_fp32.py", "print('converts')\n")
    return []


def openrlhf_whole(run: Path) -> list[Weights]:
    """The same steps twice, as partitions and as models, and the best one once more."""
    models = states(2)
    for step, model in zip((50, 100), models, strict=True):
        _zero_partitions(run / f"global_step{step}", stage=2)
        pretrained(run / f"global_step{step}_hf", model)
    _zero_partitions(run / "best_global_step50", stage=2)
    pretrained(run / "best_global_step50_hf", models[0])
    text(run / "latest", "global_step100")
    write(run, metric__json={"eval_loss": 1.0})
    return in_file(models)


def megatron_lm(run: Path) -> list[Weights]:
    for step in (100, 200):
        for rank in range(2):
            content = {"args": argparse.Namespace(tp=2), "iteration": step, "model": state(step)}
            path = run / f"iter_{step:07}" / f"mp_rank_{rank:02}" / "model_optim_rng.pt"
            torch_file(path, content)
            torch_file(path.with_name("distrib_optim.pt"), {0: {}})
    text(run / "latest_checkpointed_iteration.txt", "200")
    write(run, "energon/iter_0000200/dataloader.pt")
    return []


def megatron_core(run: Path) -> list[Weights]:
    for step in (100, 200):
        _torch_dist(run / f"iter_{step:07}", state(step))
    text(run / "latest_checkpointed_iteration.txt", "200")
    write(run / "iter_0000200", "run_config.yaml", "train_state.pt", "tokenizer/tokenizer.json")
    return []


def gpt_neox(run: Path) -> list[Weights]:
    for step in (100, 200):
        folder = run / f"global_step{step}"
        torch_file(folder / "mp_rank_00_model_states.pt", {"args": {}, "iteration": step})
        for layer in range(2):
            torch_file(folder / f"layer_{layer:02}-model_00-model_states.pt", state(layer))
        write(folder / "configs", "tiny.yml")
    text(run / "latest", "global_step200")
    return []


def torchtitan(run: Path) -> list[Weights]:
    """The model's tensors lie at the top, beside the optimizer's in all but the last save."""
    models = states(3, "tok_embeddings.weight", "layers.0.weight", "output.weight")
    for step, model in zip((100, 200, 1000), models, strict=True):
        moments = {f"state.{name}.exp_avg": tensor for name, tensor in model.items()}
        training = {
            "optimizer": moments,
            "lr_scheduler": {"last_epoch": step},
            "dataloader": {"dp_rank_0": b"state"},
            "train_state": {"step": torch.tensor(step), "ntokens_seen": torch.tensor(step * 8)},
        }
        last = step == 1000
        dcp(run / f"step-{step}", model if last else {**model, **training})
    return in_file(models)


def torchtune(run: Path) -> list[Weights]:
    expected: list[Weights] = []
    for epoch, model in enumerate(states(3)):
        folder = write(run / f"epoch_{epoch}", tokenizer__json={}, config__json={"hidden_size": 3})
        write_shards(folder, model, 2)
        shards = [f"model-{shard + 1:05}-of-00002.safetensors" for shard in range(2)]
        expected.append(
            {
                shard: {name: model[name] for name in list(model)[at::2]}
                for at, shard in enumerate(shards)
            }
        )
    torch_file(run / "recipe_state" / "recipe_state.pt", {"epochs_run": 3})
    return expected


def open_instruct(run: Path) -> list[Weights]:
    models = states(3)
    for step, model in zip((100, 200, 1000), models, strict=True):
        write(pretrained(run / f"step_{step}", model), "COMPLETED")
    return in_file(models)


def prime_rl(run: Path) -> list[Weights]:
    """Folders of the same names hold weights, the trainer's state, roll-outs and broadcasts."""
    models = states(3)
    for step, model in zip((10, 20, 30), models, strict=True):
        write(pretrained(run / "weights" / f"step_{step}", model), "STABLE")
        training = {"app": {"model": model, "optimizers": {"state": {}}}, "progress": step}
        dcp(run / "checkpoints" / f"step_{step}" / "trainer", training)
        write(run, f"rollouts/step_{step}/rank_0.pt", f"broadcasts/step_{step}/STABLE")
        write(run, f"evals/step_{step}/results.json")
    return in_file(models)


PROCESSOR = "policy_preprocessor_step_3_normalizer_processor.safetensors"


def _lerobot(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"{step:06}"
    model = write(folder / "pretrained_model", config__json={"type": "act"})
    write(model, train_config__json={"steps": 10_000}, policy_preprocessor__json={"steps": []})
    safetensors(model / PROCESSOR, state(90 + step, "observation.mean"))
    training = write(folder / "training_state", training_step__json={"step": step})
    safetensors(training / "optimizer_state.safetensors", state(80, "state/0/exp_avg"))
    safetensors(training / "rng_state.safetensors", {"torch_rng_state": torch.get_rng_state()})
    write(training, optimizer_param_groups__json=[], scheduler_state__json={})
    return model


def lerobot(run: Path) -> list[Weights]:
    models = states(3, "model.encoder.weight", "model.encoder.bias")
    for step, model in zip((5000, 10_000, 15_000), models, strict=True):
        safetensors(_lerobot(run, step) / "model.safetensors", model)
    link(run / "checkpoints" / "last", "015000")
    write(run, "wandb/latest-run/a", "eval/videos_step_005000/0.mp4")
    return in_file(models)


def lerobot_dcp(run: Path) -> list[Weights]:
    models = states(2, "encoder.weight", "encoder.bias")
    for step, model in zip((5000, 10_000), models, strict=True):
        dcp(_lerobot(run, step), {"model": model})
    link(run / "checkpoints" / "last", "010000")
    return in_file(models)


def _olmo_sharded(folder: Path, step: int) -> Path:
    for kind in ("model", "optim", "train"):
        torch_file(folder / kind / "rank0.pt", {"step": step, "flat": torch.zeros(9)})
    text(folder / "config.yaml", "model: tiny\n")
    return folder


def olmo(run: Path) -> list[Weights]:
    """Every step twice, cut in shards and whole."""
    models = states(2, "transformer.wte.weight", "transformer.ff_out.weight")
    for step, model in zip((1000, 2000), models, strict=True):
        _olmo_sharded(run / f"step{step}", step)
        folder = run / f"step{step}-unsharded"
        torch_file(folder / "model.pt", model)
        torch_file(folder / "optim.pt", optimizer(model))
        torch_file(folder / "train.pt", {"global_step": step, "rng": NumpyArray()})
        text(folder / "config.yaml", "model: tiny\n")
    link(run / "latest", "step2000")
    link(run / "latest-unsharded", "step2000-unsharded")
    _olmo_sharded(run / "step3000-tmp", 3000)
    return in_file(models)


def olmo_sharded(run: Path) -> list[Weights]:
    for step in (1000, 2000):
        _olmo_sharded(run / f"step{step}", step)
    link(run / "latest", "step2000")
    return []


def olmo_core(run: Path) -> list[Weights]:
    models = states(3, "embeddings.weight", "w_out.weight")
    for step, model in zip((1000, 2000, 3000), models, strict=True):
        folder = run / f"step{step}"
        moments = {f"{name}.exp_avg": tensor for name, tensor in model.items()}
        dcp(folder / "model_and_optim", {"model": model, "optim": {"state": moments}})
        torch_file(folder / "train" / "rank0.pt", {"global_step": step})
        text(folder / ".metadata.json", '{"version": "v2"}')
        write(folder, config__json={"model": {"d_model": 3}})
    return in_file(models)


def hub_cache(run: Path, revisions: Mapping[str, Tensors], newest: str | None = None) -> Path:
    """The Hub's cache of one repository: every file is a link, every revision names a snapshot."""
    for revision, model in revisions.items():
        commit = hashlib.sha1(revision.encode()).hexdigest()
        text(run / "refs" / revision, commit)
        folder = run / "snapshots" / commit
        content = pretrained(run / "staging", model)
        for source in sorted(content.iterdir()):
            blob = hashlib.sha256(source.read_bytes()).hexdigest()
            target = run / "blobs" / blob
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
            folder.mkdir(parents=True, exist_ok=True)
            link(folder / source.name, f"../../blobs/{blob}")
        shutil.rmtree(content)
    if newest:
        text(run / "refs" / "main", hashlib.sha1(newest.encode()).hexdigest())
    return run


def hub_revisions(run: Path) -> list[Weights]:
    """Steps that were published as branches; the main one is the last of them."""
    models = states(3)
    names = ("step1000", "step3000", "step20000")
    hub_cache(run, dict(zip(names, models, strict=True)), newest="step20000")
    write(run, ".no_exist/0/adapter_config.json")
    return in_file(models)


def hub_copies(run: Path) -> list[Weights]:
    """The same branches downloaded into folders."""
    models = states(3)
    for step, model in zip((1000, 3000, 20_000), models, strict=True):
        pretrained(run / f"stage1-step{step}-tokens{step // 200}B", model)
    return in_file(models)


def litgpt(run: Path) -> list[Weights]:
    """The last one is copied under a name without a number."""
    models = states(2, "lm_head.weight", "transformer.wte.weight")
    for step, model in zip((100, 200), models, strict=True):
        folder = run / f"step-{step:08}"
        content = {"model": model, "optimizer": optimizer(model), "iter_num": step * 4}
        torch_file(folder / "lit_model.pth", {**content, "step_count": step})
        write(folder, config__json={"name": "tiny"}, tokenizer__json={})
        text(folder / "model_config.yaml", "name: tiny\n")
        text(folder / "hyperparameters.yaml", "lr: 0.1\n")
    shutil.copytree(folder, run / "final")
    write(run, "logs/csv/metrics.csv")
    return in_file(models)


def litgpt_lora(run: Path) -> list[Weights]:
    models = states(2, "lm_head.lora_A", "lm_head.lora_B")
    for step, model in zip((100, 200), models, strict=True):
        folder = run / f"step-{step:06}"
        torch_file(folder / "lit_model.pth.lora", {"model": model})
        write(folder, config__json={"name": "tiny"})
        text(folder / "model_config.yaml", "name: tiny\n")
    shutil.copytree(folder, run / "final")
    return in_file(models)


def nanogpt(run: Path) -> list[Weights]:
    """One file that is written over and over, and the copies that a user made of it."""
    names = ("_orig_mod.transformer.wte.weight", "_orig_mod.lm_head.weight")
    models = states(3, *names)
    for step, model in zip((1000, 2000, 10_000), models, strict=True):
        content = {
            "model": collections.OrderedDict(model),
            "optimizer": optimizer(model),
            "model_args": {"n_layer": 1},
            "iter_num": step,
            "best_val_loss": torch.tensor(1.5),
            "config": {"out_dir": "out"},
        }
        torch_file(run / "ckpt.pt", content)
        shutil.copy(run / "ckpt.pt", run / f"ckpt_{step}.pt")
    return in_file(models)


def nanochat(run: Path) -> list[Weights]:
    models = states(2, "_orig_mod.transformer.wte.weight", "_orig_mod.lm_head.weight")
    for step, model in zip((100, 200), models, strict=True):
        torch_file(run / f"model_{step:06}.pt", model)
        torch_file(run / f"optim_{step:06}_rank0.pt", optimizer(model))
        text(run / f"meta_{step:06}.json", json.dumps({"step": step, "val_bpb": 1.0}))
    return in_file(models)


def composer(run: Path) -> list[Weights]:
    """One file for each rank, the model in the first; the epoch and the batch in the name."""
    models = states(2, "model.weight", "model.bias")
    for batch, model in zip((100, 1000), models, strict=True):
        for rank in range(2):
            training = {
                "model": model if rank == 0 else {},
                "optimizers": {"Adam": optimizer(model)},
                "timestamp": {"Timestamp": {"batch": batch}},
                "integrations": {"version": _TORCH_VERSION("2.14")},
            }
            content = {"state": training, "rng": [{"numpy": ("MT19937", NumpyArray())}]}
            torch_file(run / f"ep1-ba{batch}-rank{rank}.pt", content)
    link(run / "latest-rank0.pt", "ep1-ba1000-rank0.pt")
    return in_file(models)


def composer_sharded(run: Path) -> list[Weights]:
    """Read with `key`, since it nests deeper than others."""
    models = states(2, "model.weight", "model.bias")
    for batch, model in zip((100, 200), models, strict=True):
        training = {"model": model, "optimizers": {"Adam": {"exp_avg": torch.ones(2)}}}
        dcp(run / f"ep1-ba{batch}", {"state": training})
    return in_file(models)


def llm_foundry(run: Path) -> list[Weights]:
    models = states(2)
    for batch, model in zip((100, 200), models, strict=True):
        pretrained(run / "huggingface" / f"ba{batch}", model)
    return in_file(models)


def instructlab(run: Path) -> list[Weights]:
    models = states(2)
    for samples, model in zip((900, 1234), models, strict=True):
        pretrained(run / "hf_format" / f"samples_{samples}", model)
    write(run, "training_params_and_metrics_global0.jsonl")
    return in_file(models)


def diffusion_pipe(run: Path) -> list[Weights]:
    """Models of every epoch beside DeepSpeed's own checkpoints."""
    models = states(2, "diffusion_model.layer.lora_A.weight", "diffusion_model.layer.lora_B.weight")
    for epoch, model in zip((9, 10), models, strict=True):
        adapter(run / f"epoch{epoch}", model)
    for step in (500, 1234):
        _zero_partitions(run / f"global_step{step}", stage=1)
    text(run / "latest", "global_step1234")
    write(run, "tmp/model.pt")
    return in_file(models, "adapter_model.safetensors")


def simpletuner(run: Path) -> list[Weights]:
    models = states(2, "transformer.layer.lora_A.weight", "transformer.layer.lora_B.weight")
    for step, model in zip((500, 1000), models, strict=True):
        folder = run / f"checkpoint-{step}"
        safetensors(folder / "pytorch_lora_weights.safetensors", model)
        write(folder, "optimizer.bin", "random_states_0.pkl", "scheduler.bin")
        write(folder, training_state__json={"global_step": step})
    safetensors(run / "checkpoint-1500-tmp" / "pytorch_lora_weights.safetensors", models[0])
    return in_file(models, "pytorch_lora_weights.safetensors")


def ray_train(run: Path) -> list[Weights]:
    models = states(2)
    for index, model in enumerate(models):
        folder = run / f"checkpoint_{index:06}"
        trainer_junk(pretrained(folder / "checkpoint", model), 100 * (index + 1))
    write(run, "result.json", "params.json", "progress.csv")
    return in_file(models)


def mlx_lm(run: Path) -> list[Weights]:
    models = states(3, "model.layers.0.lora_a", "model.layers.0.lora_b")
    for step, model in zip((100, 200, 300), models, strict=True):
        safetensors(run / f"{step:07}_adapters.safetensors", model)
    safetensors(run / "adapters.safetensors", models[-1])
    write(run, adapter_config__json={"fine_tune_type": "lora"})
    return in_file(models, "0000300_adapters.safetensors")


def nanotron(run: Path) -> list[Weights]:
    for step in (10, 20):
        folder = run / "checkpoints" / str(step)
        for rank in range(2):
            name = f"model_weight_pp-rank-0-of-1_tp-rank-{rank}-of-2.safetensors"
            safetensors(folder / "model" / "model" / "decoder" / name, state(step, "data"))
        write(folder, checkpoint_metadata__json={"metas": {}}, model_config__json={})
    text(run / "checkpoints" / "latest.txt", "20")
    return []


# --- speech and translation ---


def fairseq_file(path: Path, model: Tensors, epoch: int, updates: int) -> Path:
    """One checkpoint of fairseq."""
    content = {
        "args": argparse.Namespace(arch="transformer"),
        "cfg": {"model": {"arch": "transformer"}},
        "model": model,
        "optimizer_history": [{"num_updates": updates, "optimizer_name": "FairseqAdam"}],
        "extra_state": {"train_iterator": {"epoch": epoch}, "best": NumpyScalar()},
        "last_optimizer_state": optimizer(model),
        "task_state": {},
    }
    return torch_file(path, content)


def fairseq(run: Path) -> list[Weights]:
    models = states(3, "encoder.weight", "decoder.weight")
    for epoch, model in zip((1, 2, 10), models, strict=True):
        fairseq_file(run / f"checkpoint{epoch}.pt", model, epoch, epoch * 1000)
    shutil.copy(run / "checkpoint10.pt", run / "checkpoint_last.pt")
    shutil.copy(run / "checkpoint2.pt", run / "checkpoint_best.pt")
    shutil.copy(run / "checkpoint2.pt", run / "checkpoint.best_loss_2.345.pt")
    write(run, "checkpoint11.pt.tmp", "dict.en.txt", "dict.de.txt")
    return in_file(models)


def fairseq_updates(run: Path) -> list[Weights]:
    models = states(3, "encoder.weight", "decoder.weight")
    for epoch, updates, model in zip((1, 1, 2), (500, 1000, 1500), models, strict=True):
        fairseq_file(run / f"checkpoint_{epoch}_{updates}.pt", model, epoch, updates)
    shutil.copy(run / "checkpoint_2_1500.pt", run / "checkpoint_last.pt")
    return in_file(models)


def espnet(run: Path) -> list[Weights]:
    """Links to the best and to the trainer's own averages among the epochs."""
    models = states(3, "encoder.weight", "decoder.weight")
    for epoch, model in zip((8, 9, 12), models, strict=True):
        torch_file(run / f"{epoch}epoch.pth", collections.OrderedDict(model))
    resume = {"model": models[-1], "optimizers": [optimizer(models[-1])], "reporter": {"epoch": 12}}
    torch_file(run / "checkpoint.pth", resume)
    link(run / "latest.pth", "12epoch.pth")
    link(run / "valid.acc.best.pth", "9epoch.pth")
    torch_file(run / "valid.acc.ave_3best.pth", state(90, *models[0]))
    link(run / "valid.acc.ave.pth", "valid.acc.ave_3best.pth")
    text(run / "config.yaml", "encoder: tiny\n")
    write(run, "images/loss.png", "train.log")
    return in_file(models)


def wenet(run: Path) -> list[Weights]:
    """The step is in a text file beside each checkpoint."""
    models = states(3, "encoder.weight", "decoder.weight")
    for epoch, model in zip((0, 1, 10), models, strict=True):
        torch_file(run / f"epoch_{epoch}.pt", model)
        text(run / f"epoch_{epoch}.yaml", f"cv_loss: 1.5\nepoch: {epoch}\nstep: {epoch * 10}\n")
    torch_file(run / "init.pt", state(90, *models[0]))
    text(run / "init.yaml", "epoch: -1\nstep: -1\n")
    torch_file(run / "avg_3.pt", state(91, *models[0]))
    link(run / "final.pt", "epoch_10.pt")
    text(run / "train.yaml", "encoder: tiny\n")
    return in_file(models)


def icefall_file(path: Path, model: Tensors, batch: int) -> Path:
    """One checkpoint of icefall, its running average beside the model."""
    content = {
        "model": model,
        "model_avg": {name: tensor.double() + 7 for name, tensor in model.items()},
        "optimizer": optimizer(model),
        "grad_scaler": {},
        "batch_idx_train": batch,
        "exp_dir": Path("exp"),
        "best_train_loss": NumpyScalar(),
    }
    return torch_file(path, content)


def icefall(run: Path) -> list[Weights]:
    models = states(3, "encoder.weight", "decoder.weight")
    for epoch, model in zip((1, 2, 10), models, strict=True):
        icefall_file(run / f"epoch-{epoch}.pt", model, epoch * 100)
    shutil.copy(run / "epoch-10.pt", run / "best-valid-loss.pt")
    shutil.copy(run / "epoch-2.pt", run / "best-train-loss.pt")
    write(run, "log/log-train-2026-01-01-12-00-00", "tensorboard/events.out.tfevents.1")
    return in_file(models)


def speechbrain(run: Path) -> list[Weights]:
    """The names are times of day on a clock that was set back; the order is in a file inside."""
    times = ("2026-10-25+02-50-00", "2026-10-25+02-10-00", "2026-10-25+03-00-00")
    models = states(3, "encoder.weight", "decoder.weight")
    for epoch, (time, model) in enumerate(zip(times, models, strict=True), start=1):
        folder = run / f"CKPT+{time}+00"
        torch_file(folder / "model.ckpt", model)
        torch_file(folder / "optimizer.ckpt", optimizer(model))
        text(folder / "counter.ckpt", str(epoch))
        text(folder / "dataloader-TRAIN.ckpt", "40")
        text(folder / "brain.ckpt", "avg_train_loss: 0.5\nstep: 40\n")
        meta = f"# yamllint disable\nWER: 9.{epoch}\nend-of-epoch: true\nepoch: {epoch}\n"
        text(folder / "CKPT.yaml", f"{meta}unixtime: {1_761_353_400 + 1200 * epoch}.25\n")
    return in_file(models)


def opennmt(run: Path) -> list[Weights]:
    """The layer that makes the words is saved beside the model."""
    models = states(2, "encoder.weight", "decoder.weight")
    layers = states(2, "0.weight")
    for step, model, layer in zip((5000, 10_000), models, layers, strict=True):
        content = {
            "model": model,
            "generator": layer,
            "vocab": {"src": ["a", "b"]},
            "opt": argparse.Namespace(layers=1),
            "optim": {"training_step": step, "state": optimizer(model)},
        }
        torch_file(run / f"base_step_{step}.pt", content)
    pairs = zip(models, layers, strict=True)
    return in_file([{**model, **prefixed("generator.", layer)} for model, layer in pairs])


def opennmt_paired(run: Path) -> list[Weights]:
    """The weights in a file of their own, the rest under the same name."""
    models = states(2, "encoder.weight", "decoder.weight", "generator.0.weight")
    for step, model in zip((5000, 10_000), models, strict=True):
        safetensors(run / f"base_step_{step}.safetensors", model)
        rest = {"vocab": {"src": ["a"]}, "opt": argparse.Namespace(layers=1), "optim": {}}
        torch_file(run / f"base_step_{step}.pt", rest)
    return in_file(models, "base_step_10000.safetensors")


# --- what is not PyTorch's, or not averaged ---


def orbax(run: Path) -> list[Weights]:
    for step in (1000, 2000):
        folder = run / str(step)
        write(folder, "_CHECKPOINT_METADATA", "commit_success.txt", "default/manifest.ocdbt")
        write(folder, "default/_METADATA", "default/d/0123456789abcdef", "default/_sharding")
    write(run, "3000.orbax-checkpoint-tmp-1700000000/default/d/0")
    return []


def levanter(run: Path) -> list[Weights]:
    for step in (1000, 2000):
        folder = write(run / f"step-{step}", metadata__json={"step": step, "timestamp": "2026"})
        write(folder, "model/transformer/layers/weight/.zarray", "model/transformer/weight/c/0/0")
    return []


def keras(run: Path) -> list[Weights]:
    for epoch, loss in ((5, 23), (10, 21)):
        name = f"weights.{epoch:02}-0.{loss}.weights.h5"
        text(run / name, "").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    return []


def tensorflow(run: Path) -> list[Weights]:
    for step in (12, 24):
        write(run, f"ckpt-{step}.index", f"ckpt-{step}.data-00000-of-00001")
    text(run / "checkpoint", 'model_checkpoint_path: "ckpt-24"\n')
    return []


def marian(run: Path) -> list[Weights]:
    for step in (1000, 2000):
        text(run / f"model.iter{step}.npz", "").write_bytes(b"PK\x03\x04" + bytes(64))
    write(run, "model.npz.yml", "model.npz.progress.yml")
    return []


def gguf(run: Path) -> list[Weights]:
    for step in (100, 200):
        text(run / f"tiny-step{step}.gguf", "").write_bytes(b"GGUF" + bytes(64))
    return []


def _quantised(run: Path, *names: str, **tensors: torch.Tensor) -> list[Weights]:
    for step in (100, 200):
        model = {"model.layer.norm.weight": torch.ones(3)}
        model |= {f"model.layer.{name}": tensors[name] for name in tensors}
        folder = pretrained(run / f"checkpoint-{step}", model)
        trainer_junk(folder, step)
    return []


def bitsandbytes(run: Path) -> list[Weights]:
    packed = torch.zeros(4, 1, dtype=torch.uint8)
    return _quantised(run, weight=packed, **{"weight.absmax": torch.ones(1)})


def gptq(run: Path) -> list[Weights]:
    packed = torch.zeros(4, 1, dtype=torch.int32)
    return _quantised(run, qweight=packed, qzeros=packed, scales=torch.ones(1, 4).half())


# --- the table ---

Tier = Literal["read", "convert", "foreign"]


@dataclass(frozen=True, slots=True)
class TrainerRun:
    """What must be found in one trainer's run: the steps, or the words of the refusal."""

    make: Make
    tier: Tier  # read; refused with the command that makes it readable; refused as out of scope
    steps: tuple[int, ...] | None = None  # None: the numbers are no steps, only an order
    files: tuple[str, ...] = ("model.safetensors",)
    travels: tuple[str, ...] = ()  # files that go with the weights
    options: Mapping[str, Any] = field(default_factory=dict)
    refusal: tuple[str, ...] = ()  # patterns, all of which the message must match
    free_prefix: bool = False  # the names of tensors may be shorter or longer by a prefix

    @property
    def trainer(self) -> str:
        """The name to call it by."""
        return self.make.__name__.replace("_", "-")


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ADAPTER = ("adapter_model.safetensors",)
LORA_FILE = ("pytorch_lora_weights.safetensors",)
ZERO = (r"zero_to_fp32\.py", "--safe_serialization")
MEGATRON = ("export_ckpt|convert_torch_dist_to_hf|convert_megatron_to_hf",)

RUNS: tuple[TrainerRun, ...] = (
    TrainerRun(transformers, "read", (9, 10, 500), travels=PRETRAINED),
    TrainerRun(transformers_sharded, "read", (9, 10, 500), SHARDS, PRETRAINED),
    TrainerRun(transformers_bin, "read", (9, 10, 500), travels=PRETRAINED),
    TrainerRun(transformers_fsdp, "read", (100, 200)),
    TrainerRun(transformers_zero3, "convert", refusal=(*ZERO, "global_step")),
    TrainerRun(
        peft,
        "read",
        (50, 100, 150),
        ADAPTER,
        ("adapter_config.json", "ref/adapter_config.json", "ref/adapter_model.safetensors"),
    ),
    TrainerRun(peft_bin, "read", (50, 100), ADAPTER, ("adapter_config.json",)),
    TrainerRun(trl, "read", (100, 200, 300), travels=PRETRAINED),
    TrainerRun(unsloth, "read", (60, 120), ADAPTER, ("adapter_config.json",)),
    TrainerRun(llama_factory, "read", (100, 200), travels=PRETRAINED),
    TrainerRun(llama_factory_marked, "read", (100, 200, 300), travels=PRETRAINED),
    TrainerRun(llama_factory_reward, "read", (100, 200), (*ADAPTER, "value_head.safetensors")),
    TrainerRun(ms_swift, "read", (40, 80), travels=(*PRETRAINED, "args.json")),
    TrainerRun(megatron_swift, "convert", refusal=MEGATRON),
    TrainerRun(axolotl, "read", (100, 200, 300)),
    TrainerRun(
        sentence_transformers,
        "read",
        (100, 200, 300),
        ("2_Dense/model.safetensors", "model.safetensors"),
        ("modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
    ),
    TrainerRun(
        diffusers,
        "read",
        (500, 1000, 1500),
        ("unet/diffusion_pytorch_model.safetensors",),
        ("unet/config.json",),
    ),
    TrainerRun(diffusers_lora, "read", (500, 1000), LORA_FILE),
    TrainerRun(accelerate, "read", (9, 10, 11), ("model.safetensors", "model_1.safetensors")),
    TrainerRun(accelerate_bin, "read", (100, 200)),
    TrainerRun(accelerate_fsdp, "read", (0, 1)),
    TrainerRun(accelerate_deepspeed, "convert", refusal=ZERO),
    TrainerRun(lightning, "read", (50, 100, 150)),
    TrainerRun(lightning_without_units, "read", (7, 10, 100)),
    TrainerRun(lightning_fsdp, "convert", refusal=("consolidate_checkpoint",)),
    TrainerRun(kohya, "read", (100, 150, 200, 250, 300), ("cat.safetensors",)),
    TrainerRun(kohya_unnamed, "read", (100, 150, 200, 250, 300), ("last.safetensors",)),
    TrainerRun(ai_toolkit, "read", (250, 500, 600), ("cat.safetensors",)),
    TrainerRun(timm, "read", (3, 6, 10, 11)),
    TrainerRun(
        ultralytics, "convert", refusal=("pickled", r"ultralytics\.nn\.tasks\.DetectionModel")
    ),
    TrainerRun(
        verl, "convert", refusal=("ranks", "DTensor", "model_merger merge", "--backend fsdp")
    ),
    TrainerRun(verl_whole, "read", (100, 200, 300), travels=PRETRAINED),
    TrainerRun(deepspeed, "convert", refusal=(*ZERO, "-t global_step")),
    TrainerRun(openrlhf, "convert", refusal=ZERO),
    TrainerRun(openrlhf_whole, "read", (50, 100), travels=PRETRAINED),
    TrainerRun(nemo_rl, "read", (10, 20), travels=PRETRAINED),
    TrainerRun(nemo_rl_dcp, "read", (10, 20)),
    TrainerRun(nemo_rl_megatron, "convert", refusal=("convert_megatron_to_hf",)),
    TrainerRun(megatron_lm, "convert", refusal=("Megatron", "export_ckpt")),
    TrainerRun(megatron_core, "convert", refusal=MEGATRON),
    TrainerRun(gpt_neox, "convert", refusal=("convert_neox_to_hf",)),
    TrainerRun(torchtitan, "read", (100, 200, 1000)),
    TrainerRun(nemo, "read", (1000, 2000, 3000)),
    TrainerRun(nemo_exported, "read", (1000, 2000), travels=PRETRAINED),
    TrainerRun(nemo_2, "convert", refusal=("nemo llm export|export_ckpt|convert_",)),
    TrainerRun(nemo_archive, "foreign", refusal=(r"\.nemo",)),
    TrainerRun(
        automodel, "read", (100, 200, 300), ("model-00001-of-00001.safetensors",), PRETRAINED
    ),
    TrainerRun(automodel_dcp, "read", (100, 200)),
    TrainerRun(torchtune, "read", (0, 1, 2), SHARDS, ("tokenizer.json", "config.json")),
    TrainerRun(open_instruct, "read", (100, 200, 1000), travels=PRETRAINED),
    TrainerRun(prime_rl, "read", (10, 20, 30), travels=PRETRAINED),
    TrainerRun(
        lerobot,
        "read",
        (5000, 10_000, 15_000),
        travels=("config.json", "train_config.json", "policy_preprocessor.json", PROCESSOR),
    ),
    TrainerRun(lerobot_dcp, "read", (5000, 10_000), travels=("config.json", PROCESSOR)),
    TrainerRun(olmo, "read", (1000, 2000), travels=("config.yaml",)),
    TrainerRun(olmo_sharded, "convert", refusal=(r"scripts/unshard\.py",)),
    TrainerRun(olmo_core, "read", (1000, 2000, 3000)),
    TrainerRun(hub_revisions, "read", (1000, 3000, 20_000), travels=PRETRAINED),
    TrainerRun(hub_copies, "read", (1000, 3000, 20_000), travels=PRETRAINED),
    TrainerRun(litgpt, "read", (100, 200), travels=("config.json", "model_config.yaml")),
    TrainerRun(litgpt_lora, "read", (100, 200), travels=("config.json", "model_config.yaml")),
    TrainerRun(nanogpt, "read", (1000, 2000, 10_000), free_prefix=True),
    TrainerRun(nanochat, "read", (100, 200), free_prefix=True),
    TrainerRun(composer, "read", (100, 1000)),
    TrainerRun(composer_sharded, "read", (100, 200), options={"key": "state.model"}),
    TrainerRun(llm_foundry, "read", (100, 200), travels=PRETRAINED),
    TrainerRun(mmengine, "read", (1, 2, 12)),
    TrainerRun(detectron2, "read", (4999, 9999, 14_999)),
    TrainerRun(fairseq, "read", (1, 2, 10)),
    TrainerRun(fairseq_updates, "read", (500, 1000, 1500)),
    TrainerRun(espnet, "read", (8, 9, 12)),
    TrainerRun(wenet, "read"),
    TrainerRun(icefall, "read", (1, 2, 10)),
    TrainerRun(speechbrain, "read"),
    TrainerRun(opennmt, "read", (5000, 10_000), free_prefix=True),
    TrainerRun(opennmt_paired, "read", (5000, 10_000), ("base_step_10000.safetensors",)),
    TrainerRun(dit, "read", (50_000, 100_000)),
    TrainerRun(guided_diffusion, "read", (10_000, 20_000)),
    TrainerRun(k_diffusion, "read", (10_000, 20_000)),
    TrainerRun(edm, "convert", refusal=("pickle",)),
    TrainerRun(mlx_lm, "read", (100, 200, 300), ("0000300_adapters.safetensors",)),
    TrainerRun(diffusion_pipe, "read", (9, 10), ADAPTER, ("adapter_config.json",)),
    TrainerRun(simpletuner, "read", (500, 1000), LORA_FILE),
    TrainerRun(ray_train, "read", travels=PRETRAINED),
    TrainerRun(instructlab, "read", (900, 1234), travels=PRETRAINED),
    TrainerRun(nanotron, "convert", refusal=("convert_nanotron_to_hf",)),
    TrainerRun(orbax, "foreign", refusal=("[Oo]rbax|JAX",)),
    TrainerRun(levanter, "foreign", refusal=("[Ll]evanter|JAX|zarr|[Tt]ensor[Ss]tore",)),
    TrainerRun(keras, "foreign", refusal=("Keras|HDF5",)),
    TrainerRun(tensorflow, "foreign", refusal=("TensorFlow",)),
    TrainerRun(marian, "foreign", refusal=("[Mm]arian|NumPy|npz",)),
    TrainerRun(gguf, "foreign", refusal=("GGUF",)),
    TrainerRun(bitsandbytes, "foreign", refusal=("quanti", "absmax|bitsandbytes")),
    TrainerRun(gptq, "foreign", refusal=("quanti", "qweight|GPTQ")),
)
