"""The averages that options ask for: each rule on each selection, with its weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckpt_ema.errors import Code, OptionError
from ckpt_ema.find.checkpoint import Checkpoint, gaps, known_steps, needed_steps
from ckpt_ema.find.select import Subset
from ckpt_ema.options import Weighting
from ckpt_ema.schedules.explicit import matched, read_weights
from ckpt_ema.schedules.rules import EXPLICIT, Rule
from ckpt_ema.schedules.statistics import Statistics, statistics
from ckpt_ema.schedules.weights import decays_of, weights_of
from ckpt_ema.targets.target import Output, OutputFile

_TOLERANCE = 1e-9  # how far apart two machines may compute a decay or a weight


class Weighted(NamedTuple):
    """The checkpoints of one average, oldest first, before anything is known of tensors."""

    name: str
    rule: Rule
    checkpoints: tuple[Checkpoint, ...]
    decays: tuple[float, ...]  # of the second checkpoint and those after it


class Folding(NamedTuple):
    """What the fold makes of the inputs of a plan: an average, or its exact shadow."""

    reads: tuple[int, ...]  # indexes into the inputs, oldest first
    decays: tuple[float, ...]  # of the second of these and those after it
    files: tuple[OutputFile, ...]

    @property
    def newest(self) -> int:
        """The index of the last input, which screening compares the result with."""
        return self.reads[-1]


@dataclass(frozen=True, slots=True)
class Average:
    """One average of a plan; everything is oldest first."""

    name: str  # unique in its plan, such as half-life-2000-last-4
    rule: Rule
    members: tuple[int, ...]  # its checkpoints, as indexes into those of the plan
    reads: tuple[int, ...]  # what is read for it, as indexes into the inputs of the plan
    steps: tuple[int, ...]  # of its checkpoints; 1, 2, ... where training steps are not known
    unit: str  # what `steps` count: "steps", "epochs" or "checkpoints"
    gaps: tuple[int | None, ...]  # from the checkpoint before, where that is known
    decays: tuple[float, ...]  # of the second checkpoint and those after it
    weights: tuple[float, ...]
    statistics: Statistics
    output: Output

    @property
    def text(self) -> str:
        """Its schedule, for people."""
        return self.rule.text(self.unit)

    @property
    def newest(self) -> int:
        """The index of its last checkpoint, which gives the output its form."""
        return self.members[-1]

    @property
    def folding(self) -> Folding:
        """How it is made of the inputs of the plan."""
        folds = len(self.reads) - 1
        return Folding(self.reads, self.decays[len(self.decays) - folds :], self.output.files)

    @property
    def folding_of_state(self) -> Folding | None:
        """How its state is made; None where it keeps none."""
        state = self.output.state
        return self.folding._replace(files=(state,)) if state else None


def foldings_of(averages: Sequence[Average]) -> list[Folding]:
    """Return what the fold makes of some averages: each of them, then the states that are kept."""
    states = [one.folding_of_state for one in averages]
    return [*(one.folding for one in averages), *filter(None, states)]


def weigh(subsets: Sequence[Subset], options: Weighting) -> list[Weighted]:
    """Apply every rule to every selection.

    Raises `RefusedError` if a rule counts steps that are not known, or if explicit weights do not
    match the checkpoints.
    """
    found: dict[str, Weighted] = {}
    for subset in subsets:
        for rule in options.rules:
            name = "-".join(filter(None, [rule.name, subset.name]))
            if name in found:
                message = f"Two averages would be named {name}."
                raise OptionError(message, code=Code.CONFLICTING_OPTIONS)
            checkpoints, decays = _weighted(rule, subset.checkpoints, options)
            found[name] = Weighted(name, rule, checkpoints, tuple(decays))
    return list(found.values())


def _weighted(
    rule: Rule, checkpoints: tuple[Checkpoint, ...], options: Weighting
) -> tuple[tuple[Checkpoint, ...], list[float]]:
    """Return the checkpoints that a rule takes, and the decays to fold them with."""
    if rule.schedule == EXPLICIT:
        assert options.weights is not None
        weights = matched(
            read_weights(options.weights),
            [(checkpoint.name, checkpoint.step) for checkpoint in checkpoints],
            normalize=options.normalize,
        )
        taken = [(c, weight) for c, weight in zip(checkpoints, weights, strict=True) if weight]
        return tuple(c for c, _ in taken), decays_of([weight for _, weight in taken])
    return checkpoints, decays_by(rule, checkpoints)


def decays_by(rule: Rule, checkpoints: Sequence[Checkpoint]) -> list[float]:
    """Return the decays that a rule gives to checkpoints; raises if it counts unknown steps."""
    steps: Sequence[int] = range(1, len(checkpoints) + 1)
    if rule.counts_steps:
        steps = needed_steps(checkpoints, rule.asked_by)
    return rule.decays(steps)


def make_averages(
    weighted: Sequence[Weighted],
    checkpoints: Sequence[Checkpoint],
    reads: Sequence[Sequence[int]],
    outputs: Sequence[Output],
) -> tuple[Average, ...]:
    """Make the averages of a plan of these checkpoints, with what is read for each."""
    index_of = {checkpoint: index for index, checkpoint in enumerate(checkpoints)}
    averages = []
    rows = zip(weighted, reads, outputs, strict=True)
    for (name, rule, members, decays), read, output in rows:
        steps: Sequence[int] | None = known_steps(members)
        unit = "epochs" if members[-1].unit == "epoch" else "steps"
        if steps is None:
            steps, unit = range(1, len(members) + 1), "checkpoints"
        indexes = tuple(index_of[checkpoint] for checkpoint in members)
        averages.append(
            Average(
                name=name,
                rule=rule,
                members=indexes,
                reads=tuple(read),
                steps=tuple(steps),
                unit=unit,
                gaps=tuple(gaps(members)),
                decays=decays,
                weights=tuple(weights_of(decays)),
                statistics=statistics(steps, decays),
                output=output,
            )
        )
    return tuple(averages)


def are_close(found: Sequence[float], right: Sequence[float]) -> bool:
    """Return whether decays or weights are those that another machine has computed.

    Raises `ValueError` for another number of them.
    """
    pairs = zip(found, right, strict=True)
    return all(math.isclose(*pair, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE) for pair in pairs)
