"""What checkpoints tell of how good they are: a metric's value for each, and which way is better.

Asked for by `--best`. The values are those that a trainer wrote: its log in `trainer_state.json`,
results beside the weights, the name of the checkpoint, or plain numbers in a torch file.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import IncompleteError, OptionError, RefusedError, printable, some
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.order import STEP_UNITS, Checkpoint
from ckpt_ema.trainers import conventions

_LOWER_IS_BETTER = re.compile(
    r"(loss|perplexity|ppl|wer|cer|ter|eer|error|err|mae|mse|rmse|nll|fid|kid|bpb|bpc)\d*$"
)
_HIGHER_IS_BETTER = re.compile(
    r"(acc|accuracy|f1|bleu|rouge[a-z]*|chrf|meteor|map|iou|miou|auc|auroc|precision|recall|top|em"
    r"|match|r2|pearson|spearman|psnr|ssim|score|rewards?|mcc|correlation|dice|ndcg|mrr|pass)\d*$"
)

_LARGEST = 10**300

Metrics = Mapping[str, float]


def metric_values(
    checkpoints: Sequence[Checkpoint], run: Sequence[Path], metric: str, source: Source
) -> list[float]:
    """The value of `metric` for each checkpoint; the logs in all folders of the run may tell it.

    A name without `eval_` also finds the metric that has it, as with transformers. Raises
    `RefusedError` if it is missing or NaN for some, with what was found.
    """
    logged = _logs(run, source)
    found = []
    for checkpoint in checkpoints:
        log = logged.get(checkpoint.step, {}) if checkpoint.unit in STEP_UNITS else {}
        found.append({**log, **_metrics(checkpoint, source)})
    name = next((n for n in (metric, f"eval_{metric}") if any(n in one for one in found)), None)
    if name is None:
        known = sorted(set().union(*found))
        raise RefusedError(
            f"No checkpoint tells {printable(metric)}; they tell"
            f" {some(known, 8) if known else 'no metric at all'}."
        )
    names = [checkpoint.name for checkpoint in checkpoints]
    values = [one.get(name) for one in found]
    missing = [n for n, value in zip(names, values, strict=True) if value is None]
    undefined = [n for n, one in zip(names, found, strict=True) if math.isnan(one.get(name, 0))]
    for problem, guilty in (("missing", missing), ("NaN", undefined)):
        if guilty:
            raise RefusedError(
                f"{printable(name)} is {problem} for {len(guilty)} of {len(names)} checkpoints:"
                f" {some(guilty)}.",
                "Leave them out with --exclude, or choose without --best.",
            )
    return [value for value in values if value is not None]


def higher_is_better(metric: str, mode: str) -> bool:
    """Which way a metric is better: as `mode` says ("min", "max") or, for "auto", by its name.

    Raises `OptionError` where neither tells.

    >>> higher_is_better("eval_loss", "auto"), higher_is_better("val/top1", "auto")
    (False, True)
    """
    if mode != "auto":
        return mode == "max"
    words = re.findall(r"[a-z]+[0-9]*", metric.lower())
    lower = any(_LOWER_IS_BETTER.match(word) for word in words)
    higher = any(_HIGHER_IS_BETTER.match(word) for word in words)
    if lower == higher:
        raise OptionError(
            f"Whether a high or a low {printable(metric)} is good is not known by its name.",
            "Say it with --metric-mode max or --metric-mode min.",
        )
    return higher


def _metrics(checkpoint: Checkpoint, source: Source) -> Metrics:
    """What one checkpoint tells by itself; what is told closest to the weights wins."""
    path = checkpoint.path
    found: dict[str, float] = {}
    if source.storage.is_folder(path):
        for name in sorted(source.storage.names(path)):
            if conventions.METRIC_FILES.search(name):
                found.update(_numbers(_json(path / name, source)))
    else:
        for extension, content in (("json", _json), ("yaml", _yaml)):
            beside = path.with_name(f"{stem_of(path.name)}.{extension}")
            found.update(_numbers(content(beside, source)))
        with contextlib.suppress(IncompleteError):  # of which those who are chosen will be asked
            found.update(source.read(checkpoint.model).numbers)
    return {**found, **_named(checkpoint.name)}


def _logs(folders: Sequence[Path], source: Source) -> dict[int | None, dict[str, float]]:
    """What `trainer_state.json` has logged, by step; that of a later checkpoint has it all."""
    logged: dict[int | None, dict[str, float]] = {}
    for folder in folders:
        state = _json(folder / conventions.TRAINER_STATE, source)
        history = state.get("log_history")
        for entry in history if isinstance(history, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                values = {k: v for k, v in _numbers(entry).items() if k not in ("step", "epoch")}
                logged.setdefault(entry["step"], {}).update(values)
    return logged


def _named(name: str) -> Metrics:
    """The metrics in a name, as Lightning writes them: `epoch=3-val_loss=0.12.ckpt`.

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
        or (type(value) is int and abs(value) < _LARGEST)  # no bool, and none that overflows
    }


def _json(path: Path, source: Source) -> Mapping[str, Any]:
    """The object in a JSON file, empty if there is none."""
    try:
        content = json.loads(source.storage.read(path) or b"")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _yaml(path: Path, source: Source) -> Mapping[str, Any]:
    """The numbers at the top of a YAML file, empty if there is none."""
    return dict(_yaml_numbers((source.storage.read(path) or b"").decode("utf-8", "replace")))


def _yaml_numbers(text: str) -> Iterator[tuple[str, float]]:
    for name, value in re.findall(r"^([A-Za-z_][\w/]*):\s*(\S+)\s*$", text, re.MULTILINE):
        try:
            yield name, float(value.replace(".nan", "nan").replace(".inf", "inf"))
        except ValueError:
            continue
