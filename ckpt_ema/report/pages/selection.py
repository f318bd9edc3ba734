"""The page of a selection: candidates with their metrics, the best one, and its weights."""

from collections.abc import Sequence

from ckpt_ema.errors import counted, printable
from ckpt_ema.output.selected import Candidate, Selection
from ckpt_ema.report.columns import UNKNOWN
from ckpt_ema.report.pages import axis, blocks
from ckpt_ema.report.pages.blocks import Table, section
from ckpt_ema.report.pages.chart import Chart, Kind, Point, Series
from ckpt_ema.report.pages.html import Html, document, element, joined
from ckpt_ema.report.selection import number


def selection_page(selection: Selection, command: str | None = None) -> str:
    """Return the page of a selection, with the `command` that repeats it."""
    metric, best = printable(selection.metric), selection.best_candidate
    count = counted(len(selection.candidates), "candidate")
    value = number(selection.value)
    better = "lower" if selection.is_minimized else "higher"
    found = [
        f"The best of {count} by ",
        element("code", metric),
        f" ({better} is better): {value}.",
        "" if selection.averaging_helps else " Averaging does not help here.",
    ]
    return document(
        f"{printable(best.name)}: selection by {metric}",
        element("h1", printable(best.name)),
        element("p", *found, class_="lead"),
        blocks.warnings(selection.warnings),
        _failures(selection),
        _candidates(selection),
        _weights(best),
        _all_weights(selection),
        _soup(selection),
        section("Repeat it", blocks.code(command)) if command else "",
    )


def _failures(selection: Selection) -> Html:
    failed = [one for one in selection.candidates if one.failure]
    if not failed:
        return joined()
    title = element("h2", f"{counted(len(failed), 'candidate')} without metrics")
    items = [element("li", f"{printable(one.name)}: {printable(one.failure)}") for one in failed]
    return element("div", title, element("ul", *items), class_="alert", role="note")


def _candidates(selection: Selection) -> Html:
    """Show every candidate with its metrics, numbered as in the chart."""
    metric = selection.metric
    points = [
        Point(count, one.metrics.get(metric), f"{one.name}: {one.metrics.get(metric)}")
        for count, one in enumerate(selection.candidates, start=1)
    ]
    names = [one.name for one in selection.candidates]
    place = names.index(selection.best)
    about = f"{counted(len(points), 'candidate')}; the best is number {place + 1}."
    drawn = [Series(metric, points, Kind.DOTS)]
    chart = Chart(
        printable(metric), about, "candidate", drawn, from_zero=False, marked=[points[place]]
    )
    metrics = dict.fromkeys([metric, *(m for one in selection.candidates for m in one.metrics)])
    columns = [_aligned([one.metrics.get(m) for one in selection.candidates]) for m in metrics]
    counts = map(str, range(1, len(names) + 1))
    rows = [*zip(counts, map(printable, names), *columns, strict=True)]
    headings = ["", "candidate", *map(printable, metrics)]
    table = Table(headings, rows, texts=2, chosen=frozenset([place]))
    return section("Candidates", chart.html(), table.html())


def _weights(best: Candidate) -> Html:
    points = [
        Point(count, weight, f"{name}: {weight:.2%}")
        for count, (name, weight) in enumerate(best.weights.items(), start=1)
    ]
    about = f"{counted(len(points), 'checkpoint')} in {best.name}."
    drawn = [Series(best.name, points, Kind.BARS)]
    chart = Chart("Weight of each checkpoint", about, "checkpoint", drawn, axis.shares)
    rows = [
        [str(count), printable(name), f"{weight:.2%}"]
        for count, (name, weight) in enumerate(best.weights.items(), start=1)
    ]
    table = Table(["", "checkpoint", "weight"], rows, texts=2)
    return section("Weights of the best", chart.html(), table.html())


def _all_weights(selection: Selection) -> Html:
    """Show the weights in every candidate, by its number."""
    weights = [one.weights for one in selection.candidates]
    longest_first = sorted(weights, key=len, reverse=True)  # they have the order of the run
    names = dict.fromkeys(name for one in longest_first for name in one)
    rows = [
        [printable(name), *(UNKNOWN if name not in of else f"{of[name]:.2%}" for of in weights)]
        for name in names
    ]
    headings = ["checkpoint", *(f"({count})" for count in range(1, len(weights) + 1))]
    table = Table(headings, rows).html()
    return section(
        "Weights of every candidate", blocks.folded("By the number of the candidate", table)
    )


def _soup(selection: Selection) -> Html:
    """Show the steps of the greedy soup, if one was made."""
    if not selection.steps:
        return joined()
    steps = selection.steps
    alone, with_it = (
        _aligned([getattr(one, name) for one in steps]) for name in ("metric", "soup_metric")
    )
    kept = ["kept" if one.is_kept else "not kept" for one in steps]
    names = [printable(one.checkpoint) for one in steps]
    rows = [*zip(names, alone, with_it, kept, strict=True)]
    table = Table(["checkpoint", "alone", "soup with it", ""], rows)
    text = "Checkpoints were tried from the best to the worst, each added to those kept before."
    return section("Greedy soup", element("p", text), table.html())


def _aligned(values: Sequence[float | None]) -> list[str]:
    """Return six digits of each value, with the same number of decimals.

    >>> _aligned([1.86, None, 1.8615])
    ['1.8600', '-', '1.8615']
    """
    decimals = max(len(f"{value or 0:.6g}".partition(".")[2]) for value in values)
    return [UNKNOWN if value is None else f"{value:.{decimals}f}" for value in values]
