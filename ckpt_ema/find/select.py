"""Which of a run's checkpoints take part: by steps, then distances, then --last, then --best."""

from collections.abc import Sequence
from typing import NamedTuple

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import Code, RefusedError, flag, some
from ckpt_ema.find.checkpoint import Checkpoint, Found, needed_steps
from ckpt_ema.find.metrics import higher_is_better, metric_values
from ckpt_ema.notices import Notice
from ckpt_ema.options import Selection


class Subset(NamedTuple):
    """Checkpoints for an average, oldest first."""

    name: str  # distinguishes it from other selections, such as last-4; empty for the only one
    checkpoints: tuple[Checkpoint, ...]


class Subsets(NamedTuple):
    """The selections, one for each value of --last and --best, and what to say of them."""

    subsets: tuple[Subset, ...]
    notes: tuple[Notice, ...]
    warnings: tuple[Notice, ...]


def select(found: Found, selection: Selection, source: Source) -> Subsets:
    """Choose among a run's checkpoints; raises if nothing is left or a step does not exist."""
    checkpoints = found.checkpoints
    asked = _asked(selection)
    chosen = _apart(_by_step(checkpoints, selection, asked), selection)
    chosen = chosen[::-1][:: selection.every or 1][::-1]
    if not chosen:
        run = f"{len(checkpoints)} checkpoints, {checkpoints[0].name} to {checkpoints[-1].name}"
        raise RefusedError(f"{asked} leaves none of {run}.", code=Code.NOTHING_SELECTED)
    warnings: list[Notice] = []
    subsets = []
    for last in selection.last or (None,):
        warnings += _too_many("--last", last, len(chosen))
        members = chosen[-last:] if last else chosen
        for best, kept in _best(members, found, selection, source):
            warnings += _too_many("--best", best, len(members))
            parts = [f"last-{last}"] * bool(last) + [f"best-{best}"] * bool(best)
            subsets.append(Subset("-".join(parts), tuple(kept)))
    if len(subsets) == 1:
        subsets = [Subset("", subsets[0].checkpoints)]
    most = max(len(subset.checkpoints) for subset in subsets)
    text = f"{asked} takes {most} of {len(checkpoints)} checkpoints."
    notes = (Notice(Code.DECIDED, text),) if most < len(checkpoints) else ()
    return Subsets(tuple(subsets), notes, tuple(dict.fromkeys(warnings)))


def _too_many(option: str, count: int | None, available: int) -> list[Notice]:
    if count is None or count <= available:
        return []
    text = f"{option} {count} takes all {available} checkpoints that there are."
    return [Notice(Code.FEW_CHECKPOINTS, text)]


def _by_step(
    checkpoints: Sequence[Checkpoint], selection: Selection, asked: str
) -> list[Checkpoint]:
    low, high, ranges = selection.from_step, selection.to_step, selection.steps
    if low is None and high is None and ranges is None:
        return list(checkpoints)
    chosen, steps = [], []
    for checkpoint in checkpoints:
        step = checkpoint.step
        if step is None:
            text = f"{asked} chooses by step, and no step is known for {checkpoint.name}."
            hint = "Choose by name, with --include and --exclude."
            raise RefusedError(text, hint, code=Code.NO_STEPS, path=checkpoint.path)
        steps.append(step)
        is_between = (low is None or low <= step) and (high is None or step <= high)
        if is_between and (ranges is None or any(a <= step <= b for a, b in ranges)):
            chosen.append(checkpoint)
    for first, last in ranges or ():
        if first == last and first not in steps:
            nearest = some(sorted(sorted(steps, key=lambda step: abs(step - first))[:3]))
            text = f"--steps {first}: no checkpoint has this number; the nearest are {nearest}."
            raise RefusedError(text, code=Code.NO_SUCH_STEP)
    return chosen


def _apart(checkpoints: list[Checkpoint], selection: Selection) -> list[Checkpoint]:
    """Return the newest checkpoint, and each one far enough before the one kept after it."""
    if selection.min_gap is None or not checkpoints:
        return checkpoints
    steps = needed_steps(checkpoints, "--min-gap")
    kept = [len(steps) - 1]
    for number in reversed(range(len(steps) - 1)):
        if steps[kept[-1]] - steps[number] >= selection.min_gap:
            kept.append(number)
    return [checkpoints[number] for number in reversed(kept)]


def _best(
    checkpoints: Sequence[Checkpoint], found: Found, selection: Selection, source: Source
) -> list[tuple[int | None, list[Checkpoint]]]:
    """Return that many checkpoints for each value of --best; ties go to the later checkpoint."""
    if selection.best is None or selection.metric is None:
        return [(None, list(checkpoints))]
    # Logs of those that do not take part may have values of these.
    run = [*(one.path for one in found.left_out), *(one.path for one in found.checkpoints)]
    # Before the direction is asked for: the name may be a slip.
    values = metric_values(checkpoints, run, selection.metric, source)
    sign = -1 if higher_is_better(selection.metric, selection.metric_mode) else 1
    ranked = sorted(range(len(values)), key=lambda number: (sign * values[number], -number))
    return [(best, [checkpoints[n] for n in sorted(ranked[:best])]) for best in selection.best]


def _asked(selection: Selection) -> str:
    """Return the options that select, as they were given."""
    values = {
        "--steps": ",".join("-".join(map(str, dict.fromkeys(r))) for r in selection.steps or ()),
        "--from": selection.from_step,
        "--to": selection.to_step,
        flag("min_gap"): selection.min_gap,
        "--every": selection.every,
        "--last": ",".join(map(str, selection.last or ())),
        "--best": ",".join(map(str, selection.best or ())),
    }
    return " ".join(f"{name} {value}" for name, value in values.items() if value not in (None, ""))
