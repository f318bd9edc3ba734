"""The averages that compete: those that options ask for, the last checkpoint, greedy soups."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.select import Subset
from ckpt_ema.options import Weighting
from ckpt_ema.output.selected import LAST
from ckpt_ema.planning.average import Average, Weighted, weigh
from ckpt_ema.planning.decide import Choose
from ckpt_ema.planning.plan import Plan
from ckpt_ema.schedules.rules import ALONE, Rule, make_rules


def competing(subsets: Sequence[Subset], options: Weighting) -> list[Weighted]:
    """Choose the averages that options ask for, and the last checkpoint alone."""
    return [*weigh(subsets, options), _uniform(LAST, all_of(subsets)[-1:])]


def singles(numbers: Sequence[int] | None = None) -> Choose:
    """Choose each checkpoint alone, or those with these numbers."""

    def choose(subsets: Sequence[Subset], _: Weighting) -> list[Weighted]:
        every = list(enumerate(all_of(subsets)))
        chosen = every if numbers is None else [every[number] for number in numbers]
        return [_uniform(f"single-{number}", [one]) for number, one in chosen]

    return choose


def soup(name: str, members: Sequence[int]) -> Choose:
    """Choose the uniform average of the checkpoints with these numbers, which ascend."""

    def choose(subsets: Sequence[Subset], _: Weighting) -> list[Weighted]:
        every = all_of(subsets)
        return [_uniform(name, [every[number] for number in members])]

    return choose


def all_of(subsets: Sequence[Subset]) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that any selection takes; the largest one has those of all others."""
    return max((one.checkpoints for one in subsets), key=len)


def _uniform(name: str, checkpoints: Sequence[Checkpoint]) -> Weighted:
    if len(checkpoints) == 1:
        return Weighted(name, Rule(ALONE, {}), tuple(checkpoints), ())
    [rule] = make_rules("uniform", {})
    decays = rule.decays(range(len(checkpoints)))
    return Weighted(name, rule, tuple(checkpoints), tuple(decays))


def placed(average: Average, path: Path) -> Average:
    """Return an average whose output is somewhere else."""
    return replace(average, output=replace(average.output, path=path))


def moved(plan: Plan, folder: Path) -> Plan:
    """Return a plan whose averages are each in a folder of its name below `folder`."""
    averages = tuple(placed(one, folder / one.name) for one in plan.averages)
    return replace(plan, averages=averages, output=folder)


def weights_by_name(plan: Plan, average: Average) -> dict[str, float]:
    """Return the weights of an average by the names of its checkpoints, oldest first."""
    names = [plan.checkpoints[number].name for number in average.members]
    return dict(zip(names, average.weights, strict=True))
