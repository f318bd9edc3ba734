"""Where torchrun or srun put this process: its rank, and where rank 0 is.

It reads the environment; `ckpt_ema.ranks` makes the connection.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ckpt_ema.errors import Code, OptionError

MORE_PORTS = 16  # where rank 0 may listen if MASTER_PORT is taken


class Place(NamedTuple):
    """Where a process stands among those that were launched with it, and where they meet."""

    rank: int  # from 0
    size: int
    address: str
    port: int
    is_hosted: bool  # the launcher itself listens at the port
    local_rank: int  # among those on its machine
    launch: str = ""  # the launcher's name for it

    @property
    def ports(self) -> range:
        """Where rank 0 may listen, the likeliest first."""
        return range(self.port + self.is_hosted, min(self.port + MORE_PORTS + 1, 1 << 16))

    def waiting_for(self, late: Sequence[int]) -> str:
        """Return a sentence: waiting for ranks 1, 3 of 4 at host:29500."""
        which = f"rank{'s' * (len(late) > 1)} {', '.join(map(str, late))}"
        return f"waiting for {which} of {self.size} at {self.address}:{self.port}"


def place_from(environment: Mapping[str, str]) -> Place | None:
    """Return the place that torchrun or srun gave this process; None if it is alone."""

    def text(name: str) -> str:
        if not environment.get(name):
            raise _invalid(f"incomplete launcher environment: {name} is not set.")
        return environment[name]

    def number(name: str, default: int | None = None) -> int:
        if default is not None and not environment.get(name):
            return default
        if not re.fullmatch("[0-9]{1,9}", text(name)):
            raise _invalid(f"invalid launcher environment: {name} is {text(name)!r}.")
        return int(text(name))

    if environment.get("RANK") and number("WORLD_SIZE", 1) > 1:
        rank, size = number("RANK"), number("WORLD_SIZE")
        address, port = text("MASTER_ADDR"), number("MASTER_PORT")
        is_hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # Not TORCHELASTIC_RESTART_COUNT: after a failure its value may differ between machines.
        launch = environment.get("TORCHELASTIC_RUN_ID", "")
        return Place(rank, size, address, port, is_hosted, number("LOCAL_RANK", 0), launch)
    # Only srun sets the variables of a step: a batch script has SLURM_NTASKS without tasks.
    if number("SLURM_STEP_NUM_TASKS", 1) > 1:
        job, step = number("SLURM_JOB_ID"), number("SLURM_STEP_ID")
        port = 20000 + (job * 31 + step) % 20000
        rank, size = number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS")
        address, port = first_host(text("SLURM_STEP_NODELIST")), number("MASTER_PORT", port)
        local_rank = number("SLURM_LOCALID", 0)
        return Place(rank, size, address, port, False, local_rank, f"{job}.{step}")
    return None


def first_host(nodes: str) -> str:
    """Return the first of Slurm's list of nodes.

    >>> first_host("gpu[007-010,12],cpu1"), first_host("a,b")
    ('gpu007', 'a')
    """
    match = re.match(r"([^\[,]+)(?:\[([0-9]+)[^\]]*\]([^,]*))?", nodes)
    if not match:
        raise _invalid(f"invalid launcher environment: SLURM_STEP_NODELIST is {nodes!r}.")
    return "".join(part or "" for part in match.groups())


def _invalid(message: str) -> OptionError:
    return OptionError(message, code=Code.LAUNCH_ENVIRONMENT)
