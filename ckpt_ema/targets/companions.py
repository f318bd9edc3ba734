"""Companions: the files copied beside the averaged model.

Chosen by exclusion: everything that is neither weights nor training state, so that a tokenizer, a
chat template or custom code is copied too, byte for byte. A folder inside the checkpoint that holds
weights is another model and is not copied; an adapter that is not averaged (PEFT's second one) is.
Where a trainer saves no configuration, it is taken from the run's folder or from --config-from.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.storage import Storage, storage_for
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions

_Files = dict[str, Path]  # by name relative to the output


class Companion(NamedTuple):
    """One file to copy."""

    name: str  # relative to the output
    source: Path


class Companions(NamedTuple):
    """What is copied, folders with weights of their own, which are not, and what is missing."""

    files: tuple[Companion, ...] = ()
    models: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # configurations that loaders need and that are nowhere


def companions(
    folder: Path | None,
    averaged: Collection[str],
    run: Path | None,
    config_from: Path | None,
    storage: Storage,
) -> Companions:
    """Return the companions of the newest checkpoint.

    `folder` is its folder, or None if it is a single file, which owns nothing beside it; `averaged`
    names the files in it that become the average; `run` is the folder that all checkpoints share,
    None if there is none. Raises `RefusedError` for folders that cannot be listed.
    """
    own = None if folder is None else _pipeline(folder, averaged, storage)
    models: list[str] = []
    if folder is not None and own is None:
        own, models = _own(folder, averaged, storage)
    found = _of_run(run, own, averaged, storage)
    own = own or {}
    found |= own
    if config_from is not None:
        # --config-from wins, but for the configuration of a component that is averaged.
        chosen = _chosen(config_from, averaged, storage_for(config_from))
        found |= {name: chosen[name] for name in chosen if "/" not in name or name not in own}
    kept = sorted(found.keys() - set(averaged))
    copied = tuple(Companion(name, found[name]) for name in kept)
    missing = {} if _needs_no_config(folder, storage) else dict.fromkeys(_configs_of(averaged))
    return Companions(copied, tuple(sorted(models)), tuple(missing.keys() - found.keys()))


def _configs_of(averaged: Collection[str]) -> Iterator[str]:
    """Yield the configurations that `from_pretrained` reads beside the files that it loads."""
    for name in averaged:
        folder, base = os.path.split(name)
        if conventions.WEIGHTS_EXTENSION.search(folder):  # a folder called as a file
            folder = ""
        config = conventions.CONFIG_OF.get(conventions.SHARD_NUMBER.sub("", base))
        if config:
            yield os.path.join(folder, config)


def _needs_no_config(folder: Path | None, storage: Storage) -> bool:
    """Return whether the trainer that saved a checkpoint loads it without a configuration."""
    names = () if folder is None else storage.names(folder)
    return any(map(conventions.NEEDS_NO_CONFIG.search, names))


def _own(folder: Path, averaged: Collection[str], storage: Storage) -> tuple[_Files, list[str]]:
    """Return the files in a checkpoint's own folder, at any depth, and folders of other models.

    Links to files are followed (the Hub's cache is made of them), links to folders are not.
    """
    found: _Files = {}
    models = []
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        here = folder / prefix
        files = _top_level(here, _is_copied, storage)
        is_adapter = bool(prefix) and conventions.ADAPTER_CONFIG in files
        is_averaged = any(name.startswith(prefix) for name in averaged)
        if any(map(_is_weights, files)) and not is_adapter and not is_averaged:
            models.append(prefix)
            continue
        for name, path in files.items():
            if is_adapter or not _is_weights(name):
                found[prefix + name] = path
        for name in filter(_is_copied, storage.names(here) - files.keys()):
            is_log = conventions.NO_CHECKPOINTS.search(name)
            if not is_log and storage.is_folder(here / name) and not storage.is_link(here / name):
                waiting.append(f"{prefix}{name}/")
    # verl keeps what loaders need in a folder beside the parts of the model.
    inside = f"{conventions.PRETRAINED_FOLDER}/"
    if "config.json" not in found and f"{inside}config.json" in found:
        in_it = [name for name in found if name.startswith(inside)]
        found = {**{n.removeprefix(inside): found.pop(n) for n in in_it}, **found}
    return found, models


def _of_run(
    run: Path | None, own: Collection[str] | None, averaged: Collection[str], storage: Storage
) -> _Files:
    """Return what the run keeps once for all checkpoints and the newest lacks.

    `own` are the files in its folder, None if it is a file.
    """
    if run is None or not storage.is_folder(run):
        return {}
    configs, tokenizers = conventions.CONFIG_FILES, conventions.TOKENIZER_FILES
    if own is None:
        return _top_level(run, configs.search, storage)
    pipeline = _pipeline(run, averaged, storage)
    if pipeline is not None:
        return pipeline
    # The files of a pipeline's components have their configurations beside them.
    is_pipeline = all(conventions.COMPONENT.search(name.split("/")[0]) for name in averaged)
    if not is_pipeline and not {"config.json", conventions.ADAPTER_CONFIG}.intersection(own):
        return _top_level(run, configs.search, storage)
    return {} if any(map(tokenizers.search, own)) else _top_level(run, tokenizers.search, storage)


def _chosen(config_from: Path, averaged: Collection[str], storage: Storage) -> _Files:
    """Return the files of the model or pipeline that --config-from names."""
    found = _pipeline(config_from, averaged, storage)
    if found is None and storage.is_folder(config_from):
        texts = conventions.MODEL_TEXTS
        found = _top_level(config_from, lambda n: texts.search(n) and not _stays(n), storage)
    if not found:
        message = f"--config-from {config_from} is not a folder that holds a configuration."
        raise RefusedError(message, code=Code.NOT_FOUND, path=config_from)
    return found


def _pipeline(pipeline: Path, averaged: Collection[str], storage: Storage) -> _Files | None:
    """Return what a pipeline of diffusers lists, weights included, but for what is averaged.

    None if the folder is not a pipeline.
    """
    path = pipeline / conventions.PIPELINE_LIST
    if storage.kind(path) is not Kind.FILE:
        return None
    try:
        listed = json.loads(storage.read(path) or b"")
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, dict):
        message = f"{path} is not a JSON object that lists components."
        raise RefusedError(message, code=Code.WRONG_FORMAT, path=path)
    copied = _top_level(pipeline, lambda name: not (_stays(name) or _is_weights(name)), storage)
    replaced = {name.split("/")[0] for name in averaged}
    listed_here = storage.names(pipeline) & listed.keys()
    for component in (name for name in listed_here if storage.is_folder(pipeline / name)):
        for name in _files_below(pipeline, component, storage):
            if component not in replaced or not _is_weights(name):
                copied[name] = pipeline / name
    return copied


def _top_level(folder: Path, is_wanted: Callable[[str], object], storage: Storage) -> _Files:
    paths = {name: folder / name for name in storage.names(folder) if is_wanted(name)}
    return {name: path for name, path in paths.items() if storage.kind(path) is Kind.FILE}


def _files_below(root: Path, prefix: str, storage: Storage) -> Iterator[str]:
    """Yield the names, relative to `root`, of the files below its folder `prefix`, but leavings."""
    for name in storage.names(root / prefix):
        if conventions.LEAVINGS.search(name):
            continue
        path = f"{prefix}/{name}"
        kind = storage.kind(root / path)
        if kind is Kind.FILE:
            yield path
        elif kind is Kind.FOLDER and not storage.is_link(root / path):
            yield from _files_below(root, path, storage)


def _stays(name: str) -> bool:
    return bool(conventions.STAYS_BEHIND.search(name) or conventions.LEAVINGS.search(name))


def _is_copied(name: str) -> bool:
    return not _stays(name) and not conventions.METRIC_FILES.search(name)


def _is_weights(name: str) -> bool:
    base = name.rpartition("/")[2]
    is_state = conventions.PROCESSOR_STATE.search(base)
    return bool(conventions.WEIGHTS_LIKE.search(base)) and not is_state
