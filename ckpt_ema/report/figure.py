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
from ckpt_ema.schedules.statistics import learning_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = (".png", ".svg")

_INCHES = (3.4, 4.0)  # the width of a column of a paper
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
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
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

    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_INCHES, layout="constrained", facecolor="white")
        above, below = figure.subplots(2, 1)
        for number, candidate in enumerate(plan.candidates):
            look = {
                "color": _COLOURS[number % len(_COLOURS)],
                "marker": _MARKS[number % len(_MARKS)],
                "linestyle": "-" if number < len(_COLOURS) else "--",
                "label": candidate.name,
            }
            above.plot(candidate.steps, candidate.weights, **look)
            below.plot(*_learning_rate(candidate), **{**look, "marker": ""})
        _label(above, below, plan)
        if len(plan.candidates) > 1:
            columns = 2 if len(plan.candidates) > 3 else 1
            figure.legend(
                *above.get_legend_handles_labels(),
                loc="outside lower center",
                ncols=columns,
                frameon=False,
            )
        metadata = {"Date" if kind == ".svg" else "Software": None}
        figure.savefig(content, format=kind[1:], dpi=_DOTS_PER_INCH, metadata=metadata)
    return content.getvalue()


def _learning_rate(candidate: Candidate) -> tuple[list[int], list[float]]:
    """The corners of the learning-rate decay: what is learnt before a checkpoint counts in full
    until the first one, and not at all after the last."""
    steps, rates = candidate.steps, learning_rate(candidate.weights)
    start = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    corners = [(max(start, 0), 1.0)]
    for before, after in zip([*rates], [*rates[1:], 0.0], strict=True):
        step = steps[len(corners) // 2]
        corners += [(step, before), (step, after)]
    xs, ys = zip(*corners, strict=True)
    return list(xs), list(ys)


def _label(above: "Axes", below: "Axes", plan: Plan) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    units = {candidate.unit for candidate in plan.candidates}
    along = {"steps": "training step", "epochs": "epoch"}.get(units.pop(), "checkpoint")
    for axes in (above, below):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", linewidth=0.4, alpha=0.4)
    above.set_ylabel("weight")
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set_ylabel("learning rate imitated")
    below.set_xlabel(along)
    below.set_ylim(0, 1.05)
