"""The page of averages that were made: weights, what they amount to, warnings, how to repeat it."""

import os
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from ckpt_ema.errors import counted, printable
from ckpt_ema.options import CHECKPOINT
from ckpt_ema.output.manifest import Result
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan
from ckpt_ema.report.columns import UNKNOWN
from ckpt_ema.report.figure import curves_of, learning_rate_steps
from ckpt_ema.report.lines import size
from ckpt_ema.report.pages import axis, blocks
from ckpt_ema.report.pages.blocks import Table, section
from ckpt_ema.report.pages.chart import Chart, Kind, Point, Series
from ckpt_ema.report.pages.html import Html, document, element, joined
from ckpt_ema.report.table import (
    cell_headings,
    figures_of_one,
    figures_of_several,
    number,
    rows_of,
)
from ckpt_ema.schedules.weights import learning_rate
from ckpt_ema.storage import STORAGES
from ckpt_ema.trainers.conventions import MANIFEST_NAME

_MOST_RECORDED = 1 << 60
_IMITATED = (
    "The share of each update that the average keeps: training with a learning rate that decays"
    " like this would have a similar effect (Tian et al. 2025, arXiv 2507.17634)."
)


def average_page(result: Result, command: str | None = None) -> str:
    """Return the page of averages that were made now or before, by whoever has their manifests.

    `command` is the command that is running now, for an output that does not record its own.
    """
    plan, title = result.plan, printable(os.path.basename(os.path.abspath(result.output)))
    return document(
        f"{title}: weighted average",
        element("h1", title),
        element("p", *_sentence(plan), class_="lead"),
        blocks.warnings([*plan.warnings, *result.warnings]),
        blocks.facts(_facts(result)),
        _averages(plan) if len(plan.averages) > 1 else "",
        _weights(plan),
        _learning_rate(plan),
        _output(plan),
        _decisions(plan),
        _repeat(result, command),
    )


def _sentence(plan: Plan) -> list[object]:
    run = element("code", printable(plan.run))
    checkpoints = counted(len(plan.checkpoints), "checkpoint")
    if len(plan.averages) > 1:
        made = f"{len(plan.averages)} weighted averages of {checkpoints} of "
        return [made, run, ", made in one pass without further training."]
    average = plan.averages[0]
    figures = average.statistics
    age = f"{number(figures.mean_age)} {average.unit}"
    amount = f"effective number {figures.effective_number:.1f}, mean age {age}"
    return [f"Weighted average of {checkpoints} of ", run, f": {average.text}; {amount}."]


def _facts(result: Result) -> list[tuple[str, str]]:
    """Return how the averages were made, as far as their manifest records it."""
    record, plan = result.manifests[0], result.plan
    path = plan.averages[0].output.path
    identity = STORAGES[""].identity(path if plan.is_single_file else path / MANIFEST_NAME)
    written = datetime.fromtimestamp(identity.mtime_ns // 10**9, timezone.utc)
    seconds, peak = _recorded(record, "seconds"), _recorded(record, "peak_memory_bytes")
    return [
        ("Output written", f"{written:%Y-%m-%d %H:%M} UTC"),
        ("Made by", f"ckpt-ema {_recorded_text(record, 'ckpt_ema')}"),
        ("Device", _recorded_text(record, "device")),
        ("Time", UNKNOWN if seconds is None else f"{seconds:.{1 if seconds >= 1 else 2}f} s"),
        ("Peak memory", UNKNOWN if peak is None else size(peak)),
        ("Read", size(plan.bytes_read)),
        ("Written", size(plan.bytes_written)),
    ]


# Anybody may have changed a manifest since.
def _recorded(record: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a manifest; None if it is missing or cannot be."""
    value = record.get(name)
    return value if isinstance(value, int | float) and 0 <= value < _MOST_RECORDED else None


def _recorded_text(record: Mapping[str, Any], name: str) -> str:
    """Return a text of a manifest."""
    value = record.get(name)
    return printable(value) if isinstance(value, str) and value else UNKNOWN


def _averages(plan: Plan) -> Html:
    figures = figures_of_several(plan.averages)
    rows = [
        [label, average.name, average.text, str(len(average.members)), *values]
        for label, average, *values in zip(
            _labels(plan), plan.averages, *(values for _, values in figures), strict=True
        )
    ]
    headings = ["", "average", "schedule", "checkpoints", *(label for label, _ in figures)]
    return section("Averages", Table(headings, rows, texts=3).html())


def _labels(plan: Plan) -> list[str]:
    """Return the headings of the columns of averages, which would be too wide by name."""
    several = range(1, len(plan.averages) + 1)
    return [f"({count})" for count in several] if len(plan.averages) > 1 else ["weight"]


def _weights(plan: Plan) -> Html:
    """Show the weight of each checkpoint."""
    averages, curves = plan.averages, curves_of(plan.averages)
    kind = Kind.LINE if len(averages) > 1 else Kind.BARS
    series = []
    for label, average, (steps, weights) in zip(_labels(plan), averages, curves.lines, strict=True):
        names = [printable(plan.checkpoints[member].name) for member in average.members]
        points = [
            Point(step, weight, f"{name}: {weight:.2%}")
            for step, weight, name in zip(steps, weights, names, strict=True)
        ]
        series.append(Series(f"{label} {average.name}", points, kind))
    about = "; ".join(map(_described, averages)) + "."
    title = "Weight of each checkpoint"
    chart = Chart(title, about, curves.x_label, series, axis.shares)
    figures = blocks.facts(figures_of_one(averages[0])) if len(averages) == 1 else ""
    headings = ["checkpoint", *cell_headings(averages), *_labels(plan)]
    rows = [[row.name, *row.cells, *row.shares] for row in rows_of(plan, averages)]
    return section("Weights", figures, chart.html(), Table(headings, rows).html())


def _described(average: Average) -> str:
    first, last = average.weights[0], average.weights[-1]
    return (
        f"{average.text}: from {first:.2%} on the oldest of"
        f" {counted(len(average.weights), 'checkpoint')} to {last:.2%} on the newest"
    )


def _learning_rate(plan: Plan) -> Html:
    """Show the learning-rate decay that each average imitates."""
    averages, curves = plan.averages, curves_of(plan.averages)
    series = []
    for label, average, (steps, weights) in zip(_labels(plan), averages, curves.lines, strict=True):
        xs, ys = learning_rate_steps(steps, weights, curves.start)
        points = [Point(x, y) for x, y in zip(xs, ys, strict=True)]
        series.append(Series(f"{label} {average.name}", points, Kind.STEPS))
    title = "Equivalent learning rate, as a share of the learning rate of the run"
    about = "It falls by the weight of each checkpoint, from 100% to 0%."
    chart = Chart(title, about, curves.x_label, series, axis.shares)
    rates = [dict(zip(one.members, learning_rate(one.weights), strict=True)) for one in averages]
    rows = [
        [printable(plan.checkpoints[member].name), *(_share(of.get(member)) for of in rates)]
        for member in sorted({member for of in rates for member in of})
    ]
    labels = _labels(plan) if len(averages) > 1 else ["learning rate"]
    values = blocks.folded("The values", Table(["checkpoint", *labels], rows).html())
    return section("Imitated learning-rate decay", element("p", _IMITATED), chart.html(), values)


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2%}"


def _output(plan: Plan) -> Html:
    """Show where the averages are, their files, and how to load them."""
    averages, is_one = plan.averages, len(plan.averages) == 1
    rows = [
        [
            file.name if is_one else os.path.join(one.output.path.name, file.name),
            str(len(file.tensors)),
            size(file.size_bytes),
        ]
        for one in averages
        for file in one.output.files
    ]
    copied = dict.fromkeys(copy.name for one in averages for copy in one.output.companions)
    beside = f"Also copied: {', '.join(map(printable, copied))}."
    identified = [[one.name, one.output.fingerprint] for one in averages]
    fingerprints = Table(["average", "fingerprint"], identified, texts=2).html()
    return section(
        "Output",
        *(element("p", text) for text in _loading(plan)),
        blocks.code(*(os.path.abspath(one.output.path) for one in averages)),
        Table(["file", "tensors", "size"], rows).html(),
        element("p", beside, class_="soft") if copied else "",
        blocks.folded("Fingerprint" if is_one else "Fingerprints", fingerprints),
    )


def _loading(plan: Plan) -> list[str]:
    """Return sentences on how to load an average, or several."""
    is_one = len(plan.averages) == 1
    where = "it from this path" if is_one else "each from its path"
    texts = [f"Load {where} as you load the run's checkpoints:"]
    if plan.given.get("save_as") == CHECKPOINT:
        what = "This is a copy of the" if is_one else "Each is a copy of its"
        differ = "in which only the averaged tensors differ"
        texts.insert(0, f"{what} newest checkpoint {differ}; the trainer can resume from it.")
    return texts


def _decisions(plan: Plan) -> Html:
    """Show what was left out, and what was decided without being asked."""
    left_out = [[printable(one.name), printable(one.verdict)] for one in plan.left_out]
    if not (left_out or plan.notes):
        return joined()
    table = Table(["entry", "reason"], left_out, texts=2).html() if left_out else ""
    headed = element("h3", "Left out") if left_out else ""
    return section("Decisions", headed, table, blocks.notes(plan.notes))


def _repeat(result: Result, command: str | None) -> Html:
    """Show the command that made the output, or the options where Python made it."""
    recorded = result.manifests[0].get("command")
    shown = recorded if isinstance(recorded, str) else command
    if shown:
        return section("Repeat it", blocks.code(shown))
    options = [f"{name}={value!r}" for name, value in result.plan.given.items()]
    return section("Options", blocks.code(*options)) if options else joined()
