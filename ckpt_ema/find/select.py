"""Which of a run's checkpoints take part: by their numbers, their distance, their place, a metric.

The options work in one order: steps first, then distances, then the last ones, then the best ones.
Where --last or --best have several values, each is a selection of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ckpt_ema.errors import RefusedError, flag, printable, some
from ckpt_ema.find.found import Found
from ckpt_ema.find.metrics import higher_is_better, metric_values
from ckpt_ema.find.order import Checkpoint, Read
from ckpt_ema.find.steps import needed_steps
from ckpt_ema.options import Options


class Selection(NamedTuple):
    """Checkpoints for an average, oldest first."""

    name: str  # what tells it from other selections, such as last-4; empty for the only one
    checkpoints: tuple[Checkpoint, ...]


class Selected(NamedTuple):
    """What came of selecting."""

    selections: tuple[Selection, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def select(found: Found, options: Options, read: Read) -> Selected:
    """Choose among a run's checkpoints.

    Raises `RefusedError` if nothing is left, if a step that was asked for is not there, or if what
    an option counts is not known of this run.
    """
    checkpoints = found.checkpoints
    chosen = _by_step(checkpoints, options)
    chosen = _apart(chosen, options)
    chosen = chosen[::-1][:: options.every or 1][::-1]
    if not chosen:
        raise _nothing_left(checkpoints, options)
    warnings = []
    selections = []
    for last in options.last or (None,):
        if last is not None and last > len(chosen):
            warnings.append(f"--last {last} takes all there are: {len(chosen)} checkpoints.")
        members = chosen[-last:] if last else chosen
        for best, kept in _best(members, found, options, read):
            if best is not None and best > len(members):
                warnings.append(f"--best {best} takes all there are: {len(members)} checkpoints.")
            parts = [f"last-{last}"] * bool(last) + [f"best-{best}"] * bool(best)
            selections.append(Selection("-".join(parts), tuple(kept)))
    if len(selections) == 1:
        selections = [Selection("", selections[0].checkpoints)]
    most = max(len(selection.checkpoints) for selection in selections)
    notes = []
    if most < len(checkpoints):
        notes.append(f"{_asked(options)} takes {most} of {len(checkpoints)} checkpoints.")
    return Selected(tuple(selections), tuple(notes), tuple(dict.fromkeys(warnings)))


def _by_step(checkpoints: Sequence[Checkpoint], options: Options) -> list[Checkpoint]:
    low, high, ranges = options.from_step, options.to_step, options.steps
    if low is None and high is None and ranges is None:
        return list(checkpoints)
    numbers = [_number(checkpoint, options) for checkpoint in checkpoints]
    for first, last in ranges or ():
        if first == last and first not in numbers:
            nearest = sorted(numbers, key=lambda number: abs(number - first))[:3]
            raise RefusedError(
                f"--steps {first}: no checkpoint has this number; the nearest are"
                f" {some([str(number) for number in sorted(nearest)])}."
            )
    return [
        checkpoint
        for checkpoint, number in zip(checkpoints, numbers, strict=True)
        if (low is None or low <= number)
        and (high is None or number <= high)
        and (ranges is None or any(first <= number <= last for first, last in ranges))
    ]


def _number(checkpoint: Checkpoint, options: Options) -> int:
    if checkpoint.step is None:
        raise RefusedError(
            f"{printable(checkpoint.name)} tells no step, by which {_asked(options)} could choose.",
            "Choose by name, with --include and --exclude.",
        )
    return checkpoint.step


def _apart(checkpoints: list[Checkpoint], options: Options) -> list[Checkpoint]:
    """The newest checkpoint, and before it each that is far enough from the one kept after it."""
    if options.min_gap is None or not checkpoints:
        return checkpoints
    steps = needed_steps(checkpoints, "--min-gap")
    kept: list[int] = [len(steps) - 1]
    for number in range(len(steps) - 2, -1, -1):
        if steps[kept[-1]] - steps[number] >= options.min_gap:
            kept.append(number)
    return [checkpoints[number] for number in reversed(kept)]


def _best(
    checkpoints: Sequence[Checkpoint], found: Found, options: Options, read: Read
) -> list[tuple[int | None, list[Checkpoint]]]:
    """For each value of --best that many checkpoints, in their order; ties go to the later one."""
    if options.best is None or options.metric is None:
        return [(None, list(checkpoints))]
    # Also those that do not take part may log what these reached.
    run = [*(path for path, _ in found.left_out), *(one.path for one in found.checkpoints)]
    values = metric_values(checkpoints, run, options.metric, read)  # first: the name may be a slip
    sign = -1 if higher_is_better(options.metric, options.metric_mode) else 1
    ranked = sorted(range(len(values)), key=lambda number: (sign * values[number], -number))
    return [
        (best, [checkpoints[number] for number in sorted(ranked[:best])]) for best in options.best
    ]


def _nothing_left(checkpoints: Sequence[Checkpoint], options: Options) -> RefusedError:
    first, last = checkpoints[0], checkpoints[-1]
    return RefusedError(
        f"{_asked(options)} leaves none of {len(checkpoints)} checkpoints, which go from"
        f" {printable(first.name)} to {printable(last.name)}."
    )


def _asked(options: Options) -> str:
    """The options that select, as they were given."""
    values = {
        "--steps": ",".join("-".join(map(str, dict.fromkeys(r))) for r in options.steps or ()),
        "--from": options.from_step,
        "--to": options.to_step,
        flag("min_gap"): options.min_gap,
        "--every": options.every,
        "--last": ",".join(map(str, options.last or ())),
        "--best": ",".join(map(str, options.best or ())),
    }
    return " ".join(f"{name} {value}" for name, value in values.items() if value not in (None, ""))
