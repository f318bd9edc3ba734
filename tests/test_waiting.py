"""Nobody waits for a request over a network once a signal or an error has come."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from ckpt_ema.storage.waiting import interruptible, requesting


class _Signal(BaseException):
    pass


@contextmanager
def signal_soon() -> Iterator[None]:
    """Have a signal raise after a tenth of a second."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _Signal

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_signal_ends_a_call_that_gives_python_no_turn() -> None:
    stalled = threading.Lock()
    stalled.acquire()
    began = time.monotonic()
    with pytest.raises(_Signal), signal_soon():
        interruptible(lambda: stalled.acquire(timeout=10))
    assert time.monotonic() - began < 5
    stalled.release()


def test_results_and_errors_are_those_of_the_call() -> None:
    assert interruptible(lambda: 7) == 7
    with pytest.raises(KeyError, match="x"):
        interruptible(lambda: dict[str, int]()["x"])


def test_an_error_does_not_wait_for_requests() -> None:
    stalled = threading.Event()
    began = time.monotonic()
    with pytest.raises(OSError, match="no"), requesting(2) as pool:
        pool.submit(stalled.wait, 10)
        raise OSError("no")
    assert time.monotonic() - began < 5
    stalled.set()
