"""What is at an output path already, and whether it may be replaced: nothing is touched."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckpt_ema.errors import RefusedError, printable, some
from ckpt_ema.output.manifest import read_manifest
from ckpt_ema.trainers.conventions import (
    CONFIG_FILES,
    FOLDER_WEIGHTS,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    OWN_FILES,
    SHARD_NUMBER,
)


def check_vacant(output: Path, overwrite: bool) -> None:
    """Refuse to write where something is, unless `overwrite` is given and it may be replaced.

    Files that we wrote may be, and those that make up a model; what else is in their folder is
    somebody's. So a run, a project, notes beside a model never are. Raises `RefusedError`.
    """
    shown = printable(output)
    if output.suffix == ".safetensors" and os.path.isdir(output):
        raise RefusedError(f"The output {shown} is a folder, and its name asks for one file.")
    if is_vacant(output):
        return
    if not overwrite:
        raise RefusedError(
            f"The output {shown} exists already and is not this average.",
            "Choose another with --output, or replace it with --overwrite.",
        )
    others = sorted(_others(output))
    if others:
        raise RefusedError(
            f"The output {shown} is more than a model; --overwrite would delete {some(others, 3)}.",
            "Move that elsewhere, or choose another with --output.",
        )


def is_vacant(output: Path) -> bool:
    """Whether nothing is at the path, or an empty folder."""
    return not os.path.lexists(output) or (os.path.isdir(output) and not os.listdir(output))


def averages_in(folder: Path) -> list[Path]:
    """The folder itself if it is an average of ours, or those in it if it holds nothing else."""
    if os.path.lexists(folder / MANIFEST_NAME):
        return [folder]
    if not os.path.isdir(folder):
        return []
    inside = [folder / name for name in os.listdir(folder)]
    return inside if all(os.path.lexists(path / MANIFEST_NAME) for path in inside) else []


def _others(output: Path) -> Iterator[str]:
    """What is at the path, or in the folder there, and is no part of a model."""
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
    """The files of an average of ours, by its manifest."""
    names = {file["name"] for file in manifest.get("files", [])}
    indexes = {f"{SHARD_NUMBER.sub('', name)}{INDEX_SUFFIX}" for name in names}
    return {*names, *indexes, *manifest.get("companions", []), *OWN_FILES}


def _others_in_model(folder: Path) -> Iterator[str]:
    """What a folder that we did not write holds beside one model."""
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_dir() for entry in entries}
    weights = {name for name in found if name in FOLDER_WEIGHTS or SHARD_NUMBER.search(name)}
    for name, is_folder in found.items():
        text = CONFIG_FILES.search(name) or name in OWN_FILES
        if is_folder or not weights or (name not in weights and not text):
            yield name
