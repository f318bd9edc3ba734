"""The names and patterns by which a checkpoint and its parts are found; nothing touches the disk.

What one trainer calls things is in `trainers`; here is what they share, and what is gathered from
there. Patterns are searched in base names, ignoring case.
"""

import re
from collections.abc import Iterable
from re import Pattern

from ckpt_ema.trainers.table import TRAINERS

# --- Where weights are ---------------------------------------------------------------------------

# Extensions of files that can hold a model by themselves, longest first.
WEIGHTS_EXTENSION = re.compile(
    r"(\.pth\.tar|\.pth\.lora|\.safetensors|\.ckpt|\.pth|\.bin|\.pt)$", re.IGNORECASE
)

# How a file says that it is one of several.
SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}")
INDEX_SUFFIX = ".index.json"
SHARD_OF_SEVERAL = re.compile(r"-\d{5}-of-(?!00001)\d{5}")

# What a checkpoint folder calls its whole model, in the order in which loaders look; each of these
# also with an index over shards.
MODEL_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
# What it calls its model otherwise; never sharded.
OTHER_MODEL_FILES = (
    "pytorch_model_fsdp.bin",
    "lit_model.pth",
    "lit_model.pth.lora",
    "model.pt",
    "model.pth",
    "model.ckpt",
)
ADAPTER_FILES = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)
FOLDER_WEIGHTS = (
    *(name for file in MODEL_FILES for name in (file, file + INDEX_SUFFIX)),
    *OTHER_MODEL_FILES,
    *ADAPTER_FILES,
)

# Further models in the same folder: accelerate's second one, the value head of a reward model.
FURTHER_MODEL = re.compile(
    r"^(?P<model>model_\d+|pytorch_model_\d+|value_head)\.(safetensors|bin)$"
)
# Lists the modules of a model that are folders of its checkpoint (sentence-transformers).
MODULES_LIST = "modules.json"
MODULE_FOLDER = re.compile(r"^\d+_[A-Z]\w*$")
# Folders of a checkpoint that are parts of a pipeline (diffusers).
COMPONENT = re.compile(
    r"^(unet|transformer|text_encoder|vae|controlnet|prior|decoder|image_encoder|t2iadapter"
    r"|adapter|motion_adapter)(_\d)?$"
)
PIPELINE_LIST = "model_index.json"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
DCP_METADATA = ".metadata"


def _gathered(lists: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in lists for name in names))


CONTAINERS = _gathered(trainer.containers for trainer in TRAINERS)
MODEL_FOLDERS = (
    *_gathered(trainer.models for trainer in TRAINERS),
    "huggingface",
)
DCP_FOLDERS = ("", *_gathered(trainer.sharded for trainer in TRAINERS))
DONE = _gathered(trainer.done for trainer in TRAINERS)
UNDONE = _gathered(trainer.undone for trainer in TRAINERS)
REFUSALS = tuple(refusal for trainer in TRAINERS for refusal in trainer.refusals)

# --- What names say ------------------------------------------------------------------------------

_NUMBER = r"(\d+)(?!\d|\.\d)"  # an integer, not the head of a decimal: "wer-9.965" yields nothing
_BOUNDARY = r"(?:^|(?<=[^A-Za-z]))"  # "timestep_5" is not "step_5"

# The name of a snapshot in the Hub's cache, whose digits say nothing.
COMMIT = re.compile(r"^[0-9a-f]{40}$")

# fairseq's checkpoint_EPOCH_UPDATE.
EPOCH_AND_STEP = re.compile(r"^checkpoint_(\d+)_(\d+)$", re.IGNORECASE)

# What a number in a name counts.
STEP_NAMES: dict[str, Pattern[str]] = {
    "step": re.compile(
        _BOUNDARY
        + r"(?:global[_-]?step|step|iteration|iter|updates?|ba)s?[-_=]?"
        + _NUMBER
        + r"|^checkpoint-(\d+)-",
        re.IGNORECASE,
    ),
    "epoch": re.compile(
        _BOUNDARY + r"(?:epoch|ep)s?[-_=]?" + _NUMBER + r"|^(\d+)epoch$", re.IGNORECASE
    ),
    "checkpoint": re.compile(r"^(?:checkpoint|ckpt)[-_]?" + _NUMBER + r"$", re.IGNORECASE),
    "number": re.compile(r"^(\d+)$"),
}

# Words whose number tells one run from another (the stages and ingredients of OLMo 2).
NUMBERS_A_RUN = r"(?i:(?<![a-z])(?:stage|ingredient|seed|fold|trial|version)[-_=]?\d+)"

# The value of a metric, whatever its sign and notation: "val_loss=-3e-05", "acc=1", "loss=inf".
METRIC = re.compile(
    r"(?<![a-z])(?!(?:global_step|step|iteration|iter|epoch|ep|ba)=)(?P<name>[a-z][a-z0-9_]*)="
    r"[-+]?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|inf|nan)",
    re.IGNORECASE,
)

# Lightning's suffix for a name that was taken, by an earlier run.
VERSION = re.compile(r"-v(\d+)$")

# accelerate numbers its saves one after the other: order is right, distance unknown.
SAVE_INDEX = re.compile(r"^checkpoint_\d+$")

# Folders whose own names are dates or sums; what they hold gives the order.
NAMED_BY_DATE = re.compile(r"^CKPT\+(\d{4})-(\d\d)-(\d\d)\+(\d\d)-(\d\d)-(\d\d)\+(\d\d)$")
# Where the trainer of transformers keeps its step and its log.
TRAINER_STATE = "trainer_state.json"
# Files beside the weights that hold results of an evaluation.
METRIC_FILES = re.compile(r"(^|_)(metrics?|results?)\.json$", re.IGNORECASE)

# A run's note of the last step that was saved whole (Megatron, verl).
TRACKER_NAME = "latest_checkpointed_iteration.txt"

# Tensors that are factors of an adapter.
LORA_FACTOR = re.compile(r"lora_[AB]\.|lora_(up|down)\.|\.lora_[ab]($|\.)")

# Names of weights that a trainer averaged itself.
AVERAGED_NAME = re.compile(
    r"(?:^|[-_./])(average|averaged|avg|ave|ave_\d+best|ema|bema)(?:$|[-_.])", re.IGNORECASE
)

# Names that hold a number or weights and still are no step of the run, and why.
NOT_A_STEP: dict[str, Pattern[str]] = {
    "a temporary or unfinished save": re.compile(
        r"^(\.|__|tmp([-_.]|$)|old_step_|recovery_tmp|recovery-)"
        r"|(-tmp|\.tmp|-unfinished)$|\.orbax-checkpoint-tmp",
        re.IGNORECASE,
    ),
    "optimizer or trainer state": re.compile(
        r"^(optimizer|optim_|opt\d*\.(?:pt|pth|bin)$|scheduler|scaler|rng_state|random_states"
        r"|training_args|extra_state|dl_state_dict|sampler|custom_checkpoint|distrib_optim|train_state"
        r"|trainer_state|training-state|dataloader|CRITIC_)|[-_]state$"
        r"|^(?:policy_)?(?:pre|post)processor_",
        re.IGNORECASE,
    ),
    "one shard or rank of a model": re.compile(
        SHARD_NUMBER.pattern + r"|^__\d+_\d+$|^mp_rank_\d+|(?:^|_)zero_pp_rank_\d+"
        r"|model_world_size_\d+_rank_\d+|(?:^|[_-])rank[_-]?[1-9]\d*\.(?:pt|pth|bin|ckpt)$"
        r"|^layer_\d+-model_\d+|^expp_rank_|^consolidated\.\d+|_of_\d+|pp-rank-\d+-of-|^shard-\d+-",
        re.IGNORECASE,
    ),
    "a merged copy": re.compile(r"[-_](merged|hf_merged)$", re.IGNORECASE),
    "a module of a model": MODULE_FOLDER,
    "already an average": AVERAGED_NAME,
}

# Names that may be a copy of a step, or a step of its own.
ALIAS = re.compile(r"(?:^|[-_./])(last|latest|best|final|release)(?:$|[-_.])", re.IGNORECASE)
ALWAYS_A_COPY = re.compile(r"(?:^|[-_./])best(?:$|[-_.])", re.IGNORECASE)

# Folders that are not looked into and not spoken of as checkpoints.
NO_CHECKPOINTS = re.compile(
    r"^(wandb|runs|tensorboard|samples|rollouts|broadcasts|evals|logs|energon|optimizer.*"
    r"|training_state|recipe_state|merged|bema)$",
    re.IGNORECASE,
)

# --- What lies beside weights --------------------------------------------------------------------

# What marks a folder or file as written by ckpt-ema itself.
MANIFEST_NAME = "ckpt_ema.json"
PROVENANCE_KEY = "ckpt_ema"  # in the header of each model file
CARD_NAME = "README.md"
PICTURE_STEM = "ckpt_ema"  # with .png or .svg
OWN_FILES = (MANIFEST_NAME, CARD_NAME, f"{PICTURE_STEM}.png", f"{PICTURE_STEM}.svg")

# What stays behind when the files around the weights are copied: state of the training, not of
# the model. Everything else travels.
STAYS_BEHIND = re.compile(
    r"^(optimizer|optim|scheduler|scaler|rng_state|random_states|training_args|trainer_state"
    r"|extra_state|dl_state_dict|sampler|custom_checkpoint|distrib_optim|train_state"
    r"|training_state|training_step|training_info|meta)([-_.]?\d+)*(\.(pt|pth|bin|pkl|json|yaml))?$"
    r"|^(latest|last_checkpoint|" + re.escape(TRACKER_NAME) + r"|zero_to_fp32\.py|README\.md"
    r"|global_step\d+|merged|bema|ckpt_ema\.json|CKPT\.yaml|\.metadata.*|\.git|\.cache|\.DS_Store"
    r"|" + "|".join(re.escape(name) for name in (*DONE, *UNDONE)) + r")$"
    r"|^events\.out\.",
    re.IGNORECASE,
)
# Files that a trainer keeps once, in the run's folder, for all checkpoints.
_TOKENIZER = (
    r"^(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template)[^/]*"
    r"\.(json|txt|model|jinja)$"
)
TOKENIZER_FILES = re.compile(_TOKENIZER, re.IGNORECASE)
CONFIG_FILES = re.compile(
    r"^(config|generation_config|adapter_config|model_config|preprocessor_config|processor_config"
    r"|hyperparameters|hparams|train)\.(json|yaml|yml)$"
    r"|^dict\..*\.txt$|^(tokens|units)\.txt$|" + _TOKENIZER,
    re.IGNORECASE,
)
# What a model's folder may hold beside its weights, as far as names tell.
MODEL_TEXTS = re.compile(r"\.(json|yaml|yml|txt|model|jinja|py|tiktoken)$", re.IGNORECASE)

WEIGHTS_LIKE = re.compile(
    r"(\.safetensors|\.ckpt|\.pth|\.pt|\.bin|\.tar|\.lora|\.pkl|\.npz|\.h5|\.msgpack|\.onnx|\.gguf"
    r"|\.distcp|\.index\.json)$",
    re.IGNORECASE,
)
# Statistics of a processor (LeRobot), which are no weights though they look like them.
PROCESSOR_STATE = re.compile(r"(^|_)(pre|post)processor_.*\.safetensors$", re.IGNORECASE)
