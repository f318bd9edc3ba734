"""A selection for people: the candidates and their metric side by side, best first."""

from collections.abc import Sequence

from ckpt_ema.errors import printable
from ckpt_ema.output.selected import Candidate, Selection
from ckpt_ema.report.columns import UNKNOWN

_HEADINGS = ("candidate", "schedule", "effective number")


def table_lines(selection: Selection) -> list[str]:
    """Return a line for each candidate under a line of headings; a star marks the best."""
    marks = {selection.best: "*"}
    rows = [[marks.get(one.name, ""), *_cells(selection, one)] for one in selection.ranked()]
    rows.insert(0, ["", *_headings(selection)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_aligned(row, widths) for row in rows]


def result_line(selection: Selection) -> str:
    """Return which candidate is best, by how much, and where it is."""
    path = printable(selection.path)
    if selection.is_up_to_date:
        return f"{path} is up to date: same checkpoints, options and evaluation"
    metric, value = printable(selection.metric), number(selection.value)
    if not selection.averaging_helps:
        text = "averaging does not help here: one checkpoint alone has the best"
        return f"{text} {metric}, {value}: {path}"
    last = next((one for one in selection.candidates if len(one.weights) == 1), None)
    beside = last.metrics.get(selection.metric) if last else None
    compared = "" if beside is None else f" (the last checkpoint alone: {number(beside)})"
    return f"best {metric}: {value}, by {printable(selection.best)}{compared}: {path}"


def number(value: float) -> str:
    """Write a metric in few digits.

    >>> number(1.8617493), number(12345.0), number(0.5)
    ('1.86175', '12345', '0.5')
    """
    return f"{value:.6g}"


def markdown(selection: Selection) -> str:
    """Return the section of a model card on how its candidates were evaluated."""
    better = "lower" if selection.is_minimized else "higher"
    rows = [_headings(selection), [":---", ":---", "---:", "---:"]]
    rows += [_cells(selection, one) for one in selection.ranked()]
    table = "\n".join(f"| {' | '.join(map(_escaped, row))} |" for row in rows)
    command = printable(selection.command)
    return f"""## Evaluation

The best of {len(selection.candidates)} candidates by `{printable(selection.metric)}` ({better} is \
better) is {selection.best}. Each was evaluated by:

```console
$ {command}
```

{table}

"""


def _headings(selection: Selection) -> list[str]:
    name, schedule, effective = _HEADINGS
    return [name, schedule, printable(selection.metric), effective]


def _cells(selection: Selection, one: Candidate) -> list[str]:
    value = one.metrics.get(selection.metric)
    shown = UNKNOWN if value is None else number(value)
    return [printable(one.name), one.schedule, shown, f"{one.effective_number:.1f}"]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """Return a line; names and schedules are aligned to the left, numbers to the right."""
    cells = [f"{cell:{'<' if n < 3 else '>'}{widths[n]}}" for n, cell in enumerate(row)]
    return f"{cells[0]} {'  '.join(cells[1:])}".rstrip()


def _escaped(text: str) -> str:
    return text.replace("|", "&#124;")
