"""Whether an output path may be written to: questions only, nothing is touched."""

import os
from collections.abc import Sequence
from pathlib import Path

from ckpt_ema.errors import RefusedError, printable
from ckpt_ema.storage import Storage


def check_destination(output: Path, inputs: Sequence[Path], storage: Storage) -> None:
    """Refuse an output path that would touch an input or could never be written.

    Raises `RefusedError`. Whether something is at the path already is not its question but that of
    `output.vacancy`.
    """
    shown = printable(output)
    real = os.path.realpath(output)
    for path, source in zip(inputs, storage.real_paths(inputs), strict=True):
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
