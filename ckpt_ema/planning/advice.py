"""What a person should know of the weights, with the number that would change them."""

import math
from collections.abc import Sequence
from statistics import median

from ckpt_ema.errors import printable, some
from ckpt_ema.planning.candidates import Candidate
from ckpt_ema.schedules import formulas
from ckpt_ema.schedules.rules import short
from ckpt_ema.schedules.table import WEIGHTS

# How much longer than usual a gap may be.
_MOST_GAP = 1.5
# A share above which one checkpoint is nearly the whole average.
_NEARLY_ALL = 0.95


def advice(candidates: Sequence[Candidate], names: Sequence[str]) -> list[str]:
    """Warnings about the weights; `names` are those of the plan's checkpoints."""
    concerned: dict[str, list[str]] = {}
    for candidate in candidates:
        for warnings in (
            _cap(candidate),
            _oldest(candidate, names),
            _newest(candidate, names),
            _irregular(candidate, names),
        ):
            for warning in warnings:
                concerned.setdefault(warning, []).append(candidate.name)
    if len(candidates) == 1:
        return list(concerned)
    return [
        *(f"{some(averages, 3)}: {warning}" for warning, averages in concerned.items()),
        *_equal(candidates),
    ]


def _cap(candidate: Candidate) -> list[str]:
    """Whether the most that the average may keep is ever reached."""
    if len(candidate.members) == 1:
        return ["There is one checkpoint only, so the average is that checkpoint."]
    if candidate.rule.schedule not in ("dynamic", "warmup"):
        return []
    decay = candidate.rule.numbers["decay"]
    if candidate.rule.schedule == "warmup":
        last = max(candidate.decays)
        return [
            f"--decay {short(decay)} changes nothing here: the warmup ends at {last:.4g}, and the"
            " first decay to matter is one below that."
        ] * (decay > last)
    at_steps = candidate.rule.counts_steps
    updates = candidate.steps[-1] if at_steps else len(candidate.members) - 1
    first = formulas.first_decay_that_matters(updates + 1)
    if decay < first:
        return []
    unit = "epoch" if candidate.unit == "epochs" else "training step"
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


def _oldest(candidate: Candidate, names: Sequence[str]) -> list[str]:
    """Whether the oldest checkpoint has more weight than all others, though nobody said so."""
    if not _is_computed(candidate) or candidate.weights[0] <= 0.5:
        return []
    below = _option_that_keeps(0.5, candidate, since=0)
    remedy = f"; a {below} gives it less than half" if below else ""
    return [
        f"The oldest checkpoint, {printable(names[candidate.members[0]])}, has"
        f" {candidate.weights[0]:.1%} of the weight{remedy.format('below')}."
    ]


def _newest(candidate: Candidate, names: Sequence[str]) -> list[str]:
    """Whether the average is nearly the newest checkpoint alone."""
    if not _is_computed(candidate) or candidate.weights[-1] <= _NEARLY_ALL:
        return []
    above = _option_that_keeps(1 - _NEARLY_ALL, candidate, since=-2)
    remedy = f"; a {above} gives the others more" if above else ""
    return [
        f"The average is nearly its newest checkpoint, {printable(names[candidate.newest])}, which"
        f" has {candidate.weights[-1]:.1%} of the weight{remedy.format('above')}."
    ]


def _is_computed(candidate: Candidate) -> bool:
    """Whether a schedule shares the weight out among several checkpoints."""
    return len(candidate.members) > 1 and candidate.rule.schedule != WEIGHTS


def _irregular(candidate: Candidate, names: Sequence[str]) -> list[str]:
    """Whether the weights count checkpoints that are not equally far apart."""
    known = [gap for gap in candidate.gaps if gap is not None]
    if candidate.rule.counts_steps or not _is_computed(candidate):
        return []
    if candidate.unit == "checkpoints" or max(known) <= _MOST_GAP * median(known):
        return []
    longest = candidate.gaps.index(max(known))
    before, after = (printable(names[candidate.members[n]]) for n in (longest - 1, longest))
    age = candidate.statistics.half_life
    unit = candidate.unit
    by_steps = f"; by {unit}, --half-life {_brief(age)} is as old in the mean" if age else ""
    return [
        f"The gaps between checkpoints differ: {max(known)} from {before} to {after}, half of them"
        f" at most {median(known):g}; the weights count checkpoints, not {unit}{by_steps}."
    ]


def _option_that_keeps(share: float, candidate: Candidate, since: int) -> str:
    """The option of its schedule, with the value at which a share is left of an earlier shadow.

    The shadow is that after checkpoint number `since`. "{}" stands for the side of the value to
    choose. Empty where no value of an option would do it.
    """
    span = candidate.steps[-1] - candidate.steps[since]
    folds = len(candidate.steps[since:]) - 1
    match candidate.rule.schedule:
        case "constant":
            return f"--decay {{}} {share ** (1 / folds):.4g}"
        case "dynamic" if folds == 1 and not candidate.rule.counts_steps:
            return f"--decay {{}} {share:.4g}"  # which the ramp is above from the first fold on
        case "per-step":
            return f"--decay-per-step {{}} {share ** (1 / span):.6g}"
        case "half-life":
            return f"--half-life {{}} {_brief(span * math.log(0.5) / math.log(share))}"
        case "power":
            ratio = candidate.steps[since] / candidate.steps[-1]
            gamma = math.log(share) / math.log(ratio) - 1
            return f"--sigma-rel {{}} {formulas.sigma_rel_of(gamma):.3g}" if gamma > 0 else ""
    return ""


def _brief(steps: float) -> str:
    """A number of steps, to the step where there are many."""
    return f"{steps:.4g}" if steps < 1000 else f"{steps:.0f}"


def _equal(candidates: Sequence[Candidate]) -> list[str]:
    """A warning of averages that come out the same."""
    alike: dict[object, list[str]] = {}
    for candidate in candidates:
        alike.setdefault((candidate.members, candidate.weights), []).append(candidate.name)
    return [f"{some(names)} have the same weights." for names in alike.values() if len(names) > 1]
