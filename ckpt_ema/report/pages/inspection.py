"""The page of an inspection: the checkpoints of a run beside each other and their average."""

from collections.abc import Callable, Sequence

from ckpt_ema.errors import counted, printable, some
from ckpt_ema.measure.inspection import InspectedCheckpoint, Inspection
from ckpt_ema.report.columns import UNKNOWN
from ckpt_ema.report.figure_style import x_label
from ckpt_ema.report.pages import blocks
from ckpt_ema.report.pages.blocks import Table, section
from ckpt_ema.report.pages.chart import Chart, Kind, Point, Series
from ckpt_ema.report.pages.html import Html, document, element, joined

ValueOf = Callable[[InspectedCheckpoint], float | None]


def inspection_page(inspection: Inspection, command: str | None = None) -> str:
    """Return the page of an inspection, with the `command` that repeats it."""
    run = printable(inspection.run)
    unlike = [one.name for one in inspection.checkpoints if one.stands_out]
    found = f"{some(unlike)} {'stands' if len(unlike) == 1 else 'stand'} out" if unlike else (
        "none stands out"
    )  # fmt: skip
    about = f"{counted(len(inspection.checkpoints), 'checkpoint')}, compared with their average"
    return document(
        f"{run}: inspection",
        element("h1", run),
        element("p", f"{about} ({inspection.schedule}): {found}.", class_="lead"),
        blocks.warnings(inspection.warnings),
        _distances(inspection),
        _norms(inspection),
        _plane(inspection),
        section("Checkpoints", _table(inspection)),
        blocks.notes(inspection.notes),
        section("Repeat it", blocks.code(command)) if command else "",
    )


def _distances(inspection: Inspection) -> Html:
    names = ("to the checkpoint before", "to the average")
    of_each: tuple[ValueOf, ...] = (
        lambda one: one.distance_to_previous,
        lambda one: one.distance_to_average,
    )
    drawn = [
        Series(name, _points(inspection, value_of))
        for name, value_of in zip(names, of_each, strict=True)
    ]
    text = "A spike to the checkpoint before marks a jump, or a checkpoint of another run."
    label, marked = _label(inspection), _marked(inspection, drawn)
    about = f"The distances of {counted(len(inspection.checkpoints), 'checkpoint')}."
    chart = Chart("Euclidean distance", about, label, drawn, marked=marked)
    return section("Distances", element("p", text), chart.html())


def _norms(inspection: Inspection) -> Html:
    drawn = [Series("norm", _points(inspection, lambda one: one.norm))]
    label, marked = _label(inspection), _marked(inspection, drawn)
    about = f"The norms of {counted(len(inspection.checkpoints), 'checkpoint')}."
    chart = Chart("Euclidean norm", about, label, drawn, from_zero=False, marked=marked)
    return section("Norms", chart.html())


def _plane(inspection: Inspection) -> Html:
    if not inspection.plane:
        return joined()
    members = [inspection.checkpoints[number] for number in inspection.members]
    placed = [*zip(members, inspection.plane, strict=True)]
    points = [Point(x, y, one.name) for one, (x, y) in placed]
    marked = [Point(x, y, one.name) for one, (x, y) in placed if one.stands_out]
    first, second = inspection.explained
    label = f"first principal direction ({first:.1%} of the variance)"
    about = (
        f"The run in the plane of its two principal directions, which explain {first:.1%} and"
        f" {second:.1%} of the variance."
    )
    path = [
        Series("run", points),
        Series("oldest", points[:1], Kind.DOTS),
        Series("newest", points[-1:], Kind.DOTS),
        Series("average", [Point(*inspection.average_at, "average")], Kind.DOTS),
    ]
    chart = Chart(
        f"Second principal direction ({second:.1%} of the variance)",
        *(about, label, path),
        from_zero=False,
        is_plane=True,
        marked=marked,
    )
    rows = [[point.label, f"{point.x:.4g}", f"{point.y:.4g}"] for point in points]
    table = Table(["checkpoint", "first", "second"], rows)
    return section("Path of the run", chart.html(), blocks.folded("The values", table.html()))


def _table(inspection: Inspection) -> Html:
    headings = ["checkpoint", "step", "norm", "to previous", "to average"]
    headings += ["zeros", "NaN or inf", "z-score"]
    rows = [
        [
            printable(one.name),
            _shown(one.step, ""),
            *(_shown(value, "#.4g") for value in _figures(one)),
            _shown(one.zeros_share, ".2%"),
            _shown(one.nonfinite, ""),
            _shown(one.z_score, ".1f"),
        ]
        for one in inspection.checkpoints
    ]
    unlike = frozenset(n for n, one in enumerate(inspection.checkpoints) if one.stands_out)
    return Table(headings, rows, chosen=unlike).html()


def _figures(one: InspectedCheckpoint) -> tuple[float | None, ...]:
    return one.norm, one.distance_to_previous, one.distance_to_average


def _shown(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form).rstrip(".")


def _points(inspection: Inspection, value_of: ValueOf) -> list[Point]:
    found = []
    for one, step in zip(inspection.checkpoints, _steps(inspection), strict=True):
        value = value_of(one)
        found.append(Point(step, value, "" if value is None else f"{one.name}: {value:.4g}"))
    return found


def _steps(inspection: Inspection) -> list[int]:
    """Return where checkpoints are on the axis: by their place, unless all steps are known."""
    steps = [one.step for one in inspection.checkpoints if one.step is not None]
    places = range(1, len(inspection.checkpoints) + 1)
    return steps if _has_steps(inspection) else [*places]


def _has_steps(inspection: Inspection) -> bool:
    is_known = all(one.step is not None for one in inspection.checkpoints)
    return is_known and inspection.unit != "checkpoints"


def _label(inspection: Inspection) -> str:
    return x_label(inspection.unit if _has_steps(inspection) else "checkpoints")


def _marked(inspection: Inspection, drawn: Sequence[Series]) -> list[Point]:
    """Return the points of the checkpoints that stand out."""
    both = (zip(inspection.checkpoints, one.points, strict=True) for one in drawn)
    return [point for pairs in both for one, point in pairs if one.stands_out]
