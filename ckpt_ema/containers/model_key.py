"""Which dict of tensors in a file that a training script saved is the model.

Everything that holds weights is found first. Each dict is the model, training state, an average
that the trainer made, or a reason to stop or to warn. The raw model is preferred, since an average
of averages is smoothed twice. Nothing here reads a tensor.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from ckpt_ema.containers.checks import GATHER, OF_ONE_RANK, refused
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.notices import Notice
from ckpt_ema.options import Reading
from ckpt_ema.trainers import conventions

ALREADY_AVERAGED = (
    "are averaged already (their decay is unknown); averaging them again smooths twice"
)
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # in names of hostile pickles; cannot be written
# Of the model, or a part of it, in a file of Megatron or DeepSpeed.
_OWN_KEY = re.compile(r"^(model\d*|module|state_dict)$")
_DEEPEST = 8  # levels of dicts that are searched
_EVERYTHING = "."  # the key of the whole file

_Kind = type | tuple[type, ...]
_Found = Mapping[str, Any]  # dicts and lists of tensors by dotted path; that of the top is empty


@dataclass(frozen=True, slots=True)
class Model:
    """The chosen dict; it may also hold values that are not tensors."""

    values: Mapping[str, Any]
    notes: tuple[Notice, ...] = ()
    warnings: tuple[Notice, ...] = ()
    is_average: bool = False  # made by the trainer
    others: tuple[str, ...] = ()  # places of averages beside raw weights, or of what was averaged


def find_model(path: str, root: Any, reading: Reading, tensor: _Kind) -> Model:
    """Return the model in `root`, the content of the file at `path`.

    `reading` has --key and --which; `tensor` is the class of tensors. With --which ema it is the
    raw model if there is no average. Raises `RefusedError` if there is no model, if it is a pickled
    object, if there are several, or if other weights may be a part of it.
    """
    if isinstance(root, list) or type(root) is tuple:  # as torch.save((state_dict, optimizer))
        root = {str(at): one for at, one in enumerate(root) if not isinstance(one, tensor)}
    if not isinstance(root, dict):
        raise _no_model(path, root)
    wants_average = reading.which == "ema"
    if reading.key is not None:
        return _under_keys(path, root, reading.key, wants_average, tensor)
    found = _tensors_in(root, tensor, with_callbacks=wants_average)
    averages = {place: one for place, one in found.items() if _is_averaged(root, place)}
    raw = {p: one for p, one in found.items() if p not in averages and _may_be(p)}
    _check_swapped(path, raw, averages, root)
    if not (averages and wants_average) and not any(key in raw for key in conventions.MODEL_KEYS):
        objects = (_at(root, key) for key in ("ema", *conventions.MODEL_KEYS))
        if pickled := next(filter(_class_name, objects), None):
            raise _no_model(path, pickled)
    if averages and (wants_average or not raw):
        chosen = _averaged(averages[_only(path, averages)], wants_average, _only(path, averages))
        return replace(chosen, others=tuple(place or "the top level" for place in raw))
    return _raw(path, root, raw, averages, tensor)


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
    if isinstance(root, list) or type(root) is tuple:
        root = {str(index): value for index, value in enumerate(root)}
    if not isinstance(root, dict):
        return None
    if key == _EVERYTHING:
        return root
    if key in root:
        return root[key]
    cuts = [at for at, letter in enumerate(key) if letter == "."]
    found = (_at(root[key[:at]], key[at + 1 :]) for at in cuts if key[:at] in root)
    return next((value for value in found if value is not None), None)


def _tensors_in(root: Any, tensor: _Kind, *, with_callbacks: bool = False) -> dict[str, Any]:
    """Return every dict and list that holds weights itself, by dotted path.

    Training state is left out, but for callbacks if asked. If nothing holds weights, these are what
    holds tensors of other kinds.
    """
    others: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    waiting, seen = [("", root, _DEEPEST)], {id(root)}
    for place, value, depth in waiting:
        if _is_optimizer(value):
            continue
        items = [*value.items()] if isinstance(value, dict) else [*enumerate(value)]
        tensors = (  # at the top, something such as "rng" lies beside the model
            item for key, item in items if isinstance(item, tensor) and (place or _may_be(str(key)))
        )
        first = next(tensors, None)
        if first is not None and (not isinstance(value, dict) or _are_names(value)):
            others[place] = value
            if any(getattr(item, "is_weight", True) for item in chain([first], tensors)):
                weights[place] = value
        for key, inner in items:
            # A file may hold one dict under two names, and a hostile one under any number.
            is_nested = isinstance(inner, dict | list) or type(inner) is tuple
            if is_nested and depth and id(inner) not in seen:
                seen.add(id(inner))
                if _may_be(str(key)) or (with_callbacks and "callback" in str(key)):
                    waiting.append((f"{place}.{key}" if place else str(key), inner, depth - 1))
    return weights or others


def _are_names(keys: Iterable[Any]) -> bool:
    return all(isinstance(name, str) and not _SURROGATE.search(name) for name in keys)


def _may_be(place: str) -> bool:
    """Return whether a place may have a model rather than training state."""
    return not conventions.STATE_KEY.search(place)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, dict) and {"state", "param_groups"} <= value.keys()


def _listed(found: _Found) -> str:
    return some([f"{_place(place)} ({len(one)} entries)" for place, one in found.items()])


def _place(place: str) -> str:
    return place or "the top level"


def _named(place: str, value: Any, tensor: _Kind) -> str:
    """Return what to call tensors by: their place, or at the top their names."""
    return place or some(name for name, item in value.items() if isinstance(item, tensor))


def _is_averaged(root: Mapping[Any, Any], place: str) -> bool:
    """Return whether a trainer saves an average here."""
    if place == "state_dict":
        return "current_model_state" in root or {"message_hub", "ema_state_dict"} <= root.keys()
    if place == "ema_state_dict":
        return "message_hub" not in root
    if not place:
        names = root.keys()
        return "n_averaged" in names and all(n.startswith(("module.", "n_averaged")) for n in names)
    return bool(conventions.AVERAGED_NAME.search(place))


def every_weight(path: str, root: Any, tensor: _Kind, key: str | None = None) -> dict[str, Any]:
    """Return every tensor that may be one of a model, by dotted path; there may be none.

    They are those below `key` (several keys with commas between them), by default below the keys
    of models and of averages, or all where the file has no key of a model. Raises `RefusedError`
    for two at one path.
    """
    whole = root if isinstance(root, dict) else {}
    found = _tensors_in(whole, tensor)
    if key is None and any(_OWN_KEY.search(str(name)) for name in whole):
        found = {place: one for place, one in found.items() if _is_of_model(place)}
    elif key not in (None, _EVERYTHING):
        keys = tuple(f"{one}." for one in str(key).split(","))
        found = {place: one for place, one in found.items() if f"{place}.".startswith(keys)}
    values = _joined(path, {place: _by_name(one) for place, one in found.items()})
    return {name: value for name, value in values.items() if isinstance(value, tensor)}


def _is_of_model(place: str) -> bool:
    top = place.partition(".")[0]
    return bool(_OWN_KEY.search(top) or conventions.AVERAGED_NAME.search(top))


def _under_keys(
    path: str, root: Mapping[Any, Any], key: str, wants_average: bool, tensor: _Kind
) -> Model:
    """Return the model that --key names: one dict, or several as one, their keys before names."""
    keys = [key] if _at(root, key) is not None else key.split(",")
    found = {one: _under_key(path, root, one, tensor) for one in keys}
    values = found[key] if key in found else _joined(path, found)
    averaged = [one for one in keys if one != _EVERYTHING and _is_averaged(root, one)]
    return _averaged(values, wants_average, some(averaged)) if averaged else Model(values)


def _under_key(path: str, root: Mapping[Any, Any], key: str, tensor: _Kind) -> Mapping[str, Any]:
    """Return the dict of tensors at a key, with those inside it; the raw ones, if there are any."""
    found = _tensors_in(_at(root, key) or {}, tensor)
    takes_lists = key == _EVERYTHING
    inside = {p: _by_name(v) for p, v in found.items() if takes_lists or isinstance(v, dict)}
    raw = {p: one for p, one in inside.items() if not conventions.AVERAGED_NAME.search(p)}
    if not inside:
        others = _listed(_tensors_in(root, tensor)) or "none at all"
        why = f"has no dict of tensors under {key}; it has {others}"
        raise refused(path, why, code=Code.NO_MODEL)
    if inside.keys() == {""}:
        return inside[""]
    values = _joined(path, raw or inside)
    return {name: value for name, value in values.items() if isinstance(value, tensor)}


def _by_name(values: Any) -> Mapping[str, Any]:
    return values if isinstance(values, dict) else {str(n): one for n, one in enumerate(values)}


def _joined(path: str, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return several dicts as one, the place of each before its names."""
    named = [
        (f"{place}.{name}" if place else name, value)
        for place, values in found.items()
        for name, value in values.items()
    ]
    if len(dict(named)) < len(named):
        raise refused(path, "has two tensors of one name", "Choose one dict with --key.")
    return dict(named)


def _averaged(values: Mapping[str, Any], is_wanted: bool, place: str) -> Model:
    where = f"under {place}" if place else "of an AveragedModel"
    warning = Notice(Code.ALREADY_AVERAGED, f"The model weights {where} {ALREADY_AVERAGED}.")
    return Model(values, warnings=() if is_wanted else (warning,), is_average=True)


def _check_swapped(path: str, raw: _Found, averages: _Found, root: Mapping[Any, Any]) -> None:
    if "state_dict" in raw and "ema_state_dict" in averages and "message_hub" not in root:
        either = "either may be the average: mmengine's EMAHook swaps them, others do not"
        why = f"holds both state_dict and ema_state_dict, and {either}"
        hint = "Choose with --key state_dict or --key ema_state_dict."
        raise refused(path, why, hint, Code.SEVERAL_MODELS)


def _raw(path: str, root: Mapping[str, Any], raw: _Found, averages: _Found, tensor: _Kind) -> Model:
    """Return the raw model, a note of averages, and a warning of other weights."""
    if _is_opennmt(root, raw):
        # OpenNMT-py saves its output layer beside the model; its safetensors name it like this.
        generator = {f"generator.{name}": value for name, value in raw["generator"].items()}
        return Model({**raw["model"], **generator})
    place = _only(path, raw)
    values, notes, warnings = raw[place], [], []
    if place == "ema_state_dict":  # mmengine has swapped them, and wrapped the names of this one
        names = {name.removeprefix("module."): value for name, value in values.items()}
        values = {name: value for name, value in names.items() if name in root["state_dict"]}
    if averages:
        text = f"{some(averages)} holds an average; the raw model weights are taken, from"
        notes.append(Notice(Code.DECIDED, f"{text} {_place(place)}."))
    elif place and place not in conventions.MODEL_KEYS:
        notes.append(Notice(Code.DECIDED, f"The model is taken from {place}."))
    if others := [_named(one, value, tensor) for one, value in raw.items() if one != place]:
        text = f"Tensors beside the model under {_place(place)} are left out: {some(others)}; --key"
        text = f"{text} {_EVERYTHING} takes every dict of tensors in the file."
        warnings.append(Notice(Code.OTHER_WEIGHTS, text))
    return Model(values, tuple(notes), tuple(warnings), others=tuple(averages))


def _is_opennmt(root: Mapping[str, Any], raw: _Found) -> bool:
    is_made_of_both = raw.keys() == {"model", "generator"} and "vocab" in root
    return is_made_of_both and (_class_name(root.get("opt")) or "").endswith("Namespace")


def _only(path: str, found: _Found) -> str:
    """Return the place of the only model among dicts of tensors; raises if there are several.

    Lists, lone tensors at the top, and what belongs to a loss are not a second model beside a dict
    that trainers call the model.
    """
    dicts = [place for place, one in found.items() if isinstance(one, dict)]
    known = [place for place in conventions.MODEL_KEYS if place in dicts]
    models = [place for place in dicts if place and not conventions.NO_MODEL_KEY.search(place)]
    if len(models) <= 1 and (known or (models and "" not in dicts)):
        return (known or models)[0]
    if found and not dicts:
        why = f"holds lists of tensors without names ({_listed(found)}) and no dict of them"
        raise refused(path, why, "Save a state dict.", Code.NO_MODEL)
    if len(dicts) > 1:
        raise _several(path, found, dicts)
    if not dicts:
        raise _no_model(path, found)
    return dicts[0]


def _class_name(value: Any) -> str | None:
    """Return the class of a pickled object, if it is one."""
    name = getattr(value, "name", None)
    return name if isinstance(name, str) and not isinstance(value, dict) else None


def _several(path: str, found: _Found, dicts: list[str]) -> RefusedError:
    listed = f"{len(dicts)} dicts of tensors, {_listed({place: found[place] for place in dicts})}"
    why = f"holds {listed}, and any of them may be the model or a part of it"
    tops = dict.fromkeys(place.partition(".")[0] for place in dicts)
    every = _EVERYTHING if "" in tops else ",".join(tops)
    one = next(place for place in dicts if place)
    hint = f"Choose one with --key, such as --key {one}."
    if every == one:
        hint = f"Take all as one model with --key {every}."
    elif not any(map(conventions.AVERAGED_NAME.search, dicts)):
        hint = f"Take all as one model with --key {every}, or one with --key {one}."
    return refused(path, why, hint, Code.SEVERAL_MODELS)


def _no_model(path: str, value: Any) -> RefusedError:
    if (name := _class_name(value)) and name.endswith(OF_ONE_RANK):
        why = f"stores the model as a {name}, of which each rank's file holds a part"
        return refused(path, why, GATHER, Code.UNREADABLE_TENSOR)
    if name:
        stored = f"stores the model as a pickled {name}, not as tensors"
        why = f"{stored}; reading it would run code from the file"
        return refused(path, why, "Export its state_dict() instead.", Code.PICKLED_OBJECT)
    keys = ", ".join(conventions.MODEL_KEYS)
    why = f"holds no dict of tensors, neither at the top nor under {keys}"
    return refused(path, why, "If it is elsewhere, name it with --key.", Code.NO_MODEL)
