"""Where in a checkpoint its weights are: which files, in which folder, by names alone.

The order in which names are tried is that of the loaders. Where a checkpoint holds two forms of its
model, it stops and says which option chooses.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import Member, ModelFiles
from ckpt_ema.errors import Code, RefusedError, printable, some
from ckpt_ema.notices import Notice
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions

_MOST_NAMES = 1000  # looked at for the sign of a form that is not read
_MOST_DEPTH = 5


@dataclass(frozen=True, slots=True)
class Blocked:
    """A checkpoint in a form that is not read."""

    what: str
    instead: str

    def error(self, path: Path) -> RefusedError:
        """The refusal, of the checkpoint at `path`."""
        return RefusedError(f"{printable(path)} is {self.what}.", self.instead)


def locate(path: Path, source: Source, *, depth: int = _MOST_DEPTH) -> ModelFiles | Blocked | None:
    """The weights of the checkpoint file or folder at `path`; None if it holds none.

    `depth` is how many folders deep to look for the sign of a form that is not read.
    Raises `RefusedError` if it holds two forms of its weights and nothing says which.
    """
    if not source.storage.is_folder(path):
        blocked = _sign_of_another_form([path.name])
        if (
            blocked
            or not conventions.WEIGHTS_EXTENSION.search(path.name)
            or source.reading.component
        ):
            return blocked  # a file has no components; --key looks inside
        return ModelFiles(path.parent, (Member(path.name),))
    if source.reading.component:
        return _component(path, source.reading.component, source)
    names = source.storage.names(path)
    if conventions.DCP_METADATA in names and "meta.pt" in names:
        return _sign_of_another_form(["meta.pt"])
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
    parts = [Member(main), *_further_models(names)] if main else []
    if conventions.MODULES_LIST in names:
        parts += _modules(folder, source)
    return ModelFiles(folder, tuple(parts)) if parts else None


def _model_file(folder: Path, names: set[str], source: Source) -> str | None:
    """The name of the file or index to read in a folder, as its loader would choose."""
    wanted = source.reading.form
    adapters = [name for name in conventions.ADAPTER_FILES if name in names]
    models = [name for name in conventions.OTHER_MODEL_FILES if name in names]
    for single in reversed(conventions.MODEL_FILES):
        forms = [name for name in (single, single + conventions.INDEX_SUFFIX) if name in names]
        if len(forms) == 2 and wanted not in ("single", "sharded"):
            raise _two_forms(folder, *forms)
        if len(forms) == 2:
            forms = [forms[wanted == "sharded"]]
        models = forms + models
    if not models and not adapters:
        # Shards whose index, which is written last, is missing: an unfinished save.
        sharded = {conventions.SHARD_OF_SEVERAL.sub("", name) for name in names}
        models = [
            one + conventions.INDEX_SUFFIX for one in conventions.MODEL_FILES if one in sharded
        ]
    if wanted == "adapter" or not models:
        return adapters[0] if adapters else None
    if adapters and wanted == "auto":
        raise RefusedError(
            f"{printable(folder)} holds both a model ({models[0]}) and an adapter ({adapters[0]}).",
            "Choose one with --form single (or sharded) or --form adapter.",
        )
    return models[0]


def _two_forms(folder: Path, single: str, index: str) -> RefusedError:
    return RefusedError(
        f"{printable(folder)} holds both {single} and {index}: one of them is stale, and loaders"
        f" take {single}.",
        "Remove the stale one, or choose with --form single or --form sharded.",
    )


def _further_models(names: set[str]) -> list[Member]:
    found: dict[str, str] = {}
    for name in sorted(names, reverse=True):  # safetensors come last and win
        match = conventions.FURTHER_MODEL.search(name)
        if match:
            found[match["model"].removeprefix("pytorch_")] = name
    return [Member(name, f"{model}/") for model, name in sorted(found.items())]


def _modules(folder: Path, source: Source) -> list[Member]:
    """The modules of a model that have weights and a folder of their own, in the list's order."""
    try:
        listed = json.loads(source.storage.read(folder / conventions.MODULES_LIST) or b"")
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{printable(folder / conventions.MODULES_LIST)} is no list.") from error
    parts = []
    for module in listed if isinstance(listed, list) else []:
        name = module.get("path") if isinstance(module, dict) else None
        if isinstance(name, str) and name and os.path.basename(name) == name and name != "..":
            inside = folder / name
            file = (
                _model_file(inside, source.storage.names(inside), source)
                if inside.is_dir()
                else None
            )
            if file:
                parts.append(Member(f"{name}/{file}", f"{name}/"))
    return parts


def _component(path: Path, component: str, source: Source) -> ModelFiles | Blocked | None:
    if not component or component in (".", "..") or "/" in component:
        raise RefusedError(f"--component {printable(component)!r} is not the name of a folder.")
    if conventions.COMPONENT.search(component.removesuffix("_ema")):
        return _pipeline(path, source, component)
    inside = path / component
    if source.storage.is_folder(inside):
        return (
            _in_folder(inside, source)
            or _in_model_folder(inside, source)
            or _distributed(inside, source)
            or _sign_of_another_form(list(_names_below(inside, _MOST_DEPTH)))
        )
    files = [
        name
        for name in sorted(source.storage.names(path))
        if conventions.WEIGHTS_EXTENSION.search(name)
        and conventions.WEIGHTS_EXTENSION.sub("", name) == component
    ]
    return ModelFiles(path, (Member(files[0]),)) if len(files) == 1 else None


def _pipeline(path: Path, source: Source, component: str | None = None) -> ModelFiles | None:
    """The parts of a diffusers checkpoint: folders with a model each."""
    names = sorted(source.storage.names(path))
    chosen = [
        n for n in names if n == component or (not component and conventions.COMPONENT.search(n))
    ]
    parts = []
    for name in chosen:
        if source.storage.is_folder(path / name):
            file = _model_file(path / name, source.storage.names(path / name), source)
            if file:
                parts.append(Member(f"{name}/{file}", f"{name}/"))
    averaged = [
        name for name in names if name.removesuffix("_ema") in chosen and name not in chosen
    ]
    message = f"{some(averaged)} holds an average; the raw model weights are taken."
    notes = (Notice(Code.DECIDED, message),) if averaged else ()
    return ModelFiles(path, tuple(parts), notes) if parts else None


def _in_model_folder(path: Path, source: Source) -> ModelFiles | None:
    for name in conventions.MODEL_FOLDERS:
        if source.storage.is_folder(path / name):
            found = _in_folder(path / name, source)
            if found:
                return found
    return None


def _distributed(path: Path, source: Source) -> ModelFiles | Blocked | None:
    """What torch.distributed.checkpoint wrote, in the checkpoint or a folder of it."""
    for name in conventions.DCP_FOLDERS:
        metadata = os.path.join(name, conventions.DCP_METADATA)
        names = (
            source.storage.names(path / name) if source.storage.is_folder(path / name) else set()
        )
        # Without metadata, which is written last, it is an unfinished save of the same kind.
        if conventions.DCP_METADATA in names or any(file.endswith(".distcp") for file in names):
            if "common.pt" in names or source.storage.is_folder(path / "context"):
                return _sign_of_another_form(["common.pt", "context/"])
            if name in conventions.MODEL_FOLDERS:
                return ModelFiles(path / name, (Member(conventions.DCP_METADATA),))
            return ModelFiles(path, (Member(metadata),))
    return None


def _unusual(path: Path, depth: int, source: Source) -> ModelFiles | Blocked | None:
    """What a folder holds that has none of the usual names, by the names of all files in it."""
    names = list(_names_below(path, depth))
    return (
        _sign_of_another_form(names, certain_only=True)
        or _only_file(path, source)
        or _sign_of_another_form(names)
    )


def _only_file(path: Path, source: Source) -> ModelFiles | None:
    """The one weights file of a folder without any of the usual names."""
    files = [
        name
        for name in source.storage.names(path)
        if conventions.WEIGHTS_EXTENSION.search(name)
        and name not in conventions.FOLDER_WEIGHTS
        and not any(pattern.search(name) for pattern in conventions.NOT_A_STEP.values())
        and not conventions.STAYS_BEHIND.search(name)
        and source.storage.kind(path / name) is Kind.FILE
    ]
    return ModelFiles(path, (Member(files[0]),)) if len(files) == 1 else None


def _sign_of_another_form(names: list[str], *, certain_only: bool = False) -> Blocked | None:
    for refusal in conventions.REFUSALS:
        if certain_only and not refusal.is_certain:
            continue
        if any(refusal.name.search(name) for name in names):
            return Blocked(refusal.what, refusal.instead)
    return None


def _names_below(folder: Path, depth: int) -> Iterator[str]:
    """Names of files in a folder, relative to it; not too many, at most `depth` folders deep."""
    count = 0
    for root, folders, files in os.walk(folder):
        prefix = os.path.relpath(root, folder) + "/" if root != str(folder) else ""
        if prefix.count("/") >= depth:
            folders.clear()
        for name in sorted(files):
            count += 1
            # State of the training is in many forms beside models that are read.
            if not conventions.STAYS_BEHIND.search(name):
                yield prefix + name
        if count > _MOST_NAMES:
            return
