"""What averages came to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_ema.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Result:
    """Averages that were made. `manifests` are the contents of their ckpt_ema.json."""

    plan: Plan
    is_up_to_date: bool  # these very averages were there already, and nothing was read
    seconds: float  # of reading, folding and writing
    manifests: tuple[dict[str, Any], ...]  # of each average of the plan

    @property
    def output(self) -> Path:
        """The folder or the file that was written; of several averages, the folder of all."""
        return self.plan.output

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Where each average is, in the order of the plan's averages."""
        return tuple(average.output.path for average in self.plan.averages)


@dataclass(frozen=True, slots=True)
class Finished:
    """Averages that several processes have made, each a part."""

    output: Path  # the folder or the file that was written
    outputs: tuple[Path, ...]  # where each average is
    manifests: tuple[dict[str, Any], ...]  # the contents of their ckpt_ema.json
