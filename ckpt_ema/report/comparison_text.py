"""A comparison for people: what differs, the farthest first."""

from collections.abc import Iterator, Sequence
from typing import TextIO

from ckpt_ema.errors import counted, printable, some
from ckpt_ema.measure.compared import Comparison, Distance, OtherForm
from ckpt_ema.report.columns import BETWEEN, UNKNOWN, aligned, number, shown_on
from ckpt_ema.report.lines import size

_HEADINGS = ("relative", "cosine", "largest")
_MOST_NAMES = 5  # of what only one has


def comparison_text(found: Comparison, stream: TextIO | None, most_rows: int) -> str:
    """Return a comparison as text for `stream` (None: a closed one).

    Both tables, of groups and of tensors, have at most `most_rows` rows.
    """
    return shown_on(stream, _lines(found, most_rows))


def _lines(found: Comparison, most_rows: int) -> Iterator[str]:
    yield f"a: {printable(found.a)}"
    yield f"b: {printable(found.b)}"
    groups = [
        (one.pattern, f"{one.tensors - one.equal_tensors} of {one.tensors}", one.distance)
        for one in found.groups
        if one.equal_tensors < one.tensors
    ]
    tensors = [
        (one.name, _count(one.different_elements), one.distance)
        for one in found.tensors
        if not one.is_equal
    ]
    if len(found.groups) < len(found.tensors):
        yield from _table("group", "tensors", groups, most_rows)
    yield from _table("tensor", "elements", tensors, most_rows)
    yield ""
    yield from _summary(found)


def _table(
    what: str, counted_in: str, rows: Sequence[tuple[str, str, Distance]], most_rows: int
) -> Iterator[str]:
    """Yield the rows of what differs; names come last, where they may be as long as they are."""
    if not rows:
        return
    shown = rows[:most_rows]
    numbers = [("", *_cells(distance), count) for _, count, distance in shown]
    names = [what, *(printable(name) for name, _, _ in shown)]
    yield ""
    for line, name in zip(aligned([("", *_HEADINGS, counted_in), *numbers]), names, strict=True):
        yield f"{line[BETWEEN:]}  {name}"
    if len(rows) > most_rows:
        yield f"  ... {len(rows) - most_rows} more"


def _summary(found: Comparison) -> Iterator[str]:
    if found.is_equal:
        yield f"equal: {counted(len(found.tensors), 'tensor')}, every bit the same"
    else:
        different = len(found.tensors) - found.equal_tensors
        yield f"{counted(different, 'tensor')} different, {found.equal_tensors} equal"
    for side, names in (("a", found.only_in_a), ("b", found.only_in_b)):
        if names:
            yield f"only in {side}: {some(names, _MOST_NAMES)}"
    for what, others in (("shape", found.other_shape), ("dtype", found.other_dtype)):
        if others:
            yield f"other {what}: {some(map(_form, others), _MOST_NAMES)}"
    relative, cosine, largest = _cells(found.distance)
    if found.distance.relative_distance is not None and not found.is_equal:
        yield f"relative distance {relative}, cosine {cosine}, largest difference {largest}"
    speed = size(found.bytes_read / max(found.seconds, 1e-9))
    yield f"read {size(found.bytes_read)} in {found.seconds:.2f} s ({speed}/s)"


def _form(one: OtherForm) -> str:
    return f"{one.name} ({one.a}, {one.b})"


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else str(value)


def _cells(one: Distance) -> tuple[str, str, str]:
    cosine = UNKNOWN if one.cosine is None else f"{one.cosine:.8f}"
    return number(one.relative_distance), cosine, number(one.max_abs_difference)
