"""`ckpt_ema.inspect`: what the checkpoints of a run are like beside each other, in one pass.

Measured is exactly what `average` would average, and nothing is written.
"""

import math
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ckpt_ema.errors import Code, OptionError, counted
from ckpt_ema.measure.outliers import FEWEST, Gap, Judged, Reason, judge
from ckpt_ema.measure.plane import Plane, Point, plane_of
from ckpt_ema.measure.run_sums import elements_of, sums_of
from ckpt_ema.measure.sums import Row, Sums, members_of
from ckpt_ema.notices import Notice, refuse_warnings
from ckpt_ema.options import WRITING, Keywords, PathLike, make_options
from ckpt_ema.planning.decide import plan_to_read
from ckpt_ema.planning.plan import Plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Of a plan: what is about the weights and the output, and not about the checkpoints.
_NOT_MEASURED = {
    *(Code.NO_CONFIG, Code.UNEVEN_WEIGHTS, Code.UNEVEN_GAPS, Code.FEW_CHECKPOINTS),
    *(Code.NO_EFFECT, Code.NOT_AVERAGED, Code.ADAPTER_FACTORS, Code.LEFT_OUT),
}


@dataclass(frozen=True, slots=True)
class InspectedCheckpoint:
    """One checkpoint; norms are Euclidean, over all averaged elements, None where all are NaN."""

    name: str
    path: Path
    step: int | None
    weight: float  # in the average
    norm: float | None
    distance_to_previous: float | None  # None for the first too
    distance_to_average: float | None
    zeros_share: float
    nonfinite: int  # elements, which are left out of everything else
    ratio: float | None  # what is judged: see docs/inspect.md
    z_score: float | None
    reason: Reason | None  # why it stands out

    @property
    def stands_out(self) -> bool:
        """Whether it differs from the other checkpoints as none of them does."""
        return self.reason is not None


@dataclass(frozen=True, slots=True)
class Inspection:
    """The checkpoints of a run, oldest first, and where they lie."""

    run: str
    schedule: str  # of the average, for people
    unit: str  # of the steps: "steps", "epochs" or "checkpoints"
    elements: int  # that are measured, of each checkpoint
    checkpoints: tuple[InspectedCheckpoint, ...]
    members: tuple[int, ...]  # the checkpoints in `gram` and `plane`: at most 64
    gram: tuple[tuple[float, ...], ...]  # inner products of their differences to the average
    sampled_share: float  # of the elements that `gram` was computed from, scaled to all
    plane: tuple[Point, ...]  # of each member, in the first two principal directions
    average_at: Point  # where the average lies in that plane
    explained: Point  # the share of the variance along each direction
    bytes_read: int
    seconds: float
    warnings: tuple[Notice, ...]
    notes: tuple[Notice, ...]

    def described(self) -> dict[str, Any]:
        """Return it as plain values, ready for JSON; see docs/schema/inspection.schema.json."""
        return {
            "version": 1,
            "run": self.run,
            "schedule": self.schedule,
            "unit": self.unit,
            "elements": self.elements,
            "checkpoints": [_described(one) for one in self.checkpoints],
            "sampled_share": self.sampled_share,
            "members": [*self.members],
            "gram": [[*row] for row in self.gram],
            "plane": [[*point] for point in self.plane],
            "average_at": [*self.average_at],
            "explained": [*self.explained],
            "bytes_read": self.bytes_read,
            "warnings": [warning.described() for warning in self.warnings],
            "notes": [note.described() for note in self.notes],
        }


def inspect(
    run: PathLike | Sequence[PathLike],
    *,
    started: Callable[[Plan], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: "Unpack[Keywords]",
) -> Inspection:
    """Measure the checkpoints in `run`, a folder or checkpoints oldest first, in one pass.

    The options are those of `ckpt_ema.average` that decide which checkpoints and tensors are
    averaged, and with which weights; they must ask for one average. `started` is called with the
    plan before tensors are read, `progress` with the bytes read so far and in all.

    Raises what `ckpt_ema.plan` raises; `RefusedError` for warnings, if `strict`; `FailedError` if
    reading fails.
    """
    if unused := sorted(WRITING & options.keys()):
        raise TypeError(f"inspect() got an unexpected keyword argument {unused[0]!r}")
    start = time.monotonic()
    is_strict = make_options(options).engine.strict
    decided = plan_to_read(run, **cast("Keywords", {**options, "strict": False}))
    if len(decided.averages) > 1:
        message = "inspect measures distances to one average; these options ask for"
        message = f"{message} {len(decided.averages)}."
        raise OptionError(message, code=Code.CONFLICTING_OPTIONS)
    if started:
        started(decided)
    found = _inspected(decided, sums_of(decided, progress or (lambda *_: None)), start)
    refuse_warnings(found.warnings if is_strict else ())
    return found


def _inspected(plan: Plan, sums: Sums, start: float) -> Inspection:
    """Judge what was measured."""
    [average], elements = plan.averages, elements_of(plan)
    judged = judge(_gaps(sums.rows, average.gaps, elements), _nonfinite(sums.rows))
    measured = [
        _checkpoint(plan, number, sums.rows, elements, one) for number, one in enumerate(judged)
    ]
    scale = elements / sums.sampled if sums.sampled else 0.0
    has_values = [row.nonfinite < elements for row in sums.rows]
    places = [n for n, number in enumerate(members_of(len(measured))) if has_values[number]]
    gram = tuple(tuple(scale * sums.products[i][j] for j in places) for i in places)
    plane = plane_of(gram) if gram else Plane((), (0.0, 0.0), (0.0, 0.0))
    few = f"fewer than {FEWEST} checkpoints, too few to tell which stand out by their distances."
    notes = [Notice(Code.FEW_CHECKPOINTS, f"There are {few}")] * (len(measured) < FEWEST)
    return Inspection(
        run=plan.run,
        schedule=average.text,
        unit=average.unit,
        elements=elements,
        checkpoints=tuple(measured),
        members=tuple(members_of(len(measured))[n] for n in places),
        gram=gram,
        sampled_share=sums.sampled / elements if elements else 0.0,
        plane=plane.points,
        average_at=plane.origin,
        explained=plane.explained,
        bytes_read=elements_of(plan, in_bytes=True),
        seconds=round(time.monotonic() - start, 3),
        warnings=(*_kept(plan.warnings), *_warnings(measured)),
        notes=(*_kept(plan.notes), *notes),
    )


def _kept(notices: Sequence[Notice]) -> list[Notice]:
    return [one for one in notices if one.code not in _NOT_MEASURED]


def _nonfinite(rows: Sequence[Row]) -> list[int]:
    return [round(row.nonfinite) for row in rows]


def _gaps(rows: Sequence[Row], steps: Sequence[int | None], elements: int) -> list[Gap | None]:
    """Return the gap before each checkpoint but the first; None where nothing could be compared."""
    has_values = [row.nonfinite < elements for row in rows]
    return [
        Gap(row.change, row.turn, steps[number])
        if all(has_values[number - 1 : number + 1])
        else None
        for number, row in enumerate(rows)
        if number
    ]


def _checkpoint(
    plan: Plan, number: int, rows: Sequence[Row], elements: int, judged: Judged
) -> InspectedCheckpoint:
    one, row = plan.checkpoints[number], rows[number]
    is_known = row.nonfinite < elements
    is_compared = number > 0 and is_known and rows[number - 1].nonfinite < elements
    return InspectedCheckpoint(
        name=one.name,
        path=one.path,
        step=one.step,
        weight=plan.averages[0].weights[number],
        norm=math.sqrt(row.squares) if is_known else None,
        distance_to_previous=math.sqrt(row.change) if is_compared else None,
        distance_to_average=math.sqrt(row.away) if is_known else None,
        zeros_share=row.zeros / elements if elements else 0.0,
        nonfinite=round(row.nonfinite),
        ratio=judged.ratio,
        z_score=judged.z_score,
        reason=judged.reason,
    )


def _warnings(checkpoints: Sequence[InspectedCheckpoint]) -> list[Notice]:
    """Return a warning for each checkpoint that stands out, with the option to leave it out."""
    found = []
    for number, one in enumerate(checkpoints):
        if one.reason is None:
            continue
        code, why = Code.STANDS_OUT, ""
        if one.reason is Reason.NONFINITE:
            code, why = Code.NONFINITE, f"holds {counted(one.nonfinite, 'non-finite value')}"
        elif one.reason is Reason.DUPLICATE:
            code, why = Code.DUPLICATES, f"has the same values as {checkpoints[number - 1].name}"
        elif one.reason is Reason.OFF_PATH:
            what = "as far from the path between its neighbours as they are from each other"
            why = f"is {one.ratio:.3g} times {what} (robust z-score {one.z_score:.1f})"
        else:
            what = "as far from its neighbour as the next gap and the steps suggest"
            why = f"is {one.ratio:.3g} times {what} (robust z-score {one.z_score:.1f})"
        option = f"--exclude {shlex.quote(escape(one.name))}"
        found.append(Notice(code, f"{one.name} {why}; {option} leaves it out."))
    return found


def _described(one: InspectedCheckpoint) -> dict[str, Any]:
    return {
        "name": one.name,
        "path": os.fspath(one.path),
        "step": one.step,
        "weight": one.weight,
        "norm": _finite(one.norm),
        "distance_to_previous": _finite(one.distance_to_previous),
        "distance_to_average": _finite(one.distance_to_average),
        "zeros_share": one.zeros_share,
        "nonfinite": one.nonfinite,
        "ratio": one.ratio,
        "z_score": one.z_score,
        "stands_out": one.stands_out,
        "reason": one.reason and one.reason.value,
    }


def _finite(number: float | None) -> float | None:
    """Return a number that JSON can hold; squares of huge float64 values overflow."""
    return number if number is not None and math.isfinite(number) else None
