"""One pass over checkpoints: threads that take items of work until there are none.

What an item is, which bytes it needs and what is done with them is the caller's. Of a remote run,
the bytes of the next items are fetched while earlier ones are worked on.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Generic, TypeVar

from ckpt_ema.containers.reader import Reader
from ckpt_ema.errors import Code, FailedError
from ckpt_ema.fold.hardware import check_room_for_thread, is_out_of_memory
from ckpt_ema.storage.protocol import Range

_POLL_SECONDS = 0.1  # the longest time before the main thread handles a signal

T = TypeVar("T")
Needs = Sequence[tuple[Reader, Sequence[Range]]]  # what an item reads, in that order
Tick = Callable[[int], None]  # takes the bytes read so far


class StoppedError(Exception):
    """Another thread has failed, or the process was asked to end."""


class Pass(Generic[T]):
    """The items of a pass, and what its threads share."""

    def __init__(
        self, items: Iterable[T], needs: Callable[[T], Needs] | None = None, ahead_bytes: int = 0
    ) -> None:
        """Of a remote storage, request what items need, `ahead_bytes` before it is read."""
        self.stop = bytearray(1)  # the compiled module looks at it too
        self.bytes_read = 0
        self.lock = threading.Lock()
        self._items, self._needs, self._ahead_bytes = iter(items), needs, ahead_bytes
        self._requested = deque[tuple[T, Needs]]()

    def next(self) -> tuple[T, Needs] | None:
        """Return the next item; None if there are no more, or the work was stopped."""
        with self.lock:
            if self.stop[0]:
                return None
            if self._needs is None:
                return next(((item, ()) for item in self._items), None)
            self._request(self._needs)
            return self._requested.popleft() if self._requested else None

    def _request(self, needs_of: Callable[[T], Needs]) -> None:
        """Request the bytes of the next items, in the order in which they will be taken."""
        ahead = sum(_size_bytes(needs) for _, needs in self._requested)
        while ahead < self._ahead_bytes and (item := next(self._items, None)) is not None:
            needs = needs_of(item)
            for reader, ranges in needs:
                reader.request(ranges)
            self._requested.append((item, needs))
            ahead += _size_bytes(needs)

    def count_read(self, size_bytes: int) -> None:
        """Note that bytes were read, for the progress."""
        with self.lock:
            self.bytes_read += size_bytes


def run_threads(
    shared: Pass[T],
    make_worker: Callable[[], Callable[[T], None]],
    threads: int,
    readers: Sequence[Reader],
    tick: Tick,
) -> None:
    """Have each thread make a worker and call it with items, until all are done.

    `tick` is called from this thread, ten times a second; what it or a worker raises ends the work,
    and every thread. Raises `FailedError` if a file has changed meanwhile.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-ema") as pool:
        try:
            with shared.lock:  # so that no thread takes memory before all have started
                pending = {_started(pool, shared, make_worker) for _ in range(threads)}
            while pending:
                done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                tick(shared.bytes_read)
        finally:
            shared.stop[0] = True
            for reader in readers:
                reader.cancel()
    for reader in readers:
        reader.verify()


def _started(
    pool: ThreadPoolExecutor, shared: Pass[T], make_worker: Callable[[], Callable[[T], None]]
) -> Future[None]:
    try:
        check_room_for_thread()
        return pool.submit(_work, shared, make_worker)
    except (OSError, RuntimeError) as error:
        message = "The machine can start no more threads."
        hint = "Try --threads 1 and --max-memory 64MiB."
        raise FailedError(message, hint, code=Code.OUT_OF_MEMORY) from error


def _work(shared: Pass[T], make_worker: Callable[[], Callable[[T], None]]) -> None:
    """Take items until there are none."""
    worker: Callable[[T], None] | None = None
    try:
        while taken := shared.next():
            item, needs = taken
            worker = worker or make_worker()
            with ExitStack() as held:
                for reader, ranges in needs:
                    held.enter_context(reader.held(ranges))
                worker(item)
    except StoppedError:
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = "The machine ran out of memory; nothing was written."
        hint = "Try --max-memory 64MiB."
        raise FailedError(message, hint, code=Code.OUT_OF_MEMORY) from error


def _size_bytes(needs: Needs) -> int:
    return sum(one.size_bytes for _, ranges in needs for one in ranges)
