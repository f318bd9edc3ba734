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
from typing import NamedTuple

from ckpt_ema.configs import ADAPTER_CONFIG
from ckpt_ema.errors import RefusedError, printable
from ckpt_ema.layouts import (
    COMPONENT,
    CONFIG_FILES,
    PIPELINE_LIST,
    PROCESSOR_STATE,
    STAYS_BEHIND,
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
    folder: Path, averaged: Collection[str], run: Path, config_from: Path | None, *, is_file: bool
) -> Companions:
    """The companions of the newest checkpoint, whose model is in `folder`.

    `averaged` are the files in it that become the average, `run` is the run's folder, `is_file`
    says that the checkpoint is one file among others, so that nothing beside it is its own.
    Raises `RefusedError` if a folder cannot be listed.
    """
    found: dict[str, Path] = {}
    models: list[str] = []
    try:
        if config_from is not None:
            _check_folder(config_from)
            _add_from(config_from, found, averaged)
        elif not is_file and (run / PIPELINE_LIST).is_file():
            _add_pipeline(run, found, averaged)
        elif is_file or not ((folder / "config.json").exists() or _is_pipeline(averaged)):
            _add_configs(run, found)
        if not is_file:
            own: dict[str, Path] = {}
            _walk(folder, "", averaged, own, models)
            found.update(own)  # the checkpoint's own files are newer than those of its run
    except OSError as error:
        raise RefusedError(
            f"{printable(error.filename)} cannot be listed: {error.strerror}."
        ) from error
    kept = sorted(found.keys() - set(averaged))
    return Companions(tuple(Companion(name, found[name]) for name in kept), tuple(sorted(models)))


def _is_pipeline(averaged: Collection[str]) -> bool:
    """Whether the averaged files are components, which have their configurations beside them."""
    return all(COMPONENT.search(name.split("/")[0]) for name in averaged)


def _check_folder(config_from: Path) -> None:
    if not config_from.is_dir():
        raise RefusedError(f"--config-from {printable(config_from)} is no folder.")


def _add_from(folder: Path, found: dict[str, Path], averaged: Collection[str]) -> None:
    if (folder / PIPELINE_LIST).is_file():
        _add_pipeline(folder, found, averaged)
    else:
        _walk(folder, "", averaged, found, [])


def _add_configs(run: Path, found: dict[str, Path]) -> None:
    """The configuration that a trainer keeps once for all checkpoints."""
    if run.is_dir():
        for entry in os.scandir(run):
            if CONFIG_FILES.search(entry.name) and entry.is_file():
                found[entry.name] = Path(entry.path)


def _add_pipeline(pipeline: Path, found: dict[str, Path], averaged: Collection[str]) -> None:
    """A pipeline of diffusers: what its list names, weights included, but for what is averaged."""
    try:
        listed = json.loads((pipeline / PIPELINE_LIST).read_bytes())
    except ValueError as error:
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
        if STAYS_BEHIND.search(entry.name):
            continue
        # Links to files are followed (the Hub's cache is made of them), links to folders are not.
        if entry.is_dir(follow_symlinks=False):
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
