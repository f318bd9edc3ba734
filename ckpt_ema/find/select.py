"""Which of a run's checkpoints take part: by steps, then distances, then --last, then --best."""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import Code, IncompleteError, OptionError, RefusedError, flag, some
from ckpt_ema.find.checkpoint import STEP_UNITS, Checkpoint, Found, needed_steps
from ckpt_ema.find.entries import json_object
from ckpt_ema.find.logs import LogOf
from ckpt_ema.find.names import stem_of
from ckpt_ema.notices import Notice
from ckpt_ema.options import Selection
from ckpt_ema.trainers import conventions

_LOWER_IS_BETTER = re.compile(
    r"(loss|perplexity|ppl|wer|cer|ter|eer|error|err|mae|mse|rmse|nll|fid|kid|bpb|bpc)\d*$"
)
_HIGHER_IS_BETTER = re.compile(
    r"(acc|accuracy|f1|bleu|rouge[a-z]*|chrf|meteor|map|iou|miou|auc|auroc|precision|recall|top|em"
    r"|match|r2|pearson|spearman|psnr|ssim|score|rewards?|mcc|correlation|dice|ndcg|mrr|pass)\d*$"
)

Metrics = Mapping[str, float]


class Subset(NamedTuple):
    """Checkpoints for an average, oldest first."""

    name: str  # distinguishes it from other selections, such as last-4; empty for the only one
    checkpoints: tuple[Checkpoint, ...]


class Subsets(NamedTuple):
    """The selections, one for each value of --last and --best, and what to say of them."""

    subsets: tuple[Subset, ...]
    notes: tuple[Notice, ...]
    warnings: tuple[Notice, ...]


def select(found: Found, selection: Selection, source: Source, log_of: LogOf) -> Subsets:
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
        for best, kept in _best(members, found, selection, source, log_of):
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
    text = f"{option} {count} takes all {available} checkpoints that there are."
    return [Notice(Code.FEW_CHECKPOINTS, text)] if count and count > available else []


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
    checkpoints: Sequence[Checkpoint],
    found: Found,
    selection: Selection,
    source: Source,
    log_of: LogOf,
) -> list[tuple[int | None, list[Checkpoint]]]:
    """Return the best checkpoints for each value of --best; ties go to the later checkpoint."""
    if selection.best is None or selection.metric is None:
        return [(None, list(checkpoints))]
    # The metrics of a chosen checkpoint may be in the log of one that was left out.
    run = [*(one.path for one in found.left_out), *(one.path for one in found.checkpoints)]
    # Before the direction is asked for: the name may be a slip.
    logged = _logs(run, log_of)
    values = _metric_values(checkpoints, logged, selection.metric, source)
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


# --- Metrics: from logs and results of trainers, names and torch files ----------------------------


def _metric_values(
    checkpoints: Sequence[Checkpoint],
    logged: Mapping[int | None, Metrics],
    metric: str,
    source: Source,
) -> list[float]:
    """Return the value of `metric` for each checkpoint; raises if it is missing or NaN for some."""
    logs = [logged.get(one.step, {}) if one.unit in STEP_UNITS else {} for one in checkpoints]
    found = [{**log, **_metrics(one, source)} for one, log in zip(checkpoints, logs, strict=True)]
    # transformers takes the name without "eval_" too.
    name = next((n for n in (metric, f"eval_{metric}") if any(n in one for one in found)), None)
    if name is None:
        known = sorted(set().union(*found))
        instead = f"they record {some(known, 8)}" if known else "no metrics found"
        raise RefusedError(f"No checkpoint records {metric!r}; {instead}.", code=Code.NO_METRIC)
    values = [one.get(name) for one in found]
    rows = [*zip((checkpoint.name for checkpoint in checkpoints), values, strict=True)]
    missing = [one for one, value in rows if value is None]
    undefined = [one for one, value in rows if value is not None and math.isnan(value)]
    if missing or undefined:
        where = f"{len(missing or undefined)} of {len(rows)} checkpoints"
        what = f"{name} is {'missing' if missing else 'NaN'} for {where}"
        hint = "Leave these out with --exclude, or choose without --best."
        raise RefusedError(f"{what}: {some(missing or undefined)}.", hint, code=Code.NO_METRIC)
    return [value for value in values if value is not None]


def higher_is_better(
    metric: str, mode: str, options: str = "--metric-mode max or --metric-mode min"
) -> bool:
    """Return whether higher is better, by `mode` ("min", "max") or, for "auto", by the name.

    `options` names those that decide, for the error if neither does.

    >>> higher_is_better("eval_loss", "auto"), higher_is_better("val/top1", "auto")
    (False, True)
    """
    if mode != "auto":
        return mode == "max"
    words = re.findall(r"[a-z]+[0-9]*", metric.lower())
    lower = any(_LOWER_IS_BETTER.match(word) for word in words)
    higher = any(_HIGHER_IS_BETTER.match(word) for word in words)
    if lower == higher:
        text = f"cannot tell from its name whether a high or a low {metric} is better."
        hint = f"Add {options}."
        raise OptionError(text, hint, code=Code.CONFLICTING_OPTIONS)
    return higher


def _metrics(checkpoint: Checkpoint, source: Source) -> Metrics:
    """Return what one checkpoint has by itself; values closest to the weights win."""
    path = checkpoint.path
    found: dict[str, float] = {}
    if source.storage.is_folder(path):
        for name in sorted(source.storage.names(path)):
            if conventions.METRIC_FILES.search(name):
                found.update(_numbers(json_object(source.storage.read(path / name))))
    else:
        for extension, parse in ((".json", json_object), (".yaml", _yaml_numbers)):
            beside = path.with_name(stem_of(path.name) + extension)
            found.update(_numbers(parse(source.storage.read(beside))))
        with contextlib.suppress(IncompleteError):  # judged if it is chosen
            found.update(source.read(checkpoint.model).numbers)
    return {**found, **_named(checkpoint.name)}


def _logs(folders: Sequence[Path], log_of: LogOf) -> dict[int | None, dict[str, float]]:
    """Return what `trainer_state.json` has logged, by step; a later checkpoint has all of it."""
    logged: dict[int | None, dict[str, float]] = {}
    for folder in folders:
        for row in log_of(folder).rows:
            values = {k: v for k, v in _numbers(row).items() if k not in ("step", "epoch")}
            logged.setdefault(row["step"], {}).update(values)
    return logged


def _named(name: str) -> Metrics:
    """Return the metrics in a name, as Lightning writes them: `epoch=3-val_loss=0.12.ckpt`.

    >>> _named("epoch=3-val_loss=-1e-2.ckpt")
    {'val_loss': -0.01}
    """
    pairs = (match[0].split("=", 1) for match in conventions.METRIC.finditer(stem_of(name)))
    return {word: float(value) for word, value in pairs}


def _numbers(content: Mapping[str, Any]) -> Metrics:
    return {
        str(name): float(value)
        for name, value in content.items()
        if isinstance(value, float)
        or (type(value) is int and abs(value) < 10**300)  # no bool, and none that overflows
    }


def _yaml_numbers(content: bytes | None) -> Metrics:
    """Return the numbers at the top of a YAML text."""
    text, found = (content or b"").decode("utf-8", "replace"), {}
    for name, value in re.findall(r"^([A-Za-z_][\w/]*):\s*(\S+)\s*$", text, re.MULTILINE):
        with contextlib.suppress(ValueError):
            found[name] = float(value.replace(".nan", "nan").replace(".inf", "inf"))
    return found
