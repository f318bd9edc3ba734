"""Processes that a launcher started together: torchrun, or srun.

They meet at torch's key-value store. There each counts up while it is alive, and leaves the error
with which it failed, which all others then raise. One process reports it.
"""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from ckpt_ema.errors import CkptEmaError, Code, FailedError, OptionError, RefusedError

SECONDS_TO_MEET = 60.0
SECONDS_SILENT = 20.0  # the longest that a rank may not respond
_SECONDS_BEFORE_SAYING = 2.5  # whom a process waits for
_SECONDS_TO_REPORT = 5.0  # that the first rank has before another reports an error
_SECONDS_BETWEEN_SIGNS = 0.5
_POLL_SECONDS = 0.05

_LOST = "the connection to rank 0 was lost."
_IF_ALONE = "If this process was started alone, unset WORLD_SIZE and SLURM_STEP_NUM_TASKS."

Waiting = Callable[[str], None] | None  # is called with a sentence if other processes are late


class Place(NamedTuple):
    """Where a process stands among those that were launched with it, and where they meet."""

    rank: int  # from 0
    size: int
    address: str
    port: int
    is_hosted: bool  # the launcher has the store; otherwise rank 0 has
    local_rank: int  # among those on its machine

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
        return Place(rank, size, address, port, is_hosted, number("LOCAL_RANK", 0))
    # Only srun sets the variables of a step: a batch script has SLURM_NTASKS without tasks.
    if number("SLURM_STEP_NUM_TASKS", 1) > 1:
        port = 20000 + (number("SLURM_JOB_ID") * 31 + number("SLURM_STEP_ID")) % 20000
        rank, size = number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS")
        address, port = first_host(text("SLURM_STEP_NODELIST")), number("MASTER_PORT", port)
        return Place(rank, size, address, port, False, number("SLURM_LOCALID", 0))
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


def is_reported_elsewhere(error: BaseException) -> bool:
    """Return whether another rank reports an error, so that this process should not."""
    return bool(vars(error).get("is_reported_elsewhere"))


class Ranks:
    """This process among the others of a launch."""

    def __init__(self, place: Place, store: Any) -> None:
        self.rank, self.size, self.local_rank = place.rank, place.size, place.local_rank
        self._place, self._store = place, store
        self._problem: CkptEmaError | None = None
        self._left = threading.Event()
        self._watch = threading.Thread(target=self._keep_watch, daemon=True)
        self._watch.start()

    def check(self) -> None:
        """Raise the error of another process, if one has failed."""
        if self._problem:
            raise self._problem

    def check_now(self) -> None:
        """Raise the error of another process, even if it failed a moment ago."""
        with contextlib.suppress(RuntimeError):
            self._look()
        self.check()

    def fail(self, error: BaseException) -> None:
        """Let the others fail too, unless another process did so before."""
        if not isinstance(error, CkptEmaError):
            how = f"failed: {error}" if isinstance(error, Exception) else "was stopped by a signal"
            error = _gone(f"rank {self.rank} {how}.")
        by = "" if error.code is Code.RANK_FAILED else f"rank {self.rank}: "
        facts = {name: getattr(error, name) for name in ("exit_code", "hint", "path", "tensor")}
        facts |= {"code": error.code.value, "message": f"{by}{error.message}"}
        with contextlib.suppress(RuntimeError):
            self._store.compare_set("failed", "", json.dumps(facts))

    def reports(self) -> bool:
        """Return whether this process reports an error: rank 0, or another if that is gone."""
        try:
            until = time.monotonic() + (_SECONDS_TO_REPORT if self.rank else 0.0)
            while time.monotonic() < until and not self._store.add("reported", 0):
                time.sleep(_POLL_SECONDS)
            return bool(self._store.add("reported", 1) == 1)
        except RuntimeError:  # the store was that of rank 0
            return self.rank <= 1

    def agree(self, name: str, value: str) -> None:
        """Raise `FailedError` unless all processes have the same value."""
        self.wait(name, value)
        for rank in range(self.size):
            if self._store.get(f"{name}/{rank}").decode() != value:
                message = f"ranks {self.rank} and {rank} do not see the same {name}."
                hint = "Check that all machines see the same files, and all have the same options."
                raise FailedError(message, hint, code=Code.PARTS_DISAGREE)

    def wait(self, name: str, value: str = "", waiting: Waiting = None) -> None:
        """Wait until all processes are here; `waiting` is called once if some are late."""
        self._store.set(f"{name}/{self.rank}", value)
        missing = [rank for rank in range(self.size) if rank != self.rank]
        late = time.monotonic() + _SECONDS_BEFORE_SAYING
        while missing := [rank for rank in missing if not self._has(f"{name}/{rank}")]:
            if waiting and time.monotonic() > late:
                waiting(self._place.waiting_for(missing))
                waiting = None
            time.sleep(_POLL_SECONDS)

    def leave(self) -> None:
        """Stop watching; rank 0, which may have the store, stays until all have left."""
        self._left.set()
        self._watch.join()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
            until = time.monotonic() + 5.0
            others = [f"left/{rank}" for rank in range(1, self.size) if self.rank == 0]
            while others and not self._store.check(others) and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)

    def _has(self, key: str) -> bool:
        self.check()
        try:
            return bool(self._store.check([key]))
        except RuntimeError as error:
            raise _gone(_LOST) from error

    def _look(self) -> None:
        if self._store.check(["failed"]):
            self._problem = _error_from(json.loads(self._store.get("failed")))

    def _keep_watch(self) -> None:
        """Count up, and look whether a rank has failed or the next one does not respond."""
        following = (self.rank + 1) % self.size
        seen, since = 0, time.monotonic()
        while not self._left.is_set():
            try:
                self._store.add(f"sign/{self.rank}", 1)
                signs = self._store.add(f"sign/{following}", 0)
                self._look()
                has_left = self._store.check([f"left/{following}"])
            except RuntimeError:
                self._problem = _gone(_LOST)
                return
            if signs != seen or has_left:
                seen, since = signs, time.monotonic()
            elif time.monotonic() - since > (most := SECONDS_SILENT if signs else SECONDS_TO_MEET):
                silent = "responded for" if signs else "joined within"
                hint = "Nothing was published." if signs else _IF_ALONE
                self.fail(_gone(f"rank {following} has not {silent} {most:.0f} s.", hint))
            self._left.wait(_SECONDS_BETWEEN_SIGNS)


def _gone(message: str, hint: str = "Nothing was published.") -> FailedError:
    return FailedError(message, hint, code=Code.RANK_FAILED)


def _error_from(facts: dict[str, Any]) -> CkptEmaError:
    """Return an error like that of another rank."""
    kinds = {kind.exit_code: kind for kind in (OptionError, RefusedError)}
    kind = kinds.get(facts.pop("exit_code"), FailedError)
    return kind(**{**facts, "code": Code(facts["code"])})


def _invalid(message: str) -> OptionError:
    return OptionError(message, code=Code.LAUNCH_ENVIRONMENT)


@contextlib.contextmanager
def joined(environment: Mapping[str, str], waiting: Waiting = None) -> Iterator[Ranks | None]:
    """Meet the others of a launch; yield None in a process that was started alone.

    `waiting` is called, from any thread, with a sentence if others are late. An error inside makes
    the others fail too; all but one of them are `is_reported_elsewhere`. Raises `FailedError` if
    others never come.
    """
    place = place_from(environment)
    if place is None:
        yield None
        return
    ranks = Ranks(place, _store(place, environment, waiting))
    try:
        ranks.wait("met", waiting=None if place.rank else waiting)
        yield ranks
    except BaseException as error:
        ranks.fail(error)
        vars(error)["is_reported_elsewhere"] = not ranks.reports()
        raise
    finally:
        ranks.leave()


def _store(place: Place, environment: Mapping[str, str], waiting: Waiting) -> Any:
    late = threading.Timer(
        _SECONDS_BEFORE_SAYING, lambda: waiting and waiting(place.waiting_for([0]))
    )
    late.daemon = True
    try:
        import torch.distributed

        late.start()
        distributed: Any = torch.distributed
        store = distributed.TCPStore(
            place.address,
            place.port,
            place.size,
            is_master=place.rank == 0 and not place.is_hosted,
            timeout=timedelta(seconds=SECONDS_TO_MEET),
            wait_for_workers=False,
        )
    except (RuntimeError, ImportError, AttributeError) as error:
        at = f"{place.address}:{place.port}"
        message = f"rank {place.rank} of {place.size} cannot reach rank 0 at {at}."
        raise _gone(message, _IF_ALONE) from error
    finally:
        late.cancel()
    # A launcher that restarts all ranks gives them new keys.
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"ckpt-ema/{attempt}", store)
