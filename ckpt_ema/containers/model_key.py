"""Which dict of tensors in a file that a training script saved is the model.

It is at the top, or under a key beside optimizer state, counters and perhaps an average. The raw
model is preferred, since an average of averages is smoothed twice. Nothing here reads a tensor.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from ckpt_ema.containers.checks import refused
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.notices import Notice
from ckpt_ema.trainers import conventions

ALREADY_AVERAGED = (
    "are averaged already (their decay is unknown); averaging them again smooths twice"
)
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # in names of hostile pickles; cannot be written

_Kind = type | tuple[type, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """The chosen dict; it may also hold values that are not tensors."""

    values: Mapping[str, Any]
    notes: tuple[Notice, ...] = ()
    warnings: tuple[Notice, ...] = ()


def find_model(path: str, root: Any, key: str | None, tensor: _Kind) -> Model:
    """Return the model in `root`, the content of the file at `path`.

    `key` is the dotted path given with --key; `tensor` is the class of tensors. Raises
    `RefusedError` if there is no model, if it is a pickled object, or if there are several.
    """
    if not isinstance(root, dict):
        raise _no_model(path, root)
    if key is not None:
        value = _at(root, key)
        if not _is_model(value, tensor):
            others = _listed(_models_in(root, tensor)) or "none at all"
            why = f"has no dict of tensors under {key}; it has {others}"
            raise refused(path, why, code=Code.NO_MODEL)
        return _averaged(value, f"under {key}") if _is_averaged(root, key) else Model(value)
    return (
        _raw_beside_average(path, root, tensor)
        or _under_known_key(path, root, tensor)
        or _at_the_top(root, tensor)
        or _under_any_key(path, root, tensor)
    )


def recorded(root: Any) -> dict[str, int]:
    """Return the "step" and "epoch" that a file records, where it does.

    >>> recorded({"global_step": 100, "meta": {"epoch": 3}, "model": {}})
    {'step': 100, 'epoch': 3}
    """
    history = _at(root, "optimizer_history")
    places = [root, *(history[-1:] if isinstance(history, list) else ())]
    found = {}
    for unit, keys in (("step", conventions.STEP_KEYS), ("epoch", conventions.EPOCH_KEYS)):
        values = [_at(place, key) for place in places for key in keys]
        counts = [value for value in values if type(value) is int and value >= 0]
        if counts:
            found[unit] = counts[0]
    return found


def numbers(root: Any) -> dict[str, float]:
    """Return the plain numbers in a file, at the top and one level below, by dotted path.

    >>> numbers({"metric": 93.5, "epoch": 3, "extra_state": {"val_loss": 0.25}, "model": {}})
    {'metric': 93.5, 'epoch': 3.0, 'extra_state.val_loss': 0.25}
    """
    found = {}
    for name, value in root.items() if isinstance(root, dict) else ():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        for key, number in inner:
            if type(number) is float or (type(number) is int and abs(number) < 1 << 63):
                found[str(name) if key is None else f"{name}.{key}"] = float(number)
    return found


def _at(root: Any, key: str) -> Any:
    """Return what a dotted path leads to; names may have dots of their own."""
    if not isinstance(root, dict):
        return None
    if key in root:
        return root[key]
    first, _, rest = key.partition(".")
    return _at(root.get(first), rest) if rest else None


def _is_model(value: Any, tensor: _Kind) -> TypeGuard[dict[str, Any]]:
    """Return whether it is a dict of tensors, and not of models and a lone tensor."""
    return (
        isinstance(value, dict)
        and any(isinstance(item, tensor) for item in value.values())
        and all(isinstance(name, str) and not _SURROGATE.search(name) for name in value)
        and not any(_holds_tensors(item, tensor) for key, item in value.items() if _may_be(key))
    )


def _holds_tensors(value: Any, tensor: _Kind, depth: int = 4) -> bool:
    """Return whether a dict or list holds tensors, not too deep inside."""
    if not depth or not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return any(isinstance(i, tensor) or _holds_tensors(i, tensor, depth - 1) for i in items)


def _may_be(key: Any) -> bool:
    """Return whether a key may lead to a model rather than to training state."""
    return isinstance(key, str) and not any(word in key.lower() for word in conventions.STATE_WORDS)


def _models_in(root: Mapping[Any, Any], tensor: _Kind) -> dict[str, Any]:
    """Return every dict of tensors at the first two levels that is not training state."""
    found = {}
    for key, value in root.items():
        if _may_be(key) and _is_model(value, tensor):
            found[key] = value
        elif _may_be(key) and isinstance(value, dict):
            inside = [(k, v) for k, v in value.items() if _may_be(k) and _is_model(v, tensor)]
            found |= {f"{key}.{inner}": item for inner, item in inside}
    return found


def _listed(models: Mapping[str, Any]) -> str:
    return some([f"{key} ({len(value)} entries)" for key, value in models.items()])


def _is_averaged(root: Mapping[Any, Any], key: str) -> bool:
    """Return whether trainers save an average under this key."""
    if key == "state_dict":
        return "current_model_state" in root or "message_hub" in root
    return key in conventions.AVERAGED_KEYS and "message_hub" not in root


def _averaged(values: Mapping[str, Any], place: str) -> Model:
    message = f"The model weights {place} {ALREADY_AVERAGED}."
    return Model(values, warnings=(Notice(Code.ALREADY_AVERAGED, message),))


def _raw(values: Mapping[str, Any], average: str, key: str) -> Model:
    message = f"{average} holds an average; the raw model weights are taken, from {key}."
    return Model(values, (Notice(Code.DECIDED, message),))


def _raw_beside_average(path: str, root: Mapping[str, Any], tensor: _Kind) -> Model | None:
    """Return the raw model of trainers that save an average where the model usually is."""
    raw = root.get("current_model_state")
    if _is_model(raw, tensor):
        return _raw(raw, "state_dict", "current_model_state")  # Lightning
    swapped = root.get("ema_state_dict")
    if not (_is_model(swapped, tensor) and _is_model(root.get("state_dict"), tensor)):
        return None
    if "message_hub" not in root:
        either = "either may be the average: mmengine's EMAHook swaps them, others do not"
        why = f"holds both state_dict and ema_state_dict, and {either}"
        hint = "Choose the raw model weights with --key state_dict or --key ema_state_dict."
        raise refused(path, why, hint, Code.SEVERAL_MODELS)
    names = {name.removeprefix("module."): value for name, value in swapped.items()}
    kept = {name: value for name, value in names.items() if name in root["state_dict"]}
    return _raw(kept, "state_dict", "ema_state_dict")


def _under_known_key(path: str, root: Mapping[str, Any], tensor: _Kind) -> Model | None:
    found = {k: _at(root, k) for k in conventions.MODEL_KEYS if _is_model(_at(root, k), tensor)}
    if len(found) > 1:
        raise _several(path, found)
    if not found:
        objects = (_at(root, key) for key in ("ema", *conventions.MODEL_KEYS))
        if pickled := next(filter(_class_name, objects), None):
            raise _no_model(path, pickled)
        return None
    [(key, values)] = found.items()
    generator = root.get("generator")
    if key == "model" and _is_model(generator, tensor) and ("opt" in root or "vocab" in root):
        # OpenNMT-py saves its output layer beside the model; its safetensors name it like this.
        values = {**values, **{f"generator.{name}": value for name, value in generator.items()}}
    averaged = [name for name in conventions.AVERAGED_KEYS if _is_model(_at(root, name), tensor)]
    return _raw(values, some(averaged), key) if averaged else Model(values)


def _at_the_top(root: Mapping[str, Any], tensor: _Kind) -> Model | None:
    if not _is_model(root, tensor):
        return None
    if "n_averaged" in root and all(n.startswith("module.") or n == "n_averaged" for n in root):
        return _averaged(root, "of an AveragedModel")
    return Model(root)


def _under_any_key(path: str, root: Mapping[Any, Any], tensor: _Kind) -> Model:
    found = _models_in(root, tensor)
    raw = {key: value for key, value in found.items() if key not in conventions.AVERAGED_KEYS}
    if len(raw) > 1 or (not raw and len(found) > 1):
        raise _several(path, found)
    if not found:
        raise _no_model(path, root)
    [(key, values)] = (raw or found).items()
    if raw:
        return Model(values, (Notice(Code.DECIDED, f"The model is taken from {key}."),))
    return _averaged(values, f"under {key}")


def _class_name(value: Any) -> str | None:
    """Return the class of a pickled object, if it is one."""
    name = getattr(value, "name", None)
    return name if isinstance(name, str) and not isinstance(value, dict) else None


def _several(path: str, found: Mapping[str, Any]) -> RefusedError:
    listed = f"{len(found)} dicts of tensors, {_listed(found)}"
    why, hint = f"holds {listed}, and any of them may be the model", f"--key {next(iter(found))}"
    return refused(path, why, f"Choose with {hint}.", Code.SEVERAL_MODELS)


def _no_model(path: str, value: Any) -> RefusedError:
    if name := _class_name(value):
        stored = f"stores the model as a pickled {name}, not as tensors"
        why = f"{stored}; reading it would run code from the file"
        return refused(path, why, "Export its state_dict() instead.", Code.PICKLED_OBJECT)
    keys = ", ".join(conventions.MODEL_KEYS)
    why = f"holds no dict of tensors, neither at the top nor under {keys}"
    return refused(path, why, "If it is elsewhere, name it with --key.", Code.NO_MODEL)
