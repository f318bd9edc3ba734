"""Warnings and notes about weights, each with the number that would change them."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from statistics import median

from ckpt_ema.errors import Code, some
from ckpt_ema.notices import Notice
from ckpt_ema.planning.average import Average
from ckpt_ema.schedules import dynamic
from ckpt_ema.schedules.by_step import sigma_rel_of
from ckpt_ema.schedules.rules import short
from ckpt_ema.schedules.table import EXPLICIT

# How much longer than usual a gap may be.
_MOST_GAP = 1.5
# A weight above which one checkpoint is nearly the whole average.
_NEARLY_ALL = 0.95


def weight_notes(averages: Sequence[Average]) -> list[Notice]:
    """Return notes on options without effect."""
    return _merged([(average, list(_cap(average))) for average in averages])


def weight_warnings(averages: Sequence[Average], names: Sequence[str]) -> list[Notice]:
    """Return warnings about the weights; `names` are those of the plan's checkpoints."""
    about = [(average, list(_warnings(average, names))) for average in averages]
    return [*_merged(about), *_equal(averages)]


def _merged(about: Sequence[tuple[Average, Sequence[Notice]]]) -> list[Notice]:
    """Return each notice once; of several averages, with the names of those it is about."""
    notices = dict.fromkeys(chain.from_iterable(found for _, found in about))
    if len(about) == 1:
        return list(notices)
    return [
        Notice(
            notice.code,
            f"{some([one.name for one, found in about if notice in found], 3)}: {notice.message}",
        )
        for notice in notices
    ]


def _cap(average: Average) -> Iterator[Notice]:
    """Note a cap of the decay that is never reached."""
    schedule = average.rule.schedule
    if schedule not in ("dynamic", "warmup") or len(average.members) == 1:
        return
    decay = average.rule.numbers["decay"]
    at_steps = average.rule.counts_steps
    count = average.steps[-1] if at_steps else len(average.members)
    unit = average.unit if at_steps else "checkpoints"
    first, effective = max(average.decays), ""
    if schedule == "dynamic":
        first = dynamic.first_decay_that_matters(count + at_steps)
        if decay < 1:
            below = dynamic.updates_below_the_cap(decay)
            after = f"{unit.removesuffix('s')} {below}" if at_steps else f"{below + 1} {unit}"
            effective = f" ({short(decay)} takes effect after {after})"
    if decay > first or (decay == first and schedule == "dynamic"):
        yield Notice(
            Code.NO_EFFECT,
            f"--decay {short(decay)} has no effect with {count} {unit}; use less than {first:.4g},"
            f" or --half-life{effective}.",
        )


def _warnings(average: Average, names: Sequence[str]) -> Iterator[Notice]:
    weights = average.weights
    if len(weights) == 1:
        message = "Only one checkpoint, so the average equals it."
        yield Notice(Code.FEW_CHECKPOINTS, message)
    elif average.rule.schedule != EXPLICIT:
        if weights[0] > 0.5:
            below = _option_that_keeps(0.5, average, since=0)
            remedy = f"; with {below.format('below')}, less than half" if below else ""
            which = f"oldest checkpoint, {names[average.members[0]]}"
            message = f"The {which}, has {weights[0]:.1%} of the weight{remedy}."
            yield Notice(Code.UNEVEN_WEIGHTS, message)
        if weights[-1] > _NEARLY_ALL:
            above = _option_that_keeps(1 - _NEARLY_ALL, average, since=-2)
            remedy = f"; with {above.format('above')}, the others have more" if above else ""
            which = f"newest checkpoint, {names[average.newest]}"
            message = f"The {which}, has {weights[-1]:.1%} of the weight{remedy}."
            yield Notice(Code.UNEVEN_WEIGHTS, message)
        if not average.rule.counts_steps:
            yield from _irregular(average, names)


def _irregular(average: Average, names: Sequence[str]) -> Iterator[Notice]:
    """Warn if weights count checkpoints that are not equally far apart."""
    known = [gap for gap in average.gaps if gap is not None]
    if average.unit == "checkpoints" or max(known) <= _MOST_GAP * median(known):
        return
    longest = average.gaps.index(max(known))
    before, after = (names[average.members[n]] for n in (longest - 1, longest))
    age, unit = average.statistics.half_life, average.unit
    remedy = f"; --half-life {_brief(age)} counts {unit} and has the same mean age" if age else ""
    yield Notice(
        Code.UNEVEN_GAPS,
        f"Weights count checkpoints, but their gaps differ: {max(known)} {unit} from {before} to"
        f" {after}, median {median(known):g}{remedy}.",
    )


def _option_that_keeps(share: float, average: Average, since: int) -> str:
    """Return the option of its schedule at which `share` is left of an earlier shadow.

    The shadow is that after checkpoint number `since`. "{}" stands for the side of the value to
    choose. Empty where no value of an option would do it.
    """
    span = average.steps[-1] - average.steps[since]
    folds = len(average.steps[since:]) - 1
    match average.rule.schedule:
        case "constant":
            return f"--decay {{}} {share ** (1 / folds):.4g}"
        case "dynamic" if folds == 1 and not average.rule.counts_steps:
            return f"--decay {{}} {share:.4g}"  # which the ramp is above from the first fold on
        case "per-step":
            return f"--decay-per-step {{}} {share ** (1 / span):.6g}"
        case "half-life":
            return f"--half-life {{}} {_brief(span * math.log(0.5) / math.log(share))}"
        case "power":
            ratio = average.steps[since] / average.steps[-1]
            gamma = math.log(share) / math.log(ratio) - 1
            return f"--sigma-rel {{}} {sigma_rel_of(gamma):.3g}" if gamma > 0 else ""
    return ""


def _brief(steps: float) -> str:
    """Write a number of steps, to the step where there are many."""
    return f"{steps:.4g}" if steps < 1000 else f"{steps:.0f}"


def _equal(averages: Sequence[Average]) -> Iterator[Notice]:
    """Warn of averages with the same weights."""
    alike: dict[object, list[str]] = {}
    for average in averages:
        alike.setdefault((average.members, average.weights), []).append(average.name)
    for names in alike.values():
        if len(names) > 1:
            yield Notice(Code.SAME_WEIGHTS, f"{some(names)} have the same weights.")
