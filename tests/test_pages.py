"""The kit of the pages: nothing in a name is markup, and charts show the values that they have."""

import math
import re
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_ema.errors import Code
from ckpt_ema.notices import Notice
from ckpt_ema.output.selected import Candidate, SoupStep
from ckpt_ema.report.figure_style import COLOURS
from ckpt_ema.report.pages import axis, blocks
from ckpt_ema.report.pages.blocks import Table
from ckpt_ema.report.pages.chart import Chart, Kind, Point, Series
from ckpt_ema.report.pages.html import document, element
from ckpt_ema.report.pages.inspection import inspection_page
from ckpt_ema.report.pages.selection import selection_page
from tests.makers.pages import (
    HOSTILE,
    made_up_inspection,
    made_up_selection,
    selection_of,
)
from tests.makers.parsed_page import ParsedPage, check_harmless

SHOWN = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")

# --- Markup ---------------------------------------------------------------------------------------


@given(st.text())
def test_no_text_is_markup(text: str) -> None:
    page = document(text, element("p", text, title=text), blocks.code(text))
    parsed = check_harmless(page)
    tags = [tag for tag, _ in parsed.elements]
    assert tags == [
        *("html", "head", "meta", "meta", "meta", "meta", "meta", "link", "title", "style"),
        *("body", "main", "p", "pre", "code", "footer"),
    ]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    assert parsed.attributes("p")[0]["title"] == shown
    assert "".join(parsed.texts).count(shown) >= (3 if shown else 0)


def test_names_that_are_no_text_are_shown_escaped() -> None:
    assert element("p", b"\xff".decode(errors="surrogateescape")) == "<p>\\udcff</p>"


# --- Axes -----------------------------------------------------------------------------------------

THOUSANDTHS = st.integers(-(10**8), 10**8)


@given(THOUSANDTHS, st.integers(1, 10**8), st.integers(1, 6), st.booleans())
def test_ticks_are_the_multiples_of_the_smallest_round_step_of_which_few_fit(
    low: int, span: int, most: int, whole: bool
) -> None:
    """In exact numbers, but for what floats cannot tell apart."""
    found = axis.ticks(low / 1000, (low + span) / 1000, most, whole=whole)
    close = Fraction(1, 10**6)
    steps = (Fraction(10) ** k * f for k in range(-8, 12) for f in (1, 2, 5))
    least = Fraction(span, 1000 * most) / (1 + close)
    step = next(one for one in steps if one >= least and (one >= 1 or not whole))
    first = math.ceil(Fraction(low, 1000) / step - close)
    last = math.floor(Fraction(low + span, 1000) / step + close)
    assert found == [float(step * n) for n in range(first, last + 1)]
    assert len(found) <= most + 1


def test_an_empty_range_has_one_tick() -> None:
    assert axis.ticks(3, 3) == [3]


@given(st.integers(0, 10**12), st.integers(1, 10**12))
def test_labels_below_a_chart_are_exact_and_fit_on_a_phone(low: int, span: int) -> None:
    found = axis.labelled(low, low + span, axis.counts)
    factors = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    for value, label in found:
        number = label.rstrip("kMGT")
        assert Fraction(number) * factors[label[len(number) :]] == Fraction(value)
    assert sum(len(label) for _, label in found) <= 30


@given(st.floats(1e-5, 1.0))
def test_percentages_beside_a_chart_are_exact(high: float) -> None:
    values = axis.ticks(0, high, 4)
    for value, label in zip(values, axis.shares(values), strict=True):
        assert float(label.removesuffix("%")) / 100 == pytest.approx(value, abs=1e-12)


# --- Charts ---------------------------------------------------------------------------------------


def drawn(chart: Chart) -> ParsedPage:
    return ParsedPage(chart.html())


def placed(drawing: str | None) -> list[tuple[float, float]]:
    """The points of a path, in thousandths of the chart."""
    pairs = re.findall(r"[ML]([-\d.e]+) ([-\d.e]+)", drawing or "")
    return [(float(x), float(y)) for x, y in pairs]


def test_bars_are_as_high_as_their_values() -> None:
    """Two bars over an axis that ends a twentieth above the higher one."""
    points = [Point(10, 0.5, "a"), Point(20, 0.25, "b")]
    chart = Chart("t", "about", "x", [Series("s", points, Kind.BARS)], axis.shares)
    first, second = drawn(chart).attributes("rect")
    assert float(first["height"] or 0) == pytest.approx(1000 / 1.05, rel=1e-4)
    assert float(second["height"] or 0) == pytest.approx(500 / 1.05, rel=1e-4)
    for bar in (first, second):  # they stand on the axis
        assert float(bar["y"] or 0) + float(bar["height"] or 0) == pytest.approx(1000, abs=0.01)
    # Bars are 7 wide in steps of 10, so the axis is 17 wide.
    assert (float(first["x"] or 0), float(first["width"] or 0)) == pytest.approx(
        (0, 7000 / 17), abs=0.01
    )


FINITE = st.floats(-1e6, 1e6).map(lambda x: round(x, 2))


@given(st.lists(st.tuples(FINITE, FINITE), min_size=2, max_size=20), st.booleans())
def test_a_line_goes_through_its_points(pairs: list[tuple[float, float]], is_plane: bool) -> None:
    points = [Point(x, y) for x, y in pairs]
    chart = Chart("t", "a", "x", [Series("s", points)], from_zero=False, is_plane=is_plane)
    found = placed(drawn(chart).attributes("path")[-len(points) - 1]["d"])
    assert len(found) == len(points)
    assert all(-1e-6 <= place <= 1000 + 1e-6 for pair in found for place in pair)
    scales = []
    for number, sign in ((0, 1), (1, -1)):  # y grows downwards
        values, places = [one[number] for one in pairs], [sign * one[number] for one in found]
        span, drawn_span = max(values) - min(values), max(places) - min(places)
        scale = drawn_span / span if span else 0.0
        for value, place in zip(values, places, strict=True):
            assert place - min(places) == pytest.approx((value - min(values)) * scale, abs=0.02)
        scales += [scale] if drawn_span > 50 else []
    if is_plane and len(scales) == 2:
        assert scales[1] / scales[0] == pytest.approx(1.5, rel=0.001)  # in a frame of 3 by 2


def test_what_is_missing_or_not_finite_leaves_a_gap() -> None:
    ys = [1.0, None, 2.0, 3.0, math.nan, math.inf, 4.0]
    points = [Point(x, y) for x, y in enumerate(ys)]
    parsed = drawn(Chart("t", "a", "x", [Series("s", points)]))
    [line] = [one["d"] for one in parsed.attributes("path") if one["class"] == "line c0 d0"]
    assert re.sub(r"[^ML]", "", line or "") == "MMLM"
    assert len([one for one in parsed.attributes("path") if one["class"] == "dot c0 d0"]) == 4


@pytest.mark.parametrize(
    "points",
    [
        *([], [Point(5, None)], [Point(5, 0.0)], [Point(0, -3.0)], [Point(math.nan, 1.0)]),
        [Point(0.2, 0.1), Point(0.7, 0.3)],  # with no whole number to label
    ],
)
def test_a_chart_of_next_to_nothing_is_drawn(points: list[Point]) -> None:
    for kind in (Kind.LINE, Kind.BARS):
        chart = Chart("t", "a", "x", [Series("s", points, kind)], marked=points)
        free = replace(chart, from_zero=False)
        for one in (chart, free, replace(free, is_plane=True)):
            assert "nan" not in one.html()


def test_many_lines_look_different_and_have_a_legend() -> None:
    series = [Series(f"line {n} {HOSTILE}", [Point(0, n), Point(1, n)]) for n in range(32)]
    parsed = drawn(Chart("t", "a", "x", series))
    looks = [one["class"] for one in parsed.attributes("path") if "line" in (one["class"] or "")]
    assert len(set(looks[:32])) == 32
    assert looks[:32] == looks[32:]  # of the legend
    assert f"line 31 {SHOWN}" in parsed.text
    assert {f"c{n}" for n in range(len(COLOURS))} == {(look or "").split()[1] for look in looks}


def test_many_points_are_a_line_without_dots() -> None:
    points = [Point(n, n) for n in range(500)]
    parsed = drawn(Chart("t", "a", "x", [Series("s", points)]))
    assert not [one for one in parsed.attributes("path") if "dot" in (one["class"] or "")]


def test_who_does_not_see_a_chart_is_told_what_it_shows() -> None:
    chart = Chart("Weights", "They rise.", "step", [Series("s", [Point(1, 2), Point(2, 3)])])
    parsed = drawn(chart)
    [plot] = parsed.attributes("svg")
    assert (plot["role"], plot["aria-label"]) == ("img", "Weights. They rise.")
    assert {"title", "desc"} <= {tag for tag, _ in parsed.elements}
    assert all(one["aria-hidden"] == "true" for one in parsed.attributes("span"))


# --- Tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "tables"), [(0, 1), (24, 1), (25, 3), (500, 3)])
def test_the_middle_of_a_long_table_is_folded_but_there(count: int, tables: int) -> None:
    rows = [[f"name {n}", f"{n}"] for n in range(count)]
    parsed = ParsedPage(Table(["checkpoint", "step"], rows).html())
    assert len(parsed.tables) == tables
    assert all(table[0] == ["checkpoint", "step"] for table in parsed.tables)
    assert [row for table in parsed.tables for row in table[1:]] == rows
    shown = sum(len(table) - 1 for n, table in enumerate(parsed.tables) if n != 1 or tables == 1)
    assert shown == min(count, 24)
    widths = [one.get("style") for one in parsed.attributes("col")]
    assert widths == widths[:2] * tables


def test_a_table_too_wide_for_paper_is_several() -> None:
    headings = ["checkpoint", *(f"({n})" for n in range(40))]
    rows = [[f"name {row}", *(f"{row}.{n:03}%" for n in range(40))] for row in range(3)]
    parsed = ParsedPage(Table(headings, rows, chosen=frozenset([1])).html())
    assert len(parsed.tables) > 3
    for number, line in enumerate([headings, *rows]):
        parts = [table[number] for table in parsed.tables]
        assert {part[0] for part in parts} == {line[0]}
        assert [cell for part in parts for cell in part[1:]] == line[1:]
    assert len([one for one in parsed.attributes("tr") if one.get("class")]) == len(parsed.tables)
    for one in parsed.attributes("table"):
        assert float((one["style"] or "").removeprefix("min-width:").removesuffix("ch")) <= 86


# --- Inspections and selections -------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 500])
def test_an_inspection_has_every_checkpoint(count: int) -> None:
    inspection = made_up_inspection(count)
    parsed = check_harmless(inspection_page(inspection, f"ckpt-ema inspect '{HOSTILE}'"))
    listed = [row for table in parsed.tables for row in table if len(row) == 8]
    names = [row[0] for row in listed if row[0] != "checkpoint"]
    assert names == [one.name.replace(HOSTILE, SHOWN) for one in inspection.checkpoints]
    odd = inspection.checkpoints[count // 2].name.replace(HOSTILE, SHOWN)
    assert f"{odd} stands out." in parsed.text
    for part in (f"w of {SHOWN} has zeros.", f"{SHOWN} was decided.", f"inspect '{SHOWN}'"):
        assert part in parsed.text
    assert "first principal direction (81.0% of the variance)" in parsed.text


def test_an_inspection_shows_figures_and_marks_what_stands_out() -> None:
    parsed = ParsedPage(inspection_page(made_up_inspection(3)))
    row = next(row for row in parsed.tables[-1] if row[0] == "checkpoint-1000")
    assert row == ["checkpoint-1000", "1000", "-", "29.00", "58.00", "0.10%", "3", "4.2"]
    assert len([one for one in parsed.attributes("tr") if one.get("class") == "chosen"]) == 1
    # Of both distances and the plane; its norm is not finite.
    assert len([one for one in parsed.attributes("path") if one["class"] == "ring"]) == 3


def test_an_inspection_can_know_little() -> None:
    inspection = made_up_inspection(3)
    bare = [replace(one, step=None, norm=None, z_score=None) for one in inspection.checkpoints]
    calm = tuple(replace(one, reason=None, distance_to_average=None) for one in bare)
    little = replace(inspection, checkpoints=calm, members=(), plane=(), warnings=(), notes=())
    parsed = ParsedPage(inspection_page(little))
    assert "training step" not in parsed.text
    assert "none stands out" in parsed.text
    assert "principal direction" not in parsed.text
    assert not [one for one in parsed.attributes("div") if one.get("class") == "alert"]
    row = next(row for row in parsed.tables[-1] if row[0] == "checkpoint-1000")
    assert row == ["checkpoint-1000", "-", "-", "29.00", "-", "0.10%", "3", "-"]


def test_a_selection_has_every_candidate_and_marks_the_best() -> None:
    selection = made_up_selection(5)
    parsed = check_harmless(selection_page(selection, "ckpt-ema select runs/"))
    assert "The best of 7 candidates by eval_loss (lower is better): 1.86." in parsed.text
    assert parsed.tables[0] == [
        ["", "candidate", "eval_loss", "accuracy"],
        ["1", SHOWN, "-", "-"],
        ["2", "half-life-100", "1.864", "0.5"],
        ["3", "half-life-200", "1.861", "0.5"],
        ["4", "half-life-300", "1.860", "0.5"],
        ["5", "half-life-400", "1.861", "0.5"],
        ["6", "half-life-500", "1.864", "0.5"],
        ["7", "soup", "1.859", "-"],
    ]
    assert f"1 candidate without metrics {SHOWN}: the command failed: {SHOWN}" in parsed.text
    assert parsed.tables[1][1] == ["1", "checkpoint-500", "12.50%"]
    assert parsed.tables[2][1] == ["checkpoint-500", "-", *["12.50%"] * 5, "50.00%"]
    assert "ckpt-ema select runs/" in parsed.text


def test_a_selection_shows_the_steps_of_its_soup_and_warnings() -> None:
    steps = (SoupStep(HOSTILE, 1.9, None, True), SoupStep("checkpoint-500", 2.0, 1.95, False))
    warnings = (Notice(Code.ZEROS, f"{HOSTILE} has zeros."),)
    selection = replace(made_up_selection(2), steps=steps, warnings=warnings)
    parsed = check_harmless(selection_page(selection))
    assert [SHOWN, "1.9", "-", "kept"] in parsed.tables[-1]
    assert ["checkpoint-500", "2.0", "1.95", "not kept"] in parsed.tables[-1]
    assert f"{SHOWN} has zeros." in parsed.text


def test_a_selection_without_failures_has_no_box_and_can_be_of_one() -> None:
    one = Candidate("uniform", "", {"checkpoint-1": 1.0}, {"accuracy": 0.75})
    parsed = ParsedPage(selection_page(selection_of("accuracy", False, "uniform", [one])))
    assert "Averaging does not help here." in parsed.text
    assert "The best of 1 candidate by accuracy (higher is better): 0.75." in parsed.text
    assert not [one for one in parsed.attributes("div") if one.get("class") == "alert"]
    assert "Repeat it" not in parsed.text
