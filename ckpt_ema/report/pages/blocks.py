"""The blocks of a page beside charts: tables, facts, notices, commands."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ckpt_ema.notices import Notice
from ckpt_ema.report.lines import counted
from ckpt_ema.report.pages.html import Html, element, joined

_MOST_ROWS = 24  # that are shown at first
_OLDEST = 8  # of them, before the fold
# Of columns, in digits.
_MARGIN = 1.5
_SHORT_TEXT = 6  # as wide as it is; longer ones are broken into lines
_LEAST_TEXT = 12


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the middle of a long one is folded away on a screen, not on paper."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1  # how many columns are text; the others are numbers
    chosen: frozenset[int] = field(default=frozenset())  # rows that stand out, by index

    def html(self) -> Html:
        """Return it as a table, or as three with a fold between them."""
        numbered = [*enumerate(self.rows)]
        if len(numbered) <= _MOST_ROWS:
            return element("div", self._part(numbered), class_="scroll")
        end = len(numbered) - (_MOST_ROWS - _OLDEST)
        middle = numbered[_OLDEST:end]
        more = element("summary", f"{len(middle)} more rows")
        return element(
            "div",
            self._part(numbered[:_OLDEST]),
            element("details", more, self._part(middle, class_="hidden")),
            self._part(numbered[end:], class_="hidden"),
            class_="scroll",
        )

    def _part(self, rows: Sequence[tuple[int, Sequence[str]]], class_: str | None = None) -> Html:
        """Return some rows as a table, whose columns are as wide as those of the others."""
        widths = [_width(self, column) for column in range(len(self.headings))]
        columns = [element("col", style=width and f"width:{width}ch") for width in widths]
        head = element("thead", element("tr", *self._cells(self.headings, "th")))
        body = [
            element("tr", *self._cells(row, "td"), class_="chosen" if n in self.chosen else None)
            for n, row in rows
        ]
        least = sum(_LEAST_TEXT if width is None else width for width in widths)
        return element(
            "table",
            *(element("colgroup", *columns), head, element("tbody", *body)),
            class_=class_,
            style=f"min-width:{least}ch",
        )

    def _cells(self, cells: Sequence[str], name: str) -> list[Html]:
        return [
            element(name, cell, class_="number" if column >= self.texts else None)
            for column, cell in enumerate(cells)
        ]


def _width(table: Table, column: int) -> float | None:
    """Return the width of a column in digits; None for texts, which share what room there is."""
    cells = [len(row[column]) for row in table.rows]
    longest = max([*map(len, table.headings[column].split()), *cells], default=0)
    return longest + _MARGIN if column >= table.texts or longest <= _SHORT_TEXT else None


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
