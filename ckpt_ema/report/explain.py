"""The explanation of a plan: what every entry and every tensor was taken for, and by which rule."""

import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from ckpt_ema.errors import escaped
from ckpt_ema.find.verdict import Judged
from ckpt_ema.planning.roles import TensorRole


def explanation(run: str, judged: Sequence[Judged], roles: Sequence[TensorRole]) -> str:
    """Return two tables: the verdict on each entry, and the role of the tensors of each pattern.

    >>> from ckpt_ema.find.verdict import Outcome, Reason, Verdict
    >>> verdict = Verdict(Outcome.OTHER, Reason.NO_MODEL, "no-model")
    >>> print(explanation("run", [Judged(Path("run/logs"), "logs", verdict)], []))
    entry  taken for  rule      reason
    logs   other      no-model  no model weights in it
    """
    entries = [("entry", "taken for", "rule", "reason")]
    found = [(one.path.parent, one.path.name, one.verdict) for one in judged]
    found.sort(key=lambda one: (_numbered(os.fspath(one[0])), _numbered(one[1])))
    for folder, members in groupby(found, key=lambda one: one[0]):
        is_run = folder == Path(run)
        inside = folder.relative_to(run) if folder.is_relative_to(run) else folder
        entries += [] if is_run else [(f"{inside}/", "", "", "")]
        for _, name, verdict in members:
            shown = name if is_run else f"  {name}"
            entries.append((shown, verdict.outcome.value, verdict.rule, str(verdict)))
    tensors = [("tensors", "count", "role", "rule", "reason")]
    for role in roles:
        count = str(role.count)
        tensors.append((role.pattern, count, role.role.value, role.rule, role.reason.value))
    return "\n\n".join(_table(rows) for rows in (entries, tensors) if len(rows) > 1)


def _numbered(text: str) -> list[str | int]:
    """Return what sorts texts by the numbers in them.

    >>> sorted(["step-10", "step-9"], key=_numbered)
    ['step-9', 'step-10']
    >>> sorted(["m²-2", "m²-10", "²"], key=_numbered)
    ['m²-2', 'm²-10', '²']
    """
    parts = re.split("([0-9]+)", text)  # every second one is a number
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join(lines)
