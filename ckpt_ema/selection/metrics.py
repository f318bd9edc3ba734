"""Metrics in what an evaluation prints or returns: numbers by name, nested names with dots."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ckpt_ema.errors import printable, some

_NUMBER = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf(?:inity)?)"
# Neither 5 of 5/10, nor 1 of 1,87.
_END = r"(?!\.?\w|,\d|/)"


def read_metrics(stdout: str, metric: str) -> dict[str, float]:
    """Return the numbers of the last line that is JSON and holds `metric`.

    Else that of the last `metric=value` or `metric: value`; else nothing.

    >>> read_metrics('loading\\n{"loss": 1.5, "step": {"n": 3}}\\ndone', "loss")
    {'loss': 1.5, 'step.n': 3.0}
    >>> read_metrics("loss=2.0\\nloss=1.5 after 10 s", "loss")
    {'loss': 1.5}
    """
    for line in reversed(stdout.splitlines()):
        found = _numbers_in(line)
        if metric in found:
            return found
    pair = rf"""(?<![\w./-]){re.escape(metric)}["']?\s*[=:]\s*({_NUMBER}){_END}"""
    values = re.findall(pair, stdout, re.IGNORECASE)
    return {metric: float(values[-1])} if values else {}


def numbers(reported: Mapping[Any, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a mapping by name; those of mappings in it after a dot.

    Scalars of numpy and torch are numbers, booleans are not.

    >>> numbers({"results": {"acc,none": 0.5}, "ok": True})
    {'results.acc,none': 0.5}
    """
    found: dict[str, float] = {}
    for key, value in reported.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found.update(numbers(value, f"{name}."))
            continue
        number = value.item() if getattr(value, "shape", None) == () else value
        if isinstance(number, int | float) and not isinstance(number, bool):
            found[name] = _float(number)
    return found


def problem_of(metrics: Mapping[str, float], metric: str) -> str:
    """Return what is wrong with the metric among these; empty if it is a finite number."""
    if metric not in metrics:
        others = f", only {some(metrics)}" if metrics else ""
        return f"no number called {metric} was reported{others}"
    if not math.isfinite(metrics[metric]):
        return f"{metric} is {metrics[metric]}"
    return ""


def _numbers_in(line: str) -> dict[str, float]:
    """Return the numbers of a line that is a JSON object; nothing of any other."""
    try:
        found = json.loads(line) if line.lstrip().startswith("{") else {}
        return numbers(found)
    except (ValueError, RecursionError):
        return {}


def _float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def last_lines(text: str, most: int = 10) -> list[str]:
    """Return the last lines that are not blank, without control characters."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return [printable(line) for line in lines[-most:]]
