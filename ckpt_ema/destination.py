"""Whether an output path may be written to: questions only, nothing is touched."""

import os
from collections.abc import Sequence
from pathlib import Path

from ckpt_ema.errors import RefusedError, printable
from ckpt_ema.layouts import MANIFEST_NAME, WEIGHTS_LIKE


def check_destination(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output path that would touch an input or could never be written.

    Raises `RefusedError`. Whether something is at the path already is not its question.
    """
    shown = printable(output)
    real = output.resolve()
    for path in inputs:
        source = path.resolve()
        if real == source or source in real.parents or real in source.parents:
            raise RefusedError(
                f"The output {shown} is, holds or lies inside the input {printable(path)}.",
                "Choose another with --output.",
            )
    if not output.parent.is_dir():
        raise RefusedError(
            f"The folder of the output, {printable(output.parent)}, does not exist or is no"
            " folder.",
            "Create it first.",
        )
    if os.path.lexists(output) and not (output.is_dir() or output.is_file()):
        raise RefusedError(f"The output {shown} exists and is neither a file nor a folder.")


def check_vacant(output: Path, overwrite: bool) -> None:
    """Refuse to write where something is, unless `overwrite` is given and it is a model.

    Raises `RefusedError`.
    """
    shown = printable(output)
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise RefusedError(
            f"The output {shown} exists already and is not this average.",
            "Choose another with --output, or replace it with --overwrite.",
        )
    if output.is_dir() and not output.is_symlink():
        names = [entry.name for entry in output.iterdir()]
        if not any(name == MANIFEST_NAME or WEIGHTS_LIKE.search(name) for name in names):
            raise RefusedError(
                f"The output {shown} is a folder that holds no model; --overwrite would delete"
                " what is in it.",
                "Remove it yourself, or choose another with --output.",
            )
