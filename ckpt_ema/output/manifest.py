"""Provenance: what was averaged into what, as plain values; kept with every output.

A folder holds it as `ckpt_ema.json`, a single file in its header. It marks an output as ours, and
tells a second run with the same inputs and choices that it is up to date.
"""

import json
import os
from pathlib import Path
from typing import Any

from ckpt_ema.errors import CkptEmaError
from ckpt_ema.files import open_regular, read_exactly
from ckpt_ema.formats.safetensors import read_specs
from ckpt_ema.layouts import MANIFEST_NAME
from ckpt_ema.planning.outputs import PROVENANCE_KEY, OutputFile
from ckpt_ema.planning.plan import Plan, PlannedCheckpoint


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, ready for JSON; `checkpoints` is oldest first, sizes in bytes."""
    return {
        "run": plan.run,
        "output": os.fspath(plan.output),
        "schedule": plan.options.schedule,
        "decay": plan.options.decay,
        "num_updates": "index: the first checkpoint initialises, the first fold has n = 1",
        "checkpoints": [_describe_checkpoint(checkpoint) for checkpoint in plan.checkpoints],
        "files": [
            {"name": file.name, "bytes": file.size_bytes, "tensors": len(file.tensors)}
            for file in plan.files
        ],
        "companions": [companion.name for companion in plan.companions],
        "dtype": plan.options.dtype,
        "accumulate": plan.options.accumulate,
        "device": plan.options.device,
        "threads": plan.threads,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "memory_bytes": plan.memory_bytes,
        "left_out": [{"path": os.fspath(path), "reason": why} for path, why in plan.left_out],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "fingerprint": plan.fingerprint,
    }


def describe_tensors(plan: Plan) -> list[dict[str, Any]]:
    """The output's tensors: name, file, dtype, shape, and whether it is averaged."""
    return [
        {
            "name": tensor.name,
            "file": file.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "averaged": tensor.averaged,
        }
        for file in plan.files
        for tensor in file.tensors
    ]


def is_up_to_date(plan: Plan) -> bool:
    """Whether this very average is at the output path already, every file whole."""
    if read_manifest(plan.output).get("fingerprint") != plan.fingerprint:
        return False
    if plan.is_single_file:
        return True  # its header was just read and found to cover the file
    try:
        if any((plan.output / name).read_bytes() != content for name, content in plan.indexes):
            return False
        return all(_is_whole(plan.output / file.name, file) for file in plan.files) and all(
            (plan.output / name).stat().st_size == source.stat().st_size
            for name, source in plan.companions
        )
    except OSError:
        return False


def _is_whole(path: Path, file: OutputFile) -> bool:
    with path.open("rb") as stream:
        header = stream.read(len(file.header))
    return header == file.header and path.stat().st_size == file.size_bytes


def read_manifest(output: Path) -> dict[str, Any]:
    """What an output says of itself; empty if it is not one of ours."""
    try:
        if os.path.isdir(output):
            path = os.fspath(output / MANIFEST_NAME)
            with open_regular(path) as file:
                text = read_exactly(path, file.fd, file.size_bytes, 0).decode()
        else:
            text = read_specs(os.fspath(output)).metadata[0].get(PROVENANCE_KEY, "{}")
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError, CkptEmaError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _describe_checkpoint(checkpoint: PlannedCheckpoint) -> dict[str, Any]:
    return {
        "path": os.fspath(checkpoint.path),
        "step": checkpoint.step,
        "unit": checkpoint.unit,
        "gap": checkpoint.gap,
        "decay": checkpoint.decay,
        "weight": checkpoint.weight,
        "files": [
            {
                "name": file.name,
                "bytes": file.size_bytes,
                "mtime_ns": file.mtime_ns,
                "header_sha256": file.digest,
            }
            for file in checkpoint.specs.files
        ],
    }
