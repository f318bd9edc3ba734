"""Charts as inline SVG that stretches with the page, beside labels that do not.

Lines and dots keep their widths (`vector-effect`), and labels are text of the page, placed by
percentages: so the same chart is readable on a phone, on a desk and on paper, without a script.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

from ckpt_ema.report.figure_style import COLOURS
from ckpt_ema.report.pages import axis
from ckpt_ema.report.pages.html import Html, element, joined
from ckpt_ema.report.pages.style import DASHES

_EDGE = 1000  # of the drawing, in its own units, both ways
_MOST_DOTS = 80  # on one line
_BAR_SHARE = 0.7  # of the smallest gap between two
_LEAST_BAR = _EDGE / 400  # still visible on a phone
_PLANE = 3 / 2  # width by height, where a unit is as long both ways


class Kind(Enum):
    """How values are drawn."""

    BARS = "bars"
    LINE = "line"
    STEPS = "steps"  # a line whose corners are given; it has no dots
    DOTS = "dots"


class Point(NamedTuple):
    """A point of a series; a missing or non-finite value leaves a gap."""

    x: float
    y: float | None
    label: str = ""  # shown where a mouse points at it


class Series(NamedTuple):
    """One set of points of a chart, in the order in which a line joins them."""

    name: str
    points: Sequence[Point]
    kind: Kind = Kind.LINE


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart; its values are also in a table below it."""

    title: str
    about: str  # a sentence for whoever does not see it
    x_label: str
    series: Sequence[Series]
    y_labels: Callable[[Sequence[float]], list[str]] = axis.plain
    from_zero: bool = True  # whether the values begin at 0
    is_plane: bool = False  # whether distances mean the same in both directions
    marked: Sequence[Point] = ()  # points with a ring

    def html(self) -> Html:
        """Return it as a figure."""
        return _figure(self)


class _Frame(NamedTuple):
    """The ranges of both axes."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        """Return where a value is, in units of the drawing from the left."""
        return _EDGE * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        """Return where a value is, in units of the drawing from the top."""
        return _EDGE * (self.high - value) / (self.high - self.low)

    def at(self, point: Point) -> str:
        """Return the coordinates of a point."""
        assert point.y is not None
        return f"{self.x(point.x):.6g} {self.y(point.y):.6g}"


def _figure(chart: Chart) -> Html:
    frame = _frame(chart)
    y_values = axis.ticks(frame.low, frame.high, 4)
    grid = [
        _path(
            "grid" if value or not chart.from_zero else "axis", f"M0 {frame.y(value):.6g}H{_EDGE}"
        )
        for value in y_values
    ]
    drawn = [shape for n, one in enumerate(chart.series) for shape in _shapes(one, n, frame)]
    rings = [_path("ring", f"M{frame.at(point)}h0") for point in _finite(chart.marked)]
    plot = element(
        "svg",
        *(element("title", chart.title), element("desc", chart.about)),
        *(*grid, *rings, *drawn),
        class_="plot plane" if chart.is_plane else "plot",
        viewBox=f"0 0 {_EDGE} {_EDGE}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{chart.title}. {chart.about}",
    )
    labels = [] if chart.is_plane else _labels(chart, frame, y_values)  # its axes have no unit
    return element(
        "figure",
        element("figcaption", chart.title),
        element("div", plot, *labels, class_="frame"),
        element("p", chart.x_label, class_="below"),
        _legend(chart) if len(chart.series) > 1 else "",
    )


def _labels(chart: Chart, frame: _Frame, y_values: Sequence[float]) -> list[Html]:
    """Return the labels of the ticks of both axes."""
    beside = zip(y_values, chart.y_labels(y_values), strict=True)
    below = axis.labelled(frame.left, frame.right, axis.counts)
    return [
        *(_tick("y", "bottom", 1 - frame.y(value) / _EDGE, text) for value, text in beside),
        *(_tick("x", "left", frame.x(value) / _EDGE, text) for value, text in below),
    ]


def _tick(axis_name: str, side: str, share: float, text: str) -> Html:
    place = f"{side}:{share:.4%}"
    return element("span", text, class_=f"tick {axis_name}", style=place, aria_hidden="true")


def _path(class_: str, drawing: str, label: str = "") -> Html:
    return element("path", element("title", label) if label else "", class_=class_, d=drawing)


def _frame(chart: Chart) -> _Frame:
    """Return the ranges that hold every point, with some room around them."""
    points = [point for one in chart.series for point in _finite(one.points)]
    xs, ys = [point.x for point in points] or [0.0], [y for _, y, _ in points if y is not None]
    has_bars = any(one.kind is Kind.BARS for one in chart.series)
    room = _bar_room(xs) if has_bars else 0.0
    left, right = _widened(min(xs) - room, max(xs) + room)
    low, high = min(ys, default=0.0), max(ys, default=0.0)
    if chart.from_zero:
        return _Frame(left, right, 0.0, high * 1.05 if high > 0 else 1.0)
    low, high = _widened(low, high)
    edge = 0.06 * (high - low)
    frame = _Frame(left, right, low - edge, high + edge)
    return _in_proportion(frame) if chart.is_plane else frame


def _widened(low: float, high: float) -> tuple[float, float]:
    """Return a range that is not empty."""
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(low) or 1) / 2)


def _bar_room(xs: Sequence[float]) -> float:
    """Return the half of a bar's width."""
    ordered = sorted(set(xs))
    gaps = [after - before for before, after in pairwise(ordered)]
    span = sum(gaps)
    share = _BAR_SHARE if len(xs) <= _MOST_DOTS else 1.0
    return max(share * min(gaps, default=1.0), _LEAST_BAR / _EDGE * span) / 2


def _in_proportion(frame: _Frame) -> _Frame:
    """Return a wider or a higher range, so that a unit is as long in both directions."""
    width, height = 1.12 * (frame.right - frame.left), frame.high - frame.low
    width, height = max(width, height * _PLANE), max(height, width / _PLANE)
    x, y = (frame.left + frame.right) / 2, (frame.low + frame.high) / 2
    return _Frame(x - width / 2, x + width / 2, y - height / 2, y + height / 2)


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if _is_finite(point)]


def _is_finite(point: Point) -> bool:
    return point.y is not None and math.isfinite(point.x) and math.isfinite(point.y)


def _shapes(one: Series, number: int, frame: _Frame) -> Iterator[Html]:
    """Yield what a series is drawn with; further series have other colours and dashes."""
    points, look = _finite(one.points), _look(number)
    if one.kind is Kind.BARS:
        half = _bar_room([point.x for point in points])
        for point in points:
            left, right, top = frame.x(point.x - half), frame.x(point.x + half), frame.at(point)
            place = {"x": f"{left:.6g}", "y": top.split()[1], "width": f"{right - left:.6g}"}
            height = f"{_EDGE - frame.y(point.y or 0.0):.6g}"
            title = element("title", point.label)
            yield element("rect", title, class_=f"bar {look}", **place, height=height)
        return
    if one.kind is not Kind.DOTS:
        yield _path(f"line {look}", _line(one.points, frame))
    if one.kind is Kind.STEPS or len(points) > _MOST_DOTS:
        return
    yield from (_path(f"dot {look}", f"M{frame.at(point)}h0", point.label) for point in points)


def _line(points: Sequence[Point], frame: _Frame) -> str:
    """Return the path through points, broken where values are missing."""
    parts, is_broken = [], True
    for point in points:
        if not _is_finite(point):
            is_broken = True
            continue
        parts.append(("M" if is_broken else "L") + frame.at(point))
        is_broken = False
    return "".join(parts)


def _look(number: int) -> str:
    """Return the classes of a series: colour and dashes, unlike those of all others up to 32."""
    group, colour = divmod(number, len(COLOURS))
    return f"c{colour} d{(colour + group) % len(DASHES)}"


def _legend(chart: Chart) -> Html:
    entries = []
    for number, one in enumerate(chart.series):
        look, is_dot = _look(number), one.kind is Kind.DOTS
        drawn = _path(f"dot {look}", "M16 6h0") if is_dot else _path(f"line {look}", "M0 6H32")
        swatch = element("svg", drawn, class_="swatch", viewBox="0 0 32 12", aria_hidden="true")
        entries.append(element("li", joined(swatch, one.name)))
    return element("ul", *entries, class_="legend")
