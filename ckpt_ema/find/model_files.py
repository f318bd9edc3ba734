"""Which files in which folder are a checkpoint's model, by names alone, in the order of loaders."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

from ckpt_ema.containers import deepspeed
from ckpt_ema.containers.shards import complete_set
from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import Member, ModelFiles, OnlyAsSaved
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.names import numbers_in, slots_in, stem_of
from ckpt_ema.find.weights_file import (
    Located,
    holds_weights,
    locate_file,
    may_be_weights,
    refusal_of,
)
from ckpt_ema.notices import Notice
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.table import Refusal

_MOST_UNKNOWN = 64  # names in a folder whose files are opened to see what they are
_MOST_TAG_BYTES = 1024
_DEEPEST = 5  # folders deep that signs of another format are looked for


def unsupported(path: Path, refusal: Refusal) -> RefusedError:
    """Return the error for a checkpoint in a format that is not read."""
    text = f"{path} is {refusal.what}."
    return RefusedError(text, refusal.instead, code=Code.UNSUPPORTED_FORMAT, path=path)


def locate(path: Path, source: Source, *, depth: int = _DEEPEST, is_given: bool = False) -> Located:
    """Return the model files of the checkpoint at `path`; raises if two models are in doubt.

    A file that a person has given is one of a model, whatever its name.
    """
    if source.storage.is_folder(path):
        found = _in_checkpoint(path, source, depth)
    elif source.reading.component:
        return refusal_of([path.name])  # a file has no components; --key looks inside
    else:
        found = locate_file(path, source, is_given=is_given)
    by_name = source.reading.which == "ema" and conventions.AVERAGED_NAME.search(stem_of(path.name))
    return replace(found, is_average=True) if by_name and isinstance(found, ModelFiles) else found


def _in_checkpoint(path: Path, source: Source, depth: int) -> Located:
    if source.reading.component:
        return _component(path, source.reading.component, source)
    names = source.storage.names(path)
    found = (
        (_average(path, names, source) if source.reading.which == "ema" else None)
        or _in_folder(path, names, source)
        or _of_deepspeed(path, names, source)
        or _pipeline(path, source)
        or _in_model_folder(path, source)
        or _distributed(path, source)
        or _tagged_by_deepspeed(path, names, source)
    )
    if found:
        return found
    below = _names_below(path, depth, source)
    return (
        _in_parts(path, refusal_of(below, certain_only=True), source)
        or _own_names(path, names, source)
        or _only_folder(path, below, source)
        or _average(path, names, source)
        or refusal_of(below)
    )


def _in_folder(folder: Path, names: set[str], source: Source) -> ModelFiles | None:
    main = _model_file(folder, names, source)
    # Newer versions of zero_to_fp32.py write shards into a folder with the name of the file.
    inside = _member(folder, main, source) if main else []
    if inside:
        return ModelFiles(folder, (Member(inside[0].name),))
    members = [Member(main), *_further_models(names)] if main else []
    if conventions.MODULES_LIST in names:
        members += _modules(folder, source)
    return ModelFiles(folder, tuple(members)) if members else None


def _model_file(folder: Path, names: set[str], source: Source) -> str | None:
    """Return the name of the file or index to read in a folder, as its loader would choose."""
    wanted = source.reading.form
    adapters = [name for name in conventions.ADAPTER_FILES if name in names]
    models = [name for name in conventions.OTHER_MODEL_FILES if name in names]
    models += filter(conventions.FIRST_RANK.search, sorted(names))
    for single in reversed(conventions.MODEL_FILES):
        index = single + conventions.INDEX_SUFFIX
        shards = _without_index(folder, index, names, source) if single in names else []
        forms = [name for name in (single, index) if name in names or (shards and name == index)]
        if len(forms) == 2 and wanted == "auto":
            other = f"all shards of another ({some(shards, 2)})" if shards else index
            both = f"both {single} and {other}: one of them is stale, and loaders take {single}"
            hint = "Remove the stale one, or choose with --form single or --form sharded."
            raise _several_models(folder, both, hint)
        if len(forms) == 2:
            forms = [forms[wanted == "sharded"]]
        models = forms + models
    if not models and not adapters:
        models = [one + conventions.INDEX_SUFFIX for one in _sharded(folder, names, source)]
    if wanted == "adapter" or not models:
        return adapters[0] if adapters else None
    if adapters and wanted == "auto":
        both = f"both a model ({models[0]}) and an adapter ({adapters[0]})"
        hint = "Choose one with --form single (or sharded) or --form adapter."
        raise _several_models(folder, both, hint)
    return models[0]


def _without_index(folder: Path, index: str, names: set[str], source: Source) -> list[str]:
    """Return the shards of a model if they are all there and their index is not."""
    is_sharded = index not in names and any(map(conventions.SHARD_NUMBER.search, names))
    return complete_set(os.path.join(folder, index), source.storage) if is_sharded else []


def _sharded(folder: Path, names: set[str], source: Source) -> list[str]:
    """Return the names of models whose shards are in a folder, perhaps without their index."""
    matches = ((name, conventions.SHARD_NUMBER.sub("", name)) for name in sorted(names))
    wholes = dict.fromkeys(whole for name, whole in matches if whole != name)
    usual = [one for one in conventions.MODEL_FILES if one in wholes]
    if usual:
        return usual
    index_of = {one: one + conventions.INDEX_SUFFIX for one in wholes if stem_of(one) != one}
    return [
        one
        for one, index in index_of.items()
        if index in names or complete_set(os.path.join(folder, index), source.storage)
    ][:1]


def _several_models(folder: Path, both: str, hint: str) -> RefusedError:
    return RefusedError(f"{folder} holds {both}.", hint, code=Code.SEVERAL_MODELS, path=folder)


def _further_models(names: set[str]) -> list[Member]:
    # Of two files of one model, that in safetensors comes last and wins.
    matches = filter(None, map(conventions.FURTHER_MODEL.search, sorted(names, reverse=True)))
    found = {match["model"].removeprefix("pytorch_"): match[0] for match in matches}
    return [Member(name, f"{model}/") for model, name in sorted(found.items())]


def _modules(folder: Path, source: Source) -> list[Member]:
    """Return the modules of a model that have a folder with weights, in the order of their list."""
    listing = folder / conventions.MODULES_LIST
    try:
        modules = json.loads(source.storage.read(listing) or b"")
    except (ValueError, RecursionError) as error:
        text = f"{listing} is not JSON."
        raise RefusedError(text, code=Code.WRONG_FORMAT, path=listing) from error
    members = []
    for module in modules if isinstance(modules, list) else []:
        name = module.get("path") if isinstance(module, dict) else None
        if isinstance(name, str) and name != ".." and os.path.basename(name) == name != "":
            members += _member(folder, name, source)
    return members


def _member(folder: Path, name: str, source: Source) -> list[Member]:
    """Return the model in a folder of the checkpoint, if there is one."""
    inside = folder / name
    if not source.storage.is_folder(inside):
        return []
    file = _model_file(inside, source.storage.names(inside), source)
    return [Member(f"{name}/{file}", f"{name}/")] if file else []


def _component(path: Path, component: str, source: Source) -> Located:
    if not {"", ".", ".."}.isdisjoint(component.split("/")):
        text = f"--component {component!r} is not the name of a folder."
        raise RefusedError(text, code=Code.INVALID_OPTION)
    names = source.storage.names(path)
    if source.reading.which == "ema":
        averages = {_raw_name(stem_of(n)): n for n in names if _raw_name(n) != n}
        component = stem_of(averages.get(component, component))
    is_average = bool(conventions.AVERAGED_NAME.search(component))
    found = _component_named(path, component, names, source)
    return replace(found, is_average=is_average) if isinstance(found, ModelFiles) else found


def _component_named(path: Path, component: str, names: set[str], source: Source) -> Located:
    if conventions.COMPONENT.search(_raw_name(component)):
        return _pipeline(path, source, component)
    inside = path / component
    if source.storage.is_folder(inside):
        return (
            _in_folder(inside, source.storage.names(inside), source)
            or _in_model_folder(inside, source)
            or _of_deepspeed(inside, source.storage.names(inside), source)
            or _distributed(inside, source)
            or refusal_of(_names_below(inside, _DEEPEST, source))
        )
    files = [n for n in names if n != stem_of(n) == component]
    return ModelFiles(path, (Member(files[0]),)) if len(files) == 1 else None


def _raw_name(name: str) -> str:
    """Return the name of the raw weights of an average.

    >>> _raw_name("unet_ema"), _raw_name("ema-unet"), _raw_name("unet")
    ('unet', 'unet', 'unet')
    """
    return conventions.AVERAGED_NAME.sub("", name).strip("-_.")


def _average(path: Path, names: set[str], source: Source) -> ModelFiles | None:
    """Return the average that a trainer saved as a file or a folder of its own."""
    named = sorted(name for name in names if conventions.AVERAGED_NAME.search(stem_of(name)))
    files = [name for name in named if _may_be_a_model(name, names, path, source)]
    if any(slots_in(stem_of(name)) for name in files[1:]):
        return None  # steps of a run
    if len(files) > 1:
        several = f"several averages ({some(files)})"
        raise _several_models(path, several, "List the files of the one that you want instead.")
    if files:
        return ModelFiles(path, (Member(files[0]),), is_average=True)
    members = [member for name in named for member in _member(path, name, source)]
    if any(conventions.COMPONENT.search(_raw_name(one.prefix.rstrip("/"))) for one in members):
        return ModelFiles(path, tuple(members), is_average=True)
    folders = (path / name for name in named if source.storage.is_folder(path / name))
    located = (_in_checkpoint(folder, source, 1) for folder in folders)
    models = [one for one in located if isinstance(one, ModelFiles)]
    return replace(models[0], is_average=True) if len(models) == 1 else None


def _pipeline(path: Path, source: Source, component: str | None = None) -> ModelFiles | None:
    """Return the models of a diffusers checkpoint, each in a folder of its own."""
    names = sorted(source.storage.names(path))
    chosen = [
        n for n in names if n == component or (not component and conventions.COMPONENT.search(n))
    ]
    members = [member for name in chosen for member in _member(path, name, source)]
    averaged = [n for n in names if _raw_name(n) in chosen and n not in chosen]
    taken = f"{some(averaged)} holds averaged weights; the raw ones are used."
    notes = (Notice(Code.DECIDED, taken),) if averaged else ()
    return ModelFiles(path, tuple(members), notes) if members else None


def _in_model_folder(path: Path, source: Source) -> ModelFiles | None:
    folders = (path / name for name in conventions.MODEL_FOLDERS)
    there = (folder for folder in folders if source.storage.is_folder(folder))
    found = (_in_folder(folder, source.storage.names(folder), source) for folder in there)
    return next(filter(None, found), None)


def _distributed(path: Path, source: Source) -> ModelFiles | None:
    """Return what torch.distributed.checkpoint wrote, in the checkpoint or a folder of it."""
    for name in conventions.DCP_FOLDERS:
        folder = path / name
        names = source.storage.names(folder) if source.storage.is_folder(folder) else set()
        # Without .metadata, which is written last, it is an unfinished save of the same format.
        if conventions.DCP_METADATA in names or any(file.endswith(".distcp") for file in names):
            is_own = name in conventions.MODEL_FOLDERS
            root, inside = (folder, "") if is_own else (path, name)
            found = ModelFiles(root, (Member(os.path.join(inside, conventions.DCP_METADATA)),))
            if _is_megatron(path, folder, names, source):
                last = os.path.join(inside, conventions.MEGATRON_LIST)
                only = OnlyAsSaved(conventions.MEGATRON.what, conventions.MEGATRON.instead)
                return replace(found, only_as_saved=only, written_last=last)
            is_lightning = not name and conventions.LIGHTNING_FOLDER.search(path.name)
            return replace(found, written_last=conventions.SHARDED_STATE if is_lightning else "")
    return None


def _is_megatron(path: Path, folder: Path, names: set[str], source: Source) -> bool:
    """Return whether Megatron, its Bridge or NeMo 2 wrote a distributed checkpoint.

    Without its list of formats, which is written last, other files and the name tell.
    """
    listing = source.storage.read(folder / conventions.MEGATRON_LIST) or b""
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(listing)
        if isinstance(content, dict) and content.get("sharded_backend") == "torch_dist":
            return True
    is_named = bool(conventions.MEGATRON_FOLDER.search(folder.name))
    return "common.pt" in names or is_named or source.storage.is_folder(path / "context")


def _own_names(path: Path, names: set[str], source: Source) -> Located:
    """Return the weights files of a folder without any of the usual names.

    Several are parts of one model, unless their names are those of steps.
    """
    files = [
        name
        for name in sorted(names)
        if not conventions.AVERAGED_NAME.search(stem_of(name))
        and _may_be_a_model(name, names, path, source)
    ]
    if not files and len(names) <= _MOST_UNKNOWN:  # weights/, state: files without an ending
        files = [name for name in sorted(names) if _is_model_by_content(path / name, source)]
    if len(files) == 1:
        return locate_file(path / files[0], source)
    if any(slots_in(stem_of(name)) or conventions.ALIAS.search(name) for name in files):
        return None
    models = [ModelFiles(path, (Member(name),)) for name in files]
    parts = [model for model in models if holds_weights(model, source)]
    names_of = {frozenset(source.read(part).tensors) for part in parts}
    if len(names_of) < len(parts) and not numbers_in(path.name):
        return None  # states of one model in a run's folder, not its parts
    members = [Member(part.path.name, f"{stem_of(part.path.name)}/") for part in parts]
    return ModelFiles(path, tuple(members)) if members else None


def _is_model_by_content(path: Path, source: Source) -> bool:
    """Return whether a file without the ending of one is a model, as far as it may be opened."""
    if stem_of(path.name) != path.name:
        return False
    try:
        return isinstance(locate_file(path, source), ModelFiles)
    except RefusedError:
        return False


def _may_be_a_model(name: str, beside: set[str], folder: Path, source: Source) -> bool:
    is_named = may_be_weights(name.removesuffix(conventions.INDEX_SUFFIX), beside)
    return is_named and source.storage.kind(folder / name) is Kind.FILE


def _of_deepspeed(path: Path, names: set[str], source: Source) -> Located:
    """Return the model in a folder that DeepSpeed wrote, or the refusal of a layout of its own."""
    name = deepspeed.model_file(names)
    if not name:
        return None
    others = [one for one in names if not deepspeed.is_one_of(one)]
    folders = [f"{one}/" for one in others if source.storage.is_folder(path / one)]
    refusal = refusal_of([*others, *folders], certain_only=True)
    return _in_parts(path, refusal, source) if refusal else ModelFiles(path, (Member(name),))


def _in_parts(path: Path, refusal: Refusal | None, source: Source) -> Located:
    """Return a model whose files are averaged one by one, if it is in such a format."""
    if refusal is None or refusal.parts is None:
        return refusal
    names = [name for name in source.storage.files_below(path) if refusal.parts.search(name)]
    members = tuple(Member(name, f"{name}:", is_part=True) for name in sorted(names))
    only = OnlyAsSaved(refusal.what, refusal.instead)
    return ModelFiles(path, members, only_as_saved=only) if members else refusal


def _tagged_by_deepspeed(path: Path, names: set[str], source: Source) -> Located:
    """Return what DeepSpeed wrote into the one folder that a checkpoint has for it.

    That is the one in the file `latest`, or `global_step500` in a `checkpoint-500`; a folder
    without a number that holds the latter is a run.
    """
    latest = source.storage.read(path / "latest", _MOST_TAG_BYTES) if "latest" in names else b""
    is_step = bool(numbers_in(stem_of(path.name)))
    of_steps = {name for name in names if conventions.DEEPSPEED_STEP.search(name)}
    tags = names if latest else of_steps if is_step else set()
    folders = {tag: path / tag for tag in tags if source.storage.is_folder(path / tag)}
    located = {
        name: _of_deepspeed(folder, source.storage.names(folder), source)
        for name, folder in folders.items()
    }
    found = {name: model for name, model in located.items() if model}
    if len(found) != 1:
        return None
    [(tag, model)] = found.items()
    is_of_step = is_step and tag in of_steps
    is_latest = (latest or b"").strip() == tag.encode() and not numbers_in(tag)
    if not is_of_step and not is_latest:
        return None
    if isinstance(model, ModelFiles):
        return ModelFiles(path, (Member(f"{tag}/{model.members[0].name}"),))
    return model


def folders_with_models(path: Path, source: Source) -> list[str]:
    """Return the folders in a checkpoint that hold a model by themselves, such as `my_adapter`."""
    return list(_models_below(path, _names_below(path, _DEEPEST, source), source))


def _only_folder(path: Path, below: list[str], source: Source) -> ModelFiles | None:
    """Return the model in the only folder of a numbered checkpoint that holds one.

    An average of the trainer's own is for --component, and what is in folders without a number
    or with one of their own are runs: `seed-1/checkpoint-100`, `run_1/best`.
    """
    if not numbers_in(stem_of(path.name)):
        return None
    found = _models_below(path, below, source)
    raw = [one for name, one in found.items() if not conventions.AVERAGED_NAME.search(name)]
    return raw[0] if len(raw) == 1 else None


def _models_below(path: Path, below: list[str], source: Source) -> dict[str, ModelFiles]:
    weights = [name for name in below if conventions.WEIGHTS_EXTENSION.search(name)]
    found = {}
    for name in sorted({os.path.dirname(file) for file in below} - {""}):
        if any(map(_is_apart, name.split("/"))):
            continue
        inside = path / name
        names = source.storage.names(inside)
        model = _in_folder(inside, names, source) or _of_deepspeed(inside, names, source)
        only = _own_names(inside, names, source) if len(weights) == 1 else None
        located = model or _distributed(inside, source) or only
        if isinstance(located, ModelFiles):
            found[name] = located
    return found


def _is_apart(folder: str) -> bool:
    """Return whether a folder of a checkpoint holds something else than its model, by its name."""
    patterns = (*conventions.NOT_A_MODEL, conventions.NO_CHECKPOINTS, conventions.ALIAS)
    is_known = any(p.search(folder) for p in patterns if p is not conventions.AVERAGED_NAME)
    return bool(is_known or conventions.STATE_KEY.search(folder) or numbers_in(folder))


def _names_below(folder: Path, depth: int, source: Source) -> list[str]:
    """Return the files in a folder, relative to it, except training state of any format."""
    files, stays = source.storage.files_below(folder, depth), conventions.STAYS_BEHIND
    return [name for name in files if not stays.search(os.path.basename(name))]
