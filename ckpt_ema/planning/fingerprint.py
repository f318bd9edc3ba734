"""The fingerprint of an output: a digest of everything that decides its bytes, and nothing else."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_ema.containers.specs import FileSpec
from ckpt_ema.options import Engine, Options
from ckpt_ema.storage import Storage
from ckpt_ema.targets.companions import Companion

# Raised by a change of the fold's arithmetic, or of how files are laid out.
FOLD_VERSION = 1


def deciding(options: Options) -> dict[str, Any]:
    """Return the choices that change the bytes of an output from the same checkpoints."""
    precision = "float32" if _lacks_float64(options.engine) else options.engine.accumulate
    return {**options.deciding(), "accumulate": precision, "fold": FOLD_VERSION}


def _lacks_float64(engine: Engine) -> bool:
    """Return whether the fold runs on a device without float64, as far as known without torch."""
    if engine.device == "auto":
        return (platform.system(), platform.machine()) == ("Darwin", "arm64")
    return engine.device.split(":")[0] == "mps"


def fingerprint(
    inputs: Sequence[tuple[Path, Sequence[FileSpec]]],
    companions: Sequence[Companion],
    provenance: Mapping[str, Any],
    choices: Mapping[str, Any],
    storage: Storage,
) -> str:
    """Return the digest of one output.

    `inputs` has the folder and the files of each checkpoint, known by path, size, time and header;
    `provenance` is what the output's headers hold, weights included; `choices` are those that
    `deciding` returns, and the name of a single file.
    """
    folders = storage.real_paths(folder for folder, _ in inputs)
    files = [(folder, *files) for folder, (_, files) in zip(folders, inputs, strict=True)]
    copied = [(one.name, *storage.identity(one.source)) for one in companions]
    text = json.dumps([files, copied, provenance, choices])
    return hashlib.sha256(text.encode()).hexdigest()
