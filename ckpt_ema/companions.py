"""The files that must travel with the weights: everything that is not weights or training state.

By exclusion, so that a tokenizer, a chat template or custom code that nobody thought of travels
as well, byte for byte. A folder inside the checkpoint that holds weights is another model and
stays behind.
"""

import os
from collections.abc import Collection
from pathlib import Path

from ckpt_ema.errors import RefusedError, printable
from ckpt_ema.layouts import STAYS_BEHIND, WEIGHTS_LIKE


def companions(folder: Path, averaged: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names, relative to a checkpoint `folder`, of the files that travel; and of folders that hold
    weights of their own, which do not. `averaged` are the files that become the average.

    Raises `RefusedError` if a folder cannot be listed.
    """
    travel: list[str] = []
    models: list[str] = []
    try:
        _walk(folder, "", travel, models)
    except OSError as error:
        raise RefusedError(
            f"{printable(error.filename)} cannot be listed: {error.strerror}."
        ) from error
    return tuple(sorted(set(travel).difference(averaged))), tuple(sorted(models))


def _walk(folder: Path, prefix: str, travel: list[str], models: list[str]) -> None:
    files, folders = [], []
    for entry in os.scandir(folder):
        if STAYS_BEHIND.search(entry.name):
            continue
        # Links to files are followed (the Hub's cache is made of them), links to folders are not.
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry)
        elif entry.is_file():
            files.append(entry)
    if prefix and any(WEIGHTS_LIKE.search(entry.name) for entry in files):
        models.append(prefix)
        return
    travel += [prefix + entry.name for entry in files if not WEIGHTS_LIKE.search(entry.name)]
    for entry in folders:
        _walk(Path(entry.path), f"{prefix}{entry.name}/", travel, models)
