"""How a command ends: errors and signals as one line on stderr and the exit code they stand for."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import typer

from ckpt_ema.errors import CkptEmaError, FailedError, printable
from ckpt_ema.ranks import is_reported_elsewhere


class SignalError(BaseException):
    """A signal asks the process to end. No Exception, so that nothing on the way swallows it."""

    def __init__(self, number: int) -> None:
        self.number = number


_OUT_OF_MEMORY = (
    "error: The machine ran out of memory; nothing was written. Try --max-memory 64MiB."
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_noted: list[int] = []  # the signal that has come, if one has


def take_signals() -> None:
    """Have signals raise `SignalError`."""
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup it stays ignored
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    ignore_signals()  # what a second one would interrupt is the tidying up
    _noted.append(number)
    raise SignalError(number)


def check_signals() -> None:
    """Raise `SignalError` for a signal that has come and whose own error was swallowed.

    Python does that where one arrives while it runs a destructor, which may be at any time.
    """
    if _noted:
        raise SignalError(_noted[0])


def ignore_signals() -> None:
    """Have signals do nothing from now on."""
    # By which Python complains of a signal that is on its way already.
    sys.unraisablehook = lambda _: None
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def say_signal(error: SignalError, *, kept: bool = False) -> int:
    """Say that a signal ended the command; returns the exit code that shells expect.

    `kept` says that another run can go on from what is done.
    """
    how = "interrupted" if error.number == signal.SIGINT else "terminated"
    _report(
        error,
        f"{how}, what is done is kept: go on with --resume"
        if kept
        else f"{how}, nothing was written",
    )
    return 128 + error.number


@contextlib.contextmanager
def errors_reported(*, kept: bool = False) -> Iterator[None]:
    """Turn what goes wrong into one line on stderr and the exit code it stands for.

    `kept` says that another run can go on from what is done.
    """
    try:
        yield
    except CkptEmaError as error:
        _report(error, f"error: {error}")
        raise typer.Exit(error.exit_code) from error
    except MemoryError as error:
        _report(error, _OUT_OF_MEMORY)
        raise typer.Exit(1) from error
    except OSError as error:
        _report(error, f"error: {printable(error)}.")
        raise typer.Exit(1) from error
    except SignalError as error:
        raise typer.Exit(say_signal(error, kept=kept)) from error
    except RuntimeError as error:
        # A signal that comes while threading hands over a lock leaves it saying that the lock is
        # not held; what it was raised on top of is what happened.
        if not isinstance(error.__context__, SignalError):
            raise
        raise typer.Exit(say_signal(error.__context__, kept=kept)) from error


def _report(error: BaseException, text: str) -> None:
    """Print an error, unless another rank of a launch does."""
    if not is_reported_elsewhere(error):
        say(text)


@contextlib.contextmanager
def stdout_reported(done: str) -> Iterator[None]:
    """Say of a stdout that is closed or full that it is, and what was done all the same."""
    try:
        yield
    except OSError as error:
        raise FailedError(f"stdout cannot be written: {error.strerror}; {done}.") from error


def say(*lines: str) -> None:
    """Print lines on stderr."""
    for line in lines:
        with contextlib.suppress(OSError):  # a stderr that is full or closed changes no result
            typer.echo(line, err=True)
