"""Whether an output path may be written to: questions only, nothing is touched."""

import os
from collections.abc import Sequence
from pathlib import Path

from ckpt_ema.errors import RefusedError, printable
from ckpt_ema.files import real_paths
from ckpt_ema.layouts import FOLDER_WEIGHTS, MANIFEST_NAME, SHARD_NUMBER, WEIGHTS_EXTENSION


def check_destination(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output path that would touch an input or could never be written.

    Raises `RefusedError`. Whether something is at the path already is not its question.
    """
    shown = printable(output)
    real = os.path.realpath(output)
    for path, source in zip(inputs, real_paths(inputs), strict=True):
        if f"{real}/".startswith(f"{source}/") or f"{source}/".startswith(f"{real}/"):
            raise RefusedError(
                f"The output {shown} is, holds or lies inside the input {printable(path)}.",
                "Choose another with --output.",
            )
    if not os.path.isdir(output.parent):
        raise RefusedError(
            f"The folder of the output, {printable(output.parent)}, does not exist or is no"
            " folder.",
            "Create it first.",
        )
    if os.path.lexists(output) and not (os.path.isdir(output) or os.path.isfile(output)):
        raise RefusedError(f"The output {shown} exists and is neither a file nor a folder.")


def check_vacant(output: Path, overwrite: bool) -> None:
    """Refuse to write where something is, unless `overwrite` is given and it may be replaced.

    An output of ours may be, and a folder that is a model and nothing more: it holds model files
    and no folders. So a run, a project or a home never is. Raises `RefusedError`.
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
    if not _is_model(output):
        raise RefusedError(
            f"The output {shown} exists and is more than a model; --overwrite would delete it.",
            "Remove it yourself, or choose another with --output.",
        )


def is_vacant(output: Path) -> bool:
    """Whether nothing is at the path, or an empty folder."""
    return not os.path.lexists(output) or (os.path.isdir(output) and not os.listdir(output))


def holds_averages(folder: Path) -> bool:
    """Whether a folder is an average of ours, or holds nothing but such folders."""
    if os.path.lexists(folder / MANIFEST_NAME):
        return True
    if not os.path.isdir(folder):
        return False
    inside = [folder / name for name in os.listdir(folder)]
    return bool(inside) and all(os.path.lexists(path / MANIFEST_NAME) for path in inside)


def _is_model(output: Path) -> bool:
    if not os.path.isdir(output):
        return output.suffix == ".safetensors"
    if holds_averages(output):
        return True
    with os.scandir(output) as entries:
        found = {entry.name: entry.is_dir() for entry in entries}
    weights = {name for name in found if WEIGHTS_EXTENSION.search(name)}
    shards = {name for name in weights if SHARD_NUMBER.search(name)}
    return (
        not any(found.values())
        and bool(weights)
        and weights <= shards | set(FOLDER_WEIGHTS)  # no series of checkpoints, no training state
    )
