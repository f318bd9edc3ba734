"""How a command ends: its result, or an error or signal as one line, and its exit code."""

import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import typer

from ckpt_ema.errors import CkptEmaError, Code, FailedError, printable
from ckpt_ema.ranks import is_reported_elsewhere

if TYPE_CHECKING:
    from ckpt_ema.output.manifest import Result


class SignalError(BaseException):
    """A signal asks the process to end; not an Exception, so that no handler swallows it."""

    def __init__(self, number: int) -> None:
        self.number = number


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_noted: list[int] = []  # the signal that arrived, if any


def take_signals() -> None:
    """Have signals raise `SignalError`."""
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup it stays ignored
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    ignore_signals()  # a second one would interrupt the cleanup
    _noted.append(number)
    raise SignalError(number)


def check_signals() -> None:
    """Raise `SignalError` for a signal whose own error was swallowed.

    Python swallows it if the signal arrives while a destructor runs.
    """
    if _noted:
        raise SignalError(_noted[0])


def ignore_signals() -> None:
    """Ignore signals from now on."""
    # Python would complain of a signal that has already arrived.
    sys.unraisablehook = lambda _: None
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def ticking(progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Return what a pass over checkpoints calls now and then: signals end it, progress is shown."""

    def tick(done_bytes: int, total_bytes: int) -> None:
        check_signals()
        if not gc.isenabled():
            gc.freeze()  # the plan and all modules stay until the end
            gc.enable()
        progress(done_bytes, total_bytes)

    return tick


def say_signal(error: SignalError, left: str = "nothing was written") -> int:
    """Print that a signal ended the command and what is left; returns the usual exit code."""
    how = "interrupted" if error.number == signal.SIGINT else "terminated"
    _report(error, f"{how}; {left}")
    return 128 + error.number


@contextlib.contextmanager
def errors_reported(left: Callable[[], str] = lambda: "nothing was written") -> Iterator[None]:
    """Turn errors and signals into one line on stderr and an exit code.

    `left` tells what a signal leaves.
    """
    try:
        yield
    except CkptEmaError as error:
        _report(error, f"error: {error}")
        raise typer.Exit(error.exit_code) from error
    except MemoryError as error:
        message = "The machine ran out of memory; nothing was written. Try --max-memory 64MiB."
        _report(error, f"error: {message}")
        raise typer.Exit(1) from error
    except OSError as error:
        _report(error, f"error: {printable(error)}.")
        raise typer.Exit(1) from error
    except SignalError as error:
        raise typer.Exit(say_signal(error, left())) from error
    except RuntimeError as error:
        # A signal that arrives while threading hands over a lock ends in this error; its context is
        # the cause.
        if not isinstance(error.__context__, SignalError):
            raise
        raise typer.Exit(say_signal(error.__context__, left())) from error


def _report(error: BaseException, text: str) -> None:
    """Print an error, unless another rank of a launch does."""
    if not is_reported_elsewhere(error):
        say(text)


def print_result(result: "Result", *, quiet: bool, as_json: bool) -> None:
    """Print warnings, what was done, and the manifests or the path of each output.

    The output is complete: from here on the command is a success, whatever signal arrives.
    """
    from ckpt_ema.report import lines, table

    ignore_signals()
    plan = result.plan
    known = plan.warnings if plan and result.is_up_to_date else ()  # not shown at the start
    say(*lines.warning_lines([*known, *result.warnings]))
    if not quiet:
        say(lines.result_line(result))
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if plan and summary:
        with contextlib.suppress(OSError), Path(summary).open("a", encoding="utf-8") as page:
            page.write("\n".join(table.summary_lines(plan)) + "\n")
    text = ""
    if as_json:
        one, *more = result.manifests
        text = json.dumps([one, *more] if more else one, indent=2)
    print_paths(result.outputs, text, result.output)


def print_paths(paths: Sequence[Path], as_json: str, complete: Path) -> None:
    """Print the paths of outputs, or JSON instead; an error says that `complete` is there."""
    try:
        if as_json:
            typer.echo(as_json)
        for path in () if as_json else paths:
            typer.echo(os.fsencode(path))  # a terminal may lack letters of a path, not its bytes
    except OSError as error:
        raise unwritten(error, f"; {complete} is complete") from error


def leave(code: int) -> NoReturn:
    """Exit at once; a regular exit would spend a third of a second tearing torch down."""
    ignore_signals()
    with contextlib.suppress(OSError):
        if sys.stderr:
            sys.stderr.flush()
    os._exit(code)


def show(text: str) -> None:
    """Print text on stdout; a reader that has gone, such as `head`, ends the command silently."""
    try:
        typer.echo(text)
    except BrokenPipeError as error:
        unwritten(error)
        raise typer.Exit(128 + signal.SIGPIPE) from error
    except OSError as error:
        raise unwritten(error) from error


def unwritten(error: OSError, but: str = "") -> FailedError:
    """Give up stdout, whose buffer Python would try to write again; return the error to raise."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    message = f"stdout cannot be written: {error.strerror}{but}."
    return FailedError(message, code=Code.WRITE_FAILED)


def say(*texts: str) -> None:
    """Print texts on stderr; a terminal gets them with no word broken in two."""
    for text in texts:
        with contextlib.suppress(OSError):  # a full or closed stderr must not change the result
            if sys.stderr and sys.stderr.isatty() and "\n" not in text:
                columns = shutil.get_terminal_size().columns
                text = textwrap.fill(text, columns, break_long_words=False, break_on_hyphens=False)
            typer.echo(text, err=True)
