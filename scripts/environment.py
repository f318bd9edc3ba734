"""Make the virtual environment in which the other scripts run: this project, its tests, its tools.

It is `.venv/` in the repository; whatever else was in that folder is replaced.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = REPOSITORY / ".venv"
_STAMP = ENVIRONMENT / "ckpt-ema-environment"
_PYTHON = ENVIRONMENT / "bin" / "python"
_LINES_SHOWN = 20


def python() -> Path:
    """Return the interpreter of the environment, which is made first if it is not up to date."""
    wanted = _digest()
    # The stamp is written last, so an environment whose making was interrupted is made again.
    if not (_STAMP.is_file() and _STAMP.read_text() == wanted and _PYTHON.exists()):
        print("environment: installing into .venv (once; torch takes a while)", file=sys.stderr)
        _run("making .venv", [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)])
        install = [str(_PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
        _run("installing", [*install, "-c", "constraints.txt", "-e", ".[dev]"])
        _STAMP.write_text(wanted)
    return _PYTHON


def enter() -> None:
    """Start the calling script again in the environment, unless it is there already.

    From then on Ctrl-C ends the script with one line, even while it imports.
    """
    interpreter = python()
    if not ENVIRONMENT.samefile(sys.prefix):
        os.execv(interpreter, [str(interpreter), *sys.argv])
    signal.signal(signal.SIGINT, _stop)


def _digest() -> str:
    """Name everything that the environment depends on; an editable install knows its own path."""
    digest = hashlib.sha256(f"{sys.version}\n{REPOSITORY}\n".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((REPOSITORY / name).read_bytes())
    return digest.hexdigest()


def _run(action: str, command: list[str]) -> None:
    """Run a command in silence; if it fails, show the end of what it said and exit."""
    try:
        finished = subprocess.run(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except KeyboardInterrupt:
        _exit(f"interrupted while {action}; the next run starts that again", code=130)
    if finished.returncode != 0:
        tail = "\n".join(finished.stdout.splitlines()[-_LINES_SHOWN:])
        _exit(f"{action} failed (exit code {finished.returncode}); its last lines were:\n{tail}")


def _stop(_signal: int, _frame: FrameType | None) -> None:
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def _exit(reason: str, code: int = 1) -> NoReturn:
    print(f"environment: {reason}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    print(python())
