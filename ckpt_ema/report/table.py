"""A plan for people: the weight of every checkpoint, and what the weights amount to.

One average shows its gaps and decays too; several stand side by side. The table fits the width of
the terminal, 80 columns where there is none, and uses colours and blocks only where they can be
shown.
"""

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ckpt_ema.errors import printable
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan
from ckpt_ema.report.lines import counted, shortened, size
from ckpt_ema.report.rows import (
    UNKNOWN,
    Row,
    cell_headings,
    markdown_lines,
    rows_of,
    without_middle,
)

_LEAST_COLUMNS = 40  # with less, nothing could be read
_BETWEEN = 2  # before each column
_LONGEST_NAME, _SHORTEST_NAME = 30, 16
_BAR_COLUMNS = (4, 30)
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def plan_text(plan: Plan, stream: TextIO | None, most_rows: int) -> str:
    """Return the plan as text for `stream` (None: a closed one), in colour on a terminal.

    Beyond `most_rows` checkpoints, those in the middle share one row.
    """
    page = _Page(stream)
    is_terminal = stream is not None and stream.isatty()
    console = Console(file=page, force_terminal=is_terminal, highlight=False)
    console.width = max(_LEAST_COLUMNS, console.width)
    for part in _parts(plan, console, most_rows):
        # A path is never broken in two.
        console.print(part, soft_wrap=isinstance(part, Text))
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


class _Page(io.StringIO):
    """A buffer with the encoding of the stream that its text is for."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._encoding = stream.encoding if stream is not None else "ascii"

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return the stream's, from which rich decides whether blocks can be shown."""
        return self._encoding


def summary_lines(plan: Plan) -> list[str]:
    """Return the plan in Markdown, for the summary page of a CI job."""
    title = f"### ckpt-ema: {printable(plan.run)} → {printable(plan.output)}"
    rules = [f"- {average.name}: {average.text}" for average in plan.averages]
    return [title, "", *rules, "", *markdown_lines(plan, plan.averages), ""]


def _parts(plan: Plan, console: Console, most_rows: int) -> Iterator[RenderableType]:
    yield Text(f"{printable(plan.run)} -> {printable(plan.output)}")
    if len(plan.averages) == 1:
        only = plan.averages[0]
        yield Text(f"{only.text}; {counted(len(only.members), 'checkpoint')}")
    else:
        yield Text(f"{len(plan.averages)} averages in one pass, each in its own folder:")
        for number, average in enumerate(plan.averages, start=1):
            taken = counted(len(average.members), "checkpoint")
            yield Text(f"  ({number}) {average.name}: {average.text}; {taken}")
    for table in _tables(plan, console, most_rows):
        yield ""
        yield table
    if len(plan.averages) == 1:
        yield ""
        yield _figures(plan.averages[0])
    yield ""
    yield from _sizes(plan)


# --- The weights ---------------------------------------------------------------------------------


class _Columns(NamedTuple):
    """Widths, and how many averages stand side by side."""

    name: int
    cells: slice  # those between name and weights for which there is room
    bar: int  # 0: there is no room for bars
    averages: int
    total: int


def _tables(plan: Plan, console: Console, most_rows: int) -> Iterator[Table]:
    """Yield tables of the weights; for several averages, with their figures below.

    As many averages as fit stand side by side; the others follow in further tables.
    """
    count, headings = len(plan.averages), cell_headings(plan.averages)
    rows = without_middle(rows_of(plan, plan.averages), most_rows)
    figures = _figure_rows(plan.averages) if count > 1 else []
    columns = _columns(headings, rows, figures, console.width)
    console.width = max(console.width, columns.total)  # no number is ever cut
    largest = max(max(average.weights) for average in plan.averages)

    def bar(weight: float | None, row: Row) -> str:
        length = (weight or 0.0) / largest * columns.bar
        return _bar(length, console) if row.has_bars else ""

    for first in range(0, count, columns.averages):
        shown = slice(first, first + columns.averages)
        table = _empty_table(headings[columns.cells], range(count)[shown], count, columns)
        for row in rows:
            bars = [bar(weight, row) for weight in row.weights]
            table.add_row(
                Text(_fitted(row.name, columns.name)),
                *row.cells[columns.cells],
                *_paired(row.shares[shown], bars[shown], columns),
            )
        if figures:
            table.add_row()
        blank = [""] * len(headings[columns.cells])
        for label, values in figures:
            none = [""] * count
            table.add_row(label, *blank, *_paired(values[shown], none[shown], columns))
        yield table


def _columns(
    headings: Sequence[str],
    rows: Sequence[Row],
    figures: Sequence[tuple[str, list[str]]],
    width: int,
) -> _Columns:
    """Fit the table into `width` columns: numbers first, then names, then bars."""
    width -= _BETWEEN  # before the names
    values = [value for row in rows for value in row.shares]
    values += [value for _, of_averages in figures for value in of_averages]
    each = _BETWEEN + max(map(len, values))
    cells = [
        _BETWEEN + max(map(len, column))
        for column in zip(headings, *(row.cells for row in rows), strict=True)
    ]
    longest = max(len("checkpoint"), *(len(row.name) for row in rows))
    labels = max([len("checkpoint"), *(len(label) for label, _ in figures)])
    name = max(labels, min(longest, _LONGEST_NAME))
    free = width - sum(cells) - each
    if free < name:
        name = max(labels, min(name, free, _SHORTEST_NAME))
        if free < name:
            cells = cells[:1]  # the step; its gap and decay are in --json
    free = width - name - sum(cells)
    averages = max(1, min(len(rows[0].weights), free // each))
    bar = min(_BAR_COLUMNS[1], free // averages - each - _BETWEEN)
    return _Columns(
        name,
        slice(len(cells)),
        bar if bar >= _BAR_COLUMNS[0] else 0,
        averages,
        _BETWEEN + name + sum(cells) + averages * each,
    )


def _fitted(name: str, columns: int) -> str:
    """Shorten a name in the middle, since its ends hold the numbers.

    >>> _fitted("a-very-long-name-000100", 16)
    'a-very...-000100'
    """
    if len(name) <= columns:
        return name
    end = (columns - 2) // 2
    return f"{name[: columns - 3 - end]}...{name[-end:]}"


def _paired(values: Sequence[str], bars: Sequence[str], columns: _Columns) -> list[str]:
    """Put the bars, if there is room for them, after their values."""
    if not columns.bar:
        return list(values)
    return [cell for pair in zip(values, bars, strict=True) for cell in pair]


def _empty_table(
    headings: Sequence[str], shown: Sequence[int], count: int, columns: _Columns
) -> Table:
    table = Table(box=None, padding=(0, 0, 0, _BETWEEN), header_style="bold")
    table.add_column("checkpoint", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for number in shown:
        name = f"({number + 1})" if count > 1 else "weight"
        table.add_column(name, justify="right", no_wrap=True)
        if columns.bar:
            table.add_column("", no_wrap=True, style="cyan", min_width=columns.bar)
    return table


def _bar(columns: float, console: Console) -> str:
    """Draw a bar, to an eighth of a column where blocks can be shown."""
    if console.options.ascii_only:
        return "#" * round(columns)
    whole, eighths = divmod(round(columns * 8), 8)
    return (_EIGHTHS[8] * whole + _EIGHTHS[eighths]).strip()


# --- What the weights amount to -------------------------------------------------------------------


def _figures(average: Average) -> Table:
    """Return the figures of one average."""
    found, unit = average.statistics, average.unit
    table = Table(box=None, padding=(0, 0, 0, 2), show_header=False)
    for text, value in (
        ("effective number of checkpoints", f"{found.effective_number:.1f}"),
        ("mean age", f"{_number(found.mean_age)} {unit}"),
        ("weight on the last 10 % of training", f"{found.last_tenth:.1%}"),
        ("equivalent half-life", f"{_number(found.half_life)} {unit}"),
        ("equivalent sigma_rel", _number(found.sigma_rel)),
    ):
        table.add_row(text, value if not value.startswith(UNKNOWN) else UNKNOWN)
    return table


def _figure_rows(averages: Sequence[Average]) -> list[tuple[str, list[str]]]:
    """Return the figures of several averages: a label, and a value for each average."""
    found = [average.statistics for average in averages]
    units = {average.unit for average in averages}
    unit = units.pop() if len(units) == 1 else "own unit"
    return [
        ("effective number", [f"{one.effective_number:.1f}" for one in found]),
        (f"mean age ({unit})", [_number(one.mean_age) for one in found]),
        ("last 10 %", [f"{one.last_tenth:.1%}" for one in found]),
        (f"half-life ({unit})", [_number(one.half_life) for one in found]),
        ("sigma_rel", [_number(one.sigma_rel) for one in found]),
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
    averaged = sum(t.averaged for file in plan.averages[0].output.files for t in file.tensors)
    count = len(plan.averages)
    copied = list(dict.fromkeys(c.name for one in plan.averages for c in one.output.companions))
    yield Text(
        f"{counted(averaged, 'tensor')}{f' in each of {count} averages' if count > 1 else ''},"
        f" {size(plan.bytes_read)} to read, {size(plan.bytes_written)} to write;"
        f" working memory {size(plan.memory_bytes)} plus torch"
    )
    if copied:
        yield Text(f"also copies {shortened(copied)}")
