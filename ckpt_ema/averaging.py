"""The whole job in one call: plan, fold, publish."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ckpt_ema import __version__
from ckpt_ema.errors import FailedError, printable
from ckpt_ema.layouts import CARD_NAME, MANIFEST_NAME
from ckpt_ema.options import PathLike
from ckpt_ema.output import manifest
from ckpt_ema.output.result import Result
from ckpt_ema.output.vacancy import check_vacant
from ckpt_ema.output.write import StagedOutput
from ckpt_ema.planning.candidates import Candidate
from ckpt_ema.planning.outputs import is_single_file
from ckpt_ema.planning.plan import Plan, plan
from ckpt_ema.report.card import card
from ckpt_ema.report.figure import Picture
from ckpt_ema.report.figure import plot as draw

if TYPE_CHECKING:
    from ckpt_ema.folding.engine import Progress


def average(
    run: PathLike | Sequence[PathLike],
    *,
    overwrite: bool = False,
    plot: PathLike | None = None,
    progress: "Progress | None" = None,
    **options: Any,
) -> Result:
    """Average the checkpoints in `run`, a folder or checkpoints oldest first, into an output.

    The options are those of `ckpt_ema.plan`; where they name several averages, all are made in one
    pass over the checkpoints. `plot` is a .png or .svg file to draw the weights into, which then
    are in the model cards too. `progress` is called with the bytes read so far and in all. The
    output appears whole or not at all; if these very averages are there already, nothing is read.

    Raises what `plan` raises; `RefusedError` also if something else is at the output path and
    `overwrite` is False, or if a checkpoint holds NaN; `FailedError` if reading or writing fails.
    """
    decided = plan(run, **options)
    done = up_to_date(decided, overwrite=overwrite)
    picture = draw(decided, plot) if plot is not None else None
    return done or carry_out(decided, overwrite=overwrite, picture=picture, progress=progress)


def up_to_date(plan: Plan, *, overwrite: bool = False) -> Result | None:
    """The result of `plan` if it is at the output path already, None if that is free for it.

    Raises `RefusedError` if something else is there that may not be replaced.
    """
    if not manifest.is_up_to_date(plan):
        check_vacant(plan.output, overwrite)
        return None
    recorded = [
        # The header of a single file has no room for all of it.
        {"ckpt_ema": __version__, **manifest.describe(plan, candidate)}
        if candidate.output.is_single_file
        else manifest.read_manifest(candidate.output.path)
        for candidate in plan.candidates
    ]
    return Result(plan, True, 0.0, tuple(recorded))


def carry_out(
    plan: Plan,
    *,
    overwrite: bool = False,
    picture: Picture | None = None,
    progress: "Progress | None" = None,
    command: str | None = None,
) -> Result:
    """Do what `plan` says, once `up_to_date` has no objection.

    `command` goes into the manifests and cards, `picture` into the cards.
    """
    engine = _import_engine()
    device = engine.resolve_device(plan.options.device)
    start = time.monotonic()
    with StagedOutput(plan.output, is_single_file(plan.output), overwrite) as staged:
        staged.create(
            [
                (os.path.join(_inside(plan, candidate), file.name), file)
                for candidate in plan.candidates
                for file in candidate.output.files
            ]
        )
        engine.run(plan, staged, device, progress)
        seconds = time.monotonic() - start
        made = {
            "device": str(device),
            "seconds": round(seconds, 3),
            "peak_memory_bytes": _peak_memory_bytes(),
        }
        records = tuple(
            {
                "ckpt_ema": __version__,
                "command": command,
                **manifest.describe(plan, candidate),
                **made,
            }
            for candidate in plan.candidates
        )
        for candidate, record in zip(plan.candidates, records, strict=True):
            if not candidate.output.is_single_file:
                for name, content in _side_files(plan, candidate, record, picture):
                    staged.add(os.path.join(_inside(plan, candidate), name), content)
                for companion in candidate.output.companions:
                    name = os.path.join(_inside(plan, candidate), companion.name)
                    staged.copy(companion.source, name)
        staged.check_loads()
        staged.publish()
    return Result(plan, False, seconds, records)


def _inside(plan: Plan, candidate: Candidate) -> str:
    """The folder of one of several averages in the plan's output; empty for the only one."""
    return os.fspath(candidate.output.path.relative_to(plan.output)).removeprefix(".")


def _import_engine() -> ModuleType:
    """Only when it is needed: an output that is up to date or in the way never waits for torch."""
    try:
        from ckpt_ema.folding import engine
    except (ImportError, OSError) as error:
        raise FailedError(f"torch cannot be imported: {printable(error)}.") from error
    return engine


def _side_files(
    plan: Plan, candidate: Candidate, record: dict[str, Any], picture: Picture | None
) -> Iterator[tuple[str, bytes]]:
    """What is made beside the model files: names and contents."""
    yield from candidate.output.indexes
    yield MANIFEST_NAME, json.dumps(record, indent=2).encode() + b"\n"
    if plan.options.card:
        shown = picture.name if picture else None
        yield CARD_NAME, card(plan, candidate, record["command"], shown).encode()
        if picture:
            yield picture


def _peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
