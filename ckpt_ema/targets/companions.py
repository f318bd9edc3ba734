"""Companions: the files copied beside the averaged model.

Chosen by exclusion: everything that is neither weights nor training state, so that a tokenizer, a
chat template or custom code is copied too, byte for byte. A folder inside the checkpoint that holds
weights is another model and is not copied; an adapter that is not averaged (PEFT's second one) is.
Where a trainer saves no configuration, it is taken from the run's folder or from --config-from.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from re import Pattern
from typing import NamedTuple

from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.storage import Storage
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers.conventions import (
    ADAPTER_CONFIG,
    COMPONENT,
    CONFIG_FILES,
    METRIC_FILES,
    MODEL_TEXTS,
    NO_CHECKPOINTS,
    PIPELINE_LIST,
    PROCESSOR_STATE,
    STAYS_BEHIND,
    TOKENIZER_FILES,
    WEIGHTS_LIKE,
)


class Companion(NamedTuple):
    """One file to copy."""

    name: str  # relative to the output
    source: Path


class Companions(NamedTuple):
    """What is copied, and folders with weights of their own, which are not."""

    files: tuple[Companion, ...]
    models: tuple[str, ...]


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
    own: dict[str, Path] = {}
    models: tuple[str, ...] = ()
    if folder is not None and _has_pipeline(folder, storage):
        own = _pipeline(folder, averaged, storage)
    elif folder is not None:
        files, models = _own(folder, averaged, storage)
        own = dict(files)
    found = {**_of_run(run, own if folder is not None else None, averaged, storage), **own}
    if config_from is not None:
        # --config-from wins, but for the configuration of a component that is averaged.
        chosen = _chosen(config_from, averaged, storage)
        found |= {name: path for name, path in chosen.items() if "/" not in name or name not in own}
    kept = sorted(found.keys() - set(averaged))
    return Companions(tuple(Companion(name, found[name]) for name in kept), tuple(sorted(models)))


def _own(folder: Path, averaged: Collection[str], storage: Storage) -> Companions:
    """Return the companions in a checkpoint's own folder, at any depth."""
    files, models = [], []
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        names, folders = _listed(folder / prefix, storage)
        is_adapter = prefix and ADAPTER_CONFIG in names
        is_averaged = any(name.startswith(prefix) for name in averaged)
        if any(map(_is_weights, names)) and not is_adapter and not is_averaged:
            models.append(prefix)
            continue
        files += [
            Companion(prefix + name, folder / prefix / name)
            for name in names
            if is_adapter or not _is_weights(name)
        ]
        waiting += [f"{prefix}{name}/" for name in folders if not NO_CHECKPOINTS.search(name)]
    return Companions(tuple(files), tuple(models))


def _listed(folder: Path, storage: Storage) -> tuple[list[str], list[str]]:
    """Return the names of files and of folders in a folder, but for training state and logs.

    Links to files are followed (the Hub's cache is made of them), links to folders are not.
    """
    names = [
        name
        for name in storage.names(folder)
        if not STAYS_BEHIND.search(name) and not METRIC_FILES.search(name)
    ]
    kinds = {name: storage.kind(folder / name) for name in names}
    folders = [name for name in names if kinds[name] is Kind.FOLDER]
    return (
        [name for name in names if kinds[name] is Kind.FILE],
        [name for name in folders if not storage.is_link(folder / name)],
    )


def _of_run(
    run: Path | None, own: Collection[str] | None, averaged: Collection[str], storage: Storage
) -> dict[str, Path]:
    """Return what the run keeps once for all checkpoints and the newest lacks.

    `own` are the companions in its folder, None if it is a file.
    """
    if run is None or not storage.is_folder(run):
        return {}
    if own is None:
        return _top_level(run, CONFIG_FILES, storage)
    if _has_pipeline(run, storage):
        return _pipeline(run, averaged, storage)
    # The files of a pipeline's components have their configurations beside them.
    is_pipeline = all(COMPONENT.search(name.split("/")[0]) for name in averaged)
    if not is_pipeline and not {"config.json", ADAPTER_CONFIG}.intersection(own):
        return _top_level(run, CONFIG_FILES, storage)
    if any(map(TOKENIZER_FILES.search, own)):
        return {}
    return _top_level(run, TOKENIZER_FILES, storage)


def _chosen(config_from: Path, averaged: Collection[str], storage: Storage) -> dict[str, Path]:
    """Return the files of the model or pipeline that --config-from names."""
    found: dict[str, Path] = {}
    if _has_pipeline(config_from, storage):
        found = _pipeline(config_from, averaged, storage)
    elif storage.is_folder(config_from):
        texts = _top_level(config_from, MODEL_TEXTS, storage)
        found = {name: path for name, path in texts.items() if not STAYS_BEHIND.search(name)}
    if not found:
        message = f"--config-from {config_from} is not a folder that holds a configuration."
        raise RefusedError(message, code=Code.NOT_FOUND, path=config_from)
    return found


def _top_level(folder: Path, names: Pattern[str], storage: Storage) -> dict[str, Path]:
    return {
        name: folder / name
        for name in storage.names(folder)
        if names.search(name) and storage.kind(folder / name) is Kind.FILE
    }


def _has_pipeline(folder: Path, storage: Storage) -> bool:
    return storage.kind(folder / PIPELINE_LIST) is Kind.FILE


def _pipeline(pipeline: Path, averaged: Collection[str], storage: Storage) -> dict[str, Path]:
    """Return what a pipeline of diffusers lists, weights included, but for what is averaged."""
    path = pipeline / PIPELINE_LIST
    try:
        listed = json.loads(storage.read(path) or b"")
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, dict):
        raise RefusedError(
            f"{path} is not a JSON object that lists components.", code=Code.WRONG_FORMAT, path=path
        )
    names = storage.names(pipeline)
    copied = [
        name
        for name in names
        if not (STAYS_BEHIND.search(name) or _is_weights(name))
        and storage.kind(pipeline / name) is Kind.FILE
    ]
    replaced = {name.split("/")[0] for name in averaged}
    for component in names & listed.keys():
        if storage.is_folder(pipeline / component):
            files = _files_below(pipeline, component, storage)
            copied += [f for f in files if component not in replaced or not _is_weights(f)]
    return {name: pipeline / name for name in copied}


def _files_below(root: Path, prefix: str, storage: Storage) -> Iterator[str]:
    """Yield the names, relative to `root`, of all files below its folder `prefix`."""
    for name in storage.names(root / prefix):
        path = f"{prefix}/{name}"
        kind = storage.kind(root / path)
        if kind is Kind.FILE:
            yield path
        elif kind is Kind.FOLDER and not storage.is_link(root / path):
            yield from _files_below(root, path, storage)


def _is_weights(name: str) -> bool:
    base = name.rpartition("/")[2]
    return bool(WEIGHTS_LIKE.search(base)) and not PROCESSOR_STATE.search(base)
