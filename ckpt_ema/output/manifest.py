"""Results, and provenance as plain values: what was averaged into what; kept with every output.

A folder holds it as `ckpt_ema.json`, a single file in its header. It marks an output as ours, and
shows a second run with the same inputs and options that the output is up to date. Plans and
manifests follow the schemas in `docs/schema`; a change that breaks readers needs a new `VERSION`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckpt_ema import __version__
from ckpt_ema.containers.safetensors import read_specs
from ckpt_ema.errors import CkptEmaError, RefusedError
from ckpt_ema.find.verdict import Judged
from ckpt_ema.notices import Notice
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan, PlannedCheckpoint
from ckpt_ema.storage import storage_for
from ckpt_ema.storage.local import Local
from ckpt_ema.targets.target import Output, OutputFile
from ckpt_ema.trainers.conventions import MANIFEST_NAME, PROVENANCE_KEY

VERSION = 1
_CONVENTION = (
    "the first checkpoint initializes the shadow; the j-th is folded with num_updates = j - 1"
)


@dataclass(frozen=True, slots=True)
class Result:
    """Averages that were made, or a share of their work.

    Whoever publishes the output has its manifests; for a part, and for every rank of a launch but
    the first, `manifests` is empty.
    """

    output: Path  # the folder or the file; of several averages, the folder of all
    outputs: tuple[Path, ...]  # of each average
    is_up_to_date: bool = False  # they were there already, and nothing was read
    device: str = ""  # what they were folded on; empty if nothing was folded
    seconds: float = 0.0  # of reading, folding and writing; the sum over parts
    peak_memory_bytes: int = 0  # resident; of the largest process
    bytes_read: int = 0  # of tensor data
    bytes_written: int = 0  # of model files
    warnings: tuple[Notice, ...] = ()  # what only reading shows
    # None of `finish` alone, which needs none; callers of `average` need not ask.
    plan: Plan = None  # type: ignore[assignment]
    manifests: tuple[Mapping[str, Any], ...] = ()  # the content of each ckpt_ema.json


def describe(plan: Plan, average: Average, command: str | None = None) -> dict[str, Any]:
    """Return one average of a plan as plain values, ready for JSON; sizes are in bytes."""
    made_by = {"ckpt_ema": __version__, "command": command}
    return {**made_by, **_describe_run(plan), **_describe_average(plan, average)}


def _describe_average(plan: Plan, average: Average) -> dict[str, Any]:
    decays = (None, *average.decays)
    weighted = zip(average.members, average.gaps, decays, average.weights, strict=True)
    return {
        "name": average.name,
        "output": os.fspath(average.output.path),
        "schedule": average.rule.schedule,
        **average.rule.numbers,
        "convention": _CONVENTION,
        "checkpoints": [
            _describe_checkpoint(plan.checkpoints[number], gap=gap, decay=decay, weight=weight)
            for number, gap, decay, weight in weighted
        ],
        "statistics": {"unit": average.unit, **average.statistics._asdict()},
        "files": [
            {"name": file.name, "bytes": file.size_bytes, "tensors": len(file.tensors)}
            for file in average.output.files
        ],
        "companions": [companion.name for companion in average.output.companions],
        "dtype": plan.dtype,
        "bytes_written": sum(file.size_bytes for file in average.output.files),
        "fingerprint": average.output.fingerprint,
        **_describe_state(average.output.state),
    }


def _describe_state(state: OutputFile | None) -> dict[str, Any]:
    """Return the state of an average, but for the checksum of its values."""
    if state is None:
        return {}
    header = state.chunks[0].content[8:]
    digest = hashlib.sha256(header).hexdigest()
    return {"state": {"name": state.name, "bytes": state.size_bytes, "header_sha256": digest}}


def _describe_checkpoint(checkpoint: PlannedCheckpoint, **weighting: Any) -> dict[str, Any]:
    files = [
        {
            "name": f.name,
            "bytes": f.size_bytes,
            "mtime_ns": f.mtime_ns,
            "header_sha256": f.digest,
            **({"tag": f.tag} if f.tag else {}),
        }
        for f in checkpoint.specs.files
    ]
    return {
        "path": os.fspath(checkpoint.path),
        "name": checkpoint.name,
        "step": checkpoint.step,
        "unit": checkpoint.unit,
        **weighting,
        "files": files,
    }


def describe_making(result: Result, sync: bool) -> dict[str, Any]:
    """Return how making the averages went, and whether all files were synced."""
    return {
        "sync": sync,
        "warnings_of_reading": [warning.described() for warning in result.warnings],
        "device": result.device,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return a whole plan as plain values; its averages have their tensors too."""
    return {
        **_describe_run(plan),
        "output": os.fspath(plan.output),
        "bytes_written": plan.bytes_written,
        "entries": [_describe_entry(one) for one in plan.judged],
        "tensor_roles": [
            {**asdict(one), "role": one.role.value, "reason": one.reason.value}
            for one in plan.tensor_roles
        ],
        "averages": [
            {**_describe_average(plan, average), "tensors": _describe_tensors(average)}
            for average in plan.averages
        ],
    }


def _describe_run(plan: Plan) -> dict[str, Any]:
    return {
        "version": VERSION,
        "run": plan.run,
        "paths": list(plan.paths),
        "options": dict(plan.given),
        "accumulate": plan.engine.accumulate,
        "device": plan.engine.device,
        "threads": plan.threads,
        "bytes_read": plan.bytes_read,
        **({} if plan.requests is None else {"requests": plan.requests}),
        "memory_bytes": plan.memory_bytes,
        "left_out": [_describe_entry(one) for one in plan.left_out],
        "notes": [note.described() for note in plan.notes],
        "warnings": [warning.described() for warning in plan.warnings],
    }


def _describe_entry(judged: Judged) -> dict[str, str]:
    verdict = judged.verdict
    values = {"outcome": verdict.outcome.value, "reason": verdict.reason.value}
    return {"path": os.fspath(judged.path), **asdict(verdict), **values}


def _describe_tensors(average: Average) -> list[dict[str, Any]]:
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
    """Return whether the averages of a plan are at the output path already, every file whole."""
    if not all(is_made(average.output) for average in plan.averages):
        return False
    folders = {average.output.path for average in plan.averages} - {plan.output}
    return not folders or {path.name for path in folders} == set(os.listdir(plan.output))


def is_made(output: Output) -> bool:
    """Return whether an output is at its path already, every file whole."""
    if read_manifest(output.path).get("fingerprint") != output.fingerprint:
        return False
    if output.is_single_file:
        return True  # reading its header showed that the file is whole
    try:
        if any((output.path / name).read_bytes() != content for name, content in output.indexes):
            return False
        files = (*output.files, *([output.state] if output.state else []))
        return all(_is_whole(output.path / file.name, file) for file in files) and all(
            (output.path / name).stat().st_size == storage_for(source).identity(source).size_bytes
            for name, source in output.companions
        )
    except (OSError, RefusedError):
        return False


def _is_whole(path: Path, file: OutputFile) -> bool:
    with path.open("rb") as stream:
        for chunk in file.chunks:
            stream.seek(chunk.offset)
            if stream.read(len(chunk.content)) != chunk.content:
                return False
    return path.stat().st_size == file.size_bytes


def read_manifest(output: Path) -> dict[str, Any]:
    """Return the manifest of an output; empty if it is not one of ours."""
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
