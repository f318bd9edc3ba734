"""Processes that a launcher started together: torchrun, or srun.

They meet at a key-value store of torch's, over which each tells the others that it is alive, how
far it is, and why it gave up. One that is silent for too long has ended without a word.
"""

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from ckpt_ema.errors import FailedError, OptionError, printable

_SECONDS_TO_MEET = 60.0
_SECONDS_BETWEEN_SIGNS = 0.5
_MOST_SILENT_SECONDS = 20.0
_POLL_SECONDS = 0.05


class Place(NamedTuple):
    """Where a process stands among those that were launched with it, and where they meet."""

    rank: int  # from 0
    size: int
    address: str
    port: int
    is_hosted: bool  # the launcher has the store; otherwise the first process has
    local_rank: int  # among those on its machine


def place_from(environment: Mapping[str, str]) -> Place | None:
    """The place that torchrun or srun gave this process; None if it is alone.

    Raises `OptionError` for variables that make no sense.
    """
    try:
        if environment.get("RANK") and int(environment.get("WORLD_SIZE") or 1) > 1:
            return Place(
                int(environment["RANK"]),
                int(environment["WORLD_SIZE"]),
                environment["MASTER_ADDR"],
                int(environment["MASTER_PORT"]),
                environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                int(environment.get("LOCAL_RANK") or 0),
            )
        # Those of a step are set by srun alone: a batch script has SLURM_NTASKS without tasks.
        if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
            job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
            return Place(
                int(environment["SLURM_PROCID"]),
                int(environment["SLURM_STEP_NUM_TASKS"]),
                first_host(environment["SLURM_STEP_NODELIST"]),
                int(environment.get("MASTER_PORT") or 20000 + (job * 31 + step) % 20000),
                False,
                int(environment.get("SLURM_LOCALID") or 0),
            )
    except (KeyError, ValueError) as error:
        raise OptionError(
            f"The launcher's variables make no sense: {type(error).__name__} {printable(error)}."
        ) from error
    return None


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes.

    >>> first_host("gpu[007-010,12],cpu1"), first_host("a,b")
    ('gpu007', 'a')
    """
    match = re.match(r"([^\[,]+)(?:\[([0-9]+)[^\]]*\]([^,]*))?", nodes)
    if not match:
        raise ValueError(nodes)
    return "".join(part or "" for part in match.groups())


class Ranks:
    """This process among the others of a launch."""

    def __init__(self, place: Place, store: Any) -> None:
        self.rank, self.size, self.local_rank = place.rank, place.size, place.local_rank
        self._store = store
        self._problem = ""
        self._left = threading.Event()
        self._watch = threading.Thread(target=self._keep_watch, daemon=True)
        self._watch.start()

    def check(self) -> None:
        """Raise `FailedError` if another process has failed."""
        if self._problem:
            raise FailedError(self._problem, "Nothing was published.")

    def check_at_once(self) -> None:
        """As `check`, and what others have told since the last look counts too."""
        with contextlib.suppress(RuntimeError):
            if self._store.check(["failed"]):
                self._problem = self._store.get("failed").decode()
        self.check()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process gives up."""
        if not self._problem:
            told = f"Rank {self.rank} failed: {printable(error) or type(error).__name__}"
            with contextlib.suppress(RuntimeError):
                self._store.set("failed", told)

    def agree(self, name: str, value: str) -> None:
        """Raise `FailedError` unless all processes have the same value."""
        self._store.set(f"{name}/{self.rank}", value)
        for rank in range(self.size):
            if self._get(f"{name}/{rank}") != value:
                raise FailedError(
                    f"Ranks {self.rank} and {rank} do not see the same {name}.",
                    "Do all machines see the same files, and has the command the same options?",
                )

    def wait(self, name: str) -> None:
        """Wait until all processes have come here."""
        self._store.set(f"{name}/{self.rank}", "here")
        for rank in range(self.size):
            self._get(f"{name}/{rank}")

    def leave(self) -> None:
        """Stop watching; the first process, whose store it may be, stays until all have left."""
        self._left.set()
        self._watch.join()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
            until = time.monotonic() + 5.0
            others = [f"left/{rank}" for rank in range(1, self.size) if self.rank == 0]
            while others and not self._store.check(others) and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)

    def _get(self, key: str) -> str:
        while True:
            self.check()
            try:
                if self._store.check([key]):
                    return str(self._store.get(key).decode())
            except RuntimeError as error:
                raise FailedError("The first rank is gone.", "Nothing was published.") from error
            time.sleep(_POLL_SECONDS)

    def _keep_watch(self) -> None:
        """Give a sign of life; look whether a rank has failed or the next one is silent."""
        following = (self.rank + 1) % self.size
        seen, since = 0, time.monotonic()
        while not self._left.is_set():
            try:
                self._store.add(f"sign/{self.rank}", 1)
                signs = self._store.add(f"sign/{following}", 0)
                has_failed = self._store.check(["failed"])
                self._problem = self._store.get("failed").decode() if has_failed else ""
                has_left = self._store.check([f"left/{following}"])
            except RuntimeError:
                self._problem = "The first rank is gone."
                return
            if signs != seen or has_left:
                seen, since = signs, time.monotonic()
            elif time.monotonic() - since > (_MOST_SILENT_SECONDS if signs else _SECONDS_TO_MEET):
                self._problem = f"Rank {following} gives no sign of life."
                with contextlib.suppress(RuntimeError):
                    self._store.set("failed", self._problem)
            self._left.wait(_SECONDS_BETWEEN_SIGNS)


@contextlib.contextmanager
def joined(environment: Mapping[str, str]) -> Iterator[Ranks | None]:
    """Meet the others of a launch; None for a process that was started alone.

    What goes wrong inside is told to the others. Raises `FailedError` if they do not come.
    """
    place = place_from(environment)
    if place is None:
        yield None
        return
    ranks = Ranks(place, _store(place, environment))
    try:
        ranks.wait("met")
        yield ranks
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        ranks.leave()


def _store(place: Place, environment: Mapping[str, str]) -> Any:
    try:
        import torch.distributed

        distributed: Any = torch.distributed
        store = distributed.TCPStore(
            place.address,
            place.port,
            place.size,
            is_master=place.rank == 0 and not place.is_hosted,
            timeout=timedelta(seconds=_SECONDS_TO_MEET),
        )
    except (RuntimeError, ImportError, AttributeError) as error:
        raise FailedError(
            f"Rank {place.rank} of {place.size} cannot meet the others at"
            f" {printable(place.address)}:{place.port}.",
            "Where this is no launch of several processes, unset WORLD_SIZE and"
            " SLURM_STEP_NUM_TASKS.",
        ) from error
    # A launcher that starts all anew starts with clean keys.
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"ckpt-ema/{attempt}", store)
