"""Where the model is in a checkpoint: which files, in which folder, by names alone.

Names are tried in the order of the loaders. A checkpoint with two forms of its model is refused
with the option that chooses.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import Member, ModelFiles
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.notices import Notice
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions

_DEEPEST = 5  # folders deep that signs of another format are looked for


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A checkpoint in a format that is not read."""

    what: str
    instead: str

    def refusal(self, path: Path) -> RefusedError:
        """Return the error for the checkpoint at `path`."""
        return RefusedError(
            f"{path} is {self.what}.", self.instead, code=Code.UNSUPPORTED_FORMAT, path=path
        )


Located = ModelFiles | Unsupported | None


def locate(path: Path, source: Source, *, depth: int = _DEEPEST) -> Located:
    """Return the model files of the checkpoint file or folder at `path`; None without any.

    `depth` is how many folders deep to look for signs of another format. Raises `RefusedError` if
    there are two forms of the model and no option chooses.
    """
    if not source.storage.is_folder(path):
        unsupported = _unsupported([path.name])
        is_weights = conventions.WEIGHTS_EXTENSION.search(path.name)
        if unsupported or not is_weights or source.reading.component:
            return unsupported  # a file has no components; --key looks inside
        return ModelFiles(path.parent, (Member(path.name),))
    if source.reading.component:
        return _component(path, source.reading.component, source)
    names = source.storage.names(path)
    if conventions.DCP_METADATA in names and "meta.pt" in names:
        return _unsupported(["meta.pt"])
    return (
        _in_folder(path, source, names)
        or _pipeline(path, source)
        or _in_model_folder(path, source)
        or _distributed(path, source)
        or _unusual(path, depth, source)
    )


def _in_folder(folder: Path, source: Source, names: set[str] | None = None) -> ModelFiles | None:
    names = source.storage.names(folder) if names is None else names
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
            raise _two_forms(folder, *forms)
        if len(forms) == 2:
            forms = [forms[wanted == "sharded"]]
        models = forms + models
    if not models and not adapters:
        # Shards without their index, which is written last: an unfinished save.
        sharded = {conventions.SHARD_OF_SEVERAL.sub("", name) for name in names}
        models = [
            one + conventions.INDEX_SUFFIX for one in conventions.MODEL_FILES if one in sharded
        ]
    if wanted == "adapter" or not models:
        return adapters[0] if adapters else None
    if adapters and wanted == "auto":
        raise RefusedError(
            f"{folder} holds both a model ({models[0]}) and an adapter ({adapters[0]}).",
            "Choose one with --form single (or sharded) or --form adapter.",
            code=Code.SEVERAL_MODELS,
            path=folder,
        )
    return models[0]


def _two_forms(folder: Path, single: str, index: str) -> RefusedError:
    return RefusedError(
        f"{folder} holds both {single} and {index}: one of them is stale, and loaders take"
        f" {single}.",
        "Remove the stale one, or choose with --form single or --form sharded.",
        code=Code.SEVERAL_MODELS,
        path=folder,
    )


def _further_models(names: set[str]) -> list[Member]:
    found: dict[str, str] = {}
    for name in sorted(names, reverse=True):  # safetensors come last and win
        match = conventions.FURTHER_MODEL.search(name)
        if match:
            found[match["model"].removeprefix("pytorch_")] = name
    return [Member(name, f"{model}/") for model, name in sorted(found.items())]


def _modules(folder: Path, source: Source) -> list[Member]:
    """Return the modules of a model that have a folder with weights, in the order of their list."""
    listing = folder / conventions.MODULES_LIST
    try:
        modules = json.loads(source.storage.read(listing) or b"")
    except (ValueError, RecursionError) as error:
        raise RefusedError(
            f"{listing} is not JSON.", code=Code.WRONG_FORMAT, path=listing
        ) from error
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
    if not component or component in (".", "..") or "/" in component:
        raise RefusedError(
            f"--component {component!r} is not the name of a folder.", code=Code.INVALID_OPTION
        )
    if conventions.COMPONENT.search(component.removesuffix("_ema")):
        return _pipeline(path, source, component)
    inside = path / component
    if source.storage.is_folder(inside):
        return (
            _in_folder(inside, source)
            or _in_model_folder(inside, source)
            or _distributed(inside, source)
            or _unsupported(_names_below(inside, _DEEPEST, source))
        )
    files = [
        name
        for name in sorted(source.storage.names(path))
        if conventions.WEIGHTS_EXTENSION.search(name)
        and conventions.WEIGHTS_EXTENSION.sub("", name) == component
    ]
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
    for name in conventions.MODEL_FOLDERS:
        if source.storage.is_folder(path / name):
            found = _in_folder(path / name, source)
            if found:
                return found
    return None


def _distributed(path: Path, source: Source) -> Located:
    """Return what torch.distributed.checkpoint wrote, in the checkpoint or a folder of it."""
    for name in conventions.DCP_FOLDERS:
        metadata = os.path.join(name, conventions.DCP_METADATA)
        names = (
            source.storage.names(path / name) if source.storage.is_folder(path / name) else set()
        )
        # Without .metadata, which is written last, it is an unfinished save of the same format.
        if conventions.DCP_METADATA in names or any(file.endswith(".distcp") for file in names):
            if "common.pt" in names or source.storage.is_folder(path / "context"):
                return _unsupported(["common.pt", "context/"])
            if name in conventions.MODEL_FOLDERS:
                return ModelFiles(path / name, (Member(conventions.DCP_METADATA),))
            return ModelFiles(path, (Member(metadata),))
    return None


def _unusual(path: Path, depth: int, source: Source) -> Located:
    """Return what a folder without any of the usual names holds, by the names of all its files."""
    names = _names_below(path, depth, source)
    return _unsupported(names, certain_only=True) or _only_file(path, source) or _unsupported(names)


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


def _unsupported(names: list[str], *, certain_only: bool = False) -> Unsupported | None:
    for refusal in conventions.REFUSALS:
        if certain_only and not refusal.is_certain:
            continue
        if any(refusal.name.search(name) for name in names):
            return Unsupported(refusal.what, refusal.instead)
    return None


def _names_below(folder: Path, depth: int, source: Source) -> list[str]:
    """Return names of files in a folder, relative to it, but for training state.

    Training state comes in many formats beside models that are read.
    """
    return [
        name
        for name in source.storage.files_below(folder, depth)
        if not conventions.STAYS_BEHIND.search(os.path.basename(name))
    ]
