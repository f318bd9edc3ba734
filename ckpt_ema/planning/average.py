"""The averages that options ask for: each rule on each selection, with its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckpt_ema.errors import OptionError
from ckpt_ema.find.checkpoint import Checkpoint, gaps, known_steps, needed_steps
from ckpt_ema.find.select import Subset
from ckpt_ema.options import Weighting as WeightingOptions
from ckpt_ema.schedules.explicit import matched, read_weights
from ckpt_ema.schedules.rules import Rule
from ckpt_ema.schedules.statistics import Statistics, statistics
from ckpt_ema.schedules.table import EXPLICIT
from ckpt_ema.schedules.weights import decays_of, weights_of
from ckpt_ema.targets.safetensors_folder import Output


class Weighting(NamedTuple):
    """One average that is asked for, before anything is known of tensors; oldest first."""

    name: str
    rule: Rule
    checkpoints: tuple[Checkpoint, ...]
    decays: tuple[float, ...]  # of the second checkpoint and those after it


@dataclass(frozen=True, slots=True)
class Average:
    """One average of a plan; everything is oldest first."""

    name: str  # what tells it from the others, such as half-life-2000-last-4
    rule: Rule
    members: tuple[int, ...]  # its checkpoints, as numbers of those of the plan
    steps: tuple[int, ...]  # of its checkpoints; 1, 2, ... where training steps are not known
    unit: str  # what `steps` count: "steps", "epochs" or "checkpoints"
    gaps: tuple[int | None, ...]  # from the checkpoint before, where that is known
    decays: tuple[float, ...]  # of the second checkpoint and those after it
    weights: tuple[float, ...]
    statistics: Statistics
    output: Output

    @property
    def text(self) -> str:
        """How its weights come about, for people."""
        return self.rule.told(self.unit)

    @property
    def newest(self) -> int:
        """The number of its last checkpoint, which gives the output its form."""
        return self.members[-1]


def weigh(subsets: Sequence[Subset], options: WeightingOptions) -> list[Weighting]:
    """Every rule on every selection.

    Raises `RefusedError` if a rule counts steps that are not known, or if stated weights are not
    those of the checkpoints.
    """
    found = []
    for subset in subsets:
        for rule in options.rules:
            name = "-".join(filter(None, [rule.name, subset.name]))
            checkpoints, decays = _weighted(rule, subset.checkpoints, options)
            found.append(Weighting(name, rule, checkpoints, tuple(decays)))
    names = [weighting.name for weighting in found]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"The average {name} is asked for twice.")
    return found


def make_average(
    weighting: Weighting, numbers: Mapping[Checkpoint, int], output: Output
) -> Average:
    """A average of a plan whose checkpoints have these numbers."""
    checkpoints = weighting.checkpoints
    steps, unit = _steps(checkpoints)
    return Average(
        weighting.name,
        weighting.rule,
        tuple(numbers[checkpoint] for checkpoint in checkpoints),
        tuple(steps),
        unit,
        tuple(gaps(checkpoints)),
        weighting.decays,
        tuple(weights_of(weighting.decays)),
        statistics(steps, weighting.decays),
        output,
    )


def _weighted(
    rule: Rule, checkpoints: tuple[Checkpoint, ...], options: WeightingOptions
) -> tuple[tuple[Checkpoint, ...], list[float]]:
    """The checkpoints that a rule takes, and the decays to fold them with."""
    if rule.schedule == EXPLICIT:
        assert options.weights is not None
        stated = matched(
            read_weights(options.weights),
            [(checkpoint.name, checkpoint.step) for checkpoint in checkpoints],
            normalize=options.normalize,
        )
        taken = [(c, share) for c, share in zip(checkpoints, stated, strict=True) if share]
        return tuple(c for c, _ in taken), decays_of([share for _, share in taken])
    steps: Sequence[int] = range(1, len(checkpoints) + 1)
    if rule.counts_steps:
        steps = needed_steps(checkpoints, rule.asked_by)
    return checkpoints, rule.decays(steps)


def _steps(checkpoints: Sequence[Checkpoint]) -> tuple[Sequence[int], str]:
    """Training steps and their unit; places in the list where steps are not known."""
    steps = known_steps(checkpoints)
    if steps is None:
        return range(1, len(checkpoints) + 1), "checkpoints"
    return steps, "epochs" if checkpoints[-1].unit == "epoch" else "steps"
