"""The whole job in one call: plan, see whether it is done already, execute the plan."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ckpt_ema.errors import Code, FailedError, OptionError, RefusedError
from ckpt_ema.execute import How, execute, execute_together, publish_recorded
from ckpt_ema.fold.hardware import CPU, needs_torch
from ckpt_ema.fold.native import compiled, reason
from ckpt_ema.fold.tiles import WHOLE, Share, share_from
from ckpt_ema.notices import Notice, notices_from, refuse_warnings
from ckpt_ema.options import Keywords, PathLike
from ckpt_ema.output import manifest
from ckpt_ema.output.destination import check_free, outputs_at
from ckpt_ema.output.manifest import Result
from ckpt_ema.output.workspace import PART, Workspace, keys_with_parts
from ckpt_ema.planning.decide import plan, uncollected
from ckpt_ema.planning.plan import Plan
from ckpt_ema.ranks import Ranks, joined
from ckpt_ema.report.figure import plot as draw

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    the weights into, also for the model cards, and `command` is recorded with them. `report` is an
    .html file for a page about the averages, written when they are there. `progress` is called with
    the bytes read so far and in all, `started` with the plan if there is work to do.

    With `launch`, the processes that torchrun or srun started together share the work. Each of them
    calls this, and returns when the first has published or raises when one has failed; `waiting` is
    called with a sentence if others are late.

    Raises what `plan` raises; `RefusedError` also if something else is at the output path and
    `overwrite` is False, or if a checkpoint holds NaN; `FailedError` if reading or writing fails,
    also if only the report cannot be written, which the message says.
    """
    with joined(os.environ, waiting) if launch else nullcontext() as ranks:
        return make(partial(plan, run), keywords, ranks=ranks)


def average_part(
    run: PathLike | Sequence[PathLike], part: str, **keywords: "Unpack[RunKeywords]"
) -> Result:
    """Make one part, such as "3/64", of averages that `finish` then publishes.

    All parts are given the same run and options, which are those of `ckpt_ema.average` but for
    `report`. Making a part twice does no harm. Raises what `ckpt_ema.average` raises.
    """
    if keywords.get("report") is not None:
        message = "--report cannot be used with --part, which makes no whole output."
        hint = "Write the report after ckpt-ema finish, by ckpt-ema average without --part."
        raise OptionError(message, hint, code=Code.CONFLICTING_OPTIONS)
    return make(partial(plan, run), keywords, part)


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
        return publish_recorded(final, keys[0], PART, overwrite, sync)
    outputs = outputs_at(final)
    manifests = [manifest.read_manifest(path) for path in outputs]
    if not outputs or not all(manifests):
        hint = "Make them with ckpt-ema average --part 1/N, ... and the same --output."
        message = f"{final} has no parts to finish."
        raise RefusedError(message, hint, code=Code.NO_PARTS, path=final)
    return made_before(final, outputs, manifests)


def up_to_date(plan: Plan) -> Result | None:
    """Return the result of `plan` if it is at the output path already."""
    if not manifest.is_up_to_date(plan):
        return None
    outputs = [average.output.path for average in plan.averages]
    if plan.is_single_file:  # whose header has no room for all of it
        recorded = [manifest.describe(plan, plan.averages[0])]
    else:
        recorded = [manifest.read_manifest(path) for path in outputs]
    return replace(made_before(plan.output, outputs, recorded), plan=plan)


def write_report(result: Result, path: PathLike, command: str | None) -> None:
    """Write the page about averages that are there. Raises `FailedError`."""
    from ckpt_ema.report.pages import report  # few runs need it
    from ckpt_ema.report.pages.average import average_page

    page, done = average_page(result, command), f"{result.output} is complete"
    report.write_report(path, page, done, sync=result.plan.engine.sync)


def make(
    decide: Callable[..., Plan],
    keywords: RunKeywords,
    part: str | None = None,
    ranks: Ranks | None = None,
) -> Result:
    """Execute the plan that `decide` returns for the options, a part of it, or a rank's share."""
    share = WHOLE if part is None else share_from(part)
    how, options = split(keywords)
    return carry_out(decide(**options), how, share, ranks)


def split(keywords: Mapping[str, Any]) -> tuple[How, dict[str, Any]]:
    """Return how a plan is executed, and the options that decide it."""
    options: dict[str, Any] = {**keywords}
    how = {name: options.pop(name) for name in How.__annotations__ if name in options}
    return cast("How", how), options


def carry_out(plan: Plan, how: How, share: Share = WHOLE, ranks: Ranks | None = None) -> Result:
    """Execute a plan, a share of it as a part, or the share of a rank, and report on it."""
    decided = _with_fold_noted(plan)
    path = how.get("report") if ranks is None or ranks.rank == 0 else None
    if path is None:
        return _made(decided, how, share, ranks)
    from ckpt_ema.report.pages.report import check_report

    check_report(path, [decided.output, *decided.input_paths])
    made = _made(decided, how, share, ranks)
    write_report(made, path, how.get("command"))
    return made


def _made(decided: Plan, how: How, share: Share, ranks: Ranks | None) -> Result:
    """Execute a plan unless its averages are there already."""
    done = up_to_date(decided) if how.get("held") is None else None
    if done and decided.engine.strict:
        refuse_warnings(done.warnings)
    if done is None and how.get("held") is None:
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
    decided, device = on_device(decided, ranks.local_rank if ranks else 0)
    if ranks:
        made = execute_together(decided, how, device, picture, ranks)
    else:
        made = execute(decided, how, device, picture, share, "" if share is WHOLE else PART)
    return replace(made, plan=decided)


def _with_fold_noted(plan: Plan) -> Plan:
    """Return the plan with a note if torch will fold where the compiled module would."""
    if compiled() or needs_torch(plan.engine.device):
        return plan
    text = f"torch folds on the CPU, with the same result but more slowly ({reason()})."
    return replace(plan, notes=(*plan.notes, Notice(Code.NOT_COMPILED, text)))


def on_device(plan: Plan, place: int = 0) -> tuple[Plan, str]:
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


def made_before(
    final: Path, outputs: Sequence[Path], manifests: Sequence[Mapping[str, Any]]
) -> Result:
    """Return the result of a process that has ended; anybody may have changed its manifests."""
    warnings = notices_from(manifests[0].get("warnings_of_reading"))
    made = Result(final, tuple(outputs), is_up_to_date=True, warnings=warnings)
    return replace(made, manifests=tuple(manifests))
