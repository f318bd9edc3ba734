"""Train tiny models with real trainers, average their checkpoints and compare, trainer by trainer.

    python scripts/test_trainers.py
    python scripts/test_trainers.py --only lightning --only timm

For each trainer `ckpt-ema average RUN` must give what a fold in float64 gives, of checkpoints that
the trainer's own loader has read; the same loader must take the output, with every name it expects
and no other; and the files that it wants beside the weights must be there.

The first run makes `.venv-trainers/` (2 GB with a CPU build of torch); trainers.txt holds the
versions. Nothing but pip uses the network, and nothing stays behind but that folder. This module is
long because each trainer has functions of its own: to add one, add a function with `@scenario`.
"""

# The trainers are not installed where types are checked.
# mypy: disable-error-code="import-not-found,no-untyped-call,misc"
# ruff: noqa: E402 - the environment has to be made before torch can be imported

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import environment

FOLDER = environment.REPOSITORY / ".venv-trainers"
# The last transformers that still wrote pytorch_model.bin, laid over the environment for one run.
OLDER = FOLDER / "transformers-4"
# DeepSpeed changes what other trainers do where it is installed.
DEEPSPEED = FOLDER / "deepspeed"
# Laid over the environment for Megatron alone; it asks for Python 3.12, but runs on 3.11.
MEGATRON = FOLDER / "megatron"
ENVIRONMENT = environment.Environment(
    FOLDER,
    (
        ("-c", "constraints.txt", "-r", "scripts/trainers.txt", "-e", "."),
        (
            *("--no-deps", "--target", str(OLDER), "transformers==4.57.6", "datasets==4.0.0"),
            *("huggingface-hub==0.36.2", "tokenizers==0.22.2"),
        ),
        ("setuptools", "wheel"),
        (
            *("--no-deps", "--no-build-isolation", "--target", str(DEEPSPEED), "deepspeed==0.19.8"),
            *("einops==0.8.2", "hjson==3.1.0", "msgpack==1.2.4", "ninja==1.13.2"),
            *("py-cpuinfo==9.0.0", "pydantic==2.14.4", "pydantic-core==2.50.5"),
            *("annotated-types==0.8.0", "typing-inspection==0.4.5"),
        ),
        (
            *("--no-deps", "--ignore-requires-python", "--target", str(MEGATRON)),
            "megatron-core==0.19.2",
        ),
    ),
    ("pyproject.toml", "constraints.txt", "scripts/trainers.txt"),
)


def enter() -> None:
    """Start this script again in its environment, offline and on the CPU."""
    os.environ.update(
        CUDA_VISIBLE_DEVICES="",
        HF_HOME=str(FOLDER / "huggingface"),
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        TORCH_EXTENSIONS_DIR=str(FOLDER / "extensions"),
        TQDM_DISABLE="1",
    )
    environment.enter(ENVIRONMENT)


if __name__ == "__main__":
    enter()

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import io
import json
import multiprocessing
import re
import shutil
import string
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

DECAY = 0.999
COMMAND_SECONDS = 120
NOISE_LINES = 20
State = dict[str, Tensor]


class WrongError(Exception):
    """What came out is not what it should be."""


@dataclass
class Case:
    """What a trainer's function gets: a folder to work in, and the command to run."""

    folder: Path
    said: str = ""  # by the commands so far

    def average(self, run: Path, *options: str, name: str = "average") -> Path:
        """Average a run as a user would and return the folder of the result."""
        output = self.folder / name
        arguments = ["average", str(run), "-o", str(output), "--decay", str(DECAY), *options]
        command = [sys.executable, "-m", "ckpt_ema", *arguments]
        finished = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        self.said += f"$ ckpt-ema {' '.join(arguments)}\n{finished.stdout}"
        if finished.returncode:
            raise WrongError(f"the command ended with exit code {finished.returncode}")
        return output

    def write_back(self, run: Path, *options: str) -> Path:
        """Average a run into a copy of its newest checkpoint and return the folder of the copy."""
        return self.average(run, "--save-as", "checkpoint", *options, name="written-back")


@dataclass(frozen=True)
class Scenario:
    """One trainer's function."""

    name: str
    run: Callable[[Case], None]
    over: Path | None  # a folder of packages that comes before those of the environment


SCENARIOS: list[Scenario] = []


def scenario(
    name: str, *, over: Path | None = None
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register the function that follows."""

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        SCENARIOS.append(Scenario(name, function, over))
        return function

    return register


# What is right


def fold(values: Sequence[Tensor]) -> Tensor:
    """The average that the README promises: in float64, oldest first, with the dynamic decay."""
    shadow = values[0].double()
    for n, value in enumerate(values[1:], start=1):
        decay = min(DECAY, (1 + n) / (10 + n))
        shadow = shadow + (1 - decay) * (value.double() - shadow)
    return shadow


def check_average(average: State, checkpoints: Sequence[State]) -> None:
    """Compare with the fold of the checkpoints, rounded once, bit for bit."""
    newest = checkpoints[-1]
    check_equal("names", set(average), set(newest))
    moved = False
    for name, last in newest.items():
        found = average[name]
        check_equal(f"dtype and shape of {name}", _kind(found), _kind(last))
        if not last.is_floating_point():
            if not torch.equal(found, last):
                raise WrongError(f"{name} is not the newest checkpoint's")
            continue
        _check_rounded(name, found, [checkpoint[name] for checkpoint in checkpoints])
        moved = moved or not torch.equal(found, last)
    if not moved:
        raise WrongError("the average is the newest checkpoint: nothing was trained or averaged")


def _check_rounded(name: str, found: Tensor, values: Sequence[Tensor]) -> None:
    """Bit for bit, but where the fold is half-way between two values of the dtype either will do.

    Over a few checkpoints that happens: the weights are multiples of 1/44 or so. Which of the two
    it is depends on the last bit of a float64, and so on the order of the same arithmetic.
    """
    exact = fold(values)
    wanted = exact.to(found.dtype)
    differ = (_bits(found) != _bits(wanted)).any(dim=1).view(exact.shape)
    distance, allowed = (found.double() - exact).abs(), (wanted.double() - exact).abs()
    last_bits = 2.0**-50 * torch.stack([value.double().abs() for value in values]).amax(dim=0)
    wrong = differ & ~(distance <= allowed + last_bits)
    if wrong.any():
        raise WrongError(
            f"{name}: {int(wrong.sum())} of {found.numel()} {found.dtype} elements are not the fold"
            f" rounded once; the farthest is {distance[wrong].max():.3g} from it, where rounding"
            f" makes {allowed[wrong].max():.3g}"
        )


def _bits(tensor: Tensor) -> Tensor:
    """One row of bytes for each element."""
    return tensor.detach().contiguous().view(-1, 1).view(torch.uint8)


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def check_equal(what: str, found: object, expected: object) -> None:
    """Raise unless the two are equal; of sets, say what is missing and what is too much."""
    if found == expected:
        return
    if isinstance(found, set) and isinstance(expected, set):
        more, less = sorted(found - expected), sorted(expected - found)
        raise WrongError(f"{what}: too many {more}, missing {less}")
    raise WrongError(f"{what}: found {found}, expected {expected}")


def check_stored_names(output: Path, checkpoint: Path, files: Iterable[str]) -> None:
    """A loader is silent about names that it does not know; so compare what the files hold."""
    for file in files:
        check_equal(f"names in {file}", names_in(output / file), names_in(checkpoint / file))


def names_in(path: Path) -> set[str]:
    """The tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def check_copied(output: Path, source: Path, names: Iterable[str]) -> None:
    """These files are in the output, byte for byte as in `source`."""
    for name in names:
        if not (source / name).is_file():
            raise WrongError(f"this test is wrong: the trainer wrote no {name}")
        if not (output / name).is_file():
            raise WrongError(f"{name} did not travel with the weights")
        if (output / name).read_bytes() != (source / name).read_bytes():
            raise WrongError(f"{name} is not the one in {source.name}")


def check_absent(output: Path, patterns: Iterable[str]) -> None:
    """What only a training run needs stays behind."""
    for pattern in patterns:
        for path in output.rglob(pattern):
            raise WrongError(f"{path.relative_to(output)} should not have been copied")


def steps(run: Path, pattern: str, expected: Sequence[int | str]) -> list[Path]:
    """The checkpoints that the trainer wrote, which must be these: `pattern` has {} for a step."""
    paths = [run / pattern.format(step) for step in expected]
    there = set(run.glob(pattern.format("*")))
    if there != set(paths):
        raise WrongError(f"this test is wrong: the trainer wrote {sorted(there)}")
    return paths


def state_of(module: nn.Module) -> State:
    """A copy of the tensors of a module's state dict."""
    state = module.state_dict().items()
    return {name: value.detach().clone() for name, value in state if isinstance(value, Tensor)}


# transformers

TRAINING_FILES = (
    "optimizer.*",
    "scheduler.p*",
    "rng_state*",
    "training_args.bin",
    "trainer_state*",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def tiny_llama(**options: Any) -> Any:
    """A llama of some thousand parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **options,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> Any:
    """A GPT-2, whose output embedding is its input embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    )


def tiny_tokenizer() -> Any:
    """A tokenizer with a word for each number below 60."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    words = [*special.values(), *(str(number) for number in range(60))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def train_language_model(
    folder: Path,
    model: Any,
    *callbacks: Any,
    max_steps: int = 12,
    resumed_from: Path | None = None,
    **options: Any,
) -> Path:
    """Train for 12 steps with transformers' Trainer: checkpoints 5, 10 and 12, the model beside."""
    from transformers import Trainer, TrainingArguments

    run = folder / "run"
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=max_steps,
        save_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    tokens = torch.randint(64, (64, 16))
    examples = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(
        model,
        arguments,
        train_dataset=examples,
        processing_class=tiny_tokenizer(),
        callbacks=[*callbacks],
    )
    trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
    trainer.save_model()
    return run


def load_language_model(path: Path) -> State:
    """Read with `from_pretrained`, which must find neither too little nor too much."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    check_equal(f"loading info of {path.name}", {k: v for k, v in info.items() if v}, {})
    return state_of(model)


def check_language_model(case: Case, model: Any, **options: Any) -> tuple[Path, Path]:
    """Train, average, compare; return the newest checkpoint and the output."""
    from transformers import AutoTokenizer

    run = train_language_model(case.folder, model, **options)
    checkpoints = steps(run, "checkpoint-{}", [5, 10, 12])
    output = case.average(run)
    check_average(load_language_model(output), [load_language_model(path) for path in checkpoints])
    check_copied(
        output, checkpoints[-1], ["config.json", "generation_config.json", *TOKENIZER_FILES]
    )
    check_absent(output, TRAINING_FILES)
    check_equal("vocabulary", len(AutoTokenizer.from_pretrained(output)), 64)
    check_language_model_resumed(case, run, model, checkpoints)
    return checkpoints[-1], output


def check_language_model_resumed(
    case: Case, run: Path, model: Any, checkpoints: Sequence[Path]
) -> None:
    """Written back, the average is what the Trainer goes on from, at step 12."""
    from transformers import TrainerCallback

    written, states = case.write_back(run), [load_language_model(path) for path in checkpoints]
    check_average(load_language_model(written), states)
    check_copied(written, checkpoints[-1], ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
    seen: list[tuple[int, State]] = []

    class Look(TrainerCallback):
        def on_train_begin(self, _args: Any, state: Any, _control: Any, **more: Any) -> None:
            seen.append((state.global_step, state_of(more["model"])))

    folder = case.folder / "resumed"
    train_language_model(folder, model, Look(), max_steps=14, resumed_from=written)
    [(step, state)] = seen
    check_equal("step", step, 12)
    check_average({name: state[name] for name in states[-1]}, states)


@scenario("transformers: one file")
def transformers_single(case: Case) -> None:
    """Also uneven: a step after 5, 10 and 12."""
    newest, output = check_language_model(case, tiny_llama())
    check_stored_names(output, newest, ["model.safetensors"])


@scenario("transformers: shards, bfloat16")
def transformers_sharded(case: Case) -> None:
    """The Trainer has no option for the size of a shard, so the model's own method gets it."""
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="10KB")
    newest, output = check_language_model(case, model)
    shards = sorted(path.name for path in newest.glob("model-*-of-*.safetensors"))
    if len(shards) < 3:
        raise WrongError(f"this test is wrong: the trainer wrote the shards {shards}")
    check_stored_names(output, newest, shards)
    check_copied(output, newest, ["model.safetensors.index.json"])


@scenario("transformers: tied embeddings")
def transformers_tied(case: Case) -> None:
    """The file holds one of the two."""
    newest, output = check_language_model(case, tiny_llama(tie_word_embeddings=True))
    check_stored_names(output, newest, ["model.safetensors"])


@scenario("transformers 4: pytorch_model.bin", over=OLDER)
def transformers_bin(case: Case) -> None:
    """With tied weights, which such a file holds under both names."""
    newest, output = check_language_model(case, tiny_gpt2(), save_safetensors=False)
    check_copied_from_bin(newest, output)


@scenario("transformers 4: sharded pytorch_model.bin", over=OLDER)
def transformers_sharded_bin(case: Case) -> None:
    """In bfloat16."""
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="10KB")
    newest, output = check_language_model(case, model, save_safetensors=False)
    if not (newest / "pytorch_model.bin.index.json").is_file():
        raise WrongError("this test is wrong: the trainer wrote no shards")
    check_copied_from_bin(newest, output)


def check_copied_from_bin(newest: Path, output: Path) -> None:
    """Torch files come out as safetensors."""
    if not list(newest.glob("pytorch_model*.bin")):
        raise WrongError("this test is wrong: the trainer wrote no .bin")
    check_absent(output, ["*.bin", "*.bin.index.json"])


@scenario("transformers: PEFT adapter")
def peft_adapter(case: Case) -> None:
    """LoRA, and a whole layer that is trained beside it."""
    from peft import LoraConfig, get_peft_model

    base = case.folder / "base"
    model = tiny_llama()
    model.save_pretrained(base)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama_from(base), lora)
    run = train_language_model(case.folder, model)
    checkpoints = steps(run, "checkpoint-{}", [5, 10, 12])
    output = case.average(run)
    states = [load_adapter(base, path) for path in checkpoints]
    check_average(load_adapter(base, output), states)
    check_stored_names(output, checkpoints[-1], ["adapter_model.safetensors"])
    check_copied(output, checkpoints[-1], ["adapter_config.json", *TOKENIZER_FILES])
    check_absent(output, TRAINING_FILES)


def tiny_llama_from(path: Path) -> Any:
    """A model that knows where it came from, which the adapter's configuration repeats."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def load_adapter(base: Path, path: Path) -> State:
    """Read the base and the adapter with PEFT."""
    from peft import PeftModel

    return state_of(PeftModel.from_pretrained(tiny_llama_from(base), path))


# sentence-transformers


@scenario("sentence-transformers: Transformer, Pooling, Dense")
def sentence_transformers(case: Case) -> None:
    """Two of the three modules have weights, in a file each."""
    from sentence_transformers import SentenceTransformer

    def load(path: Path) -> State:
        return state_of(SentenceTransformer(str(path), device="cpu"))

    run = train_sentences(case.folder)
    checkpoints = steps(run, "checkpoint-{}", [4, 8, 12])
    output = case.average(run)
    check_average(load(output), [load(path) for path in checkpoints])
    check_stored_names(output, checkpoints[-1], ["model.safetensors", "2_Dense/model.safetensors"])
    beside = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"]
    inside = ["1_Pooling/config.json", "2_Dense/config.json"]
    check_copied(output, checkpoints[-1], ["config.json", *beside, *inside, *TOKENIZER_FILES])
    check_absent(output, TRAINING_FILES)
    embedding = SentenceTransformer(str(output), device="cpu").encode("1 2 3")
    check_equal("shape of an embedding", embedding.shape, (8,))


def train_sentences(folder: Path) -> Path:
    """Train a tiny BERT and the layer behind it."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses, modules
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 32}
    config = BertConfig(vocab_size=64, num_hidden_layers=2, num_attention_heads=4, **sizes)
    BertModel(config).save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    transformer = modules.Transformer(str(folder / "bert"))
    parts = [transformer, modules.Pooling(32), modules.Dense(32, 8)]
    model = SentenceTransformer(modules=parts, device="cpu")
    texts = [f"{n % 60} {n * 7 % 60} {n * 11 % 60}" for n in range(64)]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=12,
        save_steps=4,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"anchor": texts, "positive": texts[1:] + texts[:1]}),
        loss=losses.MultipleNegativesRankingLoss(model),
    ).train()
    return folder / "run"


# diffusers


@scenario("diffusers: unet in a pipeline")
def diffusers_unet(case: Case) -> None:
    """As the example scripts do it: only unet/ of a checkpoint is averaged, unet_ema/ is not."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    run = case.folder / "run"
    train_unet(run, tiny_pipeline(case.folder))
    checkpoints = steps(run, "checkpoint-{}", [4, 8, 12])
    output = case.average(run)
    pipeline = StableDiffusionPipeline.from_pretrained(output)
    states = [state_of(UNet2DConditionModel.from_pretrained(path / "unet")) for path in checkpoints]
    check_average(state_of(pipeline.unet), states)
    weights = "diffusion_pytorch_model.safetensors"
    check_stored_names(output / "unet", checkpoints[-1] / "unet", [weights])
    others = ["vae/config.json", f"vae/{weights}", "text_encoder/model.safetensors"]
    check_copied(output, run, [*others, "model_index.json", "scheduler/scheduler_config.json"])
    check_absent(output, ["unet_ema", "checkpoint-*", "optimizer.bin", "random_states*"])


@scenario("diffusers: LoRA")
def diffusers_lora(case: Case) -> None:
    """As the example scripts do it: one file in a checkpoint, loaded into a pipeline."""
    from diffusers import StableDiffusionPipeline

    run = case.folder / "run"
    pipeline = tiny_pipeline(case.folder)
    pipeline.save_pretrained(case.folder / "base")
    train_lora(run, pipeline)
    checkpoints = steps(run, "checkpoint-{}", [4, 8, 12])

    def load(path: Path) -> State:
        pipeline = StableDiffusionPipeline.from_pretrained(case.folder / "base")
        pipeline.load_lora_weights(path)
        return state_of(pipeline.unet)

    output = case.average(run)
    check_average(load(output), [load(path) for path in checkpoints])
    check_stored_names(output, checkpoints[-1], ["pytorch_lora_weights.safetensors"])
    check_absent(output, ["optimizer.bin", "random_states*"])


def tiny_pipeline(folder: Path) -> Any:
    """A Stable Diffusion of about a hundred thousand parameters."""
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 16}
    text = CLIPTextConfig(vocab_size=64, num_hidden_layers=1, num_attention_heads=2, **sizes)
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **blocks,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        **blocks,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tiny_clip_tokenizer(folder / "clip"),
        unet=unet,
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_clip_tokenizer(folder: Path) -> Any:
    """A tokenizer of letters."""
    from transformers import CLIPTokenizer

    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder)


def train_unet(run: Path, pipeline: Any) -> None:
    """Train all of it, with an average of diffusers' own beside; the pipeline is saved last."""
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    unet = pipeline.unet
    ema = EMAModel(unet.parameters(), 0.9, model_cls=UNet2DConditionModel, model_config=unet.config)

    def save_models(models: list[Any], weights: list[Any], folder: str) -> None:
        ema.save_pretrained(os.path.join(folder, "unet_ema"))
        for model in models:
            model.save_pretrained(os.path.join(folder, "unet"))
            weights.pop()

    denoise(run, unet, save_models, lambda: ema.step(unet.parameters()))
    ema.copy_to(unet.parameters())
    pipeline.save_pretrained(run)


def train_lora(run: Path, pipeline: Any) -> None:
    """Train an adapter in the unet."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))

    def save_models(models: list[Any], weights: list[Any], folder: str) -> None:
        for model in models:
            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
            pipeline.save_lora_weights(folder, unet_lora_layers=layers)
            weights.pop()

    denoise(run, pipeline.unet, save_models, lambda: None)


def denoise(run: Path, unet: Any, save_models: Any, after_step: Callable[[], None]) -> None:
    """Train for 12 steps; `accelerate` saves each fourth, the models by way of the hook."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.register_save_state_pre_hook(save_models)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(trained, lr=1e-3))
    for step in range(1, 13):
        noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
        predicted = unet(noise * 2, torch.randint(1000, (2,)), text).sample
        accelerator.backward(functional.mse_loss(predicted, noise))
        optimizer.step()
        optimizer.zero_grad()
        after_step()
        if step % 4 == 0:
            accelerator.save_state(str(run / f"checkpoint-{step}"))


# accelerate


class Tied(nn.Module):
    """Its output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits for each of the tokens."""
        logits: Tensor = self.head(self.norm(self.embedding(tokens)))
        return logits


FILES = ("model.safetensors", "model_1.safetensors")


@scenario("accelerate: two models, safetensors")
def accelerate_safetensors(case: Case) -> None:
    """The average takes the place of the weights in a checkpoint, and training can go on."""
    accelerator, models, checkpoints = train_accelerate(case.folder, safe_serialization=True)

    def load(path: Path) -> State:
        accelerator.load_state(str(path))
        return state_of(models)

    output = case.average(case.folder / "run")
    resumed = shutil.copytree(checkpoints[-1], case.folder / "resumed")
    for file in FILES:
        shutil.copy(output / file, resumed)
    check_average(load(resumed), [load(path) for path in checkpoints])
    check_stored_names(output, checkpoints[-1], FILES)
    check_absent(output, ["optimizer*", "random_states*"])


@scenario("accelerate: two models, tied, .bin")
def accelerate_bin(case: Case) -> None:
    """A .bin has tied weights under both names, and so has the output.

    A state dict that is loaded strictly needs both. The one loader that refuses them is
    `safetensors.torch.load_model`, and with it `accelerator.load_state`.
    """
    from accelerate import load_checkpoint_in_model

    accelerator, models, checkpoints = train_accelerate(case.folder, safe_serialization=False)
    states = []
    for path in checkpoints:
        accelerator.load_state(str(path))
        states.append(state_of(models))
    output = case.average(case.folder / "run")
    for model, file in zip(models, FILES, strict=True):
        load_checkpoint_in_model(model, str(output / file), strict=True)
    check_average(state_of(models), states)
    check_equal("names", names_in(output / FILES[0]), set(models[0].state_dict()))
    check_absent(output, ["*.bin", "random_states*"])


def train_accelerate(
    folder: Path, *, safe_serialization: bool
) -> tuple[Any, nn.ModuleList, list[Path]]:
    """Train two models in one loop for 12 steps, saving each third."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    run = folder / "run"
    project = ProjectConfiguration(project_dir=str(run), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=project)
    torch.manual_seed(0)
    models = nn.ModuleList(accelerator.prepare(Tied(), nn.Linear(11, 3)))
    optimizer = accelerator.prepare(torch.optim.AdamW(models.parameters(), lr=1e-2))
    for step in range(12):
        logits = models[1](models[0](torch.randint(11, (16,))))
        accelerator.backward(functional.cross_entropy(logits, torch.randint(3, (16,))))
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 2:
            accelerator.save_state(safe_serialization=safe_serialization)
    return accelerator, models, steps(run / "checkpoints", "checkpoint_{}", range(4))


@scenario("accelerate: FSDP2, folders of shards")
def accelerate_fsdp(case: Case) -> None:
    """Saved by `save_state` on two ranks; `load_state` takes what is written back."""
    run = case.folder / "run"
    run_ranks(case, train_accelerate_rank, case.folder)
    checkpoints = steps(run / "checkpoints", "checkpoint_{}", range(3))
    model = "pytorch_model_fsdp_0"
    states = [tensors_in(path / model, "model.") for path in checkpoints]
    output = case.average(run)
    check_average(load_file(output / "model.safetensors"), states)
    check_absent(output, ["*.distcp", ".metadata", "random_states*"])
    written, newest = case.write_back(run), checkpoints[-1]
    shards = [f"optimizer_0/__{rank}_0.distcp" for rank in range(RANKS)]
    random = [f"random_states_{rank}.pkl" for rank in range(RANKS)]
    check_copied(written, newest, [*shards, *random, "optimizer_0/.metadata"])
    run_ranks(case, train_accelerate_rank, case.folder / "resumed", written)
    check_resumed(case.folder / "resumed", states)


def train_accelerate_rank(rank: int, folder: Path, resumed_from: Path | None = None) -> None:
    """What one of the ranks does: 3 steps, each saved; or one more after `resumed_from`."""
    os.environ["MASTER_ADDR"] = "localhost"  # which accelerate wants, though it is not used
    from accelerate import Accelerator, PartialState
    from accelerate.utils import (
        DistributedType,
        FullyShardedDataParallelPlugin,
        ProjectConfiguration,
    )

    project = ProjectConfiguration(str(folder / "run"), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=project)
    # On CPUs, accelerate knows nothing but data parallelism; what it does for FSDP needs no GPU.
    PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="SHARDED_STATE_DICT",
        auto_wrap_policy="size_based_wrap",
        min_num_params=20,
        cpu_ram_efficient_loading=False,
    )
    network = tiny_network(torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(network, optimizer)
    torch.manual_seed(rank)
    if resumed_from:
        accelerator.load_state(str(resumed_from))
        save_whole(model, folder, "began")
    for _ in range(1 if resumed_from else 3):
        train_step(model, optimizer, accelerator.backward)
        accelerator.save_state()
    save_whole(model, folder, "ended")


# Lightning

STEPS = ("epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt")


@scenario("lightning: hyper-parameters in a Namespace, last.ckpt")
def lightning_namespace(case: Case) -> None:
    """Python objects in the file that are not torch's; `last.ckpt` is step 12 once more."""
    check_lightning(case, argparse.Namespace(width=6, path=Path("data")), STEPS)


@scenario("lightning: hyper-parameters in OmegaConf")
def lightning_omegaconf(case: Case) -> None:
    """Likewise."""
    from omegaconf import OmegaConf

    check_lightning(case, OmegaConf.create({"width": 6, "layers": [1, 2]}), STEPS)


@scenario("lightning: the best two and last.ckpt")
def lightning_best(case: Case) -> None:
    """Here `last.ckpt` alone holds step 12."""
    options = argparse.Namespace(width=6)
    check_lightning(case, options, [*STEPS[:2], "last.ckpt"], save_top_k=2, monitor="score")


@scenario("lightning: EMAWeightAveraging")
def lightning_ema(case: Case) -> None:
    """The callback moves the trained weights and puts its own average where they were."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    options = argparse.Namespace(width=6)
    check_lightning(case, options, STEPS, EMAWeightAveraging(decay=0.9), key="current_model_state")


def check_lightning(
    case: Case,
    options: Any,
    names: Sequence[str],
    *callbacks: Any,
    key: str = "state_dict",
    **saving: Any,
) -> None:
    """Train, average, compare with what is under `key` in the files with these names."""
    module = lightning_module()
    run = train_lightning(case.folder, module(options), *callbacks, **saving)
    check_equal("files of the run", {path.name for path in run.iterdir()}, {*names, "last.ckpt"})
    output = case.average(run)
    # The files are this script's own, so that it may run what is in them.
    states = [torch.load(run / name, weights_only=False)[key] for name in names]
    averaged = module(options)
    averaged.load_state_dict(load_file(output / "model.safetensors"), strict=True)
    check_average(state_of(averaged), states)
    check_absent(output, ["*.ckpt"])
    if key == "state_dict":
        check_lightning_resumed(case, run, module, options, states)


def check_lightning_resumed(
    case: Case, run: Path, module: Any, options: Any, states: Sequence[State]
) -> None:
    """Written back, the average loads as a checkpoint, and training goes on from it."""
    written = case.write_back(run)
    [path] = written.glob("*.ckpt")
    loaded = module.load_from_checkpoint(path, weights_only=False)
    check_average(state_of(loaded), states)
    seen: list[State] = []

    class Resumed(module):
        def on_train_start(self) -> None:
            check_equal("step", self.global_step, 12)
            seen.append(state_of(self))

    folder = case.folder / "resumed"
    train_lightning(folder, Resumed(options), max_steps=14, ckpt_path=path)
    check_average(seen[0], states)


SHARDED_STEPS = ("epoch=1-step=4.ckpt", "epoch=2-step=8.ckpt", "epoch=3-step=12.ckpt")


@scenario("lightning: ModelParallelStrategy, folders of shards")
def lightning_sharded(case: Case) -> None:
    """On two ranks; written back, the average is what `Trainer(ckpt_path=...)` resumes from."""
    run_ranks(case, train_lightning_rank, case.folder)
    run = case.folder / "run"
    expected = {*SHARDED_STEPS, "last.ckpt"}
    check_equal("files of the run", {path.name for path in run.iterdir()}, expected)
    states = [tensors_in(run / name, "state_dict.") for name in SHARDED_STEPS]
    output = case.average(run)
    check_average(load_file(output / "model.safetensors"), states)
    check_absent(output, ["*.distcp", "meta.pt", ".metadata"])
    written, newest = case.write_back(run), run / SHARDED_STEPS[-1]
    check_copied(written, newest, ["meta.pt", ".metadata"])
    check_rest(written, newest, {f"state_dict.{name}" for name in states[-1]})
    run_ranks(case, train_lightning_rank, case.folder / "resumed", 13, written)
    check_resumed(case.folder / "resumed", states)


def train_lightning_rank(
    _rank: int, folder: Path, max_steps: int = 12, ckpt_path: Path | None = None
) -> None:
    """What one of the ranks does: 12 steps or those that are left, saving each fourth."""
    os.environ.update(TORCHELASTIC_RUN_ID="1", GROUP_RANK="0", LOCAL_WORLD_SIZE=str(RANKS))
    load_torchvision()
    # Where ranks resume, Lightning forgets that it was told `weights_only=False`.
    torch.serialization.add_safe_globals([argparse.Namespace])
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Sharded(lightning_module()):
        def configure_model(self) -> None:
            shard(self.net, self.device_mesh["data_parallel"])

        def on_train_start(self) -> None:
            check_equal("step", self.global_step, max_steps - 1 if ckpt_path else 0)
            save_whole(self, folder, "began")

        def on_train_end(self) -> None:
            save_whole(self, folder, "ended")

    train_lightning(
        folder,
        Sharded(argparse.Namespace(width=7)),
        max_steps=max_steps,
        ckpt_path=ckpt_path,
        devices=RANKS,
        strategy=ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1),
    )


def lightning_module() -> Any:
    """The class of a small model; Lightning is imported when its turn comes."""
    from lightning.pytorch import LightningModule

    class Classifier(LightningModule):
        def __init__(self, options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            width = options.width
            self.net = nn.Sequential(
                nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3)
            )

        def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
            self.log("score", float(self.global_step))
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Classifier


def train_lightning(
    folder: Path,
    model: Any,
    *callbacks: Any,
    max_steps: int = 12,
    ckpt_path: Path | None = None,
    devices: int = 1,
    strategy: Any = "auto",
    **saving: Any,
) -> Path:
    """Train for some steps of 5 an epoch, saving each fourth; resume from `ckpt_path`."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.randint(3, (20,)))
    run = folder / "run"
    saving = {"save_top_k": -1, "save_last": True, **saving}
    saver = ModelCheckpoint(run, every_n_train_steps=4, **saving)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=max_steps,
        callbacks=[saver, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = torch.utils.data.DataLoader(data, batch_size=4)
    trainer.fit(model, batches, ckpt_path=ckpt_path, weights_only=False)
    return run


# timm


@scenario("timm: the best three, last and model_best")
def timm_saver(case: Case) -> None:
    """Of 12 epochs 3, 6 and 7 are the best and stay; `last.pth.tar` alone holds epoch 11."""
    import timm
    from timm.models import load_checkpoint

    run = case.folder / "run"
    run.mkdir()
    train_timm(run, [0.1, 0.2, 0.3, 0.9, 0.4, 0.5, 0.8, 0.7, 0.1, 0.2, 0.3, 0.4])
    checkpoints = steps(run, "checkpoint-{}.pth.tar", [3, 6, 7])

    def load(path: Path) -> State:
        model = timm.create_model("test_resnet", num_classes=3)
        load_checkpoint(model, str(path), use_ema=False, weights_only=path.suffix != ".tar")
        return state_of(model)

    output = case.average(run)
    states = [load(path) for path in [*checkpoints, run / "last.pth.tar"]]
    check_average(load(output / "model.safetensors"), states)
    check_absent(output, ["*.tar"])
    names = torch.load(checkpoints[0], weights_only=False)["state_dict"].keys()
    check_equal("names", names_in(output / "model.safetensors"), set(names))


def train_timm(run: Path, metrics: Sequence[float]) -> None:
    """One step for each epoch, saved by timm's own saver, with an average of timm's own beside."""
    import timm
    from timm.utils import CheckpointSaver, ModelEmaV3

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    saver = CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="test_resnet", lr=1e-2),
        model_ema=ema,
        checkpoint_dir=str(run),
        recovery_dir=str(run),
        max_history=3,
    )
    for epoch, metric in enumerate(metrics):
        predicted = model(torch.randn(4, 3, 32, 32))
        loss = functional.cross_entropy(predicted, torch.randint(3, (4,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        saver.save_checkpoint(epoch, metric)


# Ranks

RANKS = 2


def run_ranks(
    case: Case, function: Callable[..., None], *arguments: Any, method: str = "forkserver"
) -> None:
    """Call a function with the number of a rank and these arguments, each rank in a process."""
    from torch.multiprocessing.spawn import start_processes

    # The fork server imports this script once, so that the ranks need not.
    multiprocessing.set_forkserver_preload(["__main__"])
    rendezvous = Path(tempfile.mkdtemp(dir=case.folder)) / "rendezvous"
    start_processes(_run_rank, (rendezvous, function, arguments), RANKS, start_method=method)


def _run_rank(
    rank: int, rendezvous: Path, function: Callable[..., None], arguments: Sequence[Any]
) -> None:
    from torch import distributed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    place = f"file://{rendezvous}"
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=RANKS)
        function(rank, *arguments)
        distributed.barrier()
        distributed.destroy_process_group()


def whole_state(module: nn.Module) -> State:
    """A copy of a sharded module's state dict, without shards; all ranks have to call it."""
    from torch.distributed.tensor import DTensor

    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in state_of(module).items()
    }


def save_whole(module: nn.Module, folder: Path, name: str) -> None:
    """Save what each rank has of a sharded module, without shards; all ranks have to call it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(whole_state(module), folder / f"{name}-{torch.distributed.get_rank()}.pt")


def check_resumed(folder: Path, states: Sequence[State]) -> None:
    """On every rank, training began with the average and went on."""
    for rank in range(RANKS):
        began, ended = (torch.load(folder / f"{when}-{rank}.pt") for when in ("began", "ended"))
        check_average(began, states)
        check_moved(began, ended)


def check_moved(began: State, ended: State) -> None:
    """A step of training has changed something."""
    if all(torch.equal(tensor, ended[name]) for name, tensor in began.items()):
        raise WrongError("no step was trained after the average was loaded")


def shard(layers: nn.Sequential, mesh: Any) -> None:
    """Shard a network with FSDP2: two of its layers, and the rest together."""
    from torch.distributed.fsdp import fully_shard

    for layer in [layer for layer in layers if isinstance(layer, nn.Linear)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(layers, mesh=mesh)


def train_step(
    model: nn.Module, optimizer: Any, backward: Callable[[Tensor], None] = Tensor.backward
) -> None:
    """Train a tiny network to name the token before each."""
    tokens = torch.randint(11, (16,))
    backward(functional.cross_entropy(model(tokens).float(), tokens.roll(1)))
    optimizer.step()
    optimizer.zero_grad()


def check_rest(written: Path, newest: Path, averaged: Iterable[str]) -> None:
    """Whatever is not averaged in a torch.distributed.checkpoint folder is the newest's."""
    found, wanted = everything_in(written), everything_in(newest)
    for name in averaged:
        del found[name], wanted[name]
    check_same(found, wanted)


def check_same(found: Mapping[str, object], newest: Mapping[str, object]) -> None:
    """What is beside the weights is the newest checkpoint's."""
    check_equal("entries beside the weights", set(found), set(newest))
    if not any(isinstance(value, Tensor) for value in newest.values()):
        raise WrongError("this test is wrong: there are no tensors beside the weights")
    for name, value in newest.items():
        if not is_same(found[name], value):
            raise WrongError(f"{name} is not the newest checkpoint's")


def everything_in(path: Path) -> dict[str, object]:
    """What torch reads from a folder of torch.distributed.checkpoint, by dotted names."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(path, file.name)
        return flatten(torch.load(file.name, weights_only=False))


def tensors_in(path: Path, prefix: str) -> State:
    """The tensors in a folder of torch.distributed.checkpoint whose names begin with this."""
    return {
        name.removeprefix(prefix): value
        for name, value in everything_in(path).items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }


def flatten(value: Any) -> dict[str, object]:
    """The leaves of nested dicts and lists, by dotted names."""
    if not isinstance(value, dict | list | tuple):
        return {"": value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        f"{key}.{below}".rstrip("."): leaf
        for key, inner in items
        for below, leaf in flatten(inner).items()
    }


def is_same(one: object, other: object) -> bool:
    """Return whether two leaves are equal, tensors bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _kind(one) == _kind(other) and torch.equal(_bits(one), _bits(other))
    if isinstance(one, io.BytesIO) and isinstance(other, io.BytesIO):
        return one.getvalue() == other.getvalue()
    return type(one) is type(other) and bool(one == other)


# torch.distributed.checkpoint


@scenario("torch.distributed.checkpoint: model and optim")
def distributed_nested(case: Case) -> None:
    """Saved as {"model": ..., "optim": ...}."""
    check_distributed(case, torch.float32, flat=False)


@scenario("torch.distributed.checkpoint: flat, bfloat16")
def distributed_flat(case: Case) -> None:
    """Saved as torchtitan does: the model's names at the top, "optimizer" beside them."""
    check_distributed(case, torch.bfloat16, flat=True)


def check_distributed(case: Case, dtype: torch.dtype, *, flat: bool) -> None:
    """Train on two ranks; read with one."""
    run = case.folder / "run"
    run_ranks(case, train_rank, run, dtype, flat)
    checkpoints = steps(run, "step-{}", [10, 20, 30])
    if not all(len(list(path.glob("*.distcp"))) == RANKS for path in checkpoints):
        raise WrongError("this test is wrong: not every rank wrote a file")
    states = [state_of(load_distributed(path, dtype, flat)[0]) for path in checkpoints]
    output = case.average(run)
    model = tiny_network(dtype)
    model.load_state_dict(load_file(output / "model.safetensors"), strict=True)
    check_average(state_of(model), states)
    check_absent(output, ["*.distcp", ".metadata"])
    written = case.write_back(run)
    resumed, optimizer = load_distributed(written, dtype, flat)
    check_average(state_of(resumed), states)
    prefix = "" if flat else "model."
    check_rest(written, checkpoints[-1], {f"{prefix}{name}" for name in states[-1]})
    train_step(resumed, optimizer)
    check_equal("steps of the optimizer", {int(s["step"]) for s in optimizer.state.values()}, {31})


def load_distributed(
    path: Path, dtype: torch.dtype, flat: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Read a checkpoint as the trainer does that resumes from it, but on one rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    model = tiny_network(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = distributed_state(model, optimizer, flat)
    load(state, checkpoint_id=path, no_dist=True)
    set_state_dict(
        model,
        optimizer,
        model_state_dict={name: state[name] for name in model.state_dict()}
        if flat
        else state["model"],
        optim_state_dict=state["optimizer" if flat else "optim"],
        options=StateDictOptions(flatten_optimizer_state_dict=flat),
    )
    return model, optimizer


def distributed_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, flat: bool
) -> dict[str, Any]:
    """What is saved of a model and its optimizer, and what is loaded into them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {**weights, "optimizer": moments} if flat else {"model": weights, "optim": moments}


def tiny_network(dtype: torch.dtype) -> nn.Sequential:
    """Its sizes are odd, so that no two ranks hold the same."""
    torch.manual_seed(0)
    layers = (nn.Embedding(11, 9), nn.Linear(9, 7), nn.BatchNorm1d(7), nn.Linear(7, 11, bias=False))
    return nn.Sequential(*layers).to(dtype)


def train_rank(rank: int, run: Path, dtype: torch.dtype, flat: bool) -> None:
    """What one of the ranks does: 30 steps under FSDP, saving each tenth."""
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh

    model = tiny_network(dtype)
    shard(model, init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(rank)
    for step in range(1, 31):
        train_step(model, optimizer)
        if step % 10 == 0:
            state = distributed_state(model, optimizer, flat)
            counters = {"train_state": {"step": step}} if flat else {}
            save({**state, **counters}, checkpoint_id=run / f"step-{step}")


# Files of ranks


@scenario("verl: FSDP2, a file of each rank")
def verl_ranks(case: Case) -> None:
    """Its parts are DTensors; buffers are whole in the file of each rank."""
    run = case.folder / "run"
    run_ranks(case, train_verl, case.folder)
    checkpoints = steps(run, "global_step_{}", [1, 2, 3])
    states = [torch.load(case.folder / f"{path.name}-0.pt") for path in checkpoints]
    output = case.average(run)
    check_average(load_file(output / "model.safetensors"), states)
    check_absent(output, ["*.pt"])
    written, newest = case.write_back(run), checkpoints[-1]
    for kind in ("optim", "extra_state"):
        others = [f"actor/{kind}_world_size_{RANKS}_rank_{rank}.pt" for rank in range(RANKS)]
        check_copied(written, newest, others)
    run_ranks(case, train_verl, case.folder / "resumed", written / "actor")
    check_resumed(case.folder / "resumed", states)


def train_verl(rank: int, folder: Path, resumed_from: Path | None = None) -> None:
    """What one of the ranks does, as verl's FSDPCheckpointManager saves and loads it."""
    from torch.distributed.device_mesh import init_device_mesh

    mine = f"world_size_{RANKS}_rank_{rank}.pt"
    model = tiny_network(torch.float32)
    shard(model, init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    if resumed_from:
        model.load_state_dict(torch.load(resumed_from / f"model_{mine}", weights_only=False))
        optimizer.load_state_dict(torch.load(resumed_from / f"optim_{mine}", weights_only=False))
        save_whole(model, folder, "began")
    for step in (4,) if resumed_from else (1, 2, 3):
        train_step(model, optimizer)
        path = folder / "run" / f"global_step_{step}" / "actor"
        path.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path / f"model_{mine}")
        torch.save(optimizer.state_dict(), path / f"optim_{mine}")
        torch.save({"lr_scheduler": None, "rng": {}}, path / f"extra_state_{mine}")
        save_whole(model, folder, path.parent.name)
    save_whole(model, folder, "ended")


# DeepSpeed


def check_deepspeed(case: Case, stage: int, is_rounded: bool) -> None:
    """Train on two ranks; DeepSpeed's own script reads what they saved, but for frozen weights."""
    run = case.folder / "run"
    run_ranks(case, train_deepspeed, run, stage, is_rounded)
    checkpoints = steps(run, "global_step{}", [1, 2, 3])
    states = [_consolidated(path, stage) for path in checkpoints]
    output = case.average(run)
    average = load_file(output / "model.safetensors")
    model = deepspeed_network(is_rounded)
    check_equal("names", set(average), set(model.state_dict()))
    model.load_state_dict(average, strict=True)
    check_average({name: average[name] for name in states[-1]}, states)
    check_absent(output, ["*_states.pt", "zero_to_fp32.py", "latest"])
    check_deepspeed_resumed(case, run, states, stage, is_rounded)


# The stages of ZeRO, and in bfloat16, where masters are float32. ZeRO-1 has the frozen weights in
# the model's file alone; with ZeRO-3 in bfloat16, parts are in groups of a few elements.
for _name, _stage, _is_rounded in (
    ("without ZeRO", 0, False),
    ("ZeRO-1, bfloat16", 1, True),
    ("ZeRO-2", 2, False),
    ("ZeRO-2, bfloat16", 2, True),
    ("ZeRO-3", 3, False),
    ("ZeRO-3, bfloat16", 3, True),
):
    scenario(f"deepspeed: {_name}", over=DEEPSPEED)(
        functools.partial(check_deepspeed, stage=_stage, is_rounded=_is_rounded)
    )


def check_deepspeed_resumed(
    case: Case, run: Path, states: Sequence[State], stage: int, is_rounded: bool
) -> None:
    """Both ranks load the average that is written back, and train on.

    What they save at once is what they have loaded: masters, and weights rounded from them.
    """
    output, loaded = case.write_back(run), case.folder / "loaded"
    run_ranks(case, resume_deepspeed, output, loaded, stage, is_rounded)
    for saved in (output, loaded):
        found = _consolidated(saved / "global_step3", stage)
        check_average(found, states)
        whole = saved / "global_step3/mp_rank_00_model_states.pt"
        module = torch.load(whole, weights_only=False)["module"] if whole.exists() else {}
        for name in module.keys() & found.keys():
            if not torch.equal(module[name], found[name].to(module[name].dtype)):
                raise WrongError(f"{name} in the model's file is not the average, rounded")
    later = _consolidated(loaded / "global_step4", stage)
    if not any(not torch.equal(later[name], found[name]) for name in found):
        raise WrongError("the step after the average changed nothing")


def _consolidated(checkpoint: Path, stage: int) -> State:
    """Return what DeepSpeed's script makes of a checkpoint; it refuses those without ZeRO."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if not stage:
        whole = checkpoint / "mp_rank_00_model_states.pt"
        return dict(torch.load(whole, weights_only=False)["module"])
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint.parent, checkpoint.name)
    return {name: torch.as_tensor(tensor) for name, tensor in state.items()}


def deepspeed_network(is_rounded: bool) -> nn.Module:
    """A network with tied and frozen weights; in bfloat16 it has no buffers, which stay float32."""
    torch.manual_seed(0)
    norm: nn.Module = nn.LayerNorm(7) if is_rounded else nn.BatchNorm1d(7)
    layers = (nn.Embedding(11, 9), nn.Linear(9, 7), norm, nn.Linear(7, 9))
    network = nn.Sequential(*layers, nn.Linear(9, 11, bias=False))
    network[4].weight = network[0].weight
    network[1].bias.requires_grad_(False)
    return network


def train_deepspeed(rank: int, run: Path, stage: int, is_rounded: bool) -> None:
    """What one of the ranks does: 3 steps, each saved."""
    engine = deepspeed_engine(stage, is_rounded)
    torch.manual_seed(rank)
    for _ in range(3):
        deepspeed_step(engine)
        engine.save_checkpoint(run)


def resume_deepspeed(rank: int, output: Path, saved: Path, stage: int, is_rounded: bool) -> None:
    """What one of the ranks does later: it loads, saves what it has loaded, and trains a step."""
    engine = deepspeed_engine(stage, is_rounded)
    path, _ = engine.load_checkpoint(output)
    check_equal("where the step was loaded from", Path(path).parent, output / "global_step3")
    engine.save_checkpoint(saved)
    torch.manual_seed(rank)
    deepspeed_step(engine)
    engine.save_checkpoint(saved)


def deepspeed_step(engine: Any) -> None:
    """Train one step."""
    tokens = torch.randint(11, (16,))
    engine.backward(functional.cross_entropy(engine(tokens).float(), tokens.roll(1)))
    engine.step()


def deepspeed_engine(stage: int, is_rounded: bool) -> Any:
    """What DeepSpeed trains with, on one of the ranks."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    network = deepspeed_network(is_rounded)
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=torch.optim.AdamW(trained, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 16,
            "zero_allow_untrusted_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                "sub_group_size": 20 if is_rounded else 10**9,
            },
            "bf16": {"enabled": is_rounded},
        },
    )
    return engine


# Megatron


@scenario("megatron-core: torch_dist, float32", over=MEGATRON)
def megatron_float32(case: Case) -> None:
    """Tensor parallel on two ranks; layers are stacked, and there are no masters."""
    check_megatron(case, torch.float32)


@scenario("megatron-core: torch_dist, bfloat16", over=MEGATRON)
def megatron_bfloat16(case: Case) -> None:
    """With masters in the optimizer, from which the weights are rounded."""
    check_megatron(case, torch.bfloat16)


@scenario("megatron-core: torch_dist, distributed optimizer", over=MEGATRON)
def megatron_distributed(case: Case) -> None:
    """With masters in flat buffers, between which Megatron saves memory that it never wrote."""
    check_megatron(case, torch.bfloat16, is_flat=True)


def check_megatron(case: Case, dtype: torch.dtype, *, is_flat: bool = False) -> None:
    """Train on two ranks, write back, load the result on two ranks and train on."""
    import_megatron()
    run = case.folder / "run"
    run_ranks(case, train_megatron, run, dtype, is_flat, method="fork")
    checkpoints = steps(run, "iter_{}", ["0000001", "0000002", "0000003"])
    written = case.write_back(run)
    tracker = "latest_checkpointed_iteration.txt"
    check_copied(written, run, [tracker])
    newest, average = checkpoints[-1], written / checkpoints[-1].name
    check_copied(average, newest, ["metadata.json", ".metadata"])
    files = {path.name for path in newest.iterdir()} - {"integrity.json"}
    check_equal("files", {path.name for path in average.iterdir()}, files)
    run_ranks(case, resume_megatron, average, checkpoints, dtype, is_flat, method="fork")


def import_megatron() -> None:
    """Import Megatron, without a GPU, before the ranks are forked."""
    from unittest.mock import MagicMock

    # This module imports triton, which CPU builds of torch come without.
    sys.modules["megatron.core.transformer.moe.ops.paged_stash"] = MagicMock()
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = MagicMock(return_value="cpu")
    torch.cuda.current_stream = MagicMock()
    from megatron.core import tensor_parallel
    from megatron.core.models import gpt  # noqa: F401

    tensor_parallel.get_cuda_rng_tracker = MagicMock()


class OnTheCpu(TorchFunctionMode):
    """Create tensors on the CPU where CUDA is asked for, and report their types as CUDA's."""

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        options = dict(kwargs or {})
        if "cuda" in str(options.get("device")):
            options["device"] = "cpu"
        found = function(*args, **options)
        if function is Tensor.type and len(args) == 1 and not options:
            return found.replace("torch.", "torch.cuda.")
        return found


def megatron_model(dtype: torch.dtype, is_flat: bool) -> tuple[Any, Any]:
    """A GPT of two layers, and Megatron's optimizer."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import (
        Float16OptimizerWithFloat16Params,
        FP32Optimizer,
    )
    from megatron.core.transformer import TransformerConfig

    torch.manual_seed(0)
    is_rounded = dtype == torch.bfloat16
    config = TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
        bf16=is_rounded,
    )
    spec = get_gpt_layer_local_spec()
    model = GPTModel(config, spec, vocab_size=24, max_sequence_length=16).to(dtype)
    rates = {"lr": 1e-2, "min_lr": 1e-2, "clip_grad": 0.0}
    options = OptimizerConfig(
        bf16=is_rounded, params_dtype=dtype, use_distributed_optimizer=is_flat, **rates
    )
    if is_flat:
        return model, flat_optimizer(config, options, model)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if is_rounded:
        return model, Float16OptimizerWithFloat16Params(adam, options, None, lambda *_: None)
    return model, FP32Optimizer(adam, options, lambda *_: None)


def flat_optimizer(config: Any, options: Any, model: Any) -> Any:
    """An optimizer whose state is divided among the ranks, in flat buffers."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer

    gradients = {"use_distributed_optimizer": True, "grad_reduce_in_fp32": True}
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(**gradients), model)
    return get_megatron_optimizer(options, [chunk])


FLAT = {"distrib_optim_sharding_type": "dp_reshardable"}  # as the buffers are


def megatron_state(model: Any, optimizer: Any, step: int, **options: Any) -> dict[str, Any]:
    """What Megatron's training script saves and loads."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    rank, weights = torch.distributed.get_rank(), model.sharded_state_dict()
    return {
        "checkpoint_version": 3.0,
        "iteration": step,
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=FLAT, **options),
        "rng_state": ShardedObject("rng_state", [torch.get_rng_state()], (RANKS,), (rank,)),
    }


def train_megatron(_rank: int, run: Path, dtype: torch.dtype, is_flat: bool) -> None:
    """What one of the ranks does: 3 steps, each saved."""
    from megatron.core import dist_checkpointing, parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    with OnTheCpu():
        model, optimizer = megatron_model(dtype, is_flat)
        for step in range(1, 4):
            train_megatron_step(model, optimizer)
            path = run / f"iter_{step:07d}"
            path.mkdir(parents=True, exist_ok=True)
            state = megatron_state(model, optimizer, step)
            dist_checkpointing.save(state, str(path), verify_integrity=True)
    (run / "latest_checkpointed_iteration.txt").write_text("3")


def train_megatron_step(model: Any, optimizer: Any) -> None:
    """Train on tokens that are the same on all ranks."""
    tokens = torch.randint(24, (4, 16))
    places = torch.arange(16).expand(4, 16)
    chunks = getattr(optimizer, "model_chunks", [])
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    model(tokens, places, None, labels=tokens.roll(1, -1)).mean().backward()
    for chunk in chunks:
        chunk.finish_grad_sync()
    for weight in () if chunks else model.parameters():
        weight.main_grad = weight.grad.float()
    optimizer.step()


def resume_megatron(
    _rank: int, written: Path, checkpoints: Sequence[Path], dtype: torch.dtype, is_flat: bool
) -> None:
    """Check a rank's part of the average by its parts of the checkpoints, and train on from it."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    with OnTheCpu():
        loaded = [load_megatron(path, dtype, is_flat) for path in checkpoints]
        average = load_megatron(written, dtype, is_flat)
        began = state_of(average.model)
        if dtype == torch.bfloat16:
            check_masters(average, loaded, is_flat)
        if dtype == torch.float32 or is_flat:
            check_average(began, [state_of(one.model) for one in loaded])
        check_same(average.rest, loaded[-1].rest)
        train_megatron_step(average.model, average.optimizer)
        check_moved(began, state_of(average.model))


def check_masters(average: Megatron, loaded: Sequence[Megatron], is_flat: bool) -> None:
    """Masters are averaged in float32, and weights that have a name are rounded from that."""
    masters = [masters_of(one.model) for one in loaded]
    found, weights = masters_of(average.model), state_of(average.model)
    check_average(found, masters)
    check_equal("names", set(weights), set(found))
    for name, weight in () if is_flat else weights.items():
        check_equal(f"dtype of {name}", weight.dtype, torch.bfloat16)
        _check_rounded(name, weight, [one[name] for one in masters])


def masters_of(model: Any) -> State:
    """The masters that Megatron has left beside the weights of a model."""
    weights = model.named_parameters()
    return {name: one.main_param.detach().clone().view(one.shape) for name, one in weights}


@dataclass
class Megatron:
    """A rank's part of a checkpoint, loaded."""

    model: Any
    optimizer: Any
    rest: dict[str, object]  # what else was loaded, by dotted names


def load_megatron(path: Path, dtype: torch.dtype, is_flat: bool) -> Megatron:
    """Read as Megatron's training script does that resumes."""
    from megatron.core import dist_checkpointing

    model, optimizer = megatron_model(dtype, is_flat)
    train_megatron_step(model, optimizer)  # before it, there are no moments to load into
    wanted = megatron_state(model, optimizer, 0, is_loading=True)
    state = dist_checkpointing.load(wanted, str(path))
    rest = flatten(copy.deepcopy({name: v for name, v in state.items() if name != "model"}))
    # Masters, and steps that Megatron does not save.
    is_other = re.compile(r"fp32_from_fp16_params|\.param$|\.param_state\..*\.step$").search
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Megatron(model, optimizer, {k: v for k, v in rest.items() if not is_other(k)})


# Running them


@dataclass(frozen=True)
class Outcome:
    """How a scenario ended; `problem` is None if well."""

    name: str
    seconds: float
    problem: str | None

    def line(self, width: int) -> str:
        """One line of the summary; the name takes `width` columns."""
        verdict = "FAILED" if self.problem else "ok"
        return f"{self.name:{width}}  {verdict:6} {self.seconds:6.1f} s"


def run_scenario(scenario: Scenario) -> Outcome:
    """Run one in a folder of its own, in silence; what was said is kept for a failure."""
    began = time.monotonic()
    noise = io.StringIO()
    problem = None
    with tempfile.TemporaryDirectory(prefix="ckpt-ema-trainers-") as folder:
        case = Case(Path(folder).resolve())
        try:
            with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
                if scenario.over and str(scenario.over) not in sys.path:
                    _run_over(scenario.over, scenario, case)
                else:
                    scenario.run(case)
        except WrongError as error:
            problem = f"{case.said}{error}"
        except Exception:  # whatever a trainer raises, the others are still to be tried
            noise_shown = "".join(noise.getvalue().splitlines(keepends=True)[-NOISE_LINES:])
            problem = f"{noise_shown}{case.said}{traceback.format_exc()}"
    return Outcome(scenario.name, time.monotonic() - began, problem)


def _run_over(folder: Path, scenario: Scenario, case: Case) -> None:
    """Run it in a process of its own, which finds the packages in a folder first."""
    finished = subprocess.run(
        [sys.executable, __file__, "--only", scenario.name],
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    case.said = finished.stdout
    if finished.returncode:
        raise WrongError(f"its process ended with exit code {finished.returncode}")


def load_torchvision() -> None:
    """Let torchvision be imported beside a torch without CUDA.

    PyPI's torchvision has operators that need CUDA's libraries; timm uses none of them, but without
    their names torchvision stops at its first line.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", boxes)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def versions() -> str:
    """What is tested with what: the lines of trainers.txt, as they are installed."""
    lines = (environment.REPOSITORY / "scripts" / "trainers.txt").read_text().splitlines()
    names = [line.partition("==")[0] for line in lines if not line.startswith("#")]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def main() -> int:
    """Return 0 if all is right, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    only_help = "run those whose name contains this; repeatable"
    parser.add_argument("--only", action="append", metavar="NAME", help=only_help)
    parser.add_argument("--list", action="store_true", help="print the names and exit")
    arguments = parser.parse_args()
    chosen = [one for one in SCENARIOS if any(text in one.name for text in arguments.only or [""])]
    if not chosen:
        parser.error(f"no name contains {' or '.join(arguments.only)}; --list prints them")
    if arguments.list:
        print(*(scenario.name for scenario in chosen), sep="\n")
        return 0
    print(versions(), flush=True)
    load_torchvision()
    width = max(len(scenario.name) for scenario in chosen)
    outcomes = []
    for scenario in chosen:
        outcome = run_scenario(scenario)
        outcomes.append(outcome)
        print(outcome.line(width), flush=True)
        if outcome.problem:
            print("\n".join(f"    {line}" for line in outcome.problem.splitlines()), flush=True)
    failed = [outcome for outcome in outcomes if outcome.problem]
    if failed:
        print("", *(outcome.line(width) for outcome in outcomes), sep="\n")
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} ok")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
