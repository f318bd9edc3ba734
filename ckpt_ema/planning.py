"""Everything decided before a tensor is read: the frozen `Plan` of one average.

All checks of the inputs happen here, from headers alone; what follows only carries the plan out.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt_ema import schedule as rules
from ckpt_ema.companions import companions
from ckpt_ema.compare import check_alike
from ckpt_ema.destination import check_destination
from ckpt_ema.discover import Checkpoint, discover
from ckpt_ema.errors import OptionError, RefusedError, printable, some
from ckpt_ema.formats import read_specs
from ckpt_ema.formats.specs import AVERAGED, MOST_READ_PER_WANTED, Specs
from ckpt_ema.options import Options, PathLike, make_options
from ckpt_ema.outputs import OutputFile, make_index, needs_index, output_files
from ckpt_ema.spans import Work, make_work

_DTYPES = {"same": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class PlannedCheckpoint:
    """One checkpoint of the plan: its place in the average, and what its headers say."""

    path: Path
    step: int | None
    decay: float | None  # None for the first, which initialises the shadow
    weight: float
    folder: Path  # what the file names in `specs` are relative to
    specs: Specs


@dataclass(frozen=True, slots=True)
class Plan:
    """One average, decided. Checkpoints are oldest first; sizes are in bytes."""

    run: str
    checkpoints: tuple[PlannedCheckpoint, ...]
    options: Options
    output: Path  # a folder, or one .safetensors file
    files: tuple[OutputFile, ...]
    index: tuple[str, bytes] | None  # name and content of the index of shards
    companions: tuple[str, ...]  # files that travel, relative to the newest checkpoint
    work: Work
    threads: int
    fingerprint: str  # of all that decides the output's bytes
    left_out: tuple[tuple[Path, str], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def newest(self) -> PlannedCheckpoint:
        """The last checkpoint: it gives the output its names, dtypes, shards and side files."""
        return self.checkpoints[-1]

    @property
    def is_single_file(self) -> bool:
        """Whether the output is one .safetensors file and no folder."""
        return _is_single_file(self.output)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data to read, each once."""
        return self.work.bytes_read()

    @property
    def bytes_written(self) -> int:
        """Bytes of the model files to write."""
        return sum(file.size_bytes for file in self.files)

    @property
    def memory_bytes(self) -> int:
        """What the fold allocates beyond torch itself, whatever the size of the model."""
        wide = 4 if self.options.accumulate == "float32" else 8
        gathered = 8 * MOST_READ_PER_WANTED if any(s.in_pieces for s in self.work.spans) else 0
        # What is read, widened (float16 in two steps), the shadow, and what is rounded.
        return self.threads * self.options.tile_elements * (gathered + 8 + 4 + wide + wide + 8)


def plan(run: PathLike | Sequence[PathLike], **options: Any) -> Plan:
    """Decide an average of the checkpoints in `run`: a folder, or checkpoints oldest first.

    The options are the fields of `ckpt_ema.options.Options`: `decay`, `output` (a folder, or a path
    that ends in .safetensors for one file; by default a sibling of the run, `RUN-ema`), `dtype`
    (what averaged tensors are written in), and so on. Reads headers only and does not import torch.

    Raises `OptionError` for an impossible option and `RefusedError` for inputs that cannot be
    averaged, or an output path that would touch them.
    """
    return _plan(run, make_options(options))


def _plan(run: PathLike | Sequence[PathLike], options: Options) -> Plan:
    paths = [_named(path) for path in ([run] if isinstance(run, str | os.PathLike) else run)]
    if not paths:
        raise OptionError("No run and no checkpoints were given.")
    found = discover(paths)
    root = _root(paths, found.checkpoints)
    destination = Path(options.output) if options.output is not None else _sibling(root)
    inputs = [path for c in found.checkpoints for path in (c.path, c.weights)]
    check_destination(destination, [*paths, *inputs])
    decays = rules.decays(len(found.checkpoints), options.schedule, options.decay)
    checkpoints = _planned(found.checkpoints, decays)
    specs = [checkpoint.specs for checkpoint in checkpoints]
    dtype_warnings = check_alike([checkpoint.path.name for checkpoint in checkpoints], specs)
    newest = found.checkpoints[-1]
    single_name = destination.name if _is_single_file(destination) else None
    weights_files = [file.name for file in specs[-1].files]
    travelling, models = (
        companions(newest.path, weights_files)
        if newest.path.is_dir() and not single_name
        else ((), ())
    )
    fingerprint = _fingerprint(checkpoints, travelling, options, single_name)
    provenance = _provenance(checkpoints, options)
    if single_name:  # a folder has it in its manifest
        provenance["fingerprint"] = fingerprint
    files = output_files(specs[-1], _DTYPES[options.dtype], single_name, provenance)
    return Plan(
        run=os.fspath(root),
        checkpoints=checkpoints,
        options=options,
        output=destination,
        files=files,
        index=make_index(files, newest.weights.name) if needs_index(files) else None,
        companions=travelling,
        work=make_work(specs, files),
        threads=options.threads or _cores(),
        fingerprint=fingerprint,
        left_out=found.left_out,
        notes=_notes(checkpoints, models),
        warnings=(
            *found.warnings,
            *_schedule_warnings(options.schedule, options.decay, len(checkpoints)),
            *dtype_warnings,
        ),
    )


def _named(path: PathLike) -> Path:
    """The path with a name to call it by, which "." and ".." lack."""
    given = Path(path)
    return given if given.name not in ("", "..") else Path(os.path.abspath(given))


def _root(paths: Sequence[Path], checkpoints: Sequence[Checkpoint]) -> Path:
    """The folder that the run lives in, or the one checkpoint that is all there is."""
    if len(paths) == 1 and paths[0] != checkpoints[0].path:
        return paths[0]
    if len(checkpoints) == 1 and checkpoints[0].step is None:
        return checkpoints[0].path
    parents = {Path(os.path.abspath(checkpoint.path)).parent for checkpoint in checkpoints}
    if len(parents) == 1:
        return checkpoints[0].path.parent
    return Path(os.path.commonpath(parents))


def _sibling(root: Path) -> Path:
    named = _named(root)
    return named.parent / f"{named.name.removesuffix('.safetensors')}-ema"


def _is_single_file(output: Path) -> bool:
    return output.suffix == ".safetensors"


def _planned(
    checkpoints: Sequence[Checkpoint], decays: Sequence[float]
) -> tuple[PlannedCheckpoint, ...]:
    planned: list[PlannedCheckpoint] = []
    rows = zip(checkpoints, [None, *decays], rules.weights(decays), strict=True)
    for checkpoint, decay, weight in rows:
        specs = read_specs(checkpoint.weights)
        if not specs.tensors:
            raise RefusedError(f"{printable(checkpoint.path)} holds no tensors.")
        if planned and specs.tensors == planned[-1].specs.tensors:
            # One layout for the whole run: memory does not grow with the number of checkpoints.
            specs = replace(specs, tensors=planned[-1].specs.tensors)
        planned.append(
            PlannedCheckpoint(
                checkpoint.path, checkpoint.step, decay, weight, checkpoint.folder, specs
            )
        )
    return tuple(planned)


def _provenance(checkpoints: Sequence[PlannedCheckpoint], options: Options) -> dict[str, object]:
    """What the header of the output says of its making; the same wherever and whenever it runs."""
    return {
        "schedule": options.schedule,
        "decay": options.decay,
        "checkpoints": [
            {"name": checkpoint.path.name, "step": checkpoint.step, "weight": checkpoint.weight}
            for checkpoint in checkpoints
        ],
    }


def _fingerprint(
    checkpoints: Sequence[PlannedCheckpoint],
    travelling: Sequence[str],
    options: Options,
    single_name: str | None,
) -> str:
    """A digest of inputs (path, size, mtime, header of each file), weights and choices."""
    inputs = [
        (os.path.realpath(checkpoint.folder), checkpoint.weight, *checkpoint.specs.files)
        for checkpoint in checkpoints
    ]
    newest = checkpoints[-1].path
    stats = [(newest / name).stat() for name in travelling]
    side_files = [
        (name, status.st_size, status.st_mtime_ns)
        for name, status in zip(travelling, stats, strict=True)
    ]
    choices = [
        options.schedule,
        options.decay,
        options.dtype,
        options.accumulate,
        options.allow_nonfinite,
        single_name,
    ]
    return hashlib.sha256(json.dumps([inputs, side_files, choices]).encode()).hexdigest()


def _notes(checkpoints: Sequence[PlannedCheckpoint], models: Sequence[str]) -> tuple[str, ...]:
    newest = checkpoints[-1]
    notes = []
    kept: dict[str, list[str]] = {}
    for name, tensor in newest.specs.tensors.items():
        if tensor.dtype not in AVERAGED:
            kept.setdefault(tensor.dtype, []).append(name)
    for dtype, names in kept.items():
        notes.append(
            f"{dtype} tensors are not averaged but keep the value of"
            f" {printable(newest.path.name)}: {some(names)}."
        )
    said = {note for checkpoint in checkpoints for note in checkpoint.specs.notes}
    notes += [f"{note}." for note in sorted(said)]
    if models:
        notes.append(f"Folders with weights of their own are left behind: {some(list(models))}.")
    return tuple(notes)


def _schedule_warnings(schedule: str, decay: float, count: int) -> list[str]:
    if count == 1:
        return ["There is one checkpoint only, so the average is that checkpoint."]
    first = rules.first_decay_that_matters(count)
    if schedule == "dynamic" and decay >= first:
        beyond = (
            f" ({decay:g} is reached beyond {rules.checkpoints_below_the_cap(decay)} checkpoints)"
            if decay < 1
            else ""
        )
        return [
            f"--decay {decay:g} changes nothing here: over {count} checkpoints the dynamic decay"
            f" ends at {first:.4g}, and the first decay to matter is one below that{beyond}."
        ]
    return []


def _cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1
