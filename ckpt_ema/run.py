"""The whole job in one call: plan, fold, publish."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt_ema import __version__
from ckpt_ema.containers.compare import same_values
from ckpt_ema.errors import Code, FailedError, RefusedError, printable
from ckpt_ema.fold.monitors.twins import Twins
from ckpt_ema.fold.monitors.zeros import Zeroed
from ckpt_ema.fold.tiles import WHOLE, Share, Tile, tiles
from ckpt_ema.notices import Notice
from ckpt_ema.options import Keywords, PathLike
from ckpt_ema.output import manifest
from ckpt_ema.output.destination import check_vacant
from ckpt_ema.output.ledger import Journal
from ckpt_ema.output.publish import StagedOutput
from ckpt_ema.output.result import Result
from ckpt_ema.output.workspace import WorkFolder
from ckpt_ema.planning.plan import Plan, plan
from ckpt_ema.report.card import card
from ckpt_ema.report.figure import Picture
from ckpt_ema.report.figure import plot as draw
from ckpt_ema.targets.target import OutputFile
from ckpt_ema.trainers.conventions import CARD_NAME, MANIFEST_NAME

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

Progress = Callable[[int, int], None]  # bytes read so far, bytes to read in all


def average(
    run: PathLike | Sequence[PathLike],
    *,
    overwrite: bool = False,
    plot: PathLike | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    **options: "Unpack[Keywords]",
) -> Result:
    """Average the checkpoints in `run`, a folder or checkpoints oldest first, into an output.

    The options are those of `ckpt_ema.plan`; where they name several averages, all are made in one
    pass over the checkpoints. `plot` is a .png or .svg file to draw the weights into, which then
    are in the model cards too. `progress` is called with the bytes read so far and in all. The
    output appears whole or not at all; if these very averages are there already, nothing is read.
    With `resume`, what is done is kept if the run is interrupted, and the next such call goes on.

    Raises what `plan` raises; `RefusedError` also if something else is at the output path and
    `overwrite` is False, or if a checkpoint holds NaN; `FailedError` if reading or writing fails.
    """
    decided = plan(run, **options)
    done = up_to_date(decided, overwrite=overwrite)
    picture = draw(decided, plot) if plot is not None else None
    return done or carry_out(
        decided, overwrite=overwrite, picture=picture, progress=progress, resume=resume
    )


def up_to_date(plan: Plan, *, overwrite: bool = False) -> Result | None:
    """The result of `plan` if it is at the output path already, None if that is free for it.

    Raises `RefusedError` if something else is there that may not be replaced.
    """
    if not manifest.is_up_to_date(plan):
        check_vacant(plan.output, overwrite)
        return None
    recorded = [
        # The header of a single file has no room for all of it.
        {"ckpt_ema": __version__, **manifest.describe(plan, average)}
        if average.output.is_single_file
        else manifest.read_manifest(average.output.path)
        for average in plan.averages
    ]
    return Result(
        plan.output, outputs_of(plan), is_up_to_date=True, plan=plan, manifests=tuple(recorded)
    )


def outputs_of(plan: Plan) -> tuple[Path, ...]:
    """Where each average is, in the order of the plan's averages."""
    return tuple(average.output.path for average in plan.averages)


def carry_out(
    plan: Plan,
    *,
    overwrite: bool = False,
    picture: Picture | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    resume: bool = False,
) -> Result:
    """Do what `plan` says, once `up_to_date` has no objection.

    `command` goes into the manifests and cards, `picture` into the cards. With `resume` it goes on
    from where another run with `resume` was interrupted, and keeps what is done if it is itself.
    """
    device = resolve_device(plan)
    single = plan.is_single_file
    with (
        WorkFolder(plan.output, plan.work_id if resume else "") as work,
        StagedOutput(work, is_single_file=single, overwrite=overwrite) as staged,
    ):
        work.kept = resume
        staged.create(files_of(plan))
        add_side_files(plan, staged, picture, command)
        try:
            made = fold(plan, work, staged, device, progress=progress, resume=resume)
            check_different(plan, made.alike)
        except RefusedError:
            work.kept = False  # what is refused now will be refused again
            raise
        facts = made.facts()
        records = [{**record, **facts} for record in records_of(plan, command)]
        seal(staged, {} if single else dict(zip(folders_of(plan), records, strict=True)))
        work.kept = False
    return Result(
        plan.output,
        outputs_of(plan),
        device=made.device,
        seconds=made.seconds,
        peak_memory_bytes=facts["peak_memory_bytes"],
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        warnings=tuple(Notice(Code.ZEROS, warning) for warning in made.warnings),
        plan=plan,
        manifests=tuple(records),
    )


class Made(NamedTuple):
    """What came of folding a share of the work."""

    alike: list[tuple[int, int]]  # neighbours that no tile has told apart
    warnings: list[str]  # of what only reading shows
    seconds: float
    device: str

    def facts(self) -> dict[str, Any]:
        """What manifests say of it."""
        return {
            "warnings_of_reading": self.warnings,
            "device": self.device,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": _peak_memory_bytes(),
        }


def files_of(plan: Plan) -> list[tuple[str, OutputFile]]:
    """The model files of all averages, with their names in the plan's output."""
    return [
        (os.path.join(folder, file.name), file)
        for folder, average in zip(folders_of(plan), plan.averages, strict=True)
        for file in average.output.files
    ]


def add_side_files(
    plan: Plan, staged: StagedOutput, picture: Picture | None, command: str | None
) -> None:
    """Write what stands beside the model files, but for manifests, which tell how it went."""
    for folder, average in zip(folders_of(plan), plan.averages, strict=True):
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


def fold(
    plan: Plan,
    work: WorkFolder,
    staged: StagedOutput,
    device: "torch.device",
    share: Share = WHOLE,
    *,
    progress: Progress | None = None,
    resume: bool = False,
) -> Made:
    """Fold a share of the tiles, or with `resume` those of them that are not done yet."""
    from ckpt_ema.fold import engine

    start = time.monotonic()
    journal = Journal(work, staged.make_durable) if resume else None
    done = journal.done if journal else ()
    twins = Twins(plan.neighbours, journal.different if journal else ())
    zeroed = Zeroed(plan, journal.zeroed if journal else ())

    def todo() -> Iterator[Tile]:
        return (tile for tile in tiles(plan, share) if tile.numbers.start not in done)

    total = sum(tile.span.bytes_read(plan.work.layout_of, tile.length) for tile in todo())

    def tick(bytes_read: int) -> None:
        if progress:
            progress(bytes_read, total)
        if journal:
            journal.write_if_due(twins, zeroed)

    try:
        finished = journal.finish if journal else None
        device_sufficed = engine.run(
            plan, todo(), staged, device, twins, zeroed, tick=tick, finished=finished
        )
    finally:
        if journal:
            journal.write(twins, zeroed)
    averages = any(span.averaged for span in plan.work.spans)
    where = str(device) if device_sufficed else f"{device}, which ran out of memory, and cpu"
    alike = twins.found if averages else []
    return Made(alike, zeroed.warnings(), time.monotonic() - start, where)


def check_different(plan: Plan, alike: Sequence[tuple[int, int]]) -> None:
    """Refuse two steps with one state, unless they are wanted."""
    if alike and not plan.allow_duplicates:
        raise same_values(*(plan.checkpoints[number].name for number in alike[0]))


def seal(staged: StagedOutput, manifests: dict[str, dict[str, Any]]) -> None:
    """Write the manifests, by the folders in the output, and publish it."""
    for folder, record in manifests.items():
        content = json.dumps(record, indent=2).encode() + b"\n"
        staged.add(os.path.join(folder, MANIFEST_NAME), content)
    staged.check_loads()
    staged.publish()


def records_of(plan: Plan, command: str | None) -> list[dict[str, Any]]:
    """What manifests say but for how it went."""
    return [
        {"ckpt_ema": __version__, "command": command, **manifest.describe(plan, average)}
        for average in plan.averages
    ]


def folders_of(plan: Plan) -> list[str]:
    """The folder of each average in the plan's output; empty for the only one."""
    inside = (average.output.path.relative_to(plan.output) for average in plan.averages)
    return [os.fspath(folder).removeprefix(".") for folder in inside]


def resolve_device(plan: Plan, place: int = 0) -> "torch.device":
    """The device to fold on; torch is imported only now, when it is needed.

    `place` is the number of this process among those of a launch on this machine.
    """
    try:
        from ckpt_ema.fold import devices
    except (ImportError, OSError) as error:
        raise FailedError(f"torch cannot be imported: {printable(error)}.") from error
    return devices.resolve_device(plan.engine.device, place)


def _peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
