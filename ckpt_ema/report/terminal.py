"""A plan for people: the weight of every checkpoint, and what the weights amount to.

One average shows its gaps and decays too; several stand side by side. The table fits the width of
the terminal, 80 columns where there is none, and uses colours and blocks only where they can be
shown.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TextIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ckpt_ema.errors import printable, some
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan
from ckpt_ema.report.lines import counted, size
from ckpt_ema.report.table import UNKNOWN, Row, cell_headings, rows_of, without_middle
from ckpt_ema.schedules.statistics import Statistics

_LEAST_COLUMNS = 40  # with less, nothing could be read
_BETWEEN = 2  # before each column
_LONGEST_NAME, _SHORTEST_NAME = 30, 16
_BAR_COLUMNS = (4, 30)
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def plan_text(plan: Plan, stream: TextIO | None, most_rows: int) -> str:
    """Return the plan as text for `stream` (None: a closed one), in colour on a terminal.

    Beyond `most_rows` checkpoints, those in the middle share one row.
    """
    # Rich decides from the encoding of its file whether blocks can be shown.
    encoding = (stream and stream.encoding) or "ascii"
    page = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")
    is_terminal = stream is not None and stream.isatty()
    console = Console(file=page, force_terminal=is_terminal, highlight=False)
    console.width = max(_LEAST_COLUMNS, console.width)
    for part in _parts(plan, console, most_rows):
        # A path is never broken in two.
        console.print(part, soft_wrap=isinstance(part, Text))
    page.seek(0)
    return "\n".join(line.rstrip() for line in page.read().splitlines())


def _parts(plan: Plan, console: Console, most_rows: int) -> Iterator[RenderableType]:
    yield Text(f"{printable(plan.run)} -> {printable(plan.output)}")
    texts = [f"{one.text}; {counted(len(one.members), 'checkpoint')}" for one in plan.averages]
    if len(texts) == 1:
        yield Text(texts[0])
    else:
        yield Text(f"{len(texts)} averages in one pass, each in its own folder:")
        for number, (average, text) in enumerate(zip(plan.averages, texts, strict=True), start=1):
            yield Text(f"  ({number}) {average.name}: {text}")
    for table in _tables(plan, console, most_rows):
        yield ""
        yield table
    if len(texts) == 1:
        yield ""
        yield _figures(plan.averages[0])
    yield ""
    yield from _sizes(plan)


class _Columns(NamedTuple):
    """Widths, and how many cells and averages stand side by side."""

    name: int
    cells: int  # how many of those between name and weights have room
    share: int
    bar: int  # 0: there is no room for bars
    averages: int
    total: int


def _tables(plan: Plan, console: Console, most_rows: int) -> Iterator[Table]:
    """Yield tables of the weights, each of as many averages as fit; several with figures."""
    count, headings = len(plan.averages), cell_headings(plan.averages)
    names = [f"({number + 1})" for number in range(count)] if count > 1 else ["weight"]
    rows = without_middle(rows_of(plan, plan.averages), most_rows)
    figures = _figure_rows(plan.averages) if count > 1 else []
    columns = _columns(headings, names, rows, figures, console.width)
    console.width = max(console.width, columns.total)  # no number is ever cut
    scale = columns.bar / max(max(average.weights) for average in plan.averages)

    def cell(text: str, weight: float | None = None) -> Text:
        bar = _bar((weight or 0.0) * scale, console).ljust(columns.bar)
        room = " " * _BETWEEN if columns.bar else ""
        return Text.assemble(text.rjust(columns.share), room, (bar, "cyan"))

    for first in range(0, count, columns.averages):
        shown = slice(first, first + columns.averages)
        table = Table(box=None, padding=(0, 0, 0, _BETWEEN), header_style="bold")
        table.add_column("checkpoint", no_wrap=True)
        for heading in headings[: columns.cells]:
            table.add_column(heading, justify="right", no_wrap=True)
        for name in names[shown]:
            table.add_column(name.rjust(columns.share), no_wrap=True)
        for row in rows:
            weights = row.weights if row.has_bars else (None,) * count
            cells = map(cell, row.shares[shown], weights[shown])
            table.add_row(_fitted(row.name, columns.name), *row.cells[: columns.cells], *cells)
        if figures:
            table.add_row()
        for label, values in figures:
            table.add_row(label, *[""] * columns.cells, *map(cell, values[shown]))
        yield table


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
    cells = [_BETWEEN + max(map(len, column)) for column in columns]
    label = max(map(len, ["checkpoint", *(label for label, _ in figures)]))
    name = max(label, min(max(len(row.name) for row in rows), _LONGEST_NAME))
    each = _BETWEEN + share
    free = width - _BETWEEN - sum(cells) - each
    if free < name:
        name = max(label, min(name, free, _SHORTEST_NAME))
        if free < name:
            cells = cells[:1]  # the step; its gap and decay are in --json
    used = _BETWEEN + name + sum(cells)
    averages = max(1, min(len(names), (width - used) // each))
    bar = min(_BAR_COLUMNS[1], (width - used) // averages - each - _BETWEEN)
    bar = bar if bar >= _BAR_COLUMNS[0] else 0
    return _Columns(name, len(cells), share, bar, averages, used + averages * each)


def _fitted(name: str, columns: int) -> Text:
    """Shorten a name in the middle, since its ends hold the numbers.

    >>> _fitted("a-very-long-name-000100", 16).plain
    'a-very...-000100'
    """
    end = (columns - 2) // 2
    is_long = len(name) > columns
    return Text(f"{name[: columns - 3 - end]}...{name[-end:]}" if is_long else name)


def _bar(columns: float, console: Console) -> str:
    """Draw a bar, to an eighth of a column where blocks can be shown."""
    if console.options.ascii_only:
        return "#" * round(columns)
    whole, eighths = divmod(round(columns * 8), 8)
    return (_EIGHTHS[8] * whole + _EIGHTHS[eighths]).strip()


# Each figure: its text for one average, its label for several, its value.
_FIGURES: tuple[tuple[str, str, Callable[[Statistics], str]], ...] = (
    ("effective number of checkpoints", "effective number", lambda s: f"{s.effective_number:.1f}"),
    ("mean age", "mean age ({unit})", lambda s: _number(s.mean_age)),
    ("weight on the last 10 % of training", "last 10 %", lambda s: f"{s.last_tenth:.1%}"),
    ("equivalent half-life", "half-life ({unit})", lambda s: _number(s.half_life)),
    ("equivalent sigma_rel", "sigma_rel", lambda s: _number(s.sigma_rel)),
)


def _figures(average: Average) -> Table:
    """Return the figures of one average."""
    table = Table(box=None, padding=(0, 0, 0, _BETWEEN), show_header=False)
    for text, label, value_of in _FIGURES:
        value = value_of(average.statistics)
        has_unit = "{unit}" in label and value != UNKNOWN
        table.add_row(text, f"{value} {average.unit}" if has_unit else value)
    return table


def _figure_rows(averages: Sequence[Average]) -> list[tuple[str, list[str]]]:
    """Return the figures of several averages: a label, and a value for each average."""
    units = {average.unit for average in averages}
    unit = units.pop() if len(units) == 1 else "own unit"
    return [
        (label.format(unit=unit), [value_of(average.statistics) for average in averages])
        for _, label, value_of in _FIGURES
    ]


def _number(value: float | None) -> str:
    """Return a number in at most seven columns.

    >>> _number(0.10911), _number(998.05), _number(1234567.8), _number(1e-99), _number(None)
    ('0.109', '998', '1234568', '0', '-')
    """
    if value is None:
        return UNKNOWN
    if value < 1e-6:
        return "0"
    return f"{value:.3g}" if abs(value) < 100 or value >= 1e7 else f"{value:.0f}"


def _sizes(plan: Plan) -> Iterator[Text]:
    count, outputs = len(plan.averages), [average.output for average in plan.averages]
    tensors = [tensor for file in outputs[0].files for tensor in file.tensors]
    averaged, total = sum(tensor.averaged for tensor in tensors), counted(len(tensors), "tensor")
    taken = f"{averaged} of {total}" if averaged < len(tensors) else total
    where = f" in each of {count} averages" if count > 1 else ""
    done = f"{size(plan.bytes_read)} to read, {size(plan.bytes_written)} to write"
    yield Text(f"{taken} averaged{where}, {done}")
    yield Text(f"working memory {size(plan.memory_bytes)} plus torch")
    copied = dict.fromkeys(c.name for output in outputs for c in output.companions)
    if copied:
        yield Text(f"also copies {some(copied, 8)}")
