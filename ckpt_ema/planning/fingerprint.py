"""The fingerprint of an output: a digest of everything that decides its bytes, and nothing else."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_ema.containers.specs import FileSpec
from ckpt_ema.options import SAFETENSORS, Engine, Options
from ckpt_ema.storage import Storage, storage_for
from ckpt_ema.targets.companions import Companion

# Increase it when the arithmetic of the fold, the roles of tensors or the layout of files changes.
FOLD_VERSION = 2


def deciding(options: Options) -> dict[str, Any]:
    """Return the choices that change the bytes of an output from the same checkpoints."""
    choices = {"accumulate": precision(options.engine), "fold": FOLD_VERSION}
    save_as = options.output.save_as or SAFETENSORS
    return {**options.deciding(), **choices, "save_as": save_as}


def precision(engine: Engine) -> str:
    """Return the dtype of the fold, as far as known without torch: some devices lack float64."""
    lacks = engine.device.split(":")[0] == "mps"
    if engine.device == "auto":
        lacks = (platform.system(), platform.machine()) == ("Darwin", "arm64")
    return "float32" if lacks else engine.accumulate


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
    `deciding` returns.
    """
    folders = storage.real_paths(folder for folder, _ in inputs)
    files = [(folder, *files) for folder, (_, files) in zip(folders, inputs, strict=True)]
    copied = [(one.name, *storage_for(one.source).identity(one.source)) for one in companions]
    text = json.dumps([files, copied, provenance, choices])
    return hashlib.sha256(text.encode()).hexdigest()
