"""Plans of averages as manifests record them: the same checkpoints, weights and options."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.errors import Code, OptionError, RefusedError, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.select import Subset, Subsets
from ckpt_ema.options import Options, PathLike, Weighting, make_options
from ckpt_ema.planning.average import Weighted, are_close, decays_by
from ckpt_ema.planning.decide import decide, find_checkpoints, paths_of, uncollected
from ckpt_ema.planning.plan import Plan
from ckpt_ema.schedules.rules import ALL, Rule
from ckpt_ema.schedules.weights import weights_of

# Options that choose among the checkpoints of a run, which the record has done, or what is copied.
_DONE = (
    *("last", "best", "metric", "metric_mode"),
    *("from_step", "to_step", "steps", "every", "min_gap", "config_from"),
)
_ENGINE = ("device", "threads", "tile_size", "max_memory", "strict", "sync")


class Recorded(NamedTuple):
    """The plan of recorded averages, or what is missing for it."""

    plan: Plan | None
    gone: tuple[str, ...] = ()  # names of checkpoints that are not there


def plan_recorded(
    output: Path,
    manifests: Sequence[Mapping[str, Any]],
    run: PathLike | Sequence[PathLike] | None = None,
    **engine: Any,
) -> Recorded:
    """Plan the averages of some manifests again; `run` is where the run is now, if it was moved.

    Raises what `plan` raises for checkpoints that are there, and `RefusedError` for a `run` that
    has none of them, and for a manifest whose weights are not those of its schedule, or whose
    options are unknown.
    """
    first = manifests[0]
    options = _options(output, first, engine)
    recorded = {
        (one["name"], one["step"]): None for record in manifests for one in record["checkpoints"]
    }
    with uncollected():
        try:
            chosen = find_checkpoints(paths_of(first["paths"] if run is None else run), options)
        except RefusedError as error:
            if run is not None or error.code not in (Code.NOT_FOUND, Code.NO_CHECKPOINTS):
                raise
            return Recorded(None, tuple(name for name, _ in recorded))
        taken = [one for one in chosen.found.checkpoints if (one.name, one.step) in recorded]
        if run is not None and not taken:
            names = some((name for name, _ in recorded), 3)
            message = f"None of the checkpoints that {output} was made of is there: {names}."
            hint = "Name the run that has them."
            raise RefusedError(message, hint, code=Code.NO_CHECKPOINTS, path=output)
        there = {(one.name, one.step) for one in taken}
        if gone := tuple(name for name, step in recorded if (name, step) not in there):
            return Recorded(None, gone)
        chosen = chosen._replace(selected=Subsets((Subset("", tuple(taken)),), (), ()))
        return Recorded(decide(chosen, options, partial(_weighted, manifests)))


def _options(output: Path, record: Mapping[str, Any], engine: Mapping[str, Any]) -> Options:
    """Return the options of a manifest; raises `RefusedError` if they are impossible."""
    given = {"output": output, **engine}
    make_options(given)  # what is wrong with these is for the caller to know
    left_out = (*_DONE, *_ENGINE)
    recorded = {name: value for name, value in record["options"].items() if name not in left_out}
    try:
        return make_options({**recorded, **given})
    except (OptionError, TypeError, ValueError) as error:
        message = f"{output}: the options in its manifest are unknown or impossible: {error}"
        hint = "Verify it with the version of ckpt-ema that made it."
        text = message.rstrip(".")
        raise RefusedError(f"{text}.", hint, code=Code.DAMAGED, path=output) from error


def _weighted(
    manifests: Sequence[Mapping[str, Any]], subsets: Sequence[Subset], _weighting: Weighting
) -> list[Weighted]:
    """Return the averages of manifests; see `Choose`."""
    there = {(one.name, one.step): one for one in subsets[0].checkpoints}
    averages = []
    for record in manifests:
        rows = record["checkpoints"]
        checkpoints = tuple(there[row["name"], row["step"]] for row in rows)
        decays = tuple(row.get("decay") for row in rows[1:])
        try:
            rule = _rule(record)
            is_right = _has_weights(record, rule, checkpoints, decays)
        except (LookupError, TypeError, ValueError, ArithmeticError):  # of what is no number
            is_right = False
        if not is_right:
            message = f"{record['output']}: its weights are not those of {record['schedule']}."
            raise RefusedError(message, code=Code.WRONG_WEIGHTS, path=record["output"])
        averages.append(Weighted(record["name"], rule, checkpoints, decays))
    return averages


def _rule(record: Mapping[str, Any]) -> Rule:
    schedule = record["schedule"]
    names = (option.name for option in ALL[schedule].options)
    return Rule(schedule, {name: record[name] for name in names})


def _has_weights(
    record: Mapping[str, Any],
    rule: Rule,
    checkpoints: Sequence[Checkpoint],
    decays: Sequence[float],
) -> bool:
    """Return whether the weights are those of the schedule, and of these decays."""
    expected = decays
    if ALL[rule.schedule].formula is not None:
        expected = decays_by(rule, checkpoints)
    weights = [row["weight"] for row in record["checkpoints"]]
    return are_close(decays, expected) and are_close(weights, weights_of(decays))
