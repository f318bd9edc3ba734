"""A plan and a result as lines for a person."""

from collections.abc import Sequence

from ckpt_ema.averaging import Result
from ckpt_ema.errors import printable
from ckpt_ema.planning.plan import Plan, PlannedCheckpoint

_HEADINGS = ("checkpoint", "step", "decay", "weight")


def plan_lines(plan: Plan, most_rows: int | None = None) -> list[str]:
    """The plan: what becomes of what, a row for each checkpoint, then sizes.

    Of more than `most_rows` checkpoints the middle ones are left out; the newest weigh most.
    """
    averaged = sum(tensor.averaged for file in plan.files for tensor in file.tensors)
    copied = len(plan.companions)
    return [
        f"{printable(plan.run)} -> {printable(plan.output)}   ({plan.options.schedule}, decay"
        f" {plan.options.decay:g})",
        "",
        *_table(_rows(plan.checkpoints, most_rows)),
        "",
        f"averages {_counted(averaged, 'tensor')}: reads {size(plan.bytes_read)}, writes"
        f" {size(plan.bytes_written)}, in {size(plan.memory_bytes)} of memory beside torch's own",
        *(
            [f"copies {_counted(copied, 'file')}: {_shortened([c.name for c in plan.companions])}"]
            if copied
            else []
        ),
    ]


def remark_lines(plan: Plan) -> list[str]:
    """What a person should know of a plan: warnings first, then notes, then what was left out."""
    left_out = [f"{printable(path.name)} ({why})" for path, why in plan.left_out]
    return [
        *(f"warning: {warning}" for warning in plan.warnings),
        *(f"note: {note}" for note in plan.notes),
        *([f"left out: {_shortened(left_out)}"] if left_out else []),
    ]


def result_line(result: Result) -> str:
    """What was read and written, how fast, and where it is."""
    plan = result.plan
    output = printable(plan.output)
    if result.is_up_to_date:
        return f"{output} is up to date: the same checkpoints, weights and options."
    speed = size(plan.bytes_read / max(result.seconds, 1e-9))
    return (
        f"read {size(plan.bytes_read)} and wrote {size(plan.bytes_written)} in"
        f" {result.seconds:.1f} s ({speed}/s) on {result.manifest['device']}: {output}"
    )


def markdown_lines(plan: Plan) -> list[str]:
    """The plan's table as Markdown, for the summary page of a CI job."""
    return [
        f"### ckpt-ema: {printable(plan.run)} → {printable(plan.output)}",
        "",
        f"| {' | '.join(_HEADINGS)} |",
        "|:---|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in _rows(plan.checkpoints, None)),
        "",
    ]


def size(size_bytes: float) -> str:
    """A number of bytes as a person reads it.

    >>> size(512), size(5 * 1024**2), size(812.5 * 1024**3)
    ('512 B', '5.0 MiB', '812 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size_bytes < 1024 or unit == "TiB":
            break
        size_bytes /= 1024
    return f"{size_bytes:.{0 if unit == 'B' or size_bytes >= 100 else 1}f} {unit}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _rows(
    checkpoints: Sequence[PlannedCheckpoint], most_rows: int | None
) -> list[tuple[str, str, str, str]]:
    rows = [
        (
            printable(checkpoint.name),
            "-" if checkpoint.step is None else str(checkpoint.step),
            "-" if checkpoint.decay is None else f"{checkpoint.decay:.4f}",
            f"{checkpoint.weight:.2%}",
        )
        for checkpoint in checkpoints
    ]
    if most_rows is None or len(rows) <= most_rows:
        return rows
    newest = most_rows * 2 // 3
    oldest = most_rows - newest - 1
    hidden = checkpoints[oldest : len(rows) - newest]
    share = sum(checkpoint.weight for checkpoint in hidden)
    gap = (f"... {len(hidden)} more", "", "", f"{share:.2%}")
    return [*rows[:oldest], gap, *rows[-newest:]]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    columns = list(zip(_HEADINGS, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in (_HEADINGS, *rows)
    ]


def _shortened(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(printable(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
