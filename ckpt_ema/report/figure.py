"""The picture of a plan: the weight of each checkpoint, and the equivalent learning rate.

That of an inspection is drawn by `figure_of_inspection`.

It needs matplotlib (`pip install "ckpt-ema[plot]"`), which is imported only to draw.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt_ema.errors import Code, FailedError
from ckpt_ema.options import PathLike
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan
from ckpt_ema.report.figure_style import COLOURS, DASHES, KINDS, MARKS, STYLE, saved, x_label
from ckpt_ema.report.place import check_place
from ckpt_ema.schedules.weights import learning_rate
from ckpt_ema.trainers.conventions import PICTURE_STEM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ckpt_ema.measure.inspection import Inspection

_INCHES = (3.4, 3.6)  # the width of a column of a paper
_LEGEND_INCHES = 0.16  # a line of it
_MOST_MARKS = 20  # on one line


class Picture(NamedTuple):
    """A picture for the model cards."""

    name: str  # of its file there
    content: bytes


def plot(drawn: "Plan | Inspection", path: PathLike) -> Picture:
    """Draw a plan or an inspection as a .png or .svg file, replacing any that exists.

    Of a plan, the upper half shows the weight of each checkpoint for all averages, the lower half
    the learning-rate decay that each average imitates. Of an inspection, distances and norms by
    step, and the run in the plane of its first two principal directions. No tensor is read. Raises
    `OptionError` for another kind of file or a path inside the output or an input, `FailedError`
    without matplotlib or if the file cannot be written.
    """
    target = Path(path)
    check_drawable(target, drawn)
    kind = target.suffix.lower()
    if isinstance(drawn, Plan):
        content = _draw(drawn, kind)
    else:
        from ckpt_ema.report.figure_of_inspection import draw_inspection  # few runs need it

        content = draw_inspection(drawn, kind)
    picture = Picture(PICTURE_STEM + kind, content)
    try:
        target.write_bytes(picture.content)
    except OSError as error:
        message = f"{target} cannot be written: {error.strerror}."
        raise FailedError(message, code=Code.WRITE_FAILED, path=target) from error
    return picture


def check_drawable(path: PathLike, drawn: "Plan | Inspection") -> None:
    """Refuse a picture that could not be drawn, before anything else is done."""
    path = Path(path)
    is_plan = isinstance(drawn, Plan)
    hint = f"Draw it elsewhere{'; the model card gets a copy' * is_plan}."
    outputs = [drawn.output] if isinstance(drawn, Plan) else []
    inside = [*outputs, *(checkpoint.path for checkpoint in drawn.checkpoints)]
    check_place("--plot", path, KINDS, inside, hint)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        message = "--plot needs matplotlib, which is not installed."
        hint = "Run: pip install 'ckpt-ema[plot]'"
        raise FailedError(message, hint, code=Code.MISSING_DEPENDENCY) from error


def _draw(plan: Plan, kind: str) -> bytes:
    """Return the content of a file of this kind."""
    import matplotlib
    from matplotlib.figure import Figure

    averages = plan.averages
    several = len(averages) > 1
    columns = 2 if len(averages) > 3 else 1
    legend_inches = _LEGEND_INCHES * -(-len(averages) // columns) if several else 0.0
    with matplotlib.rc_context(STYLE):
        width, height = _INCHES
        figure = Figure(figsize=(width, height + legend_inches), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        curves = curves_of(averages)
        for number, (steps, weights) in enumerate(curves.lines):
            look = _look(number, averages)
            above.plot(steps, weights, **look)
            rates = learning_rate_steps(steps, weights, curves.start)
            below.plot(*rates, **{**look, "marker": ""})
        _label(above, below, curves.x_label)
        if not several:
            above.set_title(averages[0].text)
        else:
            figure.legend(
                *above.get_legend_handles_labels(),
                loc="outside lower center",
                ncols=columns,
                handlelength=2.6,  # room for a mark and dashes on both sides of it
                frameon=False,
            )
        return saved(figure, kind)


def _look(number: int, averages: Sequence[Average]) -> dict[str, Any]:
    """Return how to draw one average: thicker than those drawn over it, if colours suffice."""
    later = len(averages) - 1 - number if len(averages) <= len(COLOURS) else 0
    group, colour = divmod(number, len(COLOURS))
    return {
        "color": COLOURS[colour],
        "marker": MARKS[colour],
        "linestyle": DASHES[group % len(DASHES)],
        "linewidth": min(1.1 + 0.3 * later, 2.6),
        "markersize": min(3.0 + 0.3 * later, 4.5),
        "markevery": max(1, len(averages[number].members) // _MOST_MARKS),
        "label": averages[number].name,
    }


class Curves(NamedTuple):
    """What is drawn of some averages, over an axis that they share."""

    lines: list[tuple[Sequence[int], Sequence[float]]]  # steps and weights of each
    start: int  # where the axis of the learning rate begins
    x_label: str


def curves_of(averages: Sequence[Average]) -> Curves:
    """Return the weights of averages by step; by checkpoint where their units differ."""
    units = {average.unit for average in averages}
    unit = units.pop() if len(units) == 1 else "checkpoints"
    lines: list[tuple[Sequence[int], Sequence[float]]] = [
        (one.steps if one.unit == unit else [n + 1 for n in one.members], one.weights)
        for one in averages
    ]
    start = min(_start(steps) for steps, _ in lines)
    return Curves(lines, start, x_label(unit))


def _start(steps: Sequence[int]) -> int:
    """Estimate from the first gap where training towards the first checkpoint began."""
    gap = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    return max(steps[0] - gap, 0)


def learning_rate_steps(
    steps: Sequence[int], weights: Sequence[float], start: int
) -> tuple[list[int], list[float]]:
    """Return the corners of the learning-rate decay that an average imitates.

    Updates before the first checkpoint count in full, those after the last one not at all.
    """
    xs, ys = [start], [1.0]
    rates = learning_rate(weights)
    for step, before, after in zip(steps, rates, [*rates[1:], 0.0], strict=True):
        xs += [step, step]
        ys += [before, after]
    return xs, ys


def _label(above: "Axes", below: "Axes", label: str) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for axes in (above, below):
        axes.grid(axis="y", linewidth=0.4, alpha=0.4)
    above.set_ylabel("weight")
    above.set_ylim(bottom=0)
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set_ylabel("equivalent learning rate")
    below.set_ylim(0, 1.05)
    below.set_xlabel(label)
    below.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    # "1.5" and in the corner "1e6": only where the steps would not fit side by side.
    is_long = bool(below.get_xlim()[1] >= 1e6)
    below.ticklabel_format(axis="x", useOffset=is_long, scilimits=(0, 6))
