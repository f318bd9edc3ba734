"""Weights that a person states, in a file or as a mapping, instead of a schedule.

A file is a JSON object from names (or steps) to weights, or has a line for each checkpoint: its
name or step, then blanks or a comma, then its weight. Lines that start with # are comments.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckpt_ema.errors import OptionError, RefusedError, printable, some

_TOLERANCE = 1e-9  # how far from 1 a sum may be by rounding
_LARGEST_BYTES = 1 << 24


def read_weights(stated: str | os.PathLike[str] | Mapping[str, float]) -> dict[str, float]:
    """The weights by name or step, as they were stated.

    Raises `OptionError` for a file that cannot be read and for what is no weight.
    """
    pairs: list[tuple[str, object]]
    if isinstance(stated, Mapping):
        pairs = [(str(name), value) for name, value in stated.items()]
    else:
        pairs = _pairs(Path(stated))
    found: dict[str, float] = {}
    for name, value in pairs:
        if name in found:
            raise OptionError(f"--weights has {printable(name)} twice.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e300:
            shown = json.dumps(value) if isinstance(value, str) else str(value)
            raise OptionError(
                f"--weights gives {printable(name)} the weight {printable(shown)}; a weight is a"
                " number, without quotes, that is not negative."
            )
        found[name] = float(value)
    return found


def matched(
    stated: Mapping[str, float],
    checkpoints: Sequence[tuple[str, int | None]],
    *,
    normalize: bool,
) -> list[float]:
    """The weight of each checkpoint, given by name and step; 0 for those that are not named.

    Raises `RefusedError` for a name that no checkpoint has, and unless the sum is 1 or `normalize`
    is given.

    >>> matched({"checkpoint-10": 0.25, "20": 0.75}, [("checkpoint-10", 10), ("b", 20), ("c", 30)],
    ...         normalize=False)
    [0.25, 0.75, 0.0]
    """
    weights = [0.0] * len(checkpoints)
    taken_by: dict[int, str] = {}
    for name, weight in stated.items():
        number = _number_of(name, checkpoints)
        if number in taken_by:
            raise RefusedError(
                f"--weights names {printable(checkpoints[number][0])} twice: as"
                f" {printable(taken_by[number])} and as {printable(name)}."
            )
        taken_by[number] = name
        weights[number] = weight
    total = math.fsum(weights)
    if not total:
        raise RefusedError("--weights gives no checkpoint any weight.")
    if abs(total - 1) > _TOLERANCE and not normalize:
        raise RefusedError(
            f"The weights sum to {total:.12g}, which is {abs(total - 1):.3g}"
            f" {'more' if total > 1 else 'less'} than 1.",
            "Correct them, or divide them by their sum with --normalize.",
        )
    return weights


def _number_of(name: str, checkpoints: Sequence[tuple[str, int | None]]) -> int:
    by_name = [number for number, (own, _) in enumerate(checkpoints) if own == name]
    by_step = [
        number
        for number, (_, step) in enumerate(checkpoints)
        if step is not None and str(step) == name
    ]
    found = by_name or by_step
    if len(found) != 1:
        names = some([own for own, _ in checkpoints])
        raise RefusedError(
            f"--weights names {printable(name)}, which is"
            f" {'several' if found else 'none'} of the checkpoints chosen: {names}."
        )
    return found[0]


def _pairs(path: Path) -> list[tuple[str, object]]:
    try:
        if path.stat().st_size > _LARGEST_BYTES or not path.is_file():
            raise OptionError(f"--weights {printable(path)} is no file of weights.")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OptionError(f"--weights {printable(path)} cannot be read: {reason}.") from error
    if not text.lstrip().startswith("{"):
        lines = [line.strip() for line in text.splitlines()]
        return [_pair(path, line) for line in lines if line and not line.startswith("#")]
    try:
        return list(json.loads(text, object_pairs_hook=list))
    except (ValueError, RecursionError) as error:
        raise OptionError(
            f"--weights {printable(path)} is not JSON: {printable(error)}."
        ) from error


def _pair(path: Path, line: str) -> tuple[str, float]:
    match = re.fullmatch(r"(.+?)(?:\s*,\s*|:?\s+)(\S+)", line)
    try:
        if match:
            return match[1], float(match[2])
    except ValueError:
        pass
    raise OptionError(
        f"--weights {printable(path)}: '{printable(line)}' is not a name and a weight."
    )
