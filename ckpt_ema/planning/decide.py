"""Decides a plan: finds, selects, weighs and compares checkpoints, and lays the outputs out.

Inputs are checked here, from headers alone; what follows only executes the plan.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import Specs
from ckpt_ema.errors import Code, OptionError, RefusedError
from ckpt_ema.find.checkpoint import Checkpoint, Found
from ckpt_ema.find.complete import check_complete
from ckpt_ema.find.further import with_common_files
from ckpt_ema.find.logs import LogOf, check_one_run, reader_of_logs
from ckpt_ema.find.run import discover
from ckpt_ema.find.select import Subset, Subsets, select
from ckpt_ema.notices import refuse_warnings
from ckpt_ema.options import (
    CHECKPOINT,
    Keywords,
    Options,
    PathLike,
    Weighting,
    make_options,
)
from ckpt_ema.planning.average import Weighted, foldings_of, make_averages, weigh
from ckpt_ema.planning.contents import judge_newest
from ckpt_ema.planning.fingerprint import deciding, precision
from ckpt_ema.planning.keeping import FactsOfState, Keeper, check_extendable
from ckpt_ema.planning.notices import Decided, plan_notes, plan_warnings
from ckpt_ema.planning.output import find_destination, lay_out, named, with_format
from ckpt_ema.planning.plan import Plan, PlannedCheckpoint
from ckpt_ema.planning.same_model import Compared, compare
from ckpt_ema.planning.sizing import make_sizes
from ckpt_ema.planning.state import Asked, State
from ckpt_ema.planning.work import make_work
from ckpt_ema.planning.write_back import with_masters_and_files
from ckpt_ema.storage import storages_anew
from ckpt_ema.storage.uri import absolute

if TYPE_CHECKING:
    from typing_extensions import Unpack


# Chooses the averages of a plan: from the selections, and how the options weight checkpoints.
Choose = Callable[[Sequence[Subset], Weighting], list[Weighted]]


def plan(run: PathLike | Sequence[PathLike], **options: "Unpack[Keywords]") -> Plan:
    """Decide averages of the checkpoints in `run`: a folder, or checkpoints oldest first.

    The options are those of the command line: `decay`, `half_life`, `last`, `output` (a folder, or
    a path that ends in .safetensors for one file; by default a sibling of the run, `RUN-ema`),
    `dtype` (of averaged tensors), and so on. Where an option has several values, each makes an
    average. Reads headers, and the start of tensors whose role these leave open.

    Raises `OptionError` for an impossible option and `RefusedError` for inputs that cannot be
    averaged, or an output path that overlaps them.
    """
    return plan_chosen(run, weigh, **options)


def plan_chosen(
    run: PathLike | Sequence[PathLike], choose: Choose, **options: "Unpack[Keywords]"
) -> Plan:
    """Decide the averages that `choose` returns; otherwise the same as `plan`."""
    with uncollected():  # a plan is large and without cycles; collection would double the time
        decided = make_options(options)
        return decide(choose_checkpoints(paths_of(run), decided), decided, choose)


def plan_to_read(run: PathLike | Sequence[PathLike], **options: "Unpack[Keywords]") -> Plan:
    """Decide as `plan` does, for who writes nothing: what is at the output path does not matter."""
    with uncollected():
        decided = make_options(options)
        chosen = choose_checkpoints(paths_of(run), decided)
        return decide(chosen._replace(destination=Path("unwritten")), decided, weigh)


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


class Chosen(NamedTuple):
    """The checkpoints that options select in a run, before anything is weighted."""

    paths: Sequence[Path]
    source: Source
    found: Found
    selected: Subsets
    log_of: LogOf
    destination: Path | None = None  # where nothing will be written; None: where options say


def choose_checkpoints(paths: Sequence[Path], options: Options) -> Chosen:
    """Find the checkpoints of a run, or of a list, and select among them."""
    every = find_checkpoints(paths, options)
    found, source = every.found, every.source
    selected = select(found, options.selection, source, every.log_of)
    return every._replace(selected=selected)


def find_checkpoints(paths: Sequence[Path], options: Options) -> Chosen:
    """Find the checkpoints of a run, or of a list; all of them are selected."""
    storage, *others = storages_anew(paths)
    if any(other is not storage for other in others):
        message = "The checkpoints are in several places; all must be on disks, or in one store."
        raise OptionError(message, code=Code.INVALID_OPTION)
    source = Source(storage, options.reading)
    selection = options.selection
    if options.output.keep_state:
        check_extendable(options)
        # Names without a number will be written again, with other weights.
        selection = replace(selection, aliases=False)
    found = discover(paths, selection, source)
    selected = Subsets((Subset("", found.checkpoints),), (), ())
    return Chosen(paths, source, found, selected, reader_of_logs(source))


def decide(chosen: Chosen, options: Options, choose: Choose, states: Sequence[State] = ()) -> Plan:
    """Weigh, compare, lay out: each stage takes its own options.

    `states` has what was folded before into each average, if anything was.
    """
    source = chosen.source
    found, selected = with_common_files(chosen.found, chosen.selected, source)
    weighted = choose(selected.subsets, options.weighting)
    checkpoints = _taken(weighted, found)
    options = options._replace(output=with_format(options.output, checkpoints))
    last = [one.checkpoints[-1] for one in states[:1]]
    one_run = check_one_run([*last, *checkpoints], chosen.log_of)
    destination = chosen.destination or find_destination(
        options.output.output, found, chosen.paths, source.storage
    )
    compared = _compared(weighted, checkpoints, options, source)
    facts = FactsOfState(states[0]) if states else None
    judged = judge_newest(weighted, compared.specs, options.reading, source.storage, facts)
    of_all = [*_folded_before(states), *compared.specs.items()]
    laid_out = lay_out(
        weighted,
        compared.specs,
        found,
        destination,
        options.output,
        judged.rulings,
        deciding(options),
        source.storage,
        {checkpoint: specs.files for checkpoint, specs in of_all},
    )
    if options.output.keep_state:
        keeper = Keeper(states, compared.specs, judged, _asked(chosen, options))
        outputs = [*map(keeper.with_state, weighted, laid_out.outputs)]
        laid_out = laid_out._replace(outputs=outputs)
    members, reads = [c for c, _ in of_all], _reads(weighted, list(compared.specs), states)
    averages = make_averages(weighted, members, reads, laid_out.outputs)
    rulings = list(judged.rulings.values())[-1]
    decided = Decided(members, found, selected, one_run, compared, rulings, laid_out, averages)
    return _assembled(decided, destination, chosen, options, states)


def _compared(
    weighted: Sequence[Weighted],
    checkpoints: Sequence[Checkpoint],
    options: Options,
    source: Source,
) -> Compared:
    """Compare the checkpoints that are read, with all that is written back where that is asked."""
    compared = compare(checkpoints, source)
    if options.output.save_as == CHECKPOINT:
        compared = with_masters_and_files(compared, weighted, source)
    _check_names(weighted, compared)
    return compared


def _asked(chosen: Chosen, options: Options) -> Asked:
    """Return what an update needs to make the same plan."""
    paths = [absolute(path) for path in chosen.paths]
    return Asked(paths, options.repeatable(), precision(options.engine))


def _folded_before(states: Sequence[State]) -> list[tuple[Checkpoint, Specs]]:
    """Return the checkpoints in states, which have the same ones, with their files alone."""
    return [
        (checkpoint, Specs({}, files, ())) for one in states[:1] for checkpoint, files in one.folded
    ]


def _reads(
    averages: Sequence[Weighted], checkpoints: Sequence[Checkpoint], states: Sequence[State]
) -> list[list[int]]:
    """Return what is read for each average: its own state first, then checkpoints."""
    index_of = {checkpoint: len(states) + index for index, checkpoint in enumerate(checkpoints)}
    return [
        [number] * bool(states) + [index_of[c] for c in average.checkpoints if c in index_of]
        for number, average in enumerate(averages)
    ]


def _assembled(
    decided: Decided,
    destination: Path,
    chosen: Chosen,
    options: Options,
    states: Sequence[State],
) -> Plan:
    """Lay the work out, and put all that was decided together; raises for warnings if strict."""
    averages, specs_of, storage = decided.averages, decided.compared.specs, chosen.source.storage
    of_all = [PlannedCheckpoint.of(*one) for one in (*_folded_before(states), *specs_of.items())]
    inputs = (*map(PlannedCheckpoint.of_state, states), *of_all[-len(specs_of) :])
    foldings = foldings_of(averages)
    work = make_work([one.specs for one in inputs], [(one.newest, one.files) for one in foldings])
    tile_elements, threads = make_sizes(
        options.engine, work, len(foldings), is_remote=storage.is_remote
    )
    warnings = tuple(plan_warnings(decided))
    refuse_warnings(warnings if options.engine.strict else ())
    return Plan(
        run=os.fspath(decided.found.root),
        paths=tuple(absolute(path) for path in chosen.paths),
        checkpoints=tuple(of_all),
        inputs=inputs,
        states=tuple(states),
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
        judged=decided.found.judged,
        notes=tuple(plan_notes(decided)),
        warnings=warnings,
    )


def paths_of(run: PathLike | Sequence[PathLike]) -> list[Path]:
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
