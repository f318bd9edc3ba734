"""Names and patterns that identify a checkpoint and its parts; nothing here touches the disk.

What one trainer does is in `table`; here is what trainers share, and what is gathered from there.
Patterns are searched in base names, ignoring case.
"""

import re
from collections.abc import Iterable, Mapping
from re import Pattern

from ckpt_ema.trainers.table import TRAINERS


def _gathered(lists: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in lists for name in names))


def _any_case(pattern: str) -> Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def _any_of(patterns: Iterable[str]) -> str:
    return "|".join(patterns)


# --- Where weights are ---------------------------------------------------------------------------

# Extensions of files that can hold a model by themselves, longest first.
WEIGHTS_EXTENSION = _any_case(r"(\.pth\.tar|\.pth\.lora|\.safetensors|\.ckpt|\.pth|\.bin|\.pt)$")

# Others that some use: such a file is one of weights if it holds any.
OTHER_EXTENSION = _any_case(
    r"\.(tar|th|model|chkpt|chk|ckp|cpt|pyth|pkl|pickle|weights|params|mdl)$"
)
# Extensions of files that are never opened to see whether they hold a model.
NO_WEIGHTS_EXTENSION = _any_case(
    r"\.(json|jsonl|ya?ml|toml|ini|cfg|txt|log|out|err|csv|tsv|md|html?|xml|py|sh|ipynb|jinja|lock"
    r"|png|jpe?g|gif|webp|bmp|svg|pdf|wav|mp3|flac|mp4|avi|mkv|npy|npz|h5|parquet|arrow|gguf)$"
    r"|^events\.out\.|^\."
)
# Names of compressed weights, and of archives.
PACKED_WEIGHTS = _any_case(
    r"\.(safetensors|ckpt|pth|pt|bin|tar|th)\.(gz|bz2|xz|zst)$|\.(tar|tgz|nemo)$"
)

# How files of one model are numbered.
SHARD_NUMBER = re.compile(r"[-_.](?P<number>\d{4,})[-_]of[-_](?P<count>\d{4,})")
INDEX_SUFFIX = ".index.json"
# A file of one rank.
RANK = _any_case(r"(?:^|[._-])(?:rank|shard)[_-]?(?P<rank>\d+)(?:of\d+)?(?=(\.[a-z]+)+$)")
# How many ranks there are, in a name; a parameter of FSDP that only its own ranks can divide.
WORLD_SIZE = re.compile(r"(?<=world_size_)\d+")
FLAT_PARAMETER = re.compile(r"(^|\.)_?flat_param(_\d+)?$")

# Names of a whole model in a checkpoint's folder, in the order in which loaders look for them; each
# may have an index of shards instead.
MODEL_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
# That of the first rank's part of a model.
FIRST_RANK = _any_case(f"^({_any_of(_gathered(trainer.rank_files for trainer in TRAINERS))})$")
# Names that are never sharded.
OTHER_MODEL_FILES = (
    *_gathered(trainer.files for trainer in TRAINERS),
    *("model.pt", "model.pth", "model.ckpt"),
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
# What Megatron writes last into its distributed checkpoints, and what it calls their folders.
MEGATRON_LIST = "metadata.json"
MEGATRON_FOLDER = re.compile(r"^iter_\d{7}$")
# What Lightning and Fabric write last into theirs, and what Lightning calls those.
SHARDED_STATE = "meta.pt"
LIGHTNING_FOLDER = re.compile(r"=\d.*\.ckpt$")
DEEPSPEED_STEP = _any_case(r"^global_step\d+$")  # a folder that DeepSpeed names itself

CONTAINERS = _gathered(trainer.containers for trainer in TRAINERS)
PRETRAINED_FOLDER = "huggingface"
MODEL_FOLDERS = (*_gathered(trainer.models for trainer in TRAINERS), PRETRAINED_FOLDER)
DCP_FOLDERS = ("", *_gathered(trainer.sharded for trainer in TRAINERS))
# Advice for Megatron's distributed checkpoints, where the output is to be safetensors.
MEGATRON = next(trainer.stacked for trainer in TRAINERS if trainer.stacked)
REFUSALS = tuple(refusal for trainer in TRAINERS for refusal in trainer.refusals)

# Where the model is in a torch file or in DCP's metadata, dots leading into dicts.
MODEL_KEYS = (
    *("state_dict", "model_state_dict"),
    *_gathered(trainer.model_keys for trainer in TRAINERS),
    *("model", "module", "net", "network"),
)
LOADS_COMPILED = _any_case(
    f"^({_any_of(_gathered(trainer.loads_compiled for trainer in TRAINERS))})$"
)

# --- Whether a checkpoint is complete -------------------------------------------------------------

DONE = _gathered(trainer.done for trainer in TRAINERS)
UNDONE = _gathered(trainer.undone for trainer in TRAINERS)
MASTERS = tuple(masters for trainer in TRAINERS for masters in trainer.masters)
PADDED_MASTERS = re.compile(_any_of(one.with_gaps for one in MASTERS if one.with_gaps))
TRACKERS = _gathered(trainer.trackers for trainer in TRAINERS)
DIGESTS = _gathered(trainer.digests for trainer in TRAINERS)

# --- Where the step is recorded -------------------------------------------------------------------

RECORDS = tuple(record for trainer in TRAINERS for record in trainer.records)
STEP_KEYS = (
    *_gathered(trainer.step_keys for trainer in TRAINERS),
    *("step", "steps", "iter"),
)
EPOCH_KEYS = ("epoch", *_gathered(trainer.epoch_keys for trainer in TRAINERS))
# In the header of safetensors: unit -> dotted keys.
METADATA_KEYS: Mapping[str, tuple[str, ...]] = {
    unit: _gathered((trainer.metadata[unit],) for trainer in TRAINERS if unit in trainer.metadata)
    for unit in ("step", "epoch")
}
# Where the trainer of transformers keeps its log.
TRAINER_STATE = "trainer_state.json"
# Files beside the weights that hold results of an evaluation.
METRIC_FILES = _any_case(r"(^|_)(metrics?|results?)\.json$")

# --- What names say ------------------------------------------------------------------------------

# "800k", "1.5T", "1e4", "10ksteps": not "10b" in "10best", nor digits of a hash, "a1e3".
_END = r"(?![a-z0-9])|(?=steps?|iter|tok|samples|img|updates)"
_MAGNITUDE = rf"\d+(?:\.\d+)?[kmbt](?:{_END})|(?<![a-f0-9.])\d+(?:\.\d+)?e1?\d(?:{_END})"
# An integer, not the head of a decimal: "wer-9.965" yields nothing.
_NUMBER = rf"({_MAGNITUDE}|\d+(?!\d|\.\d))"
# A number written with a magnitude, with groups for its digits, its decimals and the magnitude.
MAGNITUDE = _any_case(rf"(?={_MAGNITUDE})(\d+)(?:\.(\d+))?(?:([kmbt])|e(\d+))")
# Every number in a name: a count, whose word may be there ("token-2T"), or a decimal.
COUNT = _any_case(
    rf"(?P<count>(?:(?<![a-z])tokens?[-_]?)?(?:{_MAGNITUDE}))|(?P<f>\d+\.\d+)|(?P<n>\d+)"
)
_BOUNDARY = r"(?:^|(?<=[^A-Za-z]))"  # "timestep_5" is not "step_5"

# Where a word begins, also in camelCase.
_WORD_START = r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))"

# The name of a snapshot in the Hub's cache, whose digits say nothing.
COMMIT = re.compile(r"^[0-9a-f]{40}$")

# Names of single trainers, with groups "step" and "epoch".
NAMES = tuple(_any_case(pattern) for pattern in _gathered(trainer.names for trainer in TRAINERS))

# The word before a number says what it counts.
STEP_NAMES: dict[str, Pattern[str]] = {
    "step": _any_case(
        _BOUNDARY + r"(?:global[_-]?step|step|iteration|iter|updates?|ba)s?[-_=]?" + _NUMBER
    ),
    "epoch": _any_case(_BOUNDARY + r"(?:epoch|ep)s?[-_=]?" + _NUMBER),
    "checkpoint": _any_case(r"^(?:checkpoint|ckpt)[-_]?" + _NUMBER + r"$"),
    "number": _any_case(rf"^{_NUMBER}$"),
}

# Words whose number tells one run from another (the stages and ingredients of OLMo 2).
NUMBERS_A_RUN = r"(?i:(?<![a-z])(?:stage|ingredient|seed|fold|trial|version)[-_=]?\d+)"

# The value of a metric, whatever its sign and notation: "val_loss=-3e-05", "acc=1", "loss=inf"; not
# the step before it, "model_10_acc=0.9".
METRIC = _any_case(
    r"(?<![a-z])(?!(?:global_step|step|iteration|iter|epoch|ep|ba)=)(?P<name>[a-z](?:[a-z0-9]|_(?!\d+_))*)="
    r"[-+]?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|inf|nan)"
)

# Lightning's suffix for a name that was taken, by an earlier run.
VERSION = re.compile(r"-v(\d+)$")

# accelerate numbers its saves one after the other: order is right, distance unknown.
SAVE_INDEX = re.compile(r"^checkpoint_\d+$")

# Folders whose own names are dates or sums; what they hold gives the order.
NAMED_BY_DATE = re.compile(r"^CKPT\+(\d{4})-(\d\d)-(\d\d)\+(\d\d)-(\d\d)-(\d\d)\+(\d\d)$")

# Words that torch.compile, FSDP, activation checkpointing, accelerate and Fabric add to names of
# tensors; kohya's names have underscores instead of dots.
_WRAPPER = (
    r"_(?:orig_mod|orig_module|original_module|fsdp_wrapped_module|fpw_module"
    r"|checkpoint_wrapped_module|forward_module)[._]"
)
ADDED = re.compile(rf"(?<![A-Za-z0-9]){_WRAPPER}")
# That of DistributedDataParallel, and any with "wrap", may also be the model's own, so these count
# only where checkpoints differ by them.
MAYBE_ADDED = re.compile(rf"(?<![A-Za-z0-9])(?:{_WRAPPER}|(?<![^./])(?:_?module|_\w*wrap\w*)\.)+")

# Tensors that an adapter multiplies (LoRA, LoHa, LoKr, VeRA) or makes a rotation of (OFT).
FACTOR = re.compile(
    r"(?<![A-Za-z])(lora_(embedding_)?[ABab]|lora_(up|down|mid)|_?lora\.(up|down)"
    r"|hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|vera_lambda_[bd])(?![A-Za-z0-9])"
)
ROTATION = re.compile(r"(?<![A-Za-z])oft_([Rr]|blocks)(?![A-Za-z])")
FACTORS = (FACTOR, ROTATION)
# Adapters whose deviation nothing here bounds.
OTHER_FACTOR = re.compile(r"(?<![A-Za-z])(boft_[Rs]|hra_u|vblora_|glora_|adalora_)")

# One of which is in every name that these three match.
_ADAPTER_HINTS = ("lora", "hada_", "lokr_", "vera_lambda", "oft_", "hra_u")


def may_be_of_adapters(names: Iterable[str]) -> Iterable[str]:
    """Return the names; none if no pattern for adapters can match, which is found out fast."""
    text = "\n".join(names)
    return names if any(hint in text for hint in _ADAPTER_HINTS) else ()


# Names of weights that a trainer averaged itself, whether of files, folders, dicts or modules.
AVERAGED_NAME = re.compile(
    rf"{_WORD_START}(?i:b?emas?|averaged?|avg|ave|swa|lawa|teacher|shadow|polyak"
    r"|momentum(?=[-_](?:encoder|model|net)))(?![a-z])"
)

# Names with a number or weights that are still not a step of the run.
UNFINISHED_NAME = _any_case(
    r"^(\.|__|tmp([-_.]|$)|old_step_|recovery_tmp|recovery-)"
    r"|([-_.]te?mp|-unfinished)$|\.orbax-checkpoint-tmp"
)
SHARD_OR_RANK = _any_case(
    r"[-_.]\d{4,}[-_]of[-_]\d{4,}|^__\d+_\d+$|^mp_rank_\d+|(?:^|_)zero_pp_rank_\d+"
    r"|(?:^|[._-])rank[_-]?0*[1-9]\d*\.(?:pt|pth|bin|ckpt)$"
    r"|^layer_\d+-model_\d+|^expp_rank_|^consolidated\.\d+|_of_\d+|pp-rank-\d+-of-|^shard-\d+-|shard\d+of\d+"
)
MERGED = _any_case(r"[-_](merged|hf_merged)$")

# Names that may be a copy of a step, or a step of its own.
ALIAS = _any_case(r"(?:^|[-_./])(last|latest|best|final|release)(?:$|[-_.])")
ALWAYS_A_COPY = _any_case(r"(?:^|[-_./])best(?:$|[-_.])")
# Names of weights from before the first step (WeNet's init.pt), which may record nothing.
INITIAL_NAME = _any_case(r"(?:^|[-_./])(init|initial|pretrained|base)(?:$|[-_.])")

# Folders that are neither searched nor reported as checkpoints.
NO_CHECKPOINTS = _any_case(
    r"^(wandb|runs|tensorboard|samples|evals|logs|"
    + _any_of(_gathered(trainer.folders for trainer in TRAINERS))
    + r")$"
)

# --- Training state: files, keys of a torch file, names in DCP's metadata -------------------------

_STATE = _gathered(trainer.state for trainer in TRAINERS)
STATE_NAME = _any_case(
    r"^(optim_|opt\d*\.(?:pt|pth|bin)$|training-state|dataloader|CRITIC_|"
    + _any_of(_STATE)
    + r")|[-_]state$|^(?:policy_)?(?:pre|post)processor_"
)
# Keys of dicts of tensors that are training state, not the model: "sampler", but not "resampler".
STATE_KEY = re.compile(
    r"(?i:optim|sched|rng|callback|averaging_state|train_?state|data_?loader)"
    rf"|{_WORD_START}(?i:(?:grad|amp|loss)?_?scaler|sampler)"
    rf"|{_WORD_START}(?i:loops?|opts?|adamw?)(?![a-z])"
)
# Keys of what belongs to a loss: neither state nor a part of the model that loaders know.
NO_MODEL_KEY = re.compile(rf"{_WORD_START}(?i:loss|losses|criterion|metrics?)(?![a-z])")
# Prefixes of what lies beside a model whose tensors are at the top of DCP's metadata. The words
# above would be too much: a model may have a resampler.
STATE_PREFIXES = ("optimizer.", "optim.", "lr_scheduler.", "train_state.", "dataloader.", "rng.")

# Names that no checkpoint calls its model.
NOT_A_MODEL = (UNFINISHED_NAME, STATE_NAME, SHARD_OR_RANK, MERGED, MODULE_FOLDER)

# --- What lies beside weights --------------------------------------------------------------------

# What marks a folder or file as written by ckpt-ema itself.
MANIFEST_NAME = "ckpt_ema.json"
PROVENANCE_KEY = "ckpt_ema"  # in the header of each model file
CARD_NAME = "README.md"
STATE_FILE = "ckpt_ema.state"  # the exact shadow, beside the model
PICTURE_STEM = "ckpt_ema"  # with .png or .svg
OWN_FILES = (
    *(MANIFEST_NAME, CARD_NAME, STATE_FILE),
    *(f"{PICTURE_STEM}.png", f"{PICTURE_STEM}.svg"),
)

# What is not copied with the weights. Everything else travels.
STAYS_BEHIND = _any_case(
    r"^(optim|training_state|training_step|training_info|meta|"
    + _any_of(_STATE)
    + r")([-_.]?\d+)*(\.(pt|pth|bin|pkl|json|yaml))?$"
    + r"|^(README\.md|ckpt_ema\.json|\.metadata.*|"
    + _any_of(_gathered(trainer.stays for trainer in TRAINERS))
    + "|"
    + _any_of(re.escape(name) for name in (*DONE, *UNDONE, *TRACKERS))
    + r")$|^events\.out\."
)
# Hidden files, and what editors, systems and Python leave in a folder.
LEAVINGS = _any_case(
    r"^[.#]|[~#]$|\.(sw[a-p]|bak|orig|old|save|rej|tmp|temp|part|pyc)$|^tmp[a-z0-9_]{8}$"
    r"|^core\.\d+$|^nohup\.out$| \((copy|\d+)\)(\.\w+)?$"
    r"|^(thumbs\.db|desktop\.ini|__pycache__|__MACOSX|@eaDir|lost\+found)$"
)
# The configuration without which `from_pretrained` cannot load a file of this name.
CONFIG_OF = {
    **dict.fromkeys(MODEL_FILES, "config.json"),
    **dict.fromkeys(("adapter_model.safetensors", "adapter_model.bin"), ADAPTER_CONFIG),
}
NEEDS_NO_CONFIG = _any_case(
    f"^({_any_of(_gathered(trainer.needs_no_config for trainer in TRAINERS))})$"
)
# Files that a trainer keeps once, in the run's folder, for all checkpoints.
_TOKENIZER = (
    r"^(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template)[^/]*"
    r"\.(json|txt|model|jinja)$"
)
TOKENIZER_FILES = _any_case(_TOKENIZER)
CONFIG_FILES = _any_case(
    _any_of(f"^{one}$" for one in _gathered(trainer.travels for trainer in TRAINERS))
    + "|"
    + _TOKENIZER
)
# What a model's folder may hold beside its weights, as far as names tell.
MODEL_TEXTS = _any_case(r"\.(json|yaml|yml|txt|model|jinja|py|tiktoken)$")

WEIGHTS_LIKE = _any_case(
    r"(\.safetensors|\.ckpt|\.pth|\.pt|\.bin|\.tar|\.lora|\.pkl|\.npz|\.h5|\.msgpack|\.onnx|\.gguf"
    r"|\.distcp|\.index\.json)$"
)
# Statistics of a processor (LeRobot), which look like weights but are not.
PROCESSOR_STATE = _any_case(r"(^|_)(pre|post)processor_.*\.safetensors$")
