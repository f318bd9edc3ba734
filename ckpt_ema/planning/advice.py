"""What a person should know of the weights, with the number that would change them."""

import math
from collections.abc import Sequence
from statistics import median

from ckpt_ema.errors import printable, some
from ckpt_ema.planning.average import Average
from ckpt_ema.schedules import formulas
from ckpt_ema.schedules.rules import short
from ckpt_ema.schedules.table import EXPLICIT

# How much longer than usual a gap may be.
_MOST_GAP = 1.5
# A share above which one checkpoint is nearly the whole average.
_NEARLY_ALL = 0.95


def advice(averages: Sequence[Average], names: Sequence[str]) -> list[str]:
    """Warnings about the weights; `names` are those of the plan's checkpoints."""
    concerned: dict[str, list[str]] = {}
    for average in averages:
        for warnings in (
            _cap(average),
            _oldest(average, names),
            _newest(average, names),
            _irregular(average, names),
        ):
            for warning in warnings:
                concerned.setdefault(warning, []).append(average.name)
    if len(averages) == 1:
        return list(concerned)
    return [
        *(f"{some(names, 3)}: {warning}" for warning, names in concerned.items()),
        *_equal(averages),
    ]


def _cap(average: Average) -> list[str]:
    """Whether the most that the average may keep is ever reached."""
    if len(average.members) == 1:
        return ["There is one checkpoint only, so the average is that checkpoint."]
    if average.rule.schedule not in ("dynamic", "warmup"):
        return []
    decay = average.rule.numbers["decay"]
    if average.rule.schedule == "warmup":
        last = max(average.decays)
        return [
            f"--decay {short(decay)} changes nothing here: the warmup ends at {last:.4g}, and the"
            " first decay to matter is one below that."
        ] * (decay > last)
    at_steps = average.rule.counts_steps
    updates = average.steps[-1] if at_steps else len(average.members) - 1
    first = formulas.first_decay_that_matters(updates + 1)
    if decay < first:
        return []
    unit = "epoch" if average.unit == "epochs" else "training step"
    over = f"{updates} {unit}s" if at_steps else f"{updates + 1} checkpoints"
    reached = ""
    if decay < 1:
        below = formulas.updates_below_the_cap(decay)
        most = f"{unit} {below}" if at_steps else f"{below + 1} checkpoints"
        reached = f" ({short(decay)} is reached beyond {most})"
    return [
        f"--decay {short(decay)} changes nothing here: over {over} the dynamic decay ends at"
        f" {first:.4g}, and the first decay to matter is one below that{reached}."
    ]


def _oldest(average: Average, names: Sequence[str]) -> list[str]:
    """Whether the oldest checkpoint has more weight than all others, though nobody said so."""
    if not _is_computed(average) or average.weights[0] <= 0.5:
        return []
    below = _option_that_keeps(0.5, average, since=0)
    remedy = f"; a {below} gives it less than half" if below else ""
    return [
        f"The oldest checkpoint, {printable(names[average.members[0]])}, has"
        f" {average.weights[0]:.1%} of the weight{remedy.format('below')}."
    ]


def _newest(average: Average, names: Sequence[str]) -> list[str]:
    """Whether the average is nearly the newest checkpoint alone."""
    if not _is_computed(average) or average.weights[-1] <= _NEARLY_ALL:
        return []
    above = _option_that_keeps(1 - _NEARLY_ALL, average, since=-2)
    remedy = f"; a {above} gives the others more" if above else ""
    return [
        f"The average is nearly its newest checkpoint, {printable(names[average.newest])}, which"
        f" has {average.weights[-1]:.1%} of the weight{remedy.format('above')}."
    ]


def _is_computed(average: Average) -> bool:
    """Whether a schedule shares the weight out among several checkpoints."""
    return len(average.members) > 1 and average.rule.schedule != EXPLICIT


def _irregular(average: Average, names: Sequence[str]) -> list[str]:
    """Whether the weights count checkpoints that are not equally far apart."""
    known = [gap for gap in average.gaps if gap is not None]
    if average.rule.counts_steps or not _is_computed(average):
        return []
    if average.unit == "checkpoints" or max(known) <= _MOST_GAP * median(known):
        return []
    longest = average.gaps.index(max(known))
    before, after = (printable(names[average.members[n]]) for n in (longest - 1, longest))
    age = average.statistics.half_life
    unit = average.unit
    by_steps = f"; by {unit}, --half-life {_brief(age)} is as old in the mean" if age else ""
    return [
        f"The gaps between checkpoints differ: {max(known)} from {before} to {after}, half of them"
        f" at most {median(known):g}; the weights count checkpoints, not {unit}{by_steps}."
    ]


def _option_that_keeps(share: float, average: Average, since: int) -> str:
    """The option of its schedule, with the value at which a share is left of an earlier shadow.

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
            return f"--sigma-rel {{}} {formulas.sigma_rel_of(gamma):.3g}" if gamma > 0 else ""
    return ""


def _brief(steps: float) -> str:
    """A number of steps, to the step where there are many."""
    return f"{steps:.4g}" if steps < 1000 else f"{steps:.0f}"


def _equal(averages: Sequence[Average]) -> list[str]:
    """A warning of averages that come out the same."""
    alike: dict[object, list[str]] = {}
    for average in averages:
        alike.setdefault((average.members, average.weights), []).append(average.name)
    return [f"{some(names)} have the same weights." for names in alike.values() if len(names) > 1]
