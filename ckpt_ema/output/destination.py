"""What is at an output path, and whether it may be replaced; nothing is changed."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.output.manifest import read_manifest
from ckpt_ema.storage.local import Local
from ckpt_ema.trainers.conventions import (
    CONFIG_FILES,
    FOLDER_WEIGHTS,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    OWN_FILES,
    SHARD_NUMBER,
    TRACKERS,
)


def check_free(output: Path, overwrite: bool) -> None:
    """Raise `RefusedError` unless the path is free, or `overwrite` deletes only a model there."""
    if output.suffix == ".safetensors" and os.path.isdir(output):
        is_folder = f"The output {output} is a folder, but its name is that of a file."
        raise RefusedError(is_folder, code=Code.INVALID_OUTPUT, path=output)
    if is_free(output):
        return
    others = sorted(_others(output))
    if not (overwrite or others):
        problem = f"The output {output} already exists and is not this average."
        hint = "Choose another path with --output, or replace it with --overwrite."
        raise RefusedError(problem, hint, code=Code.OUTPUT_EXISTS, path=output)
    if others:
        what = "is more than a model" if os.path.isdir(output) else "is not a model"
        problem = (
            f"The output {output} exists and {what}; --overwrite would delete {some(others, 3)}."
        )
        hint = "Move those files, or choose another path with --output."
        raise RefusedError(problem, hint, code=Code.OUTPUT_EXISTS, path=output)


def check_replaced(output: Path, expected: Mapping[str, str]) -> None:
    """Raise `RefusedError` unless the path still has the averages that were continued.

    `expected` has their fingerprints by folder; it is empty for averages made from the start.
    """
    for folder, fingerprint in expected.items():
        if read_manifest(output / folder).get("fingerprint") != fingerprint:
            message = f"{output / folder} was replaced meanwhile; it is left as it is now."
            raise RefusedError(message, code=Code.OUTPUT_EXISTS, path=output / folder)


def is_free(output: Path) -> bool:
    """Return whether the path leads to nothing, or to an empty folder."""
    return not os.path.lexists(output) or (os.path.isdir(output) and not os.listdir(output))


def averages_in(folder: Path) -> list[Path]:
    """Return the folder itself if it is an output, or its subfolders if all of them are."""
    if os.path.lexists(folder / MANIFEST_NAME):
        return [folder]
    if not os.path.isdir(folder):
        return []
    inside = [folder / name for name in sorted(Local().names(folder))]
    return inside if all(os.path.lexists(path / MANIFEST_NAME) for path in inside) else []


def outputs_at(path: Path) -> list[Path]:
    """Return the outputs at a path: a file, a folder, or the folders in it."""
    return [path] if path.is_file() else averages_in(path)


def _others(output: Path) -> Iterator[str]:
    """Yield what is at the path, or in the folder there, and is not part of a model."""
    if not os.path.isdir(output):
        if output.suffix != ".safetensors":
            yield output.name
        return
    averages = averages_in(output)
    for folder in averages:
        own = _own_files(read_manifest(folder))
        for path in folder.rglob("*"):
            name = os.path.relpath(path, folder)
            if name not in own and (path.is_symlink() or not path.is_dir()):
                yield name
    if not averages:
        yield from _others_in_model(output)


def _own_files(manifest: dict[str, Any]) -> set[str]:
    """Return the files of an output, by its manifest; none that a damaged one does not name."""
    rows = [row for row in _listed(manifest.get("files")) if isinstance(row, Mapping)]
    names = {row["name"] for row in rows if isinstance(row.get("name"), str)}
    indexes = {f"{SHARD_NUMBER.sub('', name)}{INDEX_SUFFIX}" for name in names}
    companions = (one for one in _listed(manifest.get("companions")) if isinstance(one, str))
    return {*names, *indexes, *companions, *OWN_FILES, *TRACKERS}


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _others_in_model(folder: Path) -> Iterator[str]:
    """Yield what a folder that ckpt-ema did not write holds besides one model."""
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_dir() for entry in entries}
    weights = {name for name in found if name in FOLDER_WEIGHTS or SHARD_NUMBER.search(name)}
    for name, is_folder in found.items():
        text = CONFIG_FILES.search(name) or name in OWN_FILES
        if is_folder or not weights or (name not in weights and not text):
            yield name
