"""The explanation of a plan: what every entry and every tensor was taken for, and by which rule."""

import os
from collections.abc import Sequence
from pathlib import Path

from ckpt_ema.errors import escaped
from ckpt_ema.find.verdict import Judged
from ckpt_ema.planning.roles import TensorRole


def explanation(run: str, judged: Sequence[Judged], roles: Sequence[TensorRole]) -> str:
    """Return two tables: the verdict on each entry, and the role of the tensors of each pattern.

    >>> from ckpt_ema.find.verdict import Outcome, Reason, Verdict
    >>> verdict = Verdict(Outcome.OTHER, Reason.NO_MODEL, "without weights")
    >>> print(explanation("run", [Judged(Path("run/logs"), "logs", verdict)], []))
    entry  taken for  reason                  rule
    logs   other      no model weights in it  without weights
    """
    entries = [
        (_relative(path, run), verdict.outcome.value, str(verdict), verdict.rule)
        for path, verdict in ((one.path, one.verdict) for one in judged)
    ]
    tensors = [
        (one.pattern, str(one.count), one.role.value, one.reason.value, one.rule) for one in roles
    ]
    tables = [
        _table(("entry", "taken for", "reason", "rule"), entries),
        _table(("tensors", "count", "role", "reason", "rule"), tensors),
    ]
    return "\n\n".join(text for text in tables if text)


def _relative(path: Path, run: str) -> str:
    return os.fspath(path.relative_to(run)) if path.is_relative_to(run) else os.fspath(path)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    cells = [headings, *([escaped(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
