"""Whether the configurations beside the weights agree from checkpoint to checkpoint."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckpt_ema.containers.specs import Specs
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.entries import json_object
from ckpt_ema.notices import Notice
from ckpt_ema.storage import Storage
from ckpt_ema.trainers.conventions import ADAPTER_CONFIG

_MODEL_CONFIG = "config.json"

# Fields of PEFT's configuration that decide what the adapter's tensors mean.
_ADAPTER_FIELDS = (
    *("peft_type", "r", "lora_alpha", "alpha", "target_modules", "target_parameters"),
    *("modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("bias", "lora_bias", "fan_in_fan_out", "layers_to_transform", "layer_replication"),
)
# What a release that does not know a field would have written. Most defaults are false or empty.
_ADAPTER_DEFAULTS = {"r": 8, "lora_alpha": 8, "alpha": 8, "bias": "none"}
_BASE = "base_model_name_or_path"
# Fields of a model's configuration that do not describe the model.
_UNIMPORTANT = ("transformers_version", "_name_or_path", "_diffusers_version", "use_cache")
# The same facts in the headers of kohya's files.
_HEADER_FIELDS = ("ss_network_module", "ss_network_dim", "ss_network_alpha")

_Fields = Mapping[str, Any]


def compare_configs(
    checkpoints: Sequence[Checkpoint], specs: Sequence[Specs], storage: Storage
) -> list[Notice]:
    """Compare the configurations of all checkpoints with the last one's; returns warnings.

    Raises `RefusedError` if adapters differ in what their tensors mean.
    """
    newest = checkpoints[-1]
    adapter, model = (
        storage.read(newest.model.folder / name) or b"" for name in (ADAPTER_CONFIG, _MODEL_CONFIG)
    )
    differing: dict[str, str] = {}  # field -> the first checkpoint in which it differs
    for checkpoint, one in zip(checkpoints[:-1], specs[:-1], strict=True):
        header = one.metadata[0]
        essential = _differences(header, specs[-1].metadata[0], _HEADER_FIELDS) if header else {}
        own = _unlike(checkpoint, ADAPTER_CONFIG, adapter, storage)
        if own:
            full, newer = map(_with_defaults, (own, json_object(adapter)))
            essential |= _differences(full, newer, _ADAPTER_FIELDS)
            # The same base model may have been read from another place.
            for field in _differences(own, json_object(adapter), (_BASE,)):
                differing.setdefault(field, checkpoint.name)
        if essential:
            message = (
                f"{checkpoint.name} and {newest.name} differ in {', '.join(essential.values())}."
            )
            hint = "Pass only the checkpoints that belong together."
            raise RefusedError(message, hint, code=Code.DIFFERENT_CONFIGS, path=checkpoint.path)
        own = _unlike(checkpoint, _MODEL_CONFIG, model, storage)
        if own is not None:
            fields = {**own, **json_object(model)}.keys() - set(_UNIMPORTANT)
            for field in _differences(own, json_object(model), fields):
                differing.setdefault(field, checkpoint.name)
    if not differing:
        return []
    file = _MODEL_CONFIG if model else ADAPTER_CONFIG
    both = f"{file} of {next(iter(differing.values()))} and of {newest.name}"
    message = f"{both} differ in {some(sorted(differing))}; the output has the latter."
    return [Notice(Code.DIFFERENT_CONFIGS, message)]


def _unlike(checkpoint: Checkpoint, name: str, newest: bytes, storage: Storage) -> _Fields | None:
    """Return the fields of a checkpoint's own file; None if it is the newest's, or absent."""
    own = (storage.read(checkpoint.model.folder / name) or newest) if newest else b""
    return None if own == newest else json_object(own)


def _differences(one: _Fields, other: _Fields, fields: Iterable[str]) -> dict[str, str]:
    """Return each field that differs, and how."""
    pairs = {field: (_plain(one.get(field)), _plain(other.get(field))) for field in fields}
    return {f: f"{f} ({own} → {newest})" for f, (own, newest) in pairs.items() if own != newest}


def _with_defaults(adapter: _Fields) -> _Fields:
    """Return a configuration of PEFT without what is false or empty, and with its defaults."""
    return {**_ADAPTER_DEFAULTS, **{field: value for field, value in adapter.items() if value}}


def _plain(value: Any) -> Any:
    """Return a list of modules sorted: PEFT writes what was a set."""
    is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return sorted(value) if is_list else value
