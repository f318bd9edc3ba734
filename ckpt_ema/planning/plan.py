"""Everything decided before a tensor is read: the frozen `Plan` of one or several averages.

All checks of the inputs happen here, from headers alone; what follows only carries the plan out.
"""

import contextlib
import gc
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import Specs
from ckpt_ema.errors import OptionError, RefusedError, printable, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.complete import check_complete
from ckpt_ema.find.found import Found
from ckpt_ema.find.run import discover
from ckpt_ema.find.select import select
from ckpt_ema.find.verdict import UNSELECTED, Judged
from ckpt_ema.notices import Notice
from ckpt_ema.options import Engine, Keywords, Options, PathLike, make_options
from ckpt_ema.planning.advice import advice
from ckpt_ema.planning.average import Average, Weighting, make_average, weigh
from ckpt_ema.planning.configs import check_configs
from ckpt_ema.planning.destination import check_destination
from ckpt_ema.planning.layout import Layout, lay_out
from ckpt_ema.planning.notices import run_notes, run_warnings
from ckpt_ema.planning.renaming import unified, without_prefix
from ckpt_ema.planning.same_model import check_alike
from ckpt_ema.planning.sizing import element_bytes, make_sizes
from ckpt_ema.planning.work import Work, make_work
from ckpt_ema.storage import Storage, storage_for
from ckpt_ema.targets.safetensors_folder import is_single_file

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, slots=True)
class PlannedCheckpoint:
    """One checkpoint of the plan and what its headers say."""

    path: Path
    name: str  # what to call it
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
    storage: Storage
    engine: Engine
    given: Mapping[str, Any]  # the options that are not at their defaults
    dtype: str  # of averaged tensors, "same" for each its own
    card: bool
    allow_nonfinite: bool
    allow_duplicates: bool
    output: Path  # of the one average, or the folder of all: they come into being together
    work: Work
    threads: int
    tile_elements: int  # elements that a thread folds at a time
    judged: tuple[Judged, ...]  # every entry of the run
    notes: tuple[str | Notice, ...]
    warnings: tuple[str | Notice, ...]

    @property
    def left_out(self) -> tuple[Judged, ...]:
        """The entries that do not take part although they might be expected to."""
        return tuple(entry for entry in self.judged if entry.is_left_out)

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
        """The pairs of checkpoints that follow each other in some average, by their numbers."""
        return sorted({pair for c in self.averages for pair in pairwise(c.members)})

    @property
    def key(self) -> str:
        """What the output's bytes and the numbers of the tiles depend on, as a short digest."""
        parts = [f"{c.output.path.name}:{c.output.fingerprint}" for c in self.averages]
        text = "\n".join([*parts, str(self.tile_elements)])
        return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]

    @property
    def memory_bytes(self) -> int:
        """What the fold allocates beyond torch itself, whatever the size of the model."""
        each = element_bytes(self.engine, self.work, len(self.averages))
        return self.threads * self.tile_elements * each


def plan(run: PathLike | Sequence[PathLike], **options: "Unpack[Keywords]") -> Plan:
    """Decide averages of the checkpoints in `run`: a folder, or checkpoints oldest first.

    The options are the fields of `ckpt_ema.options.Options`: `decay`, `half_life`, `last`, `output`
    (a folder, or a path that ends in .safetensors for one file; by default a sibling of the run,
    `RUN-ema`), `dtype` (what averaged tensors are written in), and so on. Where an option has
    several values, each makes a average. Reads headers only and does not import torch.

    Raises `OptionError` for an impossible option and `RefusedError` for inputs that cannot be
    averaged, or an output path that would touch them.
    """
    with _collector_paused():
        return _plan(run, make_options(options))


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Plans are large and without cycles; collecting while one grows takes as long as all else."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _plan(run: PathLike | Sequence[PathLike], options: Options) -> Plan:
    given = [run] if isinstance(run, str | os.PathLike) else run
    paths = [_named(path) for path in given if os.fspath(path)]
    if not paths or len(paths) < len(given):  # an empty name would mean the current folder
        raise OptionError("No run and no checkpoints were given.")
    source = Source(storage_for(paths[0]), options.reading)
    chosen = _choose(paths, options, source)
    found, checkpoints, weightings = chosen.found, chosen.checkpoints, chosen.weightings
    destination = (
        Path(options.output.output) if options.output.output is not None else _sibling(found.root)
    )
    check_destination(destination, [*paths, *_inputs(found, source)], source.storage)
    specs, warnings, renamed = _compared(checkpoints, source)
    _check_names(weightings, checkpoints[-1], renamed)
    specs_of = dict(zip(checkpoints, specs, strict=True))
    layouts = _layouts(weightings, specs_of, found, destination, options, source)
    numbers = {checkpoint: number for number, checkpoint in enumerate(checkpoints)}
    averages = tuple(
        make_average(weighting, numbers, layout.output)
        for weighting, layout in zip(weightings, layouts, strict=True)
    )
    work = make_work(specs, [(c.newest, c.output.files) for c in averages])
    sizes = make_sizes(options.engine, work, len(averages))
    return Plan(
        run=os.fspath(found.root),
        checkpoints=tuple(
            PlannedCheckpoint(c.path, c.name, c.step, c.unit, c.model.folder, specs_of[c])
            for c in checkpoints
        ),
        averages=averages,
        storage=source.storage,
        engine=options.engine,
        given=options.given(),
        dtype=options.output.dtype,
        card=options.output.card,
        allow_nonfinite=options.reading.allow_nonfinite,
        allow_duplicates=options.reading.allow_duplicates,
        output=destination,
        work=work,
        threads=sizes.threads,
        tile_elements=sizes.tile_elements,
        judged=found.judged,
        notes=(*chosen.notes, *run_notes(checkpoints, specs), *_left_behind(layouts)),
        warnings=(
            *found.warnings,
            *chosen.warnings,
            *advice(averages, [checkpoint.name for checkpoint in checkpoints]),
            *run_warnings(checkpoints, specs, found_in_all=_found_in_all(found)),
            *warnings,
        ),
    )


class _Chosen(NamedTuple):
    """What takes part, before headers are compared."""

    found: Found  # the run
    checkpoints: list[Checkpoint]  # those that some average takes, oldest first
    weightings: list[Weighting]
    notes: tuple[Notice, ...]
    warnings: tuple[Notice, ...]


def _choose(paths: Sequence[Path], options: Options, source: Source) -> _Chosen:
    """Find the checkpoints, select among them, weigh them, and see that they are whole."""
    found = discover(paths, options.selection, source)
    selected = select(found, options.selection, source)
    weightings = weigh(selected.subsets, options.weighting)
    taken = {checkpoint for weighting in weightings for checkpoint in weighting.checkpoints}
    checkpoints = [checkpoint for checkpoint in found.checkpoints if checkpoint in taken]
    check_complete(checkpoints, found)
    return _Chosen(found, checkpoints, weightings, selected.notes, selected.warnings)


def _compared(
    checkpoints: Sequence[Checkpoint], source: Source
) -> tuple[list[Specs], list[str], set[Checkpoint]]:
    """The checkpoints' specs under common names, checked to be of one model; and warnings.

    Also those checkpoints whose own names are others.
    """
    names = [checkpoint.name for checkpoint in checkpoints]
    own = [source.read(checkpoint.model) for checkpoint in checkpoints]
    if source.reading.strip_prefix:
        own = without_prefix(own, source.reading.strip_prefix)
    specs, name_warnings = unified(names, _shared(own))
    rows = zip(checkpoints, own, specs, strict=True)
    renamed = {
        checkpoint
        for checkpoint, before, after in rows
        if before.tensors is not after.tensors and before.tensors.keys() != after.tensors.keys()
    }
    folders = [checkpoint.model.folder for checkpoint in checkpoints]
    config_warnings = check_configs(names, folders, specs, source.storage)
    return specs, [*name_warnings, *check_alike(names, specs), *config_warnings], renamed


def _shared(checkpoints: Sequence[Specs]) -> list[Specs]:
    """One layout for the whole run: memory does not grow with the number of checkpoints."""
    shared: list[Specs] = []
    for specs in checkpoints:
        earlier = shared[-1].tensors if shared else specs.tensors
        same = specs.tensors is not earlier and specs.tensors == earlier
        shared.append(replace(specs, tensors=earlier) if same else specs)
    return shared


def _check_names(
    weightings: Sequence[Weighting], newest: Checkpoint, renamed: set[Checkpoint]
) -> None:
    """Refuse averages together that alone would have tensors of other names.

    An output takes the names of its newest checkpoint; all are read under those of the last one.
    """
    for weighting in weightings:
        last = weighting.checkpoints[-1]
        if last in renamed:
            raise RefusedError(
                f"The averages end at {printable(last.name)} and at {printable(newest.name)}, which"
                " name their tensors in different ways.",
                "Make them one at a time.",
            )


def _layouts(
    weightings: Sequence[Weighting],
    specs_of: dict[Checkpoint, Specs],
    found: Found,
    destination: Path,
    options: Options,
    source: Source,
) -> list[Layout]:
    """The output of each average: the destination itself, or a folder in it for each of several."""
    if len(weightings) == 1:
        return [lay_out(weightings[0], specs_of, found, destination, options, source)]
    if is_single_file(destination):
        raise OptionError(
            f"--output {printable(destination)} is one file, and {len(weightings)} averages are"
            " asked for; name a folder."
        )
    return [lay_out(w, specs_of, found, destination / w.name, options, source) for w in weightings]


def _left_behind(layouts: Sequence[Layout]) -> list[str]:
    models = sorted({model for layout in layouts for model in layout.left_behind})
    return [f"Folders with weights of their own are left behind: {some(models)}."] * bool(models)


def _found_in_all(found: Found) -> int:
    """How many checkpoints the run has, with those that patterns of names leave out."""
    return len(found.checkpoints) + sum(one.verdict.reason in UNSELECTED for one in found.left_out)


def _inputs(found: Found, source: Source) -> list[Path]:
    """The checkpoints, and what lies elsewhere behind their links."""
    links = [c.model.path for c in found.checkpoints if source.storage.is_link(c.model.path)]
    return [*(checkpoint.path for checkpoint in found.checkpoints), *links]


def _named(path: PathLike) -> Path:
    """The path with a name to call it by, which "." and ".." lack."""
    given = Path(path)
    return given if given.name not in ("", "..") else Path(os.path.abspath(given))


def _sibling(root: Path) -> Path:
    named = _named(root)
    if not named.name:
        raise OptionError("The checkpoints share no folder; say where to write with --output.")
    return named.parent / f"{named.name.removesuffix('.safetensors')}-ema"
