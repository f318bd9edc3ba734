"""The weights of a plan's checkpoints as rows of text, for a terminal and for Markdown."""

from collections.abc import Sequence
from typing import NamedTuple

from ckpt_ema.errors import printable
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan

UNKNOWN = "-"


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
