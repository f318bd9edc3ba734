"""Metrics of checkpoints for `--best`, from logs and results of trainers, names and torch files."""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import Code, IncompleteError, OptionError, RefusedError, some
from ckpt_ema.find.checkpoint import STEP_UNITS, Checkpoint
from ckpt_ema.find.entries import json_object
from ckpt_ema.find.names import stem_of
from ckpt_ema.trainers import conventions

_LOWER_IS_BETTER = re.compile(
    r"(loss|perplexity|ppl|wer|cer|ter|eer|error|err|mae|mse|rmse|nll|fid|kid|bpb|bpc)\d*$"
)
_HIGHER_IS_BETTER = re.compile(
    r"(acc|accuracy|f1|bleu|rouge[a-z]*|chrf|meteor|map|iou|miou|auc|auroc|precision|recall|top|em"
    r"|match|r2|pearson|spearman|psnr|ssim|score|rewards?|mcc|correlation|dice|ndcg|mrr|pass)\d*$"
)

Metrics = Mapping[str, float]


def metric_values(
    checkpoints: Sequence[Checkpoint], run: Sequence[Path], metric: str, source: Source
) -> list[float]:
    """Return the value of `metric` for each checkpoint; raises if it is missing or NaN for some.

    A name without `eval_` also finds the metric with it, as in transformers.
    """
    logged = _logs(run, source)
    logs = [logged.get(one.step, {}) if one.unit in STEP_UNITS else {} for one in checkpoints]
    found = [{**log, **_metrics(one, source)} for one, log in zip(checkpoints, logs, strict=True)]
    name = next((n for n in (metric, f"eval_{metric}") if any(n in one for one in found)), None)
    if name is None:
        known = sorted(set().union(*found))
        instead = f"they record {some(known, 8)}" if known else "no metrics found"
        raise RefusedError(f"no checkpoint records {metric!r}; {instead}.", code=Code.NO_METRIC)
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


def higher_is_better(metric: str, mode: str) -> bool:
    """Return whether higher is better, by `mode` ("min", "max") or, for "auto", by the name.

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
        hint = "Add --metric-mode max or --metric-mode min."
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


def _logs(folders: Sequence[Path], source: Source) -> dict[int | None, dict[str, float]]:
    """Return what `trainer_state.json` has logged, by step; a later checkpoint has all of it."""
    logged: dict[int | None, dict[str, float]] = {}
    for folder in folders:
        state = json_object(source.storage.read(folder / conventions.TRAINER_STATE))
        history = state.get("log_history")
        for entry in history if isinstance(history, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                values = {k: v for k, v in _numbers(entry).items() if k not in ("step", "epoch")}
                logged.setdefault(entry["step"], {}).update(values)
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
