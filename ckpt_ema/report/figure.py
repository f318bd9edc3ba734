"""The picture of a plan: the weight of each checkpoint, and the learning rate that it imitates.

It needs matplotlib (`pip install "ckpt-ema[plot]"`), which is imported only to draw.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt_ema.errors import FailedError, OptionError, printable
from ckpt_ema.options import PathLike
from ckpt_ema.planning.candidates import Candidate
from ckpt_ema.planning.plan import Plan
from ckpt_ema.schedules.shares import learning_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = (".png", ".svg")

_INCHES = (3.4, 3.6)  # the width of a column of a paper
_LEGEND_INCHES = 0.16  # a line of it
_MOST_MARKS = 20  # on one line
_DOTS_PER_INCH = 220
# The colours of Okabe and Ito, which people with any vision tell apart; marks tell them in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKS = "os^Dv<>p"
_STYLE: Any = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "figure.facecolor": "white",  # also where the viewer is dark
    "svg.hashsalt": "ckpt-ema",  # the same picture for the same plan
    "svg.fonttype": "none",
}


class Picture(NamedTuple):
    """A picture for the model cards."""

    name: str  # of its file there
    content: bytes


def plot(plan: Plan, path: PathLike) -> Picture:
    """Draw a plan as a .png or .svg file, which is replaced if it exists; no tensor is read.

    Above the weight of each checkpoint for all candidates, below the learning-rate decay that each
    average imitates. Raises `OptionError` for another kind of file, `FailedError` without
    matplotlib or if the file cannot be written.
    """
    target = Path(path)
    _check_drawable(target)
    picture = Picture(f"ckpt_ema{target.suffix.lower()}", _draw(plan, target.suffix.lower()))
    try:
        target.write_bytes(picture.content)
    except OSError as error:
        raise FailedError(f"{printable(target)} cannot be written: {error.strerror}.") from error
    return picture


def _check_drawable(path: Path) -> None:
    """Refuse a picture that could not be drawn, before anything else is done.

    Raises `OptionError` for a kind of file that is not drawn, `FailedError` without matplotlib.
    """
    if path.suffix.lower() not in _KINDS:
        raise OptionError(f"--plot {printable(path)}: pictures are {' and '.join(_KINDS)}.")
    if not path.parent.is_dir():
        raise OptionError(f"--plot {printable(path)}: its folder does not exist.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise FailedError(
            "--plot needs matplotlib, which is not installed.", "pip install 'ckpt-ema[plot]'"
        ) from error


def _draw(plan: Plan, kind: str) -> bytes:
    """The picture as the content of a file of this kind."""
    import matplotlib
    from matplotlib.figure import Figure

    candidates, content = plan.candidates, io.BytesIO()
    several = len(candidates) > 1
    columns = 2 if len(candidates) > 3 else 1
    legend_inches = _LEGEND_INCHES * -(-len(candidates) // columns) if several else 0.0
    with matplotlib.rc_context(_STYLE):
        width, height = _INCHES
        figure = Figure(figsize=(width, height + legend_inches), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        start = min(_start(candidate) for candidate in candidates)
        for number, candidate in enumerate(candidates):
            look = _look(number, candidate, later=len(candidates) - 1 - number)
            above.plot(candidate.steps, candidate.weights, **look)
            below.plot(*_learning_rate(candidate, start), **{**look, "marker": ""})
        _label(above, below, plan)
        if several:
            figure.legend(
                *above.get_legend_handles_labels(),
                loc="outside lower center",
                ncols=columns,
                frameon=False,
            )
        metadata = {"Date" if kind == ".svg" else "Software": None}
        figure.savefig(content, format=kind[1:], dpi=_DOTS_PER_INCH, metadata=metadata)
    return content.getvalue()


def _look(number: int, candidate: Candidate, later: int) -> dict[str, Any]:
    """How one average is drawn: the thicker the more are drawn above it, so that none is hidden."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKS[number % len(_MARKS)],
        "linestyle": "-" if number < len(_COLOURS) else "--",
        "linewidth": min(1.1 + 0.3 * later, 2.6),
        "markersize": min(3.0 + 0.3 * later, 4.5),
        "markevery": max(1, len(candidate.steps) // _MOST_MARKS),
        "label": candidate.name,
    }


def _start(candidate: Candidate) -> int:
    """Where the training towards the first checkpoint began, as far as gaps tell."""
    first = candidate.steps[0]
    gap = candidate.steps[1] - first if len(candidate.steps) > 1 else 1
    return max(first - gap, 0)


def _learning_rate(candidate: Candidate, start: int) -> tuple[list[int], list[float]]:
    """The corners of the learning-rate decay that an average imitates.

    What is learnt until the first checkpoint counts in full, after the last one nothing does.
    """
    xs, ys = [start], [1.0]
    rates = learning_rate(candidate.weights)
    for step, before, after in zip(candidate.steps, rates, [*rates[1:], 0.0], strict=True):
        xs += [step, step]
        ys += [before, after]
    return xs, ys


def _label(above: "Axes", below: "Axes", plan: Plan) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    units = {candidate.unit for candidate in plan.candidates}
    along = {"steps": "training step", "epochs": "epoch"}.get(units.pop(), "checkpoint")
    for axes in (above, below):
        axes.grid(axis="y", linewidth=0.4, alpha=0.4)
    above.set_ylabel("weight")
    above.set_ylim(bottom=0)
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set_ylabel("learning rate imitated")
    below.set_ylim(0, 1.05)
    below.set_xlabel(along)
    below.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    below.xaxis.set_major_formatter(EngFormatter(sep=""))
