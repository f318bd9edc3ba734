"""Whether the configurations beside the weights agree from checkpoint to checkpoint."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_ema.containers.specs import Specs
from ckpt_ema.errors import RefusedError, printable, some
from ckpt_ema.storage import Storage
from ckpt_ema.trainers.conventions import ADAPTER_CONFIG

_MODEL_CONFIG = "config.json"

# Fields of PEFT's configuration that say what the adapter's tensors mean.
_ADAPTER_FIELDS = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
)
_BASE = "base_model_name_or_path"
# Fields of a model's configuration that say nothing about the model.
_UNIMPORTANT = ("transformers_version", "_name_or_path", "_diffusers_version", "use_cache")
# The same facts in the headers of kohya's files.
_HEADER_FIELDS = ("ss_network_module", "ss_network_dim", "ss_network_alpha")


def check_configs(
    names: Sequence[str],
    folders: Sequence[Path],
    checkpoints: Sequence[Specs],
    storage: Storage,
) -> list[str]:
    """Compare the configurations of all checkpoints with the last one's; returns warnings.

    Raises `RefusedError` if those of adapters differ in what their tensors mean.
    """
    newest_adapter = _read(folders[-1] / ADAPTER_CONFIG, storage)
    newest_model = _read(folders[-1] / _MODEL_CONFIG, storage)
    different: dict[str, str] = {}
    for name, folder, specs in zip(names, folders, checkpoints, strict=True):
        both = (name, names[-1])
        _check(both, specs.metadata[0], checkpoints[-1].metadata[0], _HEADER_FIELDS)
        adapter = _read(folder / ADAPTER_CONFIG, storage) if newest_adapter else b""
        if adapter != newest_adapter:
            one, other = _content(adapter), _content(newest_adapter)
            _check(both, one, other, _ADAPTER_FIELDS)
            # The same base model may have been read from another place.
            if one and one.get(_BASE) != other.get(_BASE):
                different.setdefault(_BASE, name)
        model = _read(folder / _MODEL_CONFIG, storage) if newest_model else b""
        if model and model != newest_model:
            one, other = _content(model), _content(newest_model)
            for field in {**one, **other}.keys() - set(_UNIMPORTANT):
                if one.get(field) != other.get(field):
                    different.setdefault(field, name)
    if not different:
        return []
    first = printable(next(iter(different.values())))
    file = _MODEL_CONFIG if newest_model else ADAPTER_CONFIG
    return [
        f"{file} of {first} and of {printable(names[-1])} differ in"
        f" {some(sorted(different))}; the output has the newest's."
    ]


def _check(
    both: tuple[str, str], one: Mapping[str, Any], other: Mapping[str, Any], fields: Sequence[str]
) -> None:
    for field in fields:
        first, second = _plain(one.get(field)), _plain(other.get(field))
        if first != second and one:
            raise RefusedError(
                f"The checkpoints are not the same model: {printable(both[0])} and"
                f" {printable(both[1])} differ in {field}"
                f" ({printable(first)} → {printable(second)}).",
                "Pass only the checkpoints that belong together.",
            )


def _plain(value: Any) -> Any:
    """Lists of modules have no order of their own: PEFT writes what was a set."""
    return sorted(value) if isinstance(value, list) and all(map(_is_text, value)) else value


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _read(path: Path, storage: Storage) -> bytes:
    return storage.read(path) or b""


def _content(raw: bytes) -> Mapping[str, Any]:
    """The object in a JSON file, empty if it is none."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
