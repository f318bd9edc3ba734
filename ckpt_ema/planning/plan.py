"""Everything decided before a tensor is read: the frozen `Plan` of one average.

All checks of the inputs happen here, from headers alone; what follows only carries the plan out.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt_ema.discovery.completeness import complete
from ckpt_ema.discovery.discover import Found, discover
from ckpt_ema.discovery.order import Checkpoint, Read
from ckpt_ema.errors import OptionError, RefusedError, printable, some
from ckpt_ema.files import real_paths
from ckpt_ema.formats import read_specs
from ckpt_ema.formats.specs import MOST_READ_PER_WANTED, Specs, Weights
from ckpt_ema.options import DTYPES, Options, PathLike
from ckpt_ema.planning.companions import Companion, Companions, companions
from ckpt_ema.planning.compare import check_alike
from ckpt_ema.planning.configs import check_configs
from ckpt_ema.planning.destination import check_destination
from ckpt_ema.planning.outputs import OutputFile, make_indexes, output_files
from ckpt_ema.planning.remarks import gaps, run_notes, run_warnings
from ckpt_ema.planning.renaming import unified, without_prefix
from ckpt_ema.planning.spans import Work, make_work
from ckpt_ema.schedules import formulas as rules


@dataclass(frozen=True, slots=True)
class PlannedCheckpoint:
    """One checkpoint of the plan: its place in the average, and what its headers say."""

    path: Path
    name: str  # what to call it
    step: int | None
    unit: str  # what `step` counts
    gap: int | None  # steps since the checkpoint before, where that is known
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
    indexes: tuple[tuple[str, bytes], ...]  # names and contents of the indexes of shards
    companions: tuple[Companion, ...]  # files that travel with the weights
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
    return _plan(run, Options(**options))


def _plan(run: PathLike | Sequence[PathLike], options: Options) -> Plan:
    paths = [_named(path) for path in ([run] if isinstance(run, str | os.PathLike) else run)]
    if not paths:
        raise OptionError("No run and no checkpoints were given.")

    @functools.cache
    def read(weights: Weights) -> Specs:
        specs = read_specs(weights, options.key)
        if not specs.tensors:
            raise RefusedError(f"{printable(weights.path)} holds no tensors.")
        return specs

    found = complete(discover(paths, options, read), options, read)
    destination = Path(options.output) if options.output is not None else _sibling(found.root)
    check_destination(destination, [*paths, *_inputs(found)])
    specs, warnings = _compared(found.checkpoints, read, options)
    checkpoints = _planned(found.checkpoints, specs, options)
    newest = found.checkpoints[-1]
    single_name = destination.name if _is_single_file(destination) else None
    travelling = _travelling(found, specs[-1], options, single_name)
    fingerprint = _fingerprint(checkpoints, travelling.files, options, single_name)
    provenance = _provenance(checkpoints, options)
    if single_name:  # a folder has it in its manifest
        provenance["fingerprint"] = fingerprint
    files = output_files(specs[-1], DTYPES[options.dtype], single_name, provenance)
    part_names = [part.name for part in newest.weights.parts]
    return Plan(
        run=os.fspath(found.root),
        checkpoints=checkpoints,
        options=options,
        output=destination,
        files=files,
        indexes=() if single_name else tuple(make_indexes(files, part_names)),
        companions=travelling.files,
        work=make_work(specs, files),
        threads=options.threads or _cores(),
        fingerprint=fingerprint,
        left_out=found.left_out,
        notes=(*run_notes(found.checkpoints, specs), *_left_behind(travelling.models)),
        warnings=(
            *found.warnings,
            *run_warnings(found.checkpoints, specs, options),
            *warnings,
        ),
    )


def _compared(
    checkpoints: Sequence[Checkpoint], read: Read, options: Options
) -> tuple[list[Specs], list[str]]:
    """The checkpoints' specs under common names, checked to be of one model; and warnings."""
    names = [checkpoint.name for checkpoint in checkpoints]
    specs = [read(checkpoint.weights) for checkpoint in checkpoints]
    if options.strip_prefix:
        specs = without_prefix(specs, options.strip_prefix)
    specs, name_warnings = unified(names, _shared(specs))
    folders = [checkpoint.weights.folder for checkpoint in checkpoints]
    config_warnings = check_configs(names, folders, specs)
    return specs, [*name_warnings, *check_alike(names, specs), *config_warnings]


def _inputs(found: Found) -> list[Path]:
    """The checkpoints, and what lies elsewhere behind their links."""
    links = [c.weights.path for c in found.checkpoints if c.weights.path.is_symlink()]
    return [*(checkpoint.path for checkpoint in found.checkpoints), *links]


def _shared(checkpoints: Sequence[Specs]) -> list[Specs]:
    """One layout for the whole run: memory does not grow with the number of checkpoints."""
    shared: list[Specs] = []
    for specs in checkpoints:
        same = shared and specs.tensors == shared[-1].tensors
        shared.append(replace(specs, tensors=shared[-1].tensors) if same else specs)
    return shared


def _travelling(
    found: Found, newest: Specs, options: Options, single_name: str | None
) -> Companions:
    if single_name:
        return Companions((), ())
    checkpoint = found.checkpoints[-1]
    return companions(
        checkpoint.weights.folder,
        [file.name for file in newest.files],
        _shared_folder(found),
        Path(options.config_from) if options.config_from is not None else None,
        is_file=not checkpoint.path.is_dir(),
    )


def _shared_folder(found: Found) -> Path | None:
    """The folder that all checkpoints share; None for a list from several folders."""
    folders = {os.path.dirname(os.path.abspath(c.path)) for c in found.checkpoints}
    return found.root if len(folders) == 1 else None


def _left_behind(models: Sequence[str]) -> list[str]:
    if not models:
        return []
    return [f"Folders with weights of their own are left behind: {some(list(models))}."]


def _named(path: PathLike) -> Path:
    """The path with a name to call it by, which "." and ".." lack."""
    given = Path(path)
    return given if given.name not in ("", "..") else Path(os.path.abspath(given))


def _sibling(root: Path) -> Path:
    named = _named(root)
    if not named.name:
        raise OptionError("The checkpoints share no folder; say where to write with --output.")
    return named.parent / f"{named.name.removesuffix('.safetensors')}-ema"


def _is_single_file(output: Path) -> bool:
    return output.suffix == ".safetensors"


def _planned(
    checkpoints: Sequence[Checkpoint], specs: Sequence[Specs], options: Options
) -> tuple[PlannedCheckpoint, ...]:
    decays = rules.decays(len(checkpoints), options.schedule, options.decay)
    rows = zip(
        checkpoints, gaps(checkpoints), [None, *decays], rules.weights(decays), specs, strict=True
    )
    return tuple(
        PlannedCheckpoint(c.path, c.name, c.step, c.unit, gap, decay, weight, c.weights.folder, one)
        for c, gap, decay, weight, one in rows
    )


def _provenance(checkpoints: Sequence[PlannedCheckpoint], options: Options) -> dict[str, object]:
    """What the header of the output says of its making; the same wherever and whenever it runs."""
    return {
        "schedule": options.schedule,
        "decay": options.decay,
        "checkpoints": [
            {"name": checkpoint.name, "step": checkpoint.step, "weight": checkpoint.weight}
            for checkpoint in checkpoints
        ],
    }


def _fingerprint(
    checkpoints: Sequence[PlannedCheckpoint],
    travelling: Sequence[Companion],
    options: Options,
    single_name: str | None,
) -> str:
    """A digest of inputs (path, size, mtime, header of each file), weights and choices."""
    folders = real_paths(checkpoint.folder for checkpoint in checkpoints)
    inputs = [
        (folder, checkpoint.weight, *checkpoint.specs.files)
        for folder, checkpoint in zip(folders, checkpoints, strict=True)
    ]
    stats = [(file.name, file.source.stat()) for file in travelling]
    side_files = [(name, status.st_size, status.st_mtime_ns) for name, status in stats]
    choices = [
        options.schedule,
        options.decay,
        options.dtype,
        options.accumulate,
        options.allow_nonfinite,
        options.key,
        options.strip_prefix,
        single_name,
    ]
    return hashlib.sha256(json.dumps([inputs, side_files, choices]).encode()).hexdigest()


def _cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1
