"""The frozen `Plan` of one or several averages: everything is decided before a tensor is read.

Inputs are checked here, from headers alone; what follows only executes the plan.
"""

import contextlib
import gc
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import Specs
from ckpt_ema.errors import Code, OptionError, RefusedError
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.complete import check_complete
from ckpt_ema.find.found import Found
from ckpt_ema.find.run import discover
from ckpt_ema.find.select import select
from ckpt_ema.find.verdict import UNSELECTED, Judged
from ckpt_ema.notices import Notice
from ckpt_ema.options import (
    Engine,
    Keywords,
    Options,
    PathLike,
    Selection,
    Weighting,
    make_options,
)
from ckpt_ema.planning.advice import weight_notes, weight_warnings
from ckpt_ema.planning.average import Average, Weighted, make_averages, weigh
from ckpt_ema.planning.fingerprint import deciding
from ckpt_ema.planning.notices import run_notes, run_warnings
from ckpt_ema.planning.output import LaidOut, find_destination, lay_out, named
from ckpt_ema.planning.roles import Rule, TensorRole, all_rules, by_pattern
from ckpt_ema.planning.same_model import Compared, compare
from ckpt_ema.planning.sizing import element_bytes, make_sizes
from ckpt_ema.planning.work import Work, make_work
from ckpt_ema.storage import Storage, storage_for

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, slots=True)
class PlannedCheckpoint:
    """One checkpoint of the plan and what its headers hold."""

    path: Path
    name: str  # for people
    step: int | None
    unit: str  # what `step` counts
    folder: Path  # what the file names in `specs` are relative to
    specs: Specs


@dataclass(frozen=True, slots=True)
class Plan:
    """One or several averages, decided. Checkpoints are oldest first; sizes are in bytes."""

    run: str
    checkpoints: tuple[PlannedCheckpoint, ...]  # all that some average reads
    averages: tuple[Average, ...]
    tensor_rules: Mapping[str, Rule]  # that decided on each tensor, by key
    storage: Storage
    engine: Engine
    given: Mapping[str, Any]  # the options that are not at their defaults
    dtype: str  # of averaged tensors, "same" for each its own
    card: bool
    allow_nonfinite: bool
    allow_duplicates: bool
    output: Path  # of the one average, or the folder of all: they appear together
    work: Work
    threads: int
    tile_elements: int  # elements that a thread folds at a time
    judged: tuple[Judged, ...]  # every entry of the run, with its verdict
    notes: tuple[Notice, ...]
    warnings: tuple[Notice, ...]

    @property
    def left_out(self) -> tuple[Judged, ...]:
        """The entries that take no part although they might be expected to."""
        return tuple(entry for entry in self.judged if entry.is_left_out)

    @property
    def tensor_roles(self) -> tuple[TensorRole, ...]:
        """What becomes of tensors, by pattern of their names."""
        return by_pattern(self.tensor_rules)

    @property
    def is_single_file(self) -> bool:
        """Whether `output` is one file instead of a folder."""
        return self.averages[0].output.is_single_file

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data to read, each once."""
        return self.work.bytes_read()

    @property
    def bytes_written(self) -> int:
        """Bytes of the model files to write."""
        return sum(file.size_bytes for c in self.averages for file in c.output.files)

    @property
    def neighbours(self) -> list[tuple[int, int]]:
        """The pairs of checkpoints that follow each other in some average, by index."""
        return sorted({pair for c in self.averages for pair in pairwise(c.members)})

    @property
    def work_id(self) -> str:
        """A short digest of what decides the output's bytes and the numbers of the tiles."""
        parts = [f"{c.output.path.name}:{c.output.fingerprint}" for c in self.averages]
        text = "\n".join([*parts, str(self.tile_elements)])
        return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]

    @property
    def memory_bytes(self) -> int:
        """What the fold allocates in addition to torch, whatever the size of the model."""
        each = element_bytes(self.engine, self.work, len(self.averages))
        return self.threads * self.tile_elements * each


def plan(run: PathLike | Sequence[PathLike], **options: "Unpack[Keywords]") -> Plan:
    """Decide averages of the checkpoints in `run`: a folder, or checkpoints oldest first.

    The options are those of the command line: `decay`, `half_life`, `last`, `output` (a folder, or
    a path that ends in .safetensors for one file; by default a sibling of the run, `RUN-ema`),
    `dtype` (of averaged tensors), and so on. Where an option has several values, each makes an
    average. Reads headers only and does not import torch.

    Raises `OptionError` for an impossible option and `RefusedError` for inputs that cannot be
    averaged, or an output path that overlaps them.
    """
    with _collector_paused():
        return _plan(run, make_options(options))


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause garbage collection: plans are large, without cycles, and twice as quick without it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _plan(run: PathLike | Sequence[PathLike], options: Options) -> Plan:
    """Find, select, weigh, compare, lay out: each stage takes its own options."""
    paths = _paths(run)
    source = Source(storage_for(paths[0]), options.reading)
    chosen = _choose(paths, options.selection, options.weighting, source)
    output, found, storage = options.output, chosen.found, source.storage
    destination = find_destination(output.output, found, paths, storage)
    compared = compare(chosen.checkpoints, source)
    _check_names(chosen.averages, compared)
    laid_out = lay_out(
        chosen.averages, compared.specs, found, destination, output, deciding(options), storage
    )
    averages = make_averages(chosen.averages, laid_out.outputs, chosen.checkpoints)
    outputs = [(average.newest, average.output.files) for average in averages]
    work = make_work(list(compared.specs.values()), outputs)
    sizes = make_sizes(options.engine, work, len(averages))
    return Plan(
        run=os.fspath(found.root),
        checkpoints=_planned(compared.specs),
        averages=averages,
        tensor_rules=all_rules(laid_out.rulings, compared.dropped),
        storage=storage,
        engine=options.engine,
        given=options.given(),
        dtype=output.dtype,
        card=output.card,
        allow_nonfinite=options.reading.allow_nonfinite,
        allow_duplicates=options.reading.allow_duplicates,
        output=destination,
        work=work,
        threads=sizes.threads,
        tile_elements=sizes.tile_elements,
        judged=found.judged,
        notes=_notes(chosen, compared, laid_out, averages),
        warnings=_warnings(chosen, compared, averages),
    )


def _paths(run: PathLike | Sequence[PathLike]) -> list[Path]:
    given = [run] if isinstance(run, str | os.PathLike) else run
    if not given or not all(map(os.fspath, given)):  # an empty name would be the current folder
        raise OptionError("No run and no checkpoints were given.", code=Code.INVALID_OPTION)
    return [named(path) for path in given]


class _Chosen(NamedTuple):
    """What takes part, before headers are compared."""

    found: Found  # the run
    checkpoints: list[Checkpoint]  # those that some average takes, oldest first
    averages: list[Weighted]
    notes: tuple[Notice, ...]
    warnings: tuple[Notice, ...]


def _choose(
    paths: Sequence[Path], selection: Selection, weighting: Weighting, source: Source
) -> _Chosen:
    """Find the checkpoints, select among them, weigh them, and check that they are complete."""
    found = discover(paths, selection, source)
    selected = select(found, selection, source)
    averages = weigh(selected.subsets, weighting)
    taken = {checkpoint for average in averages for checkpoint in average.checkpoints}
    checkpoints = [checkpoint for checkpoint in found.checkpoints if checkpoint in taken]
    check_complete(checkpoints, found)
    warnings = (*found.warnings, *selected.warnings)
    return _Chosen(found, checkpoints, averages, selected.notes, warnings)


def _check_names(averages: Sequence[Weighted], compared: Compared) -> None:
    """Refuse averages together whose outputs would have other tensor names when made alone.

    An output takes the names of its newest checkpoint; all are read under those of the last one.
    """
    newest = list(compared.specs)[-1]
    for average in averages:
        last = average.checkpoints[-1]
        if last in compared.renamed:
            raise RefusedError(
                f"{last.name} and {newest.name}, at which averages end, name their tensors"
                " differently.",
                "Make the averages one at a time.",
                code=Code.DIFFERENT_NAMES,
                path=last.path,
            )


def _planned(specs_of: Mapping[Checkpoint, Specs]) -> tuple[PlannedCheckpoint, ...]:
    return tuple(
        PlannedCheckpoint(c.path, c.name, c.step, c.unit, c.model.folder, specs)
        for c, specs in specs_of.items()
    )


def _notes(
    chosen: _Chosen, compared: Compared, laid_out: LaidOut, averages: Sequence[Average]
) -> tuple[Notice, ...]:
    in_all = _found_in_all(chosen.found)
    about_run = run_notes(compared.specs, in_all, laid_out.rulings, laid_out.other_models)
    return (*chosen.notes, *weight_notes(averages), *about_run)


def _warnings(
    chosen: _Chosen, compared: Compared, averages: Sequence[Average]
) -> tuple[Notice, ...]:
    about_weights = weight_warnings(averages, [one.name for one in chosen.checkpoints])
    about_run = run_warnings(compared.specs)
    return (*chosen.warnings, *about_weights, *about_run, *compared.warnings)


def _found_in_all(found: Found) -> int:
    """Count the checkpoints of the run, with those that globs leave out."""
    return len(found.checkpoints) + sum(one.verdict.reason in UNSELECTED for one in found.left_out)
