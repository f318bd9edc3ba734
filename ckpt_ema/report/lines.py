"""Lines for people beside the plan itself: warnings, notes, sizes, the result."""

import os
from collections.abc import Iterable

from ckpt_ema.errors import printable, some
from ckpt_ema.notices import Notice
from ckpt_ema.output.manifest import Result
from ckpt_ema.planning.plan import Plan


def warning_lines(warnings: Iterable[Notice]) -> list[str]:
    """Return a line for each warning, which GitHub Actions shows as annotations."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        return [f"::warning title=ckpt-ema::{str(one).replace('%', '%25')}" for one in warnings]
    return [f"warning: {warning}" for warning in warnings]


def notice_lines(plan: Plan, quiet: bool) -> list[str]:
    """Return a plan's warnings; unless `quiet`, its notes and the entries left out too."""
    left_out = [f"{entry.name} ({entry.verdict})" for entry in plan.left_out]
    notes = [f"note: {note}" for note in plan.notes]
    notes += [f"left out: {some(left_out, 8)}"] if left_out else []
    return [*warning_lines(plan.warnings), *([] if quiet else notes)]


def result_line(result: Result) -> str:
    """Return what was read and written, how fast, and where the output is."""
    output = printable(result.output)
    if result.is_up_to_date:
        return f"{output} is up to date: same checkpoints, weights and options"
    seconds = f"{result.seconds:.{1 if result.seconds >= 1 else 2}f} s"
    speed = size(result.bytes_read / max(result.seconds, 1e-9))
    done = f"read {size(result.bytes_read)} and wrote {size(result.bytes_written)} in {seconds}"
    return f"{done} ({speed}/s) on {printable(result.device)}: {output}"


def size(size_bytes: float) -> str:
    """Return a number of bytes for people.

    >>> size(512), size(5 * 1024**2), size(812.5 * 1024**3)
    ('512 B', '5.0 MiB', '812 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size_bytes < 1024 or unit == "TiB":
            break
        size_bytes /= 1024
    return f"{size_bytes:.{0 if unit == 'B' or size_bytes >= 100 else 1}f} {unit}"
