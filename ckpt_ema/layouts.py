"""What trainers call things, as data: the names and patterns by which a checkpoint is found.

A new trainer is a new entry here and a test. Patterns are searched in the base name without its
extension, ignoring case; nothing in this module touches the disk.
"""

import re
from re import Pattern

# Extensions of files that can hold a model by themselves, longest first.
WEIGHTS_EXTENSION = re.compile(
    r"(\.pth\.tar|\.safetensors|\.ckpt|\.pth|\.bin|\.pt)$", re.IGNORECASE
)

# How a file says that it is one of several.
SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}")

# Where a checkpoint folder keeps its model, in the order in which the trainers' loaders look.
FOLDER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_NUMBER = r"(\d+)(?!\d|\.\d)"  # an integer, not the head of a decimal: "wer-9.965" yields nothing
_BOUNDARY = r"(?:^|(?<=[^A-Za-z]))"  # "timestep_5" is not "step_5"

# What a number in a name counts, the finer unit first.
STEP_NAMES: dict[str, Pattern[str]] = {
    "step": re.compile(
        _BOUNDARY + r"(?:global[_-]?step|step|iteration|iter|updates?|ba)s?[-_=]?" + _NUMBER,
        re.IGNORECASE,
    ),
    "epoch": re.compile(
        _BOUNDARY + r"(?:epoch|ep)s?[-_=]?" + _NUMBER + r"|^(\d+)epoch$", re.IGNORECASE
    ),
    "checkpoint": re.compile(
        r"^(?:checkpoint|ckpt)[-_]?" + _NUMBER + r"$|^checkpoint-(\d+)-", re.IGNORECASE
    ),
    "number": re.compile(r"^(\d+)$"),
}

# Names that hold a number or weights and still are no step of the run, and why.
NOT_A_STEP: dict[str, Pattern[str]] = {
    "a temporary or unfinished save": re.compile(
        r"^(\.|__|tmp[-_.]|old_step_|recovery_tmp|recovery-)"
        r"|(-tmp|\.tmp|-unfinished)$|\.orbax-checkpoint-tmp",
        re.IGNORECASE,
    ),
    "optimizer or trainer state": re.compile(
        r"^(optimizer|optim_|scheduler|scaler|rng_state|random_states|training_args|extra_state"
        r"|dl_state_dict|sampler|custom_checkpoint|distrib_optim|train_state|trainer_state"
        r"|dataloader)|[-_]state$",
        re.IGNORECASE,
    ),
    "one shard or rank of a model": re.compile(
        SHARD_NUMBER.pattern + r"|^__\d+_\d+$|^mp_rank_\d+|(?:^|_)zero_pp_rank_\d+"
        r"|model_world_size_\d+_rank_\d+|(?:^|[_-])rank[_-]?[1-9]\d*(?:[._]|$)"
        r"|^layer_\d+-model_\d+|^expp_rank_|^consolidated\.\d+|_of_\d+|pp-rank-\d+-of-|^shard-\d+-",
        re.IGNORECASE,
    ),
    "a merged copy": re.compile(r"[-_](merged|hf_merged)$", re.IGNORECASE),
    "already an average": re.compile(
        r"(?:^|[-_./])(average|averaged|avg|ave|ema)(?:$|[-_.])", re.IGNORECASE
    ),
    "an alias of a step": re.compile(
        r"(?:^|[-_./])(last|latest|best|final|release)(?:$|[-_.])", re.IGNORECASE
    ),
}

# What marks a folder or file as written by ckpt-ema itself.
MANIFEST_NAME = "ckpt_ema.json"

# What stays behind when the files around the weights are copied: state of the training, not of
# the model. Everything else travels.
STAYS_BEHIND = re.compile(
    r"^(optimizer|optim|scheduler|scaler|rng_state|random_states|training_args|trainer_state"
    r"|extra_state|dl_state_dict|sampler|custom_checkpoint|distrib_optim|train_state)"
    r"([-_.]?\d+)*(\.(pt|pth|bin|pkl|json))?$"
    r"|^(latest|zero_to_fp32\.py|README\.md|checkpoint-is-incomplete\.txt|CHECKPOINT_COMPLETE"
    r"|COMPLETED|STABLE|global_step\d+|merged|bema|ckpt_ema\.json|\.git|\.cache|\.DS_Store)$"
    r"|^events\.out\.",
    re.IGNORECASE,
)
WEIGHTS_LIKE = re.compile(
    r"(\.safetensors|\.ckpt|\.pth|\.pt|\.bin|\.tar|\.pkl|\.npz|\.h5|\.msgpack|\.onnx|\.gguf|\.distcp"
    r"|\.index\.json)$",
    re.IGNORECASE,
)
