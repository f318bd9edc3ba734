"""An inspection for people: a row for each checkpoint, and what stands out."""

from collections.abc import Iterator
from typing import TextIO

from ckpt_ema.errors import counted, printable
from ckpt_ema.measure.inspection import InspectedCheckpoint, Inspection
from ckpt_ema.report.columns import UNKNOWN, aligned, fitted, look_at, number, shown_on
from ckpt_ema.report.lines import size

_SHORTEST_NAME, _LONGEST_NAME = 12, 30
_OTHER_COLUMNS = 62  # beside the name
_HEADINGS = ("step", "norm", "to previous", "to average", "zeros", "non-finite", "z")
_MARK = "*"  # of what stands out


def inspection_text(found: Inspection, stream: TextIO | None, most_rows: int) -> str:
    """Return an inspection as text for `stream` (None: a closed one).

    Beyond `most_rows` checkpoints, those in the middle that do not stand out are counted.
    """
    look = look_at(stream)
    return shown_on(stream, _lines(found, look.width, most_rows))


def _lines(found: Inspection, width: int, most_rows: int) -> Iterator[str]:
    yield printable(found.run)
    counts = f"{counted(len(found.checkpoints), 'checkpoint')} of {found.elements} elements"
    yield f"{found.schedule}; {counts}"
    room = max(_SHORTEST_NAME, min(_LONGEST_NAME, width - _OTHER_COLUMNS))
    checkpoints = found.checkpoints
    rows: list[tuple[str, ...]] = [("checkpoint", *_HEADINGS)]
    rows += [(fitted(printable(one.name), room), *_cells(one)) for one in checkpoints]
    heading, *lines = aligned(rows)
    yield from ("", heading)
    half, hidden = most_rows // 2, 0
    for place, (line, one) in enumerate(zip(lines, checkpoints, strict=True)):
        is_middle = half <= place < len(checkpoints) - (most_rows - half)
        if is_middle and not one.stands_out:
            hidden += 1
            continue
        if hidden:
            yield f"  ... {hidden} more"
            hidden = 0
        yield _MARK + line[len(_MARK) :] if one.stands_out else line
    yield ""
    yield from _summary(found)


def _summary(found: Inspection) -> Iterator[str]:
    first, second = found.explained
    if len(found.members) > 2:
        hold = f"hold {first:.0%} and {second:.0%} of the variance"
        yield f"the first two principal directions {hold}"
    if outstanding := sum(one.stands_out for one in found.checkpoints):
        verb = "stands" if outstanding == 1 else "stand"
        yield f"{_MARK} {outstanding} of {counted(len(found.checkpoints), 'checkpoint')} {verb} out"
    speed = size(found.bytes_read / max(found.seconds, 1e-9))
    yield f"read {size(found.bytes_read)} in {found.seconds:.2f} s ({speed}/s)"


def _cells(one: InspectedCheckpoint) -> tuple[str, ...]:
    distances = (one.norm, one.distance_to_previous, one.distance_to_average)
    return (
        UNKNOWN if one.step is None else str(one.step),
        *map(number, distances),
        f"{one.zeros_share:.2%}",
        str(one.nonfinite),
        UNKNOWN if one.z_score is None else f"{round(one.z_score, 1) + 0.0:.1f}",
    )
