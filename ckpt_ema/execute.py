"""Executing a plan: folds a share of it, and publishes the averages or records the share."""

import json
import os
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TypedDict

from ckpt_ema.errors import Code, FailedError, RefusedError
from ckpt_ema.fold import engine
from ckpt_ema.fold.crc32 import Piece
from ckpt_ema.fold.monitors import make_monitors, watched
from ckpt_ema.fold.tiles import WHOLE, Share, Tile, tiles
from ckpt_ema.notices import Notice, refuse_warnings
from ckpt_ema.options import PathLike
from ckpt_ema.output import ledger, manifest
from ckpt_ema.output.content import describe_content
from ckpt_ema.output.destination import check_replaced
from ckpt_ema.output.ledger import Ledger, Outline, Part
from ckpt_ema.output.manifest import Result
from ckpt_ema.output.publish import StagedOutput
from ckpt_ema.output.workspace import Workspace, remove
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan
from ckpt_ema.ranks import Ranks
from ckpt_ema.report.card import card
from ckpt_ema.report.figure import Picture
from ckpt_ema.storage import storage_for
from ckpt_ema.targets.target import OutputFile
from ckpt_ema.trainers.conventions import CARD_NAME, MANIFEST_NAME

Progress = Callable[[int, int], None]  # bytes read so far, bytes to read in all

_UPDATE = "update"  # the key of the workspace of updates: one at a time
_RANK = "rank-"  # the kind of records of ranks, which no other run may use


class How(TypedDict, total=False):
    """How a plan is executed; nothing here changes a byte of the models."""

    overwrite: bool
    resume: bool
    plot: PathLike | None
    report: PathLike | None
    command: str | None
    progress: Progress | None
    started: Callable[[Plan], None] | None
    held: Path | None  # where the output is held instead of being published


def execute(
    plan: Plan,
    how: How,
    device: str,
    picture: Picture | None,
    share: Share = WHOLE,
    kind: str = "",
) -> Result:
    """Fold a share of `plan`; publish it, or record it as one of a `kind` for whoever publishes."""
    key = plan.work_id if kind or how.get("resume") else _UPDATE if plan.states else ""
    command, overwrite = how.get("command"), how.get("overwrite", False)
    files = _files(plan)
    outline = _outline(plan, files, command)
    sync = plan.engine.sync
    with StagedOutput(plan.output, key, overwrite, is_shared=bool(kind), sync=sync) as staged:
        staged.kept = key == plan.work_id
        if key == _UPDATE:
            staged.clear()  # what a killed one left is of other checkpoints
        staged.create(files)
        if share.part == 1:
            _add_side_files(plan, staged, picture, command)
        try:
            part = _fold(plan, how, device, share, staged)
            if not kind:
                return _finalize(plan.output, outline, [part], staged, how.get("held"))
        except RefusedError:
            staged.kept = bool(kind)  # the same work would be refused again; others' is kept
            raise
        except FailedError:
            if how.get("held") is None:  # or its state may seem to have changed
                check_replaced(plan.output, outline.replaces)
            raise
        staged.make_durable()
        ledger.record(staged, outline, kind, share, part)
    return _result(plan.output, outline, [part])


def execute_together(
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
            published = publish_recorded(plan.output, plan.work_id, _RANK, overwrite, sync)
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


def publish_recorded(final: Path, key: str, kind: str, overwrite: bool, sync: bool) -> Result:
    """Publish an output all of whose parts were recorded."""
    with StagedOutput(final, key, overwrite, sync=sync) as staged:
        staged.kept = True
        outline, parts = ledger.recorded(staged, kind)
        staged.adopt(outline.files)
        return _finalize(final, outline, parts, staged)


def _finalize(
    final: Path,
    outline: Outline,
    parts: Sequence[Part],
    staged: StagedOutput,
    held: Path | None = None,
) -> Result:
    """Publish an output whose tiles are all done; raises what the verdicts of monitors raise.

    It is published at `held` instead, if that is given, for somebody to publish it later.
    """
    monitors = make_monitors(outline.watched)
    for monitor, part in product(monitors, parts):
        monitor.merge(part.monitors[monitor.name])
    warnings = tuple(warning for monitor in monitors for warning in monitor.verdict())
    if outline.watched.is_strict:
        refuse_warnings(warnings)
    made = replace(_result(final, outline, parts), warnings=warnings)
    staged.write_checksums(outline.checksums)
    how = manifest.describe_making(made, staged.sync and all(part.sync for part in parts))
    manifests = {folder: {**record, **how} for folder, record in outline.manifests.items()}
    if not staged.is_single_file:
        is_seen = not any(part.is_resumed for part in parts)
        described = describe_content(outline, monitors, staged, is_seen=is_seen)
        for folder, record in manifests.items():
            record.update(described[folder])
            content = json.dumps(record, indent=2).encode() + b"\n"
            staged.add(os.path.join(folder, MANIFEST_NAME), content)
    staged.check_loads()
    if held is None:
        check_replaced(final, outline.replaces)
    staged.publish(held)
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
        is_resumed=bool(kept.done),
    )


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


def _files(plan: Plan) -> list[tuple[str, OutputFile]]:
    """Return what the fold writes in the order of its numbers: all model files, then the states."""
    states = ((folder, one.folding_of_state) for folder, one in _placed(plan))
    foldings = [*((folder, one.folding) for folder, one in _placed(plan)), *states]
    return [
        (os.path.join(folder, file.name), file)
        for folder, folding in foldings
        for file in (folding.files if folding else ())
    ]


def _outline(plan: Plan, files: Sequence[tuple[str, OutputFile]], command: str | None) -> Outline:
    pairs = zip(_placed(plan), plan.states, strict=False)
    return Outline(
        [name for name, _ in files],
        {folder: manifest.describe(plan, one, command) for folder, one in _placed(plan)},
        watched(plan),
        plan.bytes_written,
        [file.checksums for _, file in files],
        [(_fixed(file), file.size_bytes) for _, file in files],
        {folder: state.fingerprint for (folder, _), state in pairs},
    )


def _fixed(file: OutputFile) -> list[Piece]:
    """Return the chunks of a file with their CRC-32."""
    return [
        Piece(one.offset, one.offset + len(one.content), zlib.crc32(one.content))
        for one in file.chunks
    ]


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
            storage = storage_for(companion.source)
            staged.copy(companion.source, os.path.join(folder, companion.name), storage)
