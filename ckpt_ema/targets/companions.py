"""The files that must travel with the weights: everything that is not weights or training state.

By exclusion, so that a tokenizer, a chat template or custom code that nobody thought of travels
as well, byte for byte. A folder inside the checkpoint that holds weights is another model and
stays behind; an adapter that is not averaged (PEFT's second one) travels whole. Where a trainer
saves no configuration, it is taken from the run's folder or from where the user says.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from re import Pattern
from typing import NamedTuple

from ckpt_ema.errors import RefusedError, printable
from ckpt_ema.storage import Storage
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
    """One file that travels."""

    name: str  # relative to the output
    source: Path


class Companions(NamedTuple):
    """What travels, and folders with weights of their own, which do not."""

    files: tuple[Companion, ...]
    models: tuple[str, ...]


def companions(
    folder: Path,
    averaged: Collection[str],
    run: Path | None,
    config_from: Path | None,
    storage: Storage,
    *,
    is_file: bool,
) -> Companions:
    """The companions of the newest checkpoint, whose model is in `folder`.

    `averaged` are the files in it that become the average, `run` is the run's folder (None if the
    checkpoints have none in common), `is_file` says that the checkpoint is one file among others,
    so that nothing beside it is its own. Raises `RefusedError` if a folder cannot be listed.
    """
    own: dict[str, Path] = {}
    models: list[str] = []
    try:
        if not is_file and (folder / PIPELINE_LIST).is_file():
            _add_pipeline(folder, own, averaged, storage)
        elif not is_file:
            _walk(folder, "", averaged, own, models)
        found = {**_of_run(run, averaged, own, storage, is_file=is_file), **own}
        if config_from is not None:
            # What was asked for wins, but for the configuration of a component that is averaged.
            chosen = _chosen(config_from, averaged, storage).items()
            found.update(
                {name: path for name, path in chosen if "/" not in name or name not in own}
            )
    except OSError as error:
        raise RefusedError(
            f"{printable(error.filename)} cannot be listed: {error.strerror}."
        ) from error
    kept = sorted(found.keys() - set(averaged))
    return Companions(tuple(Companion(name, found[name]) for name in kept), tuple(sorted(models)))


def _of_run(
    run: Path | None,
    averaged: Collection[str],
    own: dict[str, Path],
    storage: Storage,
    *,
    is_file: bool,
) -> dict[str, Path]:
    """What the run keeps once for all checkpoints, where the checkpoint lacks it."""
    found: dict[str, Path] = {}
    if run is None or not run.is_dir():
        return found
    if not is_file and (run / PIPELINE_LIST).is_file():
        _add_pipeline(run, found, averaged, storage)
        return found
    if is_file or not (own.keys() & {"config.json", ADAPTER_CONFIG} or _is_pipeline(averaged)):
        return _top_level(run, CONFIG_FILES)
    return {} if any(map(TOKENIZER_FILES.search, own)) else _top_level(run, TOKENIZER_FILES)


def _chosen(config_from: Path, averaged: Collection[str], storage: Storage) -> dict[str, Path]:
    """The files of a model or pipeline that a person chose."""
    if not config_from.is_dir():
        raise RefusedError(f"--config-from {printable(config_from)} is no folder.")
    found: dict[str, Path] = {}
    if (config_from / PIPELINE_LIST).is_file():
        _add_pipeline(config_from, found, averaged, storage)
    else:
        found = {
            name: path
            for name, path in _top_level(config_from, MODEL_TEXTS).items()
            if not STAYS_BEHIND.search(name)
        }
    if not found:
        raise RefusedError(f"--config-from {printable(config_from)} holds no configuration.")
    return found


def _top_level(folder: Path, names: Pattern[str]) -> dict[str, Path]:
    with os.scandir(folder) as entries:
        return {
            entry.name: Path(entry.path)
            for entry in entries
            if names.search(entry.name) and entry.is_file()
        }


def _is_pipeline(averaged: Collection[str]) -> bool:
    """Whether the averaged files are components, which have their configurations beside them."""
    return all(COMPONENT.search(name.split("/")[0]) for name in averaged)


def _add_pipeline(
    pipeline: Path, found: dict[str, Path], averaged: Collection[str], storage: Storage
) -> None:
    """A pipeline of diffusers: what its list names, weights included, but for what is averaged."""
    try:
        listed = json.loads(storage.read(pipeline / PIPELINE_LIST) or b"")
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{printable(pipeline / PIPELINE_LIST)} is not JSON.") from error
    if not isinstance(listed, dict):
        raise RefusedError(f"{printable(pipeline / PIPELINE_LIST)} lists no components.")
    replaced = {name.split("/")[0] for name in averaged}
    for entry in os.scandir(pipeline):
        if entry.is_file() and not STAYS_BEHIND.search(entry.name):
            if not _is_weights(entry.name):
                found[entry.name] = Path(entry.path)
        elif entry.is_dir() and entry.name in listed:
            for root, _, files in os.walk(entry.path):
                for file in files:
                    path = Path(root) / file
                    name = os.path.relpath(path, pipeline)
                    if entry.name not in replaced or not _is_weights(file):
                        found[name] = path


def _is_weights(name: str) -> bool:
    return bool(WEIGHTS_LIKE.search(name)) and not PROCESSOR_STATE.search(name)


def _walk(
    folder: Path,
    prefix: str,
    averaged: Collection[str],
    travel: dict[str, Path],
    models: list[str],
) -> None:
    files, folders = [], []
    for entry in os.scandir(folder):
        if STAYS_BEHIND.search(entry.name) or METRIC_FILES.search(entry.name):
            continue
        # Links to files are followed (the Hub's cache is made of them), links to folders are not.
        if entry.is_dir(follow_symlinks=False):
            if not NO_CHECKPOINTS.search(entry.name):
                folders.append(entry)
        elif entry.is_file():
            files.append(entry)
    has_weights = any(_is_weights(entry.name) for entry in files)
    is_adapter = prefix and any(entry.name == ADAPTER_CONFIG for entry in files)
    is_part = any(name.startswith(prefix) for name in averaged)
    if has_weights and not is_adapter and not is_part:
        models.append(prefix)
        return
    for entry in files:
        if is_adapter or not _is_weights(entry.name):
            travel[prefix + entry.name] = Path(entry.path)
    for entry in folders:
        _walk(Path(entry.path), f"{prefix}{entry.name}/", averaged, travel, models)
