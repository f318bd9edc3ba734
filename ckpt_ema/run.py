"""The whole job in one call: plan, execute a share of the plan, then publish or record it."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ckpt_ema.errors import Code, FailedError, RefusedError
from ckpt_ema.fold import engine
from ckpt_ema.fold.hardware import CPU, needs_torch
from ckpt_ema.fold.monitors import make_monitors, watched
from ckpt_ema.fold.native import compiled, reason
from ckpt_ema.fold.tiles import WHOLE, Share, Tile, share_from, tiles
from ckpt_ema.notices import Notice, notices_from, refuse_warnings
from ckpt_ema.options import Keywords, PathLike
from ckpt_ema.output import ledger, manifest
from ckpt_ema.output.destination import check_free, outputs_at
from ckpt_ema.output.ledger import Ledger, Outline, Part
from ckpt_ema.output.manifest import Result
from ckpt_ema.output.publish import StagedOutput
from ckpt_ema.output.workspace import PART, Workspace, keys_with_parts, remove
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan, plan, uncollected
from ckpt_ema.ranks import Ranks, joined
from ckpt_ema.report.card import card
from ckpt_ema.report.figure import Picture
from ckpt_ema.report.figure import plot as draw
from ckpt_ema.trainers.conventions import CARD_NAME, MANIFEST_NAME

if TYPE_CHECKING:
    from typing_extensions import Unpack

Progress = Callable[[int, int], None]  # bytes read so far, bytes to read in all

_RANK = "rank-"  # the kind of records of ranks, which no other run may use


class How(TypedDict, total=False):
    """How a plan is executed; nothing here changes a byte of the models."""

    overwrite: bool
    resume: bool
    plot: PathLike | None
    command: str | None
    progress: Progress | None
    started: Callable[[Plan], None] | None


class RunKeywords(Keywords, How, total=False):
    """The keyword arguments of `average` and `average_part`."""


def average(
    run: PathLike | Sequence[PathLike],
    *,
    launch: bool = False,
    waiting: Callable[[str], None] | None = None,
    **keywords: "Unpack[RunKeywords]",
) -> Result:
    """Average the checkpoints in `run`, a folder or checkpoints oldest first, into an output.

    The options are those of `ckpt_ema.plan`; several averages are made in one pass over the
    checkpoints. The output appears whole or not at all. If these very averages are there already,
    nothing is read. Also: `overwrite` replaces another output. `resume` keeps finished work if the
    run is interrupted, and uses what an interrupted run kept. `plot` is a .png or .svg file to draw
    the weights into, also for the model cards, and `command` is recorded with them. `progress` is
    called with the bytes read so far and in all, `started` with the plan if there is work to do.

    With `launch`, the processes that torchrun or srun started together share the work. Each of them
    calls this, and returns when the first has published or raises when one has failed; `waiting` is
    called with a sentence if others are late.

    Raises what `plan` raises; `RefusedError` also if something else is at the output path and
    `overwrite` is False, or if a checkpoint holds NaN; `FailedError` if reading or writing fails.
    """
    with joined(os.environ, waiting) if launch else nullcontext() as ranks:
        return _run(run, keywords, ranks=ranks)


def average_part(
    run: PathLike | Sequence[PathLike], part: str, **keywords: "Unpack[RunKeywords]"
) -> Result:
    """Make one part, such as "3/64", of averages that `finish` then publishes.

    All parts are given the same run and options, which are those of `ckpt_ema.average`. Making a
    part twice does no harm. Raises what `ckpt_ema.average` raises.
    """
    return _run(run, keywords, part)


def finish(output: PathLike, *, overwrite: bool = False, sync: bool = True) -> Result:
    """Publish the output at `output`, all of whose parts were made, today or a week ago.

    An output that is there already is not made again. `sync` is the option of `ckpt_ema.average`.
    Raises `FailedError` if parts are missing, with their numbers; `RefusedError` if there is
    nothing to finish, or parts of several averages, or if something else is at the path and
    `overwrite` is False.
    """
    final = Path(output)
    keys = keys_with_parts(final)
    if len(keys) > 1:
        folders = ", ".join(str(Workspace(final, key).path) for key in keys)
        message = f"There are parts of {len(keys)} different averages for {final}: {folders}."
        hint = (
            "Parts belong together if their checkpoints and options are the same, including"
            " --tile-size and --max-memory; remove those that are not wanted."
        )
        raise RefusedError(message, hint, code=Code.PARTS_DISAGREE, path=final)
    if keys:
        check_free(final, overwrite)
        return _publish_recorded(final, keys[0], PART, overwrite, sync)
    outputs = outputs_at(final)
    manifests = [manifest.read_manifest(path) for path in outputs]
    if not outputs or not all(manifests):
        hint = "Make them with ckpt-ema average --part 1/N, ... and the same --output."
        message = f"{final} has no parts to finish."
        raise RefusedError(message, hint, code=Code.NO_PARTS, path=final)
    return _made_before(final, outputs, manifests)


def up_to_date(plan: Plan) -> Result | None:
    """Return the result of `plan` if it is at the output path already."""
    if not manifest.is_up_to_date(plan):
        return None
    outputs = [average.output.path for average in plan.averages]
    if plan.is_single_file:  # whose header has no room for all of it
        recorded = [manifest.describe(plan, plan.averages[0])]
    else:
        recorded = [manifest.read_manifest(path) for path in outputs]
    return replace(_made_before(plan.output, outputs, recorded), plan=plan)


def _run(
    run: PathLike | Sequence[PathLike],
    keywords: RunKeywords,
    part: str | None = None,
    ranks: Ranks | None = None,
) -> Result:
    """Plan, and execute the plan, a part of it, or the share of a rank."""
    share = WHOLE if part is None else share_from(part)
    options: dict[str, Any] = {**keywords}
    how = cast("How", {name: options.pop(name) for name in How.__annotations__ if name in options})
    decided = _with_fold_noted(plan(run, **options))
    done = up_to_date(decided)
    if done and decided.engine.strict:
        refuse_warnings(done.warnings)
    if done is None:
        check_free(decided.output, how.get("overwrite", False))
    if ranks:
        ranks.agree("plan", f"{decided.work_id} {'to do' if done is None else 'is done'}")
    is_first = ranks is None or ranks.rank == 0
    plot, started = how.get("plot"), how.get("started")
    picture = draw(decided, plot) if is_first and plot is not None else None
    if done:
        return done if is_first else replace(done, manifests=())
    if is_first and started:
        started(decided)
    decided, device = _on_device(decided, ranks.local_rank if ranks else 0)
    if ranks:
        made = _execute_together(decided, how, device, picture, ranks)
    else:
        made = execute(decided, how, device, picture, share, PART if part else "")
    return replace(made, plan=decided)


def execute(
    plan: Plan,
    how: How,
    device: str,
    picture: Picture | None,
    share: Share = WHOLE,
    kind: str = "",
) -> Result:
    """Fold a share of `plan`; publish it, or record it as one of a `kind` for whoever publishes."""
    key = plan.work_id if kind or how.get("resume") else ""
    command, overwrite = how.get("command"), how.get("overwrite", False)
    manifests = {folder: manifest.describe(plan, one, command) for folder, one in _placed(plan)}
    files = [
        (os.path.join(folder, file.name), file)
        for folder, average in _placed(plan)
        for file in average.output.files
    ]
    names = [name for name, _ in files]
    checksums = [file.checksums for _, file in files]
    outline = Outline(names, manifests, watched(plan), plan.bytes_written, checksums)
    sync = plan.engine.sync
    with StagedOutput(plan.output, key, overwrite, is_shared=bool(kind), sync=sync) as staged:
        staged.kept = bool(key)
        staged.create(files)
        if share.part == 1:
            _add_side_files(plan, staged, picture, command)
        try:
            part = _fold(plan, how, device, share, staged)
            if not kind:
                return finalize(plan.output, outline, [part], staged)
        except RefusedError:
            staged.kept = bool(kind)  # the same work would be refused again; others' is kept
            raise
        staged.make_durable()
        ledger.record(staged, outline, kind, share, part)
    return _result(plan.output, outline, [part])


def _execute_together(
    plan: Plan, how: How, device: str, picture: Picture | None, ranks: Ranks
) -> Result:
    """Do the share of this rank; the first publishes. If one fails, all do and leave nothing."""

    def tick(read: int, total: int) -> None:
        ranks.check()
        if progress := how.get("progress"):
            progress(read, total)

    share = Share(ranks.rank + 1, ranks.size)
    overwrite = how.get("overwrite", False)
    try:
        made = execute(plan, {**how, "progress": tick}, device, picture, share, _RANK)
        ranks.wait("parts")
        if ranks.rank == 0:
            sync = plan.engine.sync
            published = _publish_recorded(plan.output, plan.work_id, _RANK, overwrite, sync)
            made = replace(published, seconds=made.seconds)
        ranks.wait("publication")
    except BaseException as error:
        try:
            if isinstance(error, FailedError):
                ranks.check_now()  # the failure of another rank may be the cause
            ranks.fail(error)  # before the others lose their workspace
        finally:
            if not how.get("resume"):
                remove(Workspace(plan.output, plan.work_id).path)
        raise
    return made


def _publish_recorded(final: Path, key: str, kind: str, overwrite: bool, sync: bool) -> Result:
    """Publish an output all of whose parts were recorded."""
    with StagedOutput(final, key, overwrite, sync=sync) as staged:
        staged.kept = True
        outline, parts = ledger.recorded(staged, kind)
        staged.adopt(outline.files)
        return finalize(final, outline, parts, staged)


def finalize(final: Path, outline: Outline, parts: Sequence[Part], staged: StagedOutput) -> Result:
    """Publish an output whose tiles are all done; raises what the verdicts of monitors raise."""
    monitors = make_monitors(outline.watched)
    for monitor, part in product(monitors, parts):
        monitor.merge(part.monitors[monitor.name])
    warnings = tuple(warning for monitor in monitors for warning in monitor.verdict())
    if outline.watched.is_strict:
        refuse_warnings(warnings)
    made = replace(_result(final, outline, parts), warnings=warnings)
    how = manifest.describe_making(made, staged.sync and all(part.sync for part in parts))
    manifests = {folder: {**record, **how} for folder, record in outline.manifests.items()}
    for folder, record in {} if staged.is_single_file else manifests.items():
        content = json.dumps(record, indent=2).encode() + b"\n"
        staged.add(os.path.join(folder, MANIFEST_NAME), content)
    staged.write_checksums(outline.checksums)
    staged.check_loads()
    staged.publish()
    staged.kept = False
    if staged.left:  # another user's
        message = f"The output that was replaced cannot be removed and is left as {staged.left}."
        warnings = (*warnings, Notice(Code.NOT_REMOVED, message))
    return replace(made, manifests=tuple(manifests.values()), warnings=warnings)


def _fold(plan: Plan, how: How, device: str, share: Share, staged: StagedOutput) -> Part:
    """Fold a share of the tiles, but for those that the ledger has already."""
    start = time.monotonic()
    monitors = make_monitors(watched(plan))
    kept = Ledger(staged, monitors, staged.make_durable, is_kept=how.get("resume", False))

    def todo() -> Iterator[Tile]:
        return (tile for tile in tiles(plan, share) if tile.numbers.start not in kept.done)

    total = sum(tile.span.bytes_read(plan.work.layout_of, tile.length) for tile in todo())

    def tick(bytes_read: int) -> None:
        if progress := how.get("progress"):
            progress(bytes_read, total)
        kept.write_if_due()

    try:
        sufficed = engine.run(plan, todo(), device, staged, kept.finish, monitors, tick)
    finally:
        kept.write()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Part(
        ledger.states(monitors),
        device if sufficed else f"{device}, which ran out of memory, and cpu",
        seconds=round(time.monotonic() - start, 3),
        # macOS counts bytes, Linux KiB.
        peak_memory_bytes=peak if sys.platform == "darwin" else peak * 1024,
        bytes_read=total,
        sync=staged.sync,
    )


def _with_fold_noted(plan: Plan) -> Plan:
    """Return the plan with a note if torch will fold where the compiled module would."""
    if compiled() or needs_torch(plan.engine.device):
        return plan
    text = f"torch folds on the CPU, with the same result but more slowly ({reason()})."
    return replace(plan, notes=(*plan.notes, Notice(Code.NOT_COMPILED, text)))


def _on_device(plan: Plan, place: int) -> tuple[Plan, str]:
    """Return the plan as it is on the device to fold on, and the name of that device."""
    is_exact = plan.engine.accumulate == "float64"
    if is_exact and compiled() and not needs_torch(plan.engine.device):
        return plan, CPU
    try:
        with uncollected():  # importing torch allocates much and frees little
            from ckpt_ema.fold import devices  # and with it torch, which is needed only now
    except (ImportError, OSError) as error:
        message = f"torch cannot be imported: {error}."
        raise FailedError(message, code=Code.MISSING_DEPENDENCY) from error
    device = devices.resolve_device(plan.engine.device, place)
    return devices.plan_on(plan, device), str(device)


def _result(final: Path, outline: Outline, parts: Sequence[Part]) -> Result:
    return Result(
        final,
        tuple(final / folder for folder in outline.manifests),
        device=", ".join(sorted({part.device for part in parts})),
        seconds=sum(part.seconds for part in parts),
        peak_memory_bytes=max(part.peak_memory_bytes for part in parts),
        bytes_read=sum(part.bytes_read for part in parts),
        bytes_written=outline.bytes_written,
    )


def _made_before(
    final: Path, outputs: Sequence[Path], manifests: Sequence[Mapping[str, Any]]
) -> Result:
    """Return the result of a process that has ended; anybody may have changed its manifests."""
    warnings = notices_from(manifests[0].get("warnings_of_reading"))
    made = Result(final, tuple(outputs), is_up_to_date=True, warnings=warnings)
    return replace(made, manifests=tuple(manifests))


def _placed(plan: Plan) -> list[tuple[str, Average]]:
    """Return each average with its folder in the plan's output."""
    return [(os.path.relpath(one.output.path, plan.output), one) for one in plan.averages]


def _add_side_files(
    plan: Plan, staged: StagedOutput, picture: Picture | None, command: str | None
) -> None:
    """Write all other files of an output, except manifests, which record how it went."""
    for folder, average in _placed(plan):
        if average.output.is_single_file:
            continue
        for name, content in average.output.indexes:
            staged.add(os.path.join(folder, name), content)
        if plan.card:
            text = card(plan, average, command, picture.name if picture else None)
            staged.add(os.path.join(folder, CARD_NAME), text.encode())
            if picture:
                staged.add(os.path.join(folder, picture.name), picture.content)
        for companion in average.output.companions:
            staged.copy(companion.source, os.path.join(folder, companion.name), plan.storage)
