"""Provenance: what was averaged into what, as plain values; kept with every output.

A folder holds it as `ckpt_ema.json`, a single file in its header. It marks an output as ours, and
tells a second run with the same inputs and choices that it is up to date.
"""

import json
import os
from pathlib import Path
from typing import Any

from ckpt_ema.containers.safetensors import read_specs
from ckpt_ema.errors import CkptEmaError
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan, PlannedCheckpoint
from ckpt_ema.storage.local import Local
from ckpt_ema.targets.safetensors_folder import Output, OutputFile
from ckpt_ema.trainers.conventions import MANIFEST_NAME, PROVENANCE_KEY

_CONVENTION = (
    "the first checkpoint initialises the shadow; the j-th is folded as num_updates = j - 1"
)


def describe(plan: Plan, average: Average) -> dict[str, Any]:
    """One average of a plan as plain values, ready for JSON; sizes are in bytes.

    `checkpoints` is oldest first; `bytes_read` counts what is read for all averages of the plan.
    """
    return {**_describe_run(plan), **_describe_average(plan, average)}


def _describe_average(plan: Plan, average: Average) -> dict[str, Any]:
    """What is an average's own: its weights and its output."""
    return {
        "name": average.name,
        "output": os.fspath(average.output.path),
        **_describe_weights(plan, average),
        "files": [
            {"name": file.name, "bytes": file.size_bytes, "tensors": len(file.tensors)}
            for file in average.output.files
        ],
        "companions": [companion.name for companion in average.output.companions],
        "dtype": plan.dtype,
        "bytes_written": sum(file.size_bytes for file in average.output.files),
        "fingerprint": average.output.fingerprint,
    }


def describe_plan(plan: Plan) -> dict[str, Any]:
    """A whole plan as plain values: what its averages share, and each with its tensors."""
    return {
        **_describe_run(plan),
        "output": os.fspath(plan.output),
        "bytes_written": plan.bytes_written,
        "averages": [
            {**_describe_average(plan, average), "tensors": _describe_tensors(average)}
            for average in plan.averages
        ],
    }


def _describe_run(plan: Plan) -> dict[str, Any]:
    """What all averages of a plan share, as plain values."""
    return {
        "run": plan.run,
        "options": dict(plan.given),
        "accumulate": plan.engine.accumulate,
        "device": plan.engine.device,
        "threads": plan.threads,
        "bytes_read": plan.bytes_read,
        "memory_bytes": plan.memory_bytes,
        "left_out": [entry.described() for entry in plan.left_out],
        "notes": [str(note) for note in plan.notes],
        "warnings": [str(warning) for warning in plan.warnings],
    }


def _describe_weights(plan: Plan, average: Average) -> dict[str, Any]:
    """The schedule of an average, its checkpoints with their weights, and what they come to."""
    rows = zip(
        average.members,
        average.gaps,
        (None, *average.decays),
        average.weights,
        strict=True,
    )
    return {
        "schedule": average.rule.schedule,
        **average.rule.numbers,
        "convention": _CONVENTION,
        "checkpoints": [
            _describe_checkpoint(plan.checkpoints[number], gap, decay, weight)
            for number, gap, decay, weight in rows
        ],
        "statistics": {"unit": average.unit, **average.statistics._asdict()},
    }


def _describe_tensors(average: Average) -> list[dict[str, Any]]:
    """The output's tensors: name, file, dtype, shape, and whether it is averaged."""
    return [
        {
            "name": tensor.name,
            "file": file.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "averaged": tensor.averaged,
        }
        for file in average.output.files
        for tensor in file.tensors
    ]


def is_up_to_date(plan: Plan) -> bool:
    """Whether these very averages are at the output path already, every file whole."""
    if not all(_is_up_to_date(average.output) for average in plan.averages):
        return False
    folders = {average.output.path for average in plan.averages} - {plan.output}
    return not folders or {path.name for path in folders} == set(os.listdir(plan.output))


def _is_up_to_date(output: Output) -> bool:
    if read_manifest(output.path).get("fingerprint") != output.fingerprint:
        return False
    if output.is_single_file:
        return True  # its header was just read and found to cover the file
    try:
        if any((output.path / name).read_bytes() != content for name, content in output.indexes):
            return False
        return all(_is_whole(output.path / file.name, file) for file in output.files) and all(
            (output.path / name).stat().st_size == source.stat().st_size
            for name, source in output.companions
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
            text = (Local().read(path) or b"").decode()
        else:
            text = read_specs(os.fspath(output), Local()).metadata[0].get(PROVENANCE_KEY, "{}")
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError, CkptEmaError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _describe_checkpoint(
    checkpoint: PlannedCheckpoint, gap: int | None, decay: float | None, weight: float
) -> dict[str, Any]:
    return {
        "path": os.fspath(checkpoint.path),
        "name": checkpoint.name,
        "step": checkpoint.step,
        "unit": checkpoint.unit,
        "gap": gap,
        "decay": decay,
        "weight": weight,
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
