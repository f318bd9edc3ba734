"""Which files in which folder are a checkpoint's model, by names alone, in the order of loaders."""

import json
import os
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import Member, ModelFiles
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.names import numbers_in, stem_of
from ckpt_ema.notices import Notice
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.table import Refusal

_DEEPEST = 5  # folders deep that signs of another format are looked for
Located = ModelFiles | Refusal | None  # a refusal is for a format that is not read


def unsupported(path: Path, refusal: Refusal) -> RefusedError:
    """Return the error for a checkpoint in a format that is not read."""
    text = f"{path} is {refusal.what}."
    return RefusedError(text, refusal.instead, code=Code.UNSUPPORTED_FORMAT, path=path)


def locate(path: Path, source: Source, *, depth: int = _DEEPEST) -> Located:
    """Return the model files of the checkpoint at `path`; raises if two models are in doubt."""
    if not source.storage.is_folder(path):
        refusal = _refusal([path.name])
        is_weights = conventions.WEIGHTS_EXTENSION.search(path.name)
        if refusal or not is_weights or source.reading.component:
            return refusal  # a file has no components; --key looks inside
        return ModelFiles(path.parent, (Member(path.name),))
    if source.reading.component:
        return _component(path, source.reading.component, source)
    names = source.storage.names(path)
    if conventions.DCP_METADATA in names and "meta.pt" in names:
        return _refusal(["meta.pt"])
    found = (
        _in_folder(path, names, source)
        or _pipeline(path, source)
        or _in_model_folder(path, source)
        or _distributed(path, source)
    )
    if found:
        return found
    below = _names_below(path, depth, source)
    return (
        _refusal(below, certain_only=True)
        or _only_file(path, source)
        or _only_folder(path, below, source)
        or _refusal(below)
    )


def _in_folder(folder: Path, names: set[str], source: Source) -> ModelFiles | None:
    main = _model_file(folder, names, source)
    members = [Member(main), *_further_models(names)] if main else []
    if conventions.MODULES_LIST in names:
        members += _modules(folder, source)
    return ModelFiles(folder, tuple(members)) if members else None


def _model_file(folder: Path, names: set[str], source: Source) -> str | None:
    """Return the name of the file or index to read in a folder, as its loader would choose."""
    wanted = source.reading.form
    adapters = [name for name in conventions.ADAPTER_FILES if name in names]
    models = [name for name in conventions.OTHER_MODEL_FILES if name in names]
    for single in reversed(conventions.MODEL_FILES):
        forms = [name for name in (single, single + conventions.INDEX_SUFFIX) if name in names]
        if len(forms) == 2 and wanted == "auto":
            both = f"both {single} and {forms[1]}: one of them is stale, and loaders take {single}"
            hint = "Remove the stale one, or choose with --form single or --form sharded."
            raise _several_models(folder, both, hint)
        if len(forms) == 2:
            forms = [forms[wanted == "sharded"]]
        models = forms + models
    if not models and not adapters:
        # Shards without their index, which is written last: an unfinished save.
        sharded = {conventions.SHARD_OF_SEVERAL.sub("", name) for name in names}
        unindexed = (one for one in conventions.MODEL_FILES if one in sharded)
        models = [one + conventions.INDEX_SUFFIX for one in unindexed]
    if wanted == "adapter" or not models:
        return adapters[0] if adapters else None
    if adapters and wanted == "auto":
        both = f"both a model ({models[0]}) and an adapter ({adapters[0]})"
        hint = "Choose one with --form single (or sharded) or --form adapter."
        raise _several_models(folder, both, hint)
    return models[0]


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
    if conventions.COMPONENT.search(component.removesuffix("_ema")):
        return _pipeline(path, source, component)
    inside = path / component
    if source.storage.is_folder(inside):
        return (
            _in_folder(inside, source.storage.names(inside), source)
            or _in_model_folder(inside, source)
            or _distributed(inside, source)
            or _refusal(_names_below(inside, _DEEPEST, source))
        )
    files = [n for n in source.storage.names(path) if n != stem_of(n) == component]
    return ModelFiles(path, (Member(files[0]),)) if len(files) == 1 else None


def _pipeline(path: Path, source: Source, component: str | None = None) -> ModelFiles | None:
    """Return the models of a diffusers checkpoint, each in a folder of its own."""
    names = sorted(source.storage.names(path))
    chosen = [
        n for n in names if n == component or (not component and conventions.COMPONENT.search(n))
    ]
    members = [member for name in chosen for member in _member(path, name, source)]
    averaged = [n for n in names if n.removesuffix("_ema") in chosen and n not in chosen]
    taken = f"{some(averaged)} holds averaged weights; the raw ones are used."
    notes = (Notice(Code.DECIDED, taken),) if averaged else ()
    return ModelFiles(path, tuple(members), notes) if members else None


def _in_model_folder(path: Path, source: Source) -> ModelFiles | None:
    folders = (path / name for name in conventions.MODEL_FOLDERS)
    there = (folder for folder in folders if source.storage.is_folder(folder))
    found = (_in_folder(folder, source.storage.names(folder), source) for folder in there)
    return next(filter(None, found), None)


def _distributed(path: Path, source: Source) -> Located:
    """Return what torch.distributed.checkpoint wrote, in the checkpoint or a folder of it."""
    for name in conventions.DCP_FOLDERS:
        folder = path / name
        names = source.storage.names(folder) if source.storage.is_folder(folder) else set()
        # Without .metadata, which is written last, it is an unfinished save of the same format.
        if conventions.DCP_METADATA in names or any(file.endswith(".distcp") for file in names):
            if "common.pt" in names or source.storage.is_folder(path / "context"):
                return _refusal(["common.pt", "context/"])
            if name in conventions.MODEL_FOLDERS:
                return ModelFiles(folder, (Member(conventions.DCP_METADATA),))
            return ModelFiles(path, (Member(os.path.join(name, conventions.DCP_METADATA)),))
    return None


def _only_file(path: Path, source: Source) -> ModelFiles | None:
    """Return the only weights file of a folder without any of the usual names."""
    files = [
        name
        for name in source.storage.names(path)
        if conventions.WEIGHTS_EXTENSION.search(name)
        and name not in conventions.FOLDER_WEIGHTS
        and not any(pattern.search(name) for pattern in conventions.NOT_A_MODEL)
        and not conventions.STAYS_BEHIND.search(name)
        and source.storage.kind(path / name) is Kind.FILE
    ]
    return ModelFiles(path, (Member(files[0]),)) if len(files) == 1 else None


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
        model = _in_folder(inside, source.storage.names(inside), source)
        only = _only_file(inside, source) if len(weights) == 1 else None
        located = model or _distributed(inside, source) or only
        if isinstance(located, ModelFiles):
            found[name] = located
    return found


def _is_apart(folder: str) -> bool:
    """Return whether a folder of a checkpoint holds something else than its model, by its name."""
    patterns = (*conventions.NOT_A_MODEL, conventions.NO_CHECKPOINTS, conventions.ALIAS)
    is_known = any(p.search(folder) for p in patterns if p is not conventions.AVERAGED_NAME)
    is_state = any(word in folder.lower() for word in conventions.STATE_WORDS)
    return bool(is_known or is_state or numbers_in(folder))


def _refusal(names: list[str], *, certain_only: bool = False) -> Refusal | None:
    refusals = (one for one in conventions.REFUSALS if one.is_certain or not certain_only)
    return next((one for one in refusals if any(map(one.name.search, names))), None)


def _names_below(folder: Path, depth: int, source: Source) -> list[str]:
    """Return the files in a folder, relative to it, except training state of any format."""
    files, stays = source.storage.files_below(folder, depth), conventions.STAYS_BEHIND
    return [name for name in files if not stays.search(os.path.basename(name))]
