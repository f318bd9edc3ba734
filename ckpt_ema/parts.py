"""One output in several parts, made by as many processes, on one machine or on many.

Each part folds its share of the tiles into the same hidden files and leaves a record; when all are
there, one process publishes the output. What it needs to know, the parts have written down, so they
need not run at the same time: `finish` may come a week later. Ranks of one launch wait instead.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_ema.containers.compare import same_values
from ckpt_ema.errors import FailedError, RefusedError, printable
from ckpt_ema.fold.tiles import Share, share_from
from ckpt_ema.options import Keywords, PathLike
from ckpt_ema.output.destination import averages_in, check_vacant
from ckpt_ema.output.ledger import ranges
from ckpt_ema.output.manifest import read_manifest
from ckpt_ema.output.publish import StagedOutput
from ckpt_ema.output.result import Result
from ckpt_ema.output.workspace import PART, WorkFolder, existing_work, remove
from ckpt_ema.planning.plan import Plan, plan
from ckpt_ema.ranks import Ranks
from ckpt_ema.report.figure import Picture
from ckpt_ema.run import (
    Progress,
    add_side_files,
    files_of,
    fold,
    folders_of,
    records_of,
    resolve_device,
    seal,
    up_to_date,
)
from ckpt_ema.targets.safetensors import target_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

_WORK = "work"  # the record of what is made
_RANK = "rank-"  # the kind of records that say that a rank is done, which another run need not keep


def average_part(
    run: PathLike | Sequence[PathLike],
    part: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    resume: bool = False,
    **options: "Unpack[Keywords]",
) -> None:
    """Make one part, such as "3/64", of averages that `finish` then publishes.

    All parts are given the same run and options, which are those of `ckpt_ema.average`. A part that
    is made twice does no harm. Raises what `ckpt_ema.average` raises.
    """
    share, decided = share_from(part), plan(run, **options)
    if not up_to_date(decided, overwrite=overwrite):
        carry_out_part(decided, share, progress=progress, resume=resume)


def carry_out_part(
    plan: Plan,
    share: Share,
    *,
    picture: Picture | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    resume: bool = False,
    kind: str = PART,
    adds_side_files: bool = True,
    place: int = 0,
) -> None:
    """Do a share of what `plan` says, once `up_to_date` has no objection."""
    device = resolve_device(plan, place)
    single = plan.is_single_file
    with (
        WorkFolder(plan.output, plan.work_id, is_shared=True) as work,
        StagedOutput(work, is_single_file=single, overwrite=False) as staged,
    ):
        work.kept = True
        staged.create(files_of(plan))
        if adds_side_files:
            add_side_files(plan, staged, picture, command)
        made = fold(plan, work, staged, device, share, progress=progress, resume=resume)
        staged.make_durable()
        description = {
            "files": [name for name, _ in files_of(plan)],
            "manifests": dict(zip(folders_of(plan), records_of(plan, command), strict=True)),
            "checkpoints": [checkpoint.name for checkpoint in plan.checkpoints],
            "allow_duplicates": plan.allow_duplicates,
        }
        work.record(_WORK, description)
        work.record(f"{kind}{share.part}-of-{share.of}", {"alike": made.alike, **made.facts()})


def carry_out_together(
    plan: Plan,
    ranks: Ranks,
    *,
    overwrite: bool = False,
    picture: Picture | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    resume: bool = False,
) -> Result | None:
    """Do what `plan` says, each of the ranks a share; what the first of them publishes.

    If one fails, all do, and nothing is left but what `resume` keeps.
    """

    def tick(read: int, total: int) -> None:
        ranks.check()
        if progress:
            progress(read, total)

    is_first = ranks.rank == 0
    try:
        carry_out_part(
            plan,
            Share(ranks.rank + 1, ranks.size),
            picture=picture,
            progress=tick,
            command=command,
            resume=resume,
            kind=_RANK,
            adds_side_files=is_first,
            place=ranks.local_rank,
        )
        ranks.wait("parts")
        finished = _publish(plan.output, plan.work_id, _RANK, overwrite) if is_first else None
        ranks.wait("publication")
    except BaseException as error:
        try:
            if isinstance(error, FailedError):
                ranks.check_at_once()  # if another has failed, that is why
            ranks.fail(error)  # before what the others work in is gone
        finally:
            if not resume:
                remove(WorkFolder(plan.output, plan.work_id).path)
        raise
    return finished


def finish(output: PathLike, *, overwrite: bool = False) -> Result:
    """Publish the output at `output`, all of whose parts are made.

    An output that is there already is not made again. Raises `FailedError` if parts are missing,
    with which; `RefusedError` if nothing or several things are to be finished, or if something else
    is at the path and `overwrite` is False.
    """
    final = Path(output)
    keys = existing_work(final, PART)
    if not keys:
        return _finished_before(final)
    if len(keys) > 1:
        folders = [printable(WorkFolder(final, key).path) for key in keys]
        raise RefusedError(
            f"There are parts of {len(keys)} different averages for {printable(final)}:"
            f" {', '.join(folders)}.",
            "Parts go together whose checkpoints and options are the same, --tile-size and"
            " --max-memory among them; remove those that are not wanted.",
        )
    check_vacant(final, overwrite)
    return _publish(final, keys[0], PART, overwrite)


def _publish(final: Path, key: str, kind: str, overwrite: bool) -> Result:
    """Give an output all of whose parts are made its final name."""
    single = target_for(final).is_single_file
    with (
        WorkFolder(final, key) as work,
        StagedOutput(work, is_single_file=single, overwrite=overwrite) as staged,
    ):
        work.kept = True
        described = work.records(_WORK).get(_WORK)
        if described is None:
            raise FailedError(
                f"{printable(work.path)} does not say what its parts are of.", "Make one again."
            )
        made = _whole_set(final, {n.removeprefix(kind): r for n, r in work.records(kind).items()})
        alike = set.intersection(*({tuple(pair) for pair in part["alike"]} for part in made))
        if alike and not described["allow_duplicates"]:
            raise same_values(*(described["checkpoints"][number] for number in min(alike)))
        staged.adopt(described["files"])
        facts = {
            "warnings_of_reading": sorted(
                {w for part in made for w in part["warnings_of_reading"]}
            ),
            "device": ", ".join(sorted({part["device"] for part in made})),
            "seconds": round(sum(part["seconds"] for part in made), 3),
            "peak_memory_bytes": max(part["peak_memory_bytes"] for part in made),
        }
        manifests = {
            folder: {**record, **facts} for folder, record in described["manifests"].items()
        }
        seal(staged, {} if single else manifests)
        work.kept = False
    outputs = tuple(final / folder if folder else final for folder in manifests)
    return Result(final, outputs, device=facts["device"], manifests=tuple(manifests.values()))


def _finished_before(final: Path) -> Result:
    """What an earlier `finish` published, if it is there."""
    outputs = [final] if final.is_file() else sorted(averages_in(final))
    manifests = [read_manifest(path) for path in outputs]
    if not outputs or not all(manifests):
        raise RefusedError(
            f"{printable(final)} has no parts that could be finished.",
            "Make them with ckpt-ema average --part 1/N, ... and the same --output.",
        )
    return Result(final, tuple(outputs), is_up_to_date=True, manifests=tuple(manifests))


def _whole_set(final: Path, parts: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of all parts of a division that is complete."""
    by_division: dict[int, dict[int, dict[str, Any]]] = {}
    for name, record in parts.items():
        part, of = map(int, name.split("-of-"))
        by_division.setdefault(of, {})[part] = record
    of, made = min(by_division.items(), key=lambda division: division[0] - len(division[1]))
    missing = [part for part in range(1, of + 1) if part not in made]
    if missing:
        which = "part {} of {} is" if len(missing) == 1 else "parts {} of {} are"
        raise FailedError(
            f"{printable(final)} cannot be finished yet: {which.format(_listed(missing), of)}"
            " missing."
        )
    return list(made.values())


def _listed(numbers: Sequence[int]) -> str:
    """Numbers with ranges: 1-3, 7.

    >>> _listed([1, 2, 3, 7])
    '1-3, 7'
    """
    found = ranges(numbers)
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
