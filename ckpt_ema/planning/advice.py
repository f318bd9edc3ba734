"""What a person should know of the weights, with the number that would change them."""

import math
from collections.abc import Callable, Sequence
from statistics import median

from ckpt_ema.errors import printable, some
from ckpt_ema.planning.candidates import Candidate
from ckpt_ema.schedules import formulas
from ckpt_ema.schedules.rules import WEIGHTS

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
            f"--decay {decay:g} changes nothing here: the warmup ends at {last:.4g}, and the first"
            " decay to matter is one below that."
        ] * (decay > last)
    at_steps = candidate.rule.counts_steps
    updates = candidate.steps[-1] if at_steps else len(candidate.members) - 1
    first = formulas.first_decay_that_matters(updates + 1)
    if decay < first:
        return []
    over = f"{updates} training steps" if at_steps else f"{updates + 1} checkpoints"
    reached = ""
    if decay < 1:
        below = formulas.updates_below_the_cap(decay)
        most = f"training step {below}" if at_steps else f"{below + 1} checkpoints"
        reached = f" ({decay:g} is reached beyond {most})"
    return [
        f"--decay {decay:g} changes nothing here: over {over} the dynamic decay ends at"
        f" {first:.4g}, and the first decay to matter is one below that{reached}."
    ]


def _oldest(candidate: Candidate, names: Sequence[str]) -> list[str]:
    """Whether the oldest checkpoint has more weight than all others, though nobody said so."""
    span = candidate.steps[-1] - candidate.steps[0]
    folds = len(candidate.members) - 1
    if not folds or candidate.weights[0] <= 0.5:
        return []
    less: dict[str, Callable[[], str]] = {
        "constant": lambda: f"a --decay below {0.5 ** (1 / folds):.4g}",
        "per-step": lambda: f"a --decay-per-step below {0.5 ** (1 / span):.6g}",
        "half-life": lambda: f"a --half-life below {span}",
        "power": lambda: f"a --sigma-rel below {_sigma_rel_for(candidate, 0, 0.5):.3g}",
    }
    if candidate.rule.schedule not in less:
        return []
    return [
        f"The oldest checkpoint, {printable(names[candidate.members[0]])}, has"
        f" {candidate.weights[0]:.1%} of the weight;"
        f" {less[candidate.rule.schedule]()} gives it less than half."
    ]


def _newest(candidate: Candidate, names: Sequence[str]) -> list[str]:
    """Whether the average is nearly the newest checkpoint alone."""
    if len(candidate.members) == 1 or candidate.weights[-1] <= _NEARLY_ALL:
        return []
    gap = candidate.steps[-1] - candidate.steps[-2]
    kept = 1 - _NEARLY_ALL
    more: dict[str, Callable[[], str]] = {
        "constant": lambda: f"a --decay above {kept:.2g}",
        "dynamic": lambda: "--num-updates index" if candidate.rule.counts_steps else "more of them",
        "per-step": lambda: f"a --decay-per-step above {kept ** (1 / gap):.6g}",
        "half-life": lambda: f"a --half-life above {gap * math.log(0.5) / math.log(kept):.4g}",
        "power": lambda: f"a --sigma-rel above {_sigma_rel_for(candidate, -2, kept):.3g}",
    }
    if candidate.rule.schedule not in more:
        return []
    return [
        f"The average is nearly its newest checkpoint, {printable(names[candidate.newest])}, which"
        f" has {candidate.weights[-1]:.1%} of the weight;"
        f" {more[candidate.rule.schedule]()} gives the others more."
    ]


def _irregular(candidate: Candidate, names: Sequence[str]) -> list[str]:
    """Whether the weights count checkpoints that are not equally far apart."""
    known = [gap for gap in candidate.gaps if gap is not None]
    if candidate.rule.counts_steps or candidate.rule.schedule == WEIGHTS:
        return []
    if len(known) < 2 or max(known) <= _MOST_GAP * median(known):
        return []
    longest = candidate.gaps.index(max(known))
    before, after = (printable(names[candidate.members[n]]) for n in (longest - 1, longest))
    same_age = candidate.statistics.half_life
    instead = f"; by steps, --half-life {same_age:.3g} is as old in the mean" if same_age else ""
    return [
        f"The gaps between checkpoints differ: {max(known)} from {before} to {after}, half of them"
        f" at most {median(known):g}; the weights count checkpoints, not steps{instead}."
    ]


def _sigma_rel_for(candidate: Candidate, number: int, kept: float) -> float:
    """The width at which the power function keeps a share of what it has at one checkpoint."""
    ratio = candidate.steps[number] / candidate.steps[-1]
    return formulas.sigma_rel_of(max(math.log(kept) / math.log(ratio) - 1, 0.0))


def _equal(candidates: Sequence[Candidate]) -> list[str]:
    """A warning of averages that come out the same."""
    alike: dict[object, list[str]] = {}
    for candidate in candidates:
        alike.setdefault((candidate.members, candidate.weights), []).append(candidate.name)
    return [f"{some(names)} have the same weights." for names in alike.values() if len(names) > 1]
