"""Waiting for requests over a network, which a signal or an error ends at once.

The requests themselves cannot be ended: their threads are left to themselves.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def requesting(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads; whatever ends the block does not wait for their requests."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def interruptible(call: Callable[[], T]) -> T:
    """Return what `call` returns.

    Python handles signals between two instructions of the main thread. A library that is not
    written in Python gives it none while it waits, so another thread makes the call.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # which `result` raises
            future.set_exception(error)

    threading.Thread(target=work, name="ckpt-ema-request", daemon=True).start()
    return future.result()
