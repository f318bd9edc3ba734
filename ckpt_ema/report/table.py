"""The weights of a plan's checkpoints as rows of text, for a terminal and for Markdown."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ckpt_ema.errors import printable
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan
from ckpt_ema.report.columns import UNKNOWN
from ckpt_ema.schedules.statistics import Statistics

# Each figure of the weights: its text for one average, its label for several, its value.
FIGURES: tuple[tuple[str, str, Callable[[Statistics], str]], ...] = (
    ("effective number of checkpoints", "effective number", lambda s: f"{s.effective_number:.1f}"),
    ("mean age", "mean age ({unit})", lambda s: number(s.mean_age)),
    ("weight on the last 10 % of training", "last 10 %", lambda s: f"{s.last_tenth:.1%}"),
    ("equivalent half-life", "half-life ({unit})", lambda s: number(s.half_life)),
    ("equivalent sigma_rel", "sigma_rel", lambda s: number(s.sigma_rel)),
)


class Row(NamedTuple):
    """One checkpoint, or all those that the table skips."""

    name: str
    cells: tuple[str, ...]  # under `cell_headings`
    weights: tuple[float | None, ...]  # of each average; None where it is not a member
    has_bars: bool = True

    @property
    def shares(self) -> list[str]:
        """Return the weights as percentages."""
        return [UNKNOWN if weight is None else f"{weight:.2%}" for weight in self.weights]


def figures_of_one(average: Average) -> list[tuple[str, str]]:
    """Return the figures of one average: a text and a value with its unit."""
    rows = []
    for text, label, value_of in FIGURES:
        value = value_of(average.statistics)
        has_unit = "{unit}" in label and value != UNKNOWN
        rows.append((text, f"{value} {average.unit}" if has_unit else value))
    return rows


def figures_of_several(averages: Sequence[Average]) -> list[tuple[str, list[str]]]:
    """Return the figures of several averages: a label, and a value for each average."""
    units = {average.unit for average in averages}
    unit = units.pop() if len(units) == 1 else "own unit"
    return [
        (label.format(unit=unit), [value_of(average.statistics) for average in averages])
        for _, label, value_of in FIGURES
    ]


def number(value: float | None) -> str:
    """Return a number in at most seven columns.

    >>> number(0.10911), number(998.05), number(1234567.8), number(1e-99), number(None)
    ('0.109', '998', '1234568', '0', '-')
    """
    if value is None:
        return UNKNOWN
    if value < 1e-6:
        return "0"
    return f"{value:.3g}" if abs(value) < 100 or value >= 1e7 else f"{value:.0f}"


def cell_headings(averages: Sequence[Average]) -> list[str]:
    """Return the columns between names and weights; only one average has gaps and decays."""
    return ["step", "gap", "decay"] if len(averages) == 1 else ["step"]


def rows_of(plan: Plan, averages: Sequence[Average]) -> list[Row]:
    """Return a row for each checkpoint of any of the averages."""
    weights = [dict(zip(c.members, c.weights, strict=True)) for c in averages]
    taken = sorted({number for of_average in weights for number in of_average})
    columns: list[Sequence[object]] = [[plan.checkpoints[number].step for number in taken]]
    if len(averages) == 1:
        decays = [None, *(f"{decay:.4f}" for decay in averages[0].decays)]
        columns += [averages[0].gaps, decays]
    rows: list[Row] = []
    for number, *values in zip(taken, *columns, strict=True):
        cells = tuple(UNKNOWN if value is None else str(value) for value in values)
        found = tuple(of_average.get(number) for of_average in weights)
        rows.append(Row(printable(plan.checkpoints[number].name), cells, found))
    return rows


def without_middle(rows: list[Row], most_rows: int) -> list[Row]:
    """Return at most `most_rows` rows: the oldest, the newest, and one for all between."""
    if len(rows) <= most_rows:
        return rows
    newest = most_rows * 2 // 3  # they weigh most
    oldest = most_rows - newest - 1
    hidden = rows[oldest : len(rows) - newest]
    columns = zip(*(row.weights for row in hidden), strict=True)
    sums = tuple(sum(weight or 0.0 for weight in column) for column in columns)
    blank = ("",) * len(hidden[0].cells)
    between = Row(f"... {len(hidden)} more", blank, sums, has_bars=False)
    return [*rows[:oldest], between, *rows[-newest:]]


def markdown_lines(plan: Plan, averages: Sequence[Average]) -> list[str]:
    """Return the weights of some averages of a plan as a table in Markdown."""
    names = ["weight"] if len(averages) == 1 else [average.name for average in averages]
    headings = ["checkpoint", *cell_headings(averages), *names]
    rows = [
        [row.name.replace("|", "&#124;"), *row.cells, *row.shares]
        for row in rows_of(plan, averages)
    ]
    ruler = [":---", *("---:" for _ in headings[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (headings, ruler, *rows)]


def summary_lines(plan: Plan) -> list[str]:
    """Return the plan in Markdown, for the summary page of a CI job."""
    title = f"### ckpt-ema: {printable(plan.run)} → {printable(plan.output)}"
    rules = [f"- {average.name}: {average.text}" for average in plan.averages]
    return [title, "", *rules, "", *markdown_lines(plan, plan.averages), ""]
