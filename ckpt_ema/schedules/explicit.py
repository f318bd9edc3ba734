"""Explicit weights, from a file or a mapping, instead of a schedule.

A file is a JSON object from names (or steps) to weights, or has a line for each checkpoint: its
name or step, then blanks or a comma, then its weight. Lines that start with # are comments.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from ckpt_ema.errors import Code, OptionError, RefusedError, some
from ckpt_ema.storage import Location, storage_for

_TOLERANCE = 1e-9  # how far from 1 a sum may be by rounding
_LARGEST_BYTES = 1 << 24

Explicit = Location | Mapping[str, float]


def read_weights(explicit: Explicit) -> dict[str, float]:
    """Return the weights by name or step, from a file or a mapping.

    Raises `OptionError` for a file of another form, and for values that are not weights.
    """
    pairs: Iterable[tuple[object, object]]
    pairs = explicit.items() if isinstance(explicit, Mapping) else _pairs(explicit)
    found: dict[str, float] = {}
    for key, value in pairs:
        name = str(key)
        if name in found:
            raise OptionError(f"--weights has {name} twice.", code=Code.WRONG_WEIGHTS)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e300:
            shown = json.dumps(value) if isinstance(value, str) else str(value)
            problem = f"the weight {shown}, which is not a non-negative number"
            raise OptionError(f"--weights gives {name} {problem}.", code=Code.WRONG_WEIGHTS)
        found[name] = float(value)
    return found


def matched(
    explicit: Mapping[str, float],
    checkpoints: Sequence[tuple[str, int | None]],
    *,
    normalize: bool,
) -> list[float]:
    """Return the weight of each checkpoint, given by name and step; 0 for those without one.

    Raises `RefusedError` for a name that no checkpoint has, and unless the sum is 1 or `normalize`
    is given.

    >>> matched({"checkpoint-10": 0.25, "20": 0.75}, [("checkpoint-10", 10), ("b", 20), ("c", 30)],
    ...         normalize=False)
    [0.25, 0.75, 0.0]
    """
    weights = [0.0] * len(checkpoints)
    taken_by: dict[int, str] = {}
    for name, weight in explicit.items():
        number = _number_of(name, checkpoints)
        if number in taken_by:
            names = f"as {taken_by[number]} and as {name}"
            raise _refused(f"has two weights for {checkpoints[number][0]}: {names}")
        taken_by[number] = name
        weights[number] = weight
    total = math.fsum(weights)
    if not total:
        raise _refused("gives no checkpoint a weight above 0")
    if abs(total - 1) > _TOLERANCE and not normalize:
        how = "more" if total > 1 else "less"
        hint = "Correct the weights, or divide them by their sum with --normalize."
        raise _refused(f"sums to {total:.12g}, {abs(total - 1):.3g} {how} than 1", hint)
    return weights


def _number_of(name: str, checkpoints: Sequence[tuple[str, int | None]]) -> int:
    by_name = [number for number, (own, _) in enumerate(checkpoints) if own == name]
    steps = [None if step is None else str(step) for _, step in checkpoints]
    found = by_name or [number for number, step in enumerate(steps) if step == name]
    if len(found) != 1:
        count = "several" if found else "none"
        selected = some([own for own, _ in checkpoints])
        raise _refused(f"names {name}, which matches {count} of the checkpoints: {selected}")
    return found[0]


def _refused(problem: str, hint: str = "") -> RefusedError:
    return RefusedError(f"--weights {problem}.", hint, code=Code.WRONG_WEIGHTS)


def _pairs(path: Location) -> list[tuple[str, object]]:
    storage = storage_for(path)
    content = storage.read(path, _LARGEST_BYTES + 1)
    if content is None and not storage.exists(path):
        message = f"--weights {path} does not exist."
        raise OptionError(message, code=Code.NOT_FOUND, path=path)
    if content is None or len(content) > _LARGEST_BYTES:
        message = f"--weights {path} is not a file of weights."
        raise OptionError(message, code=Code.NOT_FOUND, path=path)
    try:
        text = content.decode("utf-8-sig")
        if text.lstrip().startswith("{"):
            return list(json.loads(text, object_pairs_hook=list))
    except UnicodeDecodeError as error:
        raise _unreadable(path, "it is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"it is not JSON ({error})") from error
    lines = [line.strip() for line in text.splitlines()]
    return [_pair(path, line) for line in lines if line and not line.startswith("#")]


def _pair(path: Location, line: str) -> tuple[str, float]:
    match = re.fullmatch(r"(.+?)(?:\s*,\s*|:?\s+)(\S+)", line)
    if match:
        with contextlib.suppress(ValueError):
            return match[1], float(match[2])
    raise _unreadable(path, f"'{line}' is not a name and a weight")


def _unreadable(path: Location, reason: str) -> OptionError:
    message = f"--weights {path} cannot be read: {reason}."
    return OptionError(message, code=Code.WRONG_WEIGHTS, path=path)
