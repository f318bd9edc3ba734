"""Running commands through the shell, several at a time; what they print is kept in part."""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import IO, Any, NamedTuple

_KEPT_BYTES = 1 << 20  # of the end of each stream
_READ_BYTES = 1 << 16
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
_DRAIN_SECONDS = 1.0  # for what a process outside of the group may still write


class Command(NamedTuple):
    """A command for the shell, and variables beside those of this process."""

    text: str
    variables: Mapping[str, str]


class Ended(NamedTuple):
    """How a command ended."""

    code: int | None  # negative: the signal that killed it; None: it took too long
    stdout: str  # the end of it
    stderr: str
    seconds: float


def run_commands(
    commands: Sequence[Command], jobs: int, timeout_seconds: float | None
) -> Generator[tuple[int, Ended], None, None]:
    """Run commands, at most `jobs` at a time; yield the number of each one as it ends, and how.

    Each has a process group of its own. The group is killed when the command has ended or takes
    longer than `timeout_seconds`, and when the generator is closed: nothing keeps running.
    """
    waiting = deque(enumerate(commands))
    running: list[_Running] = []
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_Running(*waiting.popleft(), selector))
                _read(selector, _POLL_SECONDS)
                for one in [*running]:
                    is_late = timeout_seconds is not None and one.seconds > timeout_seconds
                    if one.process.poll() is None and not is_late:
                        continue
                    _end([one], _GRACE_SECONDS if is_late else 0)
                    running.remove(one)
                    yield one.number, one.ended(is_late)
        finally:
            _end(running, _GRACE_SECONDS)
            for one in running:
                one.close()


class _Running:
    """A command that has been started, with the end of what it has printed."""

    def __init__(self, number: int, command: Command, selector: selectors.BaseSelector) -> None:
        self.number = number
        self._selector = selector
        self._start = time.monotonic()
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", command.text],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **command.variables},
            start_new_session=True,
        )
        self._tails = {stream: bytearray() for stream in self._streams}
        for stream, tail in self._tails.items():
            selector.register(stream, selectors.EVENT_READ, tail)

    @property
    def _streams(self) -> list[IO[bytes]]:
        return [stream for stream in (self.process.stdout, self.process.stderr) if stream]

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self._start

    def send_signal(self, number: int) -> bool:
        """Send a signal, 0 for none, to the processes of the group; return whether it has any."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:  # of another user, as under sudo
            return number == 0
        return True

    def ended(self, is_late: bool) -> Ended:
        """Read what is left of its output, and return how it ended."""
        seconds, deadline = self.seconds, time.monotonic() + _DRAIN_SECONDS
        while _read(self._selector, 0) and time.monotonic() < deadline:
            pass
        self.close()
        stdout, stderr = (
            tail[-_KEPT_BYTES:].decode(errors="replace") for tail in self._tails.values()
        )
        return Ended(None if is_late else self.process.wait(), stdout, stderr, round(seconds, 3))

    def close(self) -> None:
        """Close its streams."""
        for stream in self._tails:
            with contextlib.suppress(KeyError):
                self._selector.unregister(stream)
            stream.close()


def _read(selector: selectors.BaseSelector, seconds: float) -> bool:
    """Wait for output of any command and read some of it; return whether there was any."""
    if not selector.get_map():
        time.sleep(seconds)
        return False
    ready = selector.select(seconds)
    for key, _ in ready:
        stream: Any = key.fileobj
        tail: bytearray = key.data
        data = stream.read(_READ_BYTES)
        if not data:
            selector.unregister(stream)
        tail += data
        if len(tail) > 2 * _KEPT_BYTES:
            del tail[:-_KEPT_BYTES]
    return bool(ready)


def _end(running: Sequence[_Running], grace_seconds: float) -> None:
    """End the groups of commands: all at first gently, then what is left after a while."""
    deadline = time.monotonic() + grace_seconds
    left = [one for one in running if grace_seconds and one.send_signal(signal.SIGTERM)]
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        # A process that has ended is one of its group until it is waited for.
        left = [one for one in left if one.process.poll() is None or one.send_signal(0)]
    for one in running:
        one.send_signal(signal.SIGKILL)
        one.process.wait()
