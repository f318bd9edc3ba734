"""Columns of text that fit a terminal, for people."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TextIO

UNKNOWN = "-"
BETWEEN = 2  # spaces before each column
_LEAST_COLUMNS = 40  # with less, nothing could be read
_BOLD, _CYAN = 1, 36


class Look(NamedTuple):
    """What can be shown."""

    width: int
    has_blocks: bool
    has_styles: bool
    has_colours: bool

    def bold(self, text: str) -> str:
        """Return a heading."""
        return f"\x1b[{_BOLD}m{text}\x1b[0m" if self.has_styles else text

    def cyan(self, text: str) -> str:
        """Return a bar."""
        return f"\x1b[{_CYAN}m{text}\x1b[0m" if self.has_colours and text else text


def look_at(stream: TextIO | None) -> Look:
    """Return what a stream can show; None is a closed one."""
    is_terminal = stream is not None and stream.isatty()
    has_styles = is_terminal and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    has_colours = has_styles and not os.environ.get("NO_COLOR")
    fallback = os.terminal_size((80, 24))
    with contextlib.suppress(OSError, AttributeError):
        fallback = os.get_terminal_size(stream.fileno())  # type: ignore[union-attr]
    width = max(_LEAST_COLUMNS, shutil.get_terminal_size(fallback).columns)
    return Look(width, _encoding(stream).lower().startswith("utf"), has_styles, has_colours)


def shown_on(stream: TextIO | None, lines: Iterable[str]) -> str:
    """Return lines as one text; what the stream has no letters for is escaped."""
    encoding = _encoding(stream)
    return "\n".join(lines).encode(encoding, "backslashreplace").decode(encoding)


def _encoding(stream: TextIO | None) -> str:
    return (stream and stream.encoding) or "ascii"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row; only the first column is aligned to the left."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        room = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + room[0], *map(str.__add__, room[1:], row[1:])]
        lines.append("".join(" " * BETWEEN + cell for cell in cells))
    return lines


def _width(text: str) -> int:
    """Return the display width of a text; East Asian wide characters count twice."""
    if text.isascii():
        return len(text)
    from unicodedata import east_asian_width

    return len(text) + sum(east_asian_width(character) in "WF" for character in text)


def fitted(name: str, columns: int) -> str:
    """Shorten a name in the middle, since its ends hold the numbers.

    >>> fitted("a-very-long-name-000100", 16)
    'a-very...-000100'
    """
    end = (columns - 2) // 2
    is_long = len(name) > columns
    return f"{name[: columns - 3 - end]}...{name[-end:]}" if is_long else name


def number(value: float | None) -> str:
    """Return a number in four digits.

    >>> number(11.6), number(0.00012345), number(1234567.0), number(None)
    ('11.60', '0.0001234', '1.235e+06', '-')
    """
    return UNKNOWN if value is None else f"{value:#.4g}"
