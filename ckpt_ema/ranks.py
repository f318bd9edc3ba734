"""Processes that a launcher started together: torchrun, or srun.

They meet at a key-value store of rank 0. There each counts up while it is alive, and leaves the
error with which it failed, which all others then raise. One process reports it.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ckpt_ema.errors import CkptEmaError, Code, FailedError, OptionError, RefusedError, printable
from ckpt_ema.place import MORE_PORTS, Place, place_from

if TYPE_CHECKING:
    from ckpt_ema.rendezvous import Store

SECONDS_TO_MEET = 60.0
SECONDS_SILENT = 20.0  # the longest that a rank may not respond
_SECONDS_BEFORE_SAYING = 2.5  # whom a process waits for
_SECONDS_TO_REPORT = 5.0  # that the first rank has before another reports an error
_SECONDS_BETWEEN_SIGNS = 0.5

_LOST = "the connection to rank 0 was lost."
_IF_ALONE = "If this process was started alone, unset WORLD_SIZE and SLURM_STEP_NUM_TASKS."

Waiting = Callable[[str], None] | None  # is called with a sentence if other processes are late


def is_reported_elsewhere(error: BaseException) -> bool:
    """Return whether another rank reports an error, so that this process should not."""
    return bool(vars(error).get("is_reported_elsewhere"))


class Ranks:
    """This process among the others of a launch."""

    def __init__(self, place: Place, store: "Store") -> None:
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
        with contextlib.suppress(ConnectionError):
            self._learn(*self._store.get("failed"))
        self.check()

    def fail(self, error: BaseException) -> None:
        """Let the others fail too, unless another process did so before."""
        if not isinstance(error, CkptEmaError):
            how = f"failed: {error}" if isinstance(error, Exception) else "was stopped by a signal"
            error = _gone(f"rank {self.rank} {how}.")
        by = "" if error.code is Code.RANK_FAILED else f"rank {self.rank}: "
        facts = {name: getattr(error, name) for name in ("exit_code", "hint", "path")}
        facts["tensor"] = error.tensor and printable(error.tensor)
        facts |= {"code": error.code.value, "message": f"{by}{error.message}"}
        with contextlib.suppress(ConnectionError):
            self._store.set("failed", json.dumps(facts))

    def reports(self) -> bool:
        """Return whether this process reports an error: rank 0, or another if that is gone."""
        try:
            begun = time.monotonic()
            while self.rank and self._store.get("reported") == [None]:
                if time.monotonic() - begun > _SECONDS_TO_REPORT:
                    break
                time.sleep(self._store.pause(begun))
            return self._store.add("reported", 1) == 1
        except ConnectionError:  # the store was that of rank 0
            return self.rank <= 1

    def agree(self, name: str, value: str) -> None:
        """Raise `FailedError` unless all processes have the same value."""
        for rank, other in enumerate(self._exchanged(name, value)):
            if other != value:
                message = f"ranks {self.rank} and {rank} do not see the same {name}."
                hint = "Check that all machines see the same files, and all have the same options."
                raise FailedError(message, hint, code=Code.PARTS_DISAGREE)

    def wait(self, name: str, waiting: Waiting = None) -> None:
        """Wait until all processes are here; `waiting` is called once if some are late."""
        self._exchanged(name, "", waiting)

    def _exchanged(self, name: str, value: str, waiting: Waiting = None) -> list[str]:
        """Return the values that all ranks give, once they have."""
        begun = time.monotonic()
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        try:
            self._store.set(keys[self.rank], value)
            while True:
                self.check()
                values = self._store.get(*keys)
                if None not in values:
                    return values
                if waiting and time.monotonic() - begun > _SECONDS_BEFORE_SAYING:
                    late = [rank for rank in range(self.size) if values[rank] is None]
                    waiting(self._place.waiting_for(late))
                    waiting = None
                time.sleep(self._store.pause(begun))
        except ConnectionError as error:
            self.check()
            raise _gone(_LOST) from error

    def leave(self) -> None:
        """Stop watching; rank 0, which has the store, stays until all have left."""
        self._left.set()
        self._watch.join()
        others = [f"left/{rank}" for rank in range(1, self.size) if self.rank == 0]
        with contextlib.suppress(ConnectionError):
            self._store.set(f"left/{self.rank}", "")
            begun = time.monotonic()
            while None in self._store.get(*others) and time.monotonic() - begun < 5.0:
                time.sleep(self._store.pause(begun))
        self._store.close()

    def _learn(self, failed: str | None) -> None:
        """Keep the error of another process, if one has failed."""
        if failed is not None:
            self._problem = _error_from(json.loads(failed))

    def _keep_watch(self) -> None:
        """Count up, and look whether a rank has failed or the next one does not respond."""
        following = (self.rank + 1) % self.size
        seen, since = 0, time.monotonic()
        while not self._left.is_set():
            try:
                self._store.add(f"sign/{self.rank}", 1)
                keys = (f"sign/{following}", f"left/{following}", "failed")
                signs, left, failed = self._store.get(*keys)
            except ConnectionError:
                self._problem = self._problem or _gone(_LOST)
                return
            self._learn(failed)
            if signs != seen or left is not None:
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
    ranks = Ranks(place, _store(place, waiting))
    try:
        ranks.wait("met", waiting=None if place.rank else waiting)
        yield ranks
    except BaseException as error:
        ranks.fail(error)
        vars(error)["is_reported_elsewhere"] = not ranks.reports()
        raise
    finally:
        ranks.leave()


def _store(place: Place, waiting: Waiting) -> "Store":
    from ckpt_ema.rendezvous import meet  # only a launch needs sockets

    late = threading.Timer(
        _SECONDS_BEFORE_SAYING, lambda: waiting and waiting(place.waiting_for([0]))
    )
    late.daemon = True
    late.start()
    try:
        return meet(place, SECONDS_TO_MEET, SECONDS_SILENT)
    except OSError as error:
        cannot = "reach rank 0" if place.rank else "listen"
        at = f"{place.address}:{place.port} or the {MORE_PORTS} ports after it"
        message = f"rank {place.rank} of {place.size} cannot {cannot} at {at}."
        raise _gone(message, _IF_ALONE) from error
    finally:
        late.cancel()
