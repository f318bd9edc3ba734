"""A plan for people: the weight of every checkpoint, and what the weights amount to.

One average shows its gaps and decays too; several stand side by side. The table fits the width of
the terminal, 80 columns where there is none, and uses colours and blocks only where they can be
shown.
"""

import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

from ckpt_ema.containers.specs import Role
from ckpt_ema.errors import counted, printable, some
from ckpt_ema.options import CHECKPOINT
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan
from ckpt_ema.report.columns import BETWEEN, Look, aligned, fitted, look_at, shown_on
from ckpt_ema.report.lines import size
from ckpt_ema.report.table import (
    Row,
    cell_headings,
    figures_of_one,
    figures_of_several,
    rows_of,
    without_middle,
)

_LONGEST_NAME, _SHORTEST_NAME = 30, 16
_BAR_COLUMNS = (4, 30)
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def plan_text(plan: Plan, stream: TextIO | None, most_rows: int) -> str:
    """Return the plan as text for `stream` (None: a closed one), in colour on a terminal.

    Beyond `most_rows` checkpoints, those in the middle share one row.
    """
    return shown_on(stream, _lines(plan, look_at(stream), most_rows))


def _lines(plan: Plan, look: Look, most_rows: int) -> Iterator[str]:
    yield f"{printable(plan.run)} -> {printable(plan.output)}"
    texts = [f"{one.text}; {counted(len(one.members), 'checkpoint')}" for one in plan.averages]
    if len(texts) == 1:
        yield texts[0]
    else:
        yield f"{len(texts)} averages in one pass, each in its own folder:"
        for number, (average, text) in enumerate(zip(plan.averages, texts, strict=True), start=1):
            yield f"  ({number}) {average.name}: {text}"
    yield from _tables(plan, look, most_rows)
    if len(texts) == 1:
        yield ""
        yield from _figures(plan.averages[0], look.width)
    yield ""
    yield from _sizes(plan)


class _Columns(NamedTuple):
    """Widths, and how many cells and averages stand side by side."""

    name: int
    cells: int  # how many of those between name and weights have room
    share: int
    bar: int  # 0: there is no room for bars
    averages: int


def _tables(plan: Plan, look: Look, most_rows: int) -> Iterator[str]:
    """Yield tables of the weights, each of as many averages as fit; several with figures."""
    count, headings = len(plan.averages), cell_headings(plan.averages)
    names = [f"({number + 1})" for number in range(count)] if count > 1 else ["weight"]
    rows = without_middle(rows_of(plan, plan.averages), most_rows)
    figures = figures_of_several(plan.averages) if count > 1 else []
    columns = _columns(headings, names, rows, figures, look.width)
    scale = columns.bar / max(max(average.weights) for average in plan.averages)
    labels = [("checkpoint", *headings[: columns.cells])]
    labels += [(fitted(row.name, columns.name), *row.cells[: columns.cells]) for row in rows]
    labels += [(label, *[""] * columns.cells) for label, _ in figures]
    before = aligned(labels)
    none = (None,) * count
    values = [(row.shares, row.weights if row.has_bars else none) for row in rows]
    values += [(of_averages, none) for _, of_averages in figures]

    def cell(text: str, weight: float | None) -> str:
        share = f"{'':{BETWEEN}}{text:>{columns.share}}"
        if not columns.bar:
            return share
        bar = _bar((weight or 0.0) * scale, look.has_blocks)
        return f"{share}{'':{BETWEEN}}{look.cyan(bar)}{'':{columns.bar - len(bar)}}"

    for first in range(0, count, columns.averages):
        shown = slice(first, first + columns.averages)
        lines = [
            (label + "".join(map(cell, shares[shown], weights[shown]))).rstrip()
            for label, (shares, weights) in zip(before[1:], values, strict=True)
        ]
        heading = "".join(cell(name, None) for name in names[shown])
        yield from ("", look.bold((before[0] + heading).rstrip()), *lines[: len(rows)])
        yield from ("", *lines[len(rows) :]) if figures else ()


def _columns(
    headings: Sequence[str],
    names: Sequence[str],
    rows: Sequence[Row],
    figures: Sequence[tuple[str, list[str]]],
    width: int,
) -> _Columns:
    """Fit the table into `width` columns: numbers first, then names, then bars."""
    shares = [*names, *(share for row in rows for share in row.shares)]
    share = max(map(len, [*shares, *(value for _, values in figures for value in values)]))
    columns = zip(headings, *(row.cells for row in rows), strict=True)
    cells = [BETWEEN + max(map(len, column)) for column in columns]
    label = max(map(len, ["checkpoint", *(label for label, _ in figures)]))
    name = max(label, min(max(len(row.name) for row in rows), _LONGEST_NAME))
    each = BETWEEN + share
    free = width - BETWEEN - sum(cells) - each
    if free < name:
        name = max(label, min(name, free, _SHORTEST_NAME))
        if free < name:
            cells = cells[:1]  # the step; its gap and decay are in --json
    used = BETWEEN + name + sum(cells)
    averages = max(1, min(len(names), (width - used) // each))
    bar = min(_BAR_COLUMNS[1], (width - used) // averages - each - BETWEEN)
    bar = bar if bar >= _BAR_COLUMNS[0] else 0
    return _Columns(name, len(cells), share, bar, averages)


def _bar(columns: float, has_blocks: bool) -> str:
    """Draw a bar, to an eighth of a column where blocks can be shown."""
    if not has_blocks:
        return "#" * round(columns)
    whole, eighths = divmod(round(columns * 8), 8)
    return (_EIGHTHS[8] * whole + _EIGHTHS[eighths]).strip()


def _figures(average: Average, width: int) -> Iterator[str]:
    """Yield the figures of one average, their labels broken where there is too little room."""
    rows = figures_of_one(average)
    room = width - 2 * BETWEEN - max(len(value) for _, value in rows)
    broken = [textwrap.wrap(text, room) for text, _ in rows]
    longest = max(len(line) for lines in broken for line in lines)
    for (first, *more), (_, value) in zip(broken, rows, strict=True):
        yield f"{'':{BETWEEN}}{first:{longest}}{'':{BETWEEN}}{value}"
        yield from (f"{'':{BETWEEN}}{line}" for line in more)


def _sizes(plan: Plan) -> Iterator[str]:
    count, outputs = len(plan.averages), [average.output for average in plan.averages]
    tensors = {tensor.key: tensor.role for file in outputs[0].files for tensor in file.tensors}
    averaged = [*tensors.values()].count(Role.AVERAGED)
    total = counted(len(tensors), "tensor")
    taken = f"{averaged} of {total}" if averaged < len(tensors) else total
    where = f" in each of {count} averages" if count > 1 else ""
    requests = "" if plan.requests is None else f" in {counted(plan.requests, 'request')}"
    done = f"{size(plan.bytes_read)} to read{requests}, {size(plan.bytes_written)} to write"
    yield f"{taken} averaged{where}, {done}"
    if plan.given.get("save_as") == CHECKPOINT:
        newest = dict.fromkeys(plan.checkpoints[average.newest].name for average in plan.averages)
        files = counted(len(outputs[0].files), "file")
        yield f"written back into a copy of {some(newest)} ({files}), which is otherwise unchanged"
    yield f"working memory at most {size(plan.memory_bytes)}"
    copied = dict.fromkeys(c.name for output in outputs for c in output.companions)
    if copied:
        yield f"also copies {some(copied, 8)}"
