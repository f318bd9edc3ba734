"""Runs a command after each publication, in the background and one at a time."""

import shlex
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

from ckpt_ema.watching.events import Kind, Reporter


class Hook(AbstractContextManager["Hook"]):
    """A command, with the path in place of `{}` or as its last word; waits for it at the end."""

    def __init__(self, command: str | None, reporter: Reporter) -> None:
        """Without a command, nothing is run."""
        self._command, self._reporter = command, reporter
        self._running: subprocess.Popen[bytes] | None = None
        self._next: Path | None = None  # published while the command was running

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None or issubclass(error, Exception):  # after a signal it is left to itself
            while self._running:
                if self._running.poll() is None:
                    text = "waiting for the command of --on-publish to end"
                    self._reporter.tell(Kind.WAITING, text)
                self._running.wait()
                self.look()

    def run(self, path: Path) -> None:
        """Run the command on a path; while one is running, only the newest path waits."""
        if self._command:
            self._next = path
            self.look()

    def look(self) -> None:
        """See whether the command has ended, and start the one that waits."""
        if self._running:
            code = self._running.poll()
            if code is None:
                return
            self._running = None
            if code:
                how = f"exit code {code}" if code > 0 else f"signal {-code}"
                text = f"the command of --on-publish failed with {how}: {self._command}"
                self._reporter.tell(Kind.WARNING, text)
        if self._next is not None and self._command:
            path, self._next = shlex.quote(str(self._next)), None
            has_place = "{}" in self._command
            text = self._command.replace("{}", path) if has_place else f"{self._command} {path}"
            try:
                self._running = subprocess.Popen(
                    ["sh", "-c", text],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # the watch's own is for paths or JSON
                )
            except OSError as error:
                text = f"the command of --on-publish cannot be started: {error.strerror}"
                self._reporter.tell(Kind.WARNING, text)
