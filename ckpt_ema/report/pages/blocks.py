"""The blocks of a page beside charts: tables, facts, notices, commands."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckpt_ema.errors import counted
from ckpt_ema.notices import Notice
from ckpt_ema.report.pages.html import Html, element, joined

_MOST_ROWS = 24  # that are shown at first
_OLDEST = 8  # of them, before the fold
# Of columns, in digits.
_MARGIN = 1.5
_SHORT_TEXT = 6  # as wide as it is; longer ones are broken into lines
_LEAST_TEXT = 10
_MOST_WIDTH = 86  # of a table on paper


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the middle of a long one is folded away on a screen, not on paper."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1  # how many columns are text; the others are numbers
    chosen: frozenset[int] = frozenset()  # rows that stand out, by index

    def html(self) -> Html:
        """Return it as one table, or as several below each other if it is too wide for paper."""
        widths = [_width(self, column) for column in range(len(self.headings))]
        return joined(*(_folded_table(self, part) for part in _parts(self, widths)))


# Columns by index, with their widths in digits; None for texts, which share what room there is.
_Columns = dict[int, float | None]


def _width(table: Table, column: int) -> float | None:
    cells = [len(row[column]) for row in table.rows]
    longest = max([*map(len, table.headings[column].split()), *cells], default=0)
    return longest + _MARGIN if column >= table.texts or longest <= _SHORT_TEXT else None


def _least_width(columns: _Columns) -> float:
    return sum(width or _LEAST_TEXT for width in columns.values())


def _parts(table: Table, widths: Sequence[float | None]) -> list[_Columns]:
    """Return columns that fit on paper together; texts are in each part."""
    texts: _Columns = dict(enumerate(widths[: table.texts]))
    parts = [{**texts}]
    for column, width in enumerate(widths[table.texts :], start=table.texts):
        wider = {**parts[-1], column: width}
        if len(parts[-1]) > len(texts) and _least_width(wider) > _MOST_WIDTH:
            parts.append({**texts, column: width})
        else:
            parts[-1] = wider
    return parts


def _folded_table(table: Table, columns: _Columns) -> Html:
    """Return some columns as a table, or as three with a fold between them."""
    count = len(table.rows)
    if count <= _MOST_ROWS:
        return element("div", _rows(table, columns, range(count)), class_="scroll")
    end = count - (_MOST_ROWS - _OLDEST)
    more = element("summary", f"{end - _OLDEST} more rows")
    return element(
        "div",
        _rows(table, columns, range(_OLDEST)),
        element("details", more, _rows(table, columns, range(_OLDEST, end), class_="hidden")),
        _rows(table, columns, range(end, count), class_="hidden"),
        class_="scroll",
    )


def _rows(table: Table, columns: _Columns, rows: range, class_: str | None = None) -> Html:
    """Return some rows as a table, whose columns are as wide as those of the other rows."""

    def line(cells: Sequence[str], name: str, **attributes: object) -> Html:
        shown = [
            element(name, cells[one], class_="number" if one >= table.texts else None)
            for one in columns
        ]
        return element("tr", *shown, **attributes)

    styles = [width and f"width:{width}ch" for width in columns.values()]
    chosen = dict.fromkeys(table.chosen, "chosen")
    return element(
        "table",
        element("colgroup", *(element("col", style=style) for style in styles)),
        element("thead", line(table.headings, "th")),
        element("tbody", *(line(table.rows[n], "td", class_=chosen.get(n)) for n in rows)),
        class_=class_,
        style=f"min-width:{_least_width(columns)}ch",
    )


def section(title: str, *content: object) -> Html:
    """Return a part of the page with its own heading."""
    return element("section", element("h2", title), *content)


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Return names with their values."""
    groups = [element("div", element("dt", name), element("dd", value)) for name, value in pairs]
    return element("dl", *groups)


def warnings(found: Sequence[Notice]) -> Html:
    """Return warnings in a box that is not overlooked, or nothing."""
    if not found:
        return joined()
    title = element("h2", counted(len(found), "warning"))
    return element("div", title, _listed(found), class_="alert", role="note")


def notes(found: Sequence[Notice]) -> Html:
    """Return notes, folded away on a screen; nothing if there are none."""
    return folded(counted(len(found), "note"), _listed(found)) if found else joined()


def _listed(found: Sequence[Notice]) -> Html:
    return element("ul", *(element("li", notice) for notice in found))


def folded(title: str, *content: object) -> Html:
    """Return something that is folded away on a screen, and shown on paper."""
    return element("details", element("summary", title), *content)


def code(*lines: str) -> Html:
    """Return lines to copy; one click selects all of them."""
    return element("pre", element("code", Html("\n".join(joined(line) for line in lines))))
