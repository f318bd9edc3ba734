"""The frozen `Plan` of one or several averages: everything is decided before a tensor is read.

Inputs are checked here, from headers alone; what follows only executes the plan.
"""

import gc
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import Specs
from ckpt_ema.errors import Code, OptionError, RefusedError
from ckpt_ema.find.checkpoint import Checkpoint, Found
from ckpt_ema.find.complete import check_complete
from ckpt_ema.find.further import with_common_files
from ckpt_ema.find.logs import check_one_run, reader_of_logs
from ckpt_ema.find.run import discover
from ckpt_ema.find.select import select
from ckpt_ema.find.verdict import Judged
from ckpt_ema.notices import Notice, refuse_warnings
from ckpt_ema.options import (
    CHECKPOINT,
    Engine,
    Keywords,
    Options,
    PathLike,
    Reading,
    make_options,
)
from ckpt_ema.planning.average import Average, Weighted, make_averages, weigh
from ckpt_ema.planning.contents import judge_newest
from ckpt_ema.planning.fingerprint import deciding
from ckpt_ema.planning.notices import Decided, plan_notes, plan_warnings
from ckpt_ema.planning.output import find_destination, lay_out, named, with_format
from ckpt_ema.planning.roles import Ruling, TensorRole, by_pattern
from ckpt_ema.planning.same_model import Compared, compare
from ckpt_ema.planning.sizing import (
    KEPT_BYTES,
    element_bytes,
    fetched_elements,
    make_sizes,
    prefetched_bytes,
)
from ckpt_ema.planning.work import Work, make_work
from ckpt_ema.planning.write_back import with_masters_and_files
from ckpt_ema.storage import Storage, storages_anew
from ckpt_ema.storage.protocol import REQUEST_BYTES

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

    @classmethod
    def of(cls, one: Checkpoint, specs: Specs) -> "PlannedCheckpoint":
        """Return a checkpoint that was found, with its specs."""
        return cls(one.path, one.name, one.step, one.unit, one.model.folder, specs)


@dataclass(frozen=True, slots=True)
class Plan:
    """One or several averages, decided. Checkpoints are oldest first; sizes are in bytes."""

    run: str
    checkpoints: tuple[PlannedCheckpoint, ...]  # all that some average reads
    averages: tuple[Average, ...]
    rulings: Mapping[str, Ruling]  # on each tensor, by key
    storage: Storage
    engine: Engine
    given: Mapping[str, Any]  # the options that are not at their defaults
    dtype: str  # of averaged tensors, "same" for each its own
    card: bool
    reading: Reading
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
        return by_pattern(self.rulings)

    @property
    def is_single_file(self) -> bool:
        """Whether `output` is one file instead of a folder."""
        return self.averages[0].output.is_single_file

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data to read, each once."""
        return sum(span.bytes_read(self.work.layout_of) for span in self.work.spans)

    @property
    def requests(self) -> int | None:
        """How many requests read that from a remote storage; None for a file system."""
        if not self.storage.is_remote:
            return None
        fetched, kept = self.fetched_elements, self.tile_elements * KEPT_BYTES
        return sum(
            span.requests(self.work.layout_of, fetched if span.averaged else kept, REQUEST_BYTES)
            for span in self.work.spans
        )

    @property
    def fetched_elements(self) -> int:
        """Elements of each checkpoint of a remote run that are fetched at a time."""
        if self.engine.tile_size:
            return self.tile_elements
        return max(self.tile_elements, fetched_elements(self.engine, self.work))

    @property
    def bytes_written(self) -> int:
        """Bytes of the model files to write."""
        return sum(file.size_bytes for one in self.averages for file in one.output.files)

    @property
    def neighbours(self) -> list[tuple[int, int]]:
        """The pairs of checkpoints that follow each other in some average, by index."""
        return sorted({pair for one in self.averages for pair in pairwise(one.members)})

    @property
    def work_id(self) -> str:
        """A short digest of what decides the output's bytes and the numbers of the tiles."""
        outputs = [one.output for one in self.averages]
        parts = [f"{output.path.name}:{output.fingerprint}" for output in outputs]
        text = "\n".join([*parts, str(self.tile_elements)])
        return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]

    @property
    def memory_bytes(self) -> int:
        """The most that the fold allocates, without torch's own, whatever the size of the model.

        Includes what is fetched ahead from a remote storage.
        """
        each = element_bytes(self.engine, self.work, len(self.averages))
        fold = self.threads * self.tile_elements * each
        return fold + 2 * prefetched_bytes(self.engine) * self.storage.is_remote


def plan(run: PathLike | Sequence[PathLike], **options: "Unpack[Keywords]") -> Plan:
    """Decide averages of the checkpoints in `run`: a folder, or checkpoints oldest first.

    The options are those of the command line: `decay`, `half_life`, `last`, `output` (a folder, or
    a path that ends in .safetensors for one file; by default a sibling of the run, `RUN-ema`),
    `dtype` (of averaged tensors), and so on. Where an option has several values, each makes an
    average. Reads headers, and the start of tensors whose role these leave open.

    Raises `OptionError` for an impossible option and `RefusedError` for inputs that cannot be
    averaged, or an output path that overlaps them.
    """
    with uncollected():  # a plan is large and without cycles; collection would double the time
        return _plan(_paths(run), make_options(options))


def plan_to_read(run: PathLike | Sequence[PathLike], **options: "Unpack[Keywords]") -> Plan:
    """Decide as `plan` does, for who writes nothing: what is at the output path does not matter."""
    with uncollected():
        return _plan(_paths(run), make_options(options), Path("unwritten"))


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage inside of the block."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _plan(paths: Sequence[Path], options: Options, destination: Path | None = None) -> Plan:
    """Find, select, weigh, compare, lay out: each stage takes its own options."""
    storage, *others = storages_anew(paths)
    if any(other is not storage for other in others):
        message = "The checkpoints are in several places; all must be on disks, or in one store."
        raise OptionError(message, code=Code.INVALID_OPTION)
    source = Source(storage, options.reading)
    found = discover(paths, options.selection, source)
    log_of = reader_of_logs(source)
    selected = select(found, options.selection, source, log_of)
    found, selected = with_common_files(found, selected, source)
    weighted = weigh(selected.subsets, options.weighting)
    checkpoints = _taken(weighted, found)
    options = options._replace(output=with_format(options.output, checkpoints))
    one_run = check_one_run(checkpoints, log_of)
    if destination is None:
        destination = find_destination(options.output.output, found, paths, source.storage)
    compared = compare(checkpoints, source)
    if options.output.save_as == CHECKPOINT:
        compared = with_masters_and_files(compared, weighted, source)
    specs_of = compared.specs
    _check_names(weighted, compared)
    rulings = judge_newest(weighted, specs_of, options.reading, source.storage)
    laid_out = lay_out(
        weighted,
        specs_of,
        found,
        destination,
        options.output,
        rulings,
        deciding(options),
        source.storage,
    )
    averages = make_averages(weighted, checkpoints, laid_out.outputs)
    newest = list(rulings.values())[-1]
    decided = Decided(found, selected, one_run, compared, newest, laid_out, averages)
    return _assembled(decided, destination, source.storage, options)


def _assembled(decided: Decided, destination: Path, storage: Storage, options: Options) -> Plan:
    """Lay the work out, and put all that was decided together; raises for warnings if strict."""
    found, averages, specs_of = decided.found, decided.averages, decided.compared.specs
    work = make_work([*specs_of.values()], [(one.newest, one.output.files) for one in averages])
    tile_elements, threads = make_sizes(
        options.engine, work, len(averages), is_remote=storage.is_remote
    )
    warnings = tuple(plan_warnings(decided))
    refuse_warnings(warnings if options.engine.strict else ())
    return Plan(
        run=os.fspath(found.root),
        checkpoints=tuple(PlannedCheckpoint.of(*one) for one in specs_of.items()),
        averages=tuple(averages),
        rulings={**decided.rulings, **decided.compared.dropped},
        storage=storage,
        engine=options.engine,
        given=options.given(),
        dtype=options.output.dtype,
        card=options.output.card and options.output.save_as != CHECKPOINT,
        reading=options.reading,
        output=destination,
        work=work,
        threads=threads,
        tile_elements=tile_elements,
        judged=found.judged,
        notes=tuple(plan_notes(decided)),
        warnings=warnings,
    )


def _paths(run: PathLike | Sequence[PathLike]) -> list[Path]:
    given = [run] if isinstance(run, str | os.PathLike) else run
    if not given or not all(map(os.fspath, given)):  # an empty name would be the current folder
        raise OptionError("No run and no checkpoints were given.", code=Code.INVALID_OPTION)
    return [named(path) for path in given]


def _taken(averages: Sequence[Weighted], found: Found) -> list[Checkpoint]:
    """Return the checkpoints that some average takes, oldest first, all of them complete."""
    taken = {checkpoint for average in averages for checkpoint in average.checkpoints}
    checkpoints = [checkpoint for checkpoint in found.checkpoints if checkpoint in taken]
    check_complete(checkpoints, found)
    return checkpoints


def _check_names(averages: Sequence[Weighted], compared: Compared) -> None:
    """Refuse averages together whose outputs would have other tensor names when made alone."""
    newest = list(compared.specs)[-1]
    for last in (average.checkpoints[-1] for average in averages):
        if last in compared.renamed:
            both = f"{last.name} and {newest.name}, at which averages end,"
            message = f"{both} name their tensors differently."
            hint = "Make the averages one at a time."
            raise RefusedError(message, hint, code=Code.DIFFERENT_NAMES, path=last.path)
