"""The picture of an inspection: distances and norms by step, and the path of the run."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckpt_ema.report.columns import fitted
from ckpt_ema.report.figure_style import COLOURS, STYLE, saved, x_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ckpt_ema.measure.inspection import Inspection

_INCHES = (3.4, 6.4)  # the width of a column of a paper
_LONGEST_NAME = 20
_WIDE = 100.0  # the ratio of distances from which their axis is logarithmic

Values = Sequence[float | None]


def draw_inspection(found: "Inspection", kind: str) -> bytes:
    """Return the content of a file of this kind."""
    import matplotlib
    from matplotlib.figure import Figure

    checkpoints = found.checkpoints
    steps = [one.step or 0 for one in checkpoints]
    if found.unit == "checkpoints":
        steps = list(range(1, len(checkpoints) + 1))
    outstanding = [number for number, one in enumerate(checkpoints) if one.stands_out]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_INCHES, layout="constrained")
        distances, norms, path = figure.subplots(3, 1, height_ratios=(2, 1.4, 3))
        lines = {
            "to the checkpoint before": [one.distance_to_previous for one in checkpoints],
            "to the average": [one.distance_to_average for one in checkpoints],
        }
        for (label, values), colour, mark in zip(lines.items(), COLOURS, "os", strict=False):
            _draw_line(distances, steps, values, outstanding, colour, mark, label)
        known = [value for values in lines.values() for value in values if value]
        if known and max(known) > _WIDE * min(known):
            distances.set_yscale("log")
        distances.set_ylabel("distance")
        distances.legend(frameon=False)
        values = [one.norm for one in checkpoints]
        _draw_line(norms, steps, values, outstanding, COLOURS[2], "^", "")
        norms.set_ylabel("norm")
        norms.set_xlabel(x_label(found.unit))
        _draw_path(path, found, outstanding)
        return saved(figure, kind)


def _draw_line(
    axes: "Axes",
    steps: Sequence[int],
    values: Values,
    outstanding: Sequence[int],
    colour: str,
    mark: str,
    label: str,
) -> None:
    """Draw values by step, with a ring around those of checkpoints that stand out."""
    known = [math.nan if value is None else value for value in values]
    axes.plot(steps, known, color=colour, marker=mark, markersize=3, linewidth=1.1, label=label)
    for number in outstanding:
        _ring(axes, steps[number], known[number])
    axes.grid(axis="y", linewidth=0.4, alpha=0.4)


def _draw_path(axes: "Axes", found: "Inspection", outstanding: Sequence[int]) -> None:
    """Draw the run in its plane, from the first checkpoint to the last, and the average."""
    xs, ys = ([point[axis] for point in found.plane] for axis in (0, 1))
    axes.plot(xs, ys, color=COLOURS[0], marker="o", markersize=3, linewidth=0.8)
    star: Any = {"color": COLOURS[1], "marker": "*", "markersize": 8.0, "linestyle": "none"}
    axes.plot(*found.average_at, **star, label="average")
    for end, side in ((0, "left"), (-1, "right")) if found.plane else ():
        name = fitted(found.checkpoints[found.members[end]].name, _LONGEST_NAME)
        axes.annotate(name, (xs[end], ys[end]), (0, 5), textcoords="offset points", ha=side)
    for place, number in enumerate(found.members):
        if number in outstanding:
            _ring(axes, xs[place], ys[place])
    axes.set_aspect("equal", adjustable="datalim")
    first, second = found.explained
    axes.set_xlabel(f"first principal direction ({first:.0%})")
    axes.set_ylabel(f"second ({second:.0%})")
    axes.legend(frameon=False)


def _ring(axes: "Axes", x: float, y: float) -> None:
    axes.plot(x, y, marker="o", markersize=8, markerfacecolor="none", color=COLOURS[1])
