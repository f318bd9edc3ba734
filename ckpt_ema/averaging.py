"""The whole job in one call: plan, fold, publish."""

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ckpt_ema import __version__
from ckpt_ema.errors import FailedError, printable
from ckpt_ema.layouts import MANIFEST_NAME
from ckpt_ema.options import PathLike
from ckpt_ema.output import manifest
from ckpt_ema.output.write import StagedOutput
from ckpt_ema.planning.destination import check_vacant
from ckpt_ema.planning.plan import Plan, plan

if TYPE_CHECKING:
    from ckpt_ema.folding.engine import Progress


@dataclass(frozen=True, slots=True)
class Result:
    """What an average came to. `manifest` is the content of the output's ckpt_ema.json."""

    plan: Plan
    is_up_to_date: bool  # this very average was there already, and nothing was read
    seconds: float  # of reading, folding and writing
    manifest: dict[str, Any]

    @property
    def output(self) -> Path:
        """The folder or the file that was written."""
        return self.plan.output


def average(
    run: PathLike | Sequence[PathLike],
    *,
    overwrite: bool = False,
    progress: "Progress | None" = None,
    **options: Any,
) -> Result:
    """Average the checkpoints in `run`, a folder or checkpoints oldest first, into an output.

    The options are those of `ckpt_ema.plan`. `progress` is called with the bytes read so far and
    in all. The output appears whole or not at all; if this very average is there already, nothing
    is read.

    Raises what `plan` raises; `RefusedError` also if something else is at the output path and
    `overwrite` is False, or if a checkpoint holds NaN; `FailedError` if reading or writing fails.
    """
    decided = plan(run, **options)
    done = up_to_date(decided, overwrite=overwrite)
    return done or carry_out(decided, overwrite=overwrite, progress=progress)


def up_to_date(plan: Plan, *, overwrite: bool = False) -> Result | None:
    """The result of `plan` if it is at the output path already, None if that is free for it.

    Raises `RefusedError` if something else is there that may not be replaced.
    """
    if not manifest.is_up_to_date(plan):
        check_vacant(plan.output, overwrite)
        return None
    recorded = manifest.read_manifest(plan.output)
    if plan.is_single_file:  # its header has no room for all of it
        recorded = {"ckpt_ema": __version__, **manifest.describe(plan)}
    return Result(plan, True, 0.0, recorded)


def carry_out(
    plan: Plan,
    *,
    overwrite: bool = False,
    progress: "Progress | None" = None,
    command: str | None = None,
) -> Result:
    """Do what `plan` says, once `up_to_date` has no objection; `command` goes into the manifest."""
    engine = _import_engine()
    device = engine.resolve_device(plan.options.device)
    start = time.monotonic()
    with StagedOutput(plan.output, plan.is_single_file, overwrite) as staged:
        staged.create(plan.files)
        engine.run(plan, staged, device, progress)
        seconds = time.monotonic() - start
        record = {
            "ckpt_ema": __version__,
            "command": command,
            **manifest.describe(plan),
            "device": str(device),
            "seconds": round(seconds, 3),
            "peak_memory_bytes": _peak_memory_bytes(),
        }
        if not plan.is_single_file:
            _add_side_files(plan, staged, record)
        staged.check_loads()
        staged.publish()
    return Result(plan, False, seconds, record)


def _import_engine() -> ModuleType:
    """Only when it is needed: an output that is up to date or in the way never waits for torch."""
    try:
        from ckpt_ema.folding import engine
    except (ImportError, OSError) as error:
        raise FailedError(f"torch cannot be imported: {printable(error)}.") from error
    return engine


def _add_side_files(plan: Plan, staged: StagedOutput, record: dict[str, Any]) -> None:
    for companion in plan.companions:
        staged.copy(companion.source, companion.name)
    for index in plan.indexes:
        staged.add(*index)
    staged.add(MANIFEST_NAME, json.dumps(record, indent=2).encode() + b"\n")


def _peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
