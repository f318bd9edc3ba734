"""What came of making averages, as typed values; manifests and messages are written from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_ema.notices import Notice
from ckpt_ema.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Result:
    """Averages that were made, or a share of their work.

    Whoever publishes the output has its manifests; for a part, and for every rank of a launch but
    the first, `manifests` is empty.
    """

    output: Path  # the folder or the file; of several averages, the folder of all
    outputs: tuple[Path, ...]  # of each average
    is_up_to_date: bool = False  # they were there already, and nothing was read
    device: str = ""  # what they were folded on; empty if nothing was folded
    seconds: float = 0.0  # of reading, folding and writing; the sum over parts
    peak_memory_bytes: int = 0  # resident; of the largest process
    bytes_read: int = 0  # of tensor data
    bytes_written: int = 0  # of model files
    warnings: tuple[Notice, ...] = ()  # what only reading shows
    # None of `finish` alone, which needs none; callers of `average` need not ask.
    plan: Plan = None  # type: ignore[assignment]
    manifests: tuple[Mapping[str, Any], ...] = ()  # the content of each ckpt_ema.json
