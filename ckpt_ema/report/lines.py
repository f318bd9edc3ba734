"""What a person should know beside the plan itself: remarks, sizes, the result."""

from collections.abc import Sequence

from ckpt_ema.errors import printable
from ckpt_ema.output.result import Finished, Result
from ckpt_ema.planning.plan import Plan


def remark_lines(plan: Plan) -> list[str]:
    """What a person should know of a plan: warnings first, then notes, then what was left out."""
    left_out = [printable(f"{entry.name} ({entry.verdict})") for entry in plan.left_out]
    return [
        *(f"warning: {warning}" for warning in plan.warnings),
        *(f"note: {note}" for note in plan.notes),
        *([f"left out: {shortened(left_out)}"] if left_out else []),
    ]


def reading_lines(result: Result | Finished) -> list[str]:
    """What a person should know of what only reading has shown."""
    told = result.manifests[0].get("warnings_of_reading")
    return [f"warning: {printable(one)}" for one in told] if isinstance(told, list) else []


def result_line(result: Result | Finished) -> str:
    """What was read and written, how fast, and where it is."""
    output = printable(result.output)
    if isinstance(result, Finished):
        device = result.manifests[0].get("device")  # the header of a single file has no room for it
        return f"all parts are done{f', on {printable(device)}' if device else ''}: {output}"
    plan = result.plan
    if result.is_up_to_date:
        return f"{output} is up to date: the same checkpoints, weights and options."
    speed = size(plan.bytes_read / max(result.seconds, 1e-9))
    return (
        f"read {size(plan.bytes_read)} and wrote {size(plan.bytes_written)} in"
        f" {result.seconds:.1f} s ({speed}/s) on {result.manifests[0]['device']}: {output}"
    )


def part_line(plan: Plan, share: str) -> str:
    """What to do after a part is made."""
    output = printable(plan.output)
    return f"part {share} of {output} is done; when all are: ckpt-ema finish {output}"


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


def counted(number: int, thing: str) -> str:
    """A number of things.

    >>> counted(1, "tensor"), counted(2, "tensor")
    ('1 tensor', '2 tensors')
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"


def shortened(names: Sequence[str], limit: int = 8) -> str:
    """Names in one line, not too many."""
    shown = ", ".join(printable(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
