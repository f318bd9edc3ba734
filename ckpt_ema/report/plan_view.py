"""A plan as a person grasps it at once: the weight of every checkpoint, and what the weights mean.

One average shows its gaps and decays too; several stand side by side. It fits the width of the
terminal, 80 columns where there is none, and does without colours and blocks where those would not
arrive.
"""

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ckpt_ema.errors import printable
from ckpt_ema.planning.candidates import Candidate
from ckpt_ema.planning.plan import Plan
from ckpt_ema.report.lines import counted, shortened, size

_UNKNOWN = "-"
_LEAST_COLUMNS = 40  # with less, nothing could be read
_WEIGHT_COLUMNS = 9  # "100.00%" and what stands between columns
_LONGEST_NAME = 30
_BAR_COLUMNS = (4, 30)
_EIGHTHS = " ▏▎▍▌▋▊▉█"


class _Row(NamedTuple):
    """A checkpoint, or those that are left out of the table."""

    name: str
    cells: tuple[str, ...]
    weights: tuple[float | None, ...]  # None where an average does not take it
    has_bars: bool = True


def plan_text(plan: Plan, stream: TextIO | None, most_rows: int) -> str:
    """The plan as text for `stream` (None: a closed one), with colours if it is a terminal.

    Of more than `most_rows` checkpoints those in the middle are left out.
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
    """Text for a stream that is not written to yet."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._encoding = stream.encoding if stream is not None else "ascii"

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream, by which rich tells whether blocks would arrive."""
        return self._encoding


def markdown_lines(plan: Plan, candidates: Sequence[Candidate]) -> list[str]:
    """The weights of some averages of a plan as a table in Markdown."""
    headings = ["checkpoint", *_headings(candidates), *_weight_headings(candidates)]
    return [
        f"| {' | '.join(headings)} |",
        f"|:---|{'---:|' * (len(headings) - 1)}",
        *(
            f"| {' | '.join([row.name.replace('|', '&#124;'), *row.cells, *_shares(row)])} |"
            for row in _rows(plan, candidates)
        ),
    ]


def summary_lines(plan: Plan) -> list[str]:
    """The plan for the summary page of a CI job, in Markdown."""
    title = f"### ckpt-ema: {printable(plan.run)} → {printable(plan.output)}"
    rules = [f"- {candidate.name}: {candidate.rule.text}" for candidate in plan.candidates]
    return [title, "", *rules, "", *markdown_lines(plan, plan.candidates), ""]


def _parts(plan: Plan, console: Console, most_rows: int) -> Iterator[RenderableType]:
    yield Text(f"{printable(plan.run)} -> {printable(plan.output)}")
    if len(plan.candidates) == 1:
        only = plan.candidates[0]
        yield Text(f"{only.rule.text}; {counted(len(only.members), 'checkpoint')}")
    else:
        yield Text(f"{len(plan.candidates)} averages in one pass, each in a folder of its name:")
        for number, candidate in enumerate(plan.candidates, start=1):
            taken = counted(len(candidate.members), "checkpoint")
            yield Text(f"  ({number}) {candidate.name}: {candidate.rule.text}; {taken}")
    for table in _tables(plan, console, most_rows):
        yield ""
        yield table
    if len(plan.candidates) == 1:
        yield ""
        yield _figures(plan.candidates[0])
    yield ""
    yield from _sizes(plan)


# --- The weights ---------------------------------------------------------------------------------


def _headings(candidates: Sequence[Candidate]) -> list[str]:
    return ["step", "gap", "decay"] if len(candidates) == 1 else ["step"]


def _weight_headings(candidates: Sequence[Candidate]) -> list[str]:
    return ["weight"] if len(candidates) == 1 else [candidate.name for candidate in candidates]


def _rows(plan: Plan, candidates: Sequence[Candidate]) -> list[_Row]:
    weights = [dict(zip(c.members, c.weights, strict=True)) for c in candidates]
    taken = sorted({number for of_candidate in weights for number in of_candidate})
    rows: list[_Row] = []
    for number in taken:
        checkpoint = plan.checkpoints[number]
        cells = [_UNKNOWN if checkpoint.step is None else str(checkpoint.step)]
        if len(candidates) == 1:
            place = len(rows)
            gap, decay = candidates[0].gaps[place], (None, *candidates[0].decays)[place]
            cells.append(_UNKNOWN if gap is None else str(gap))
            cells.append(_UNKNOWN if decay is None else f"{decay:.4f}")
        shares = tuple(of_candidate.get(number) for of_candidate in weights)
        rows.append(_Row(printable(checkpoint.name), tuple(cells), shares))
    return rows


def _without_middle(rows: list[_Row], most_rows: int) -> list[_Row]:
    """The rows, or the oldest and newest of them with one row for those between."""
    if len(rows) <= most_rows:
        return rows
    newest = most_rows * 2 // 3  # which weigh most
    oldest = most_rows - newest - 1
    hidden = rows[oldest : len(rows) - newest]
    columns = zip(*(row.weights for row in hidden), strict=True)
    sums = tuple(sum(weight or 0.0 for weight in column) for column in columns)
    blank = ("",) * len(hidden[0].cells)
    return [
        *rows[:oldest],
        _Row(f"... {len(hidden)} more", blank, sums, has_bars=False),
        *rows[-newest:],
    ]


def _shares(row: _Row) -> list[str]:
    return [_UNKNOWN if weight is None else f"{weight:.2%}" for weight in row.weights]


def _tables(plan: Plan, console: Console, most_rows: int) -> Iterator[Table]:
    """The weights, and for several averages what they come to, in the columns of each.

    As many averages as fit stand side by side; others follow below.
    """
    candidates, headings = plan.candidates, _headings(plan.candidates)
    rows = _without_middle(_rows(plan, candidates), most_rows)
    figures = _figure_rows(candidates) if len(candidates) > 1 else []
    labels = [row.name for row in rows] + [label for label, _ in figures]
    name_columns = min(_LONGEST_NAME, max(map(len, labels)))
    cells = zip(headings, *(row.cells for row in rows), strict=True)
    taken = 2 + name_columns + sum(2 + max(map(len, column)) for column in cells)
    most = max(1, min(len(candidates), (console.width - taken) // _WEIGHT_COLUMNS))
    bar = min(_BAR_COLUMNS[1], (console.width - taken) // most - _WEIGHT_COLUMNS - 2)
    bar = bar if bar >= _BAR_COLUMNS[0] else 0
    largest = max(max(candidate.weights) for candidate in candidates)
    for first in range(0, len(candidates), most):
        shown = range(first, min(first + most, len(candidates)))
        names = [f"({number + 1})" for number in shown] if len(candidates) > 1 else ["weight"]
        table = _empty_table(name_columns, headings, names, bar)
        for row in rows:
            line: list[RenderableType] = [Text(row.name), *row.cells]
            shares = _shares(row)
            for number in shown:
                length = (row.weights[number] or 0.0) / largest * bar if row.has_bars else 0.0
                line += [shares[number], _bar(length, console)] if bar else [shares[number]]
            table.add_row(*line)
        for label, values in figures:
            if label == figures[0][0]:
                table.add_row()
            line = [label, *("" for _ in headings)]
            for number in shown:
                line += [values[number], ""] if bar else [values[number]]
            table.add_row(*line)
        yield table


def _empty_table(
    name_columns: int, headings: Sequence[str], averages: Sequence[str], bar: int
) -> Table:
    table = Table(box=None, padding=(0, 0, 0, 2), header_style="bold")
    table.add_column("checkpoint", no_wrap=True, overflow="ellipsis", max_width=name_columns)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for average in averages:
        table.add_column(average, justify="right", no_wrap=True)
        if bar:
            table.add_column("", no_wrap=True, style="cyan", min_width=bar)
    return table


def _bar(columns: float, console: Console) -> str:
    """A bar of so many columns, to the eighth of one where blocks can be shown."""
    if console.options.ascii_only:
        return "#" * round(columns)
    whole, eighths = divmod(round(columns * 8), 8)
    return (_EIGHTHS[8] * whole + _EIGHTHS[eighths]).strip()


# --- What the weights mean ------------------------------------------------------------------------


def _figures(candidate: Candidate) -> Table:
    """What one average's weights come to, in words."""
    found, unit = candidate.statistics, candidate.unit
    table = Table(box=None, padding=(0, 0, 0, 2), show_header=False)
    for text, value in (
        ("effective number of checkpoints", f"{found.effective_number:.1f}"),
        ("mean age, before the newest", f"{_number(found.mean_age)} {unit}"),
        ("weight of the last tenth of the run", f"{found.last_tenth:.1%}"),
        ("as old as a half-life of", f"{_number(found.half_life)} {unit}"),
        ("as old as a power function of sigma_rel", _number(found.sigma_rel)),
    ):
        table.add_row(text, value if not value.startswith(_UNKNOWN) else _UNKNOWN)
    return table


def _figure_rows(candidates: Sequence[Candidate]) -> list[tuple[str, list[str]]]:
    """What the weights of several averages come to: a label, and a value for each."""
    found = [candidate.statistics for candidate in candidates]
    units = {candidate.unit for candidate in candidates}
    unit = units.pop() if len(units) == 1 else "their units"
    return [
        ("effective number", [f"{one.effective_number:.1f}" for one in found]),
        (f"mean age ({unit})", [_number(one.mean_age) for one in found]),
        ("last tenth", [f"{one.last_tenth:.1%}" for one in found]),
        (f"half-life ({unit})", [_number(one.half_life) for one in found]),
        ("sigma_rel", [_number(one.sigma_rel) for one in found]),
    ]


def _number(value: float | None) -> str:
    """A number in at most seven columns.

    >>> _number(0.10911), _number(998.05), _number(1234567.8), _number(None)
    ('0.109', '998', '1234568', '-')
    """
    if value is None:
        return _UNKNOWN
    return f"{value:.3g}" if abs(value) < 100 or value >= 1e7 else f"{value:.0f}"


def _sizes(plan: Plan) -> Iterator[Text]:
    files = [file for candidate in plan.candidates for file in candidate.output.files]
    averaged = sum(tensor.averaged for file in files for tensor in file.tensors)
    copied = list(dict.fromkeys(c.name for one in plan.candidates for c in one.output.companions))
    yield Text(
        f"averages {counted(averaged, 'tensor')}: reads {size(plan.bytes_read)}, writes"
        f" {size(plan.bytes_written)}, in {size(plan.memory_bytes)} of memory beside torch's own"
    )
    if copied:
        yield Text(f"copies {counted(len(copied), 'file')}: {shortened(copied)}")
