"""Make the virtual environments in which the other scripts run: this project and what they need.

`.venv/` in the repository has the tests and tools; whatever else was in that folder is replaced.
Where only the compiled fold has changed, it alone is built again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
_COMPILED_FROM = ("native/fold.c", "setup.py", "ckpt_ema/__init__.py")  # the last has the version
_LINES_SHOWN = 20


@dataclass(frozen=True)
class Environment:
    """A virtual environment: where it is, what pip installs into it, which files decide that."""

    folder: Path
    installs: tuple[tuple[str, ...], ...]  # arguments of pip install, run one after the other
    decided_by: tuple[str, ...]  # files in the repository

    @property
    def interpreter(self) -> Path:
        """Its Python."""
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """A file that names what it was made from; it is written last."""
        return self.folder / "ckpt-ema-environment"

    def digest(self) -> str:
        """Name everything that it depends on; an editable install knows its own path."""
        return _digest(f"{sys.version}\n{REPOSITORY}\n{self.installs}\n", self.decided_by)


DEVELOPMENT = Environment(
    REPOSITORY / ".venv",
    (("-c", "constraints.txt", "-e", ".[dev]"),),
    ("pyproject.toml", "constraints.txt"),
)


def python(environment: Environment = DEVELOPMENT) -> Path:
    """Return the interpreter of an environment, which is made first if it is not up to date."""
    stamp = environment.stamp
    # An environment whose making was interrupted has no stamp and is made again.
    is_made = stamp.is_file() and environment.interpreter.exists()
    found = stamp.read_text().split() if is_made else []
    wanted = [environment.digest(), _digest("", _COMPILED_FROM)]
    if found != wanted:
        if found[:1] == wanted[:1]:
            _install(environment, "--no-deps", "-e", ".")
        else:
            _make(environment)
        stamp.write_text("\n".join(wanted))
    return environment.interpreter


def enter(environment: Environment = DEVELOPMENT) -> None:
    """Start the calling script again in an environment, unless it is there already.

    From then on Ctrl-C ends the script with one line, even while it imports.
    """
    interpreter = python(environment)
    if not environment.folder.samefile(sys.prefix):
        os.execv(interpreter, [str(interpreter), *sys.argv])
    signal.signal(signal.SIGINT, _stop)


def run(action: str, command: list[str], folder: Path = REPOSITORY, **variables: str) -> None:
    """Run a command in silence; if it fails, show the end of what it said and exit."""
    try:
        finished = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except KeyboardInterrupt:
        _exit(f"interrupted while {action}; the next run starts that again", code=130)
    if finished.returncode != 0:
        tail = "\n".join(finished.stdout.splitlines()[-_LINES_SHOWN:])
        _exit(f"{action} failed (exit code {finished.returncode}); its last lines were:\n{tail}")


def copy_sources(folder: Path) -> Path:
    """Copy the repository without what was built or installed in it; return where it is."""
    hidden = (".git", ".venv*", ".demo", ".bench", ".hypothesis", ".*_cache")
    made = ("build", "dist", "*.egg-info", "*.so", "__pycache__")
    left_out = shutil.ignore_patterns(*hidden, *made)
    return Path(shutil.copytree(REPOSITORY, folder / "sources", ignore=left_out))


def _digest(text: str, names: Iterable[str]) -> str:
    """Return a digest of a text and of files in the repository."""
    digest = hashlib.sha256(text.encode())
    for name in names:
        digest.update((REPOSITORY / name).read_bytes())
    return digest.hexdigest()


def _make(environment: Environment) -> None:
    name = environment.folder.name
    print(f"environment: installing into {name} (once; torch takes a while)", file=sys.stderr)
    run(f"making {name}", [sys.executable, "-m", "venv", "--clear", str(environment.folder)])
    (environment.folder / ".gitignore").write_text("*\n")
    for arguments in environment.installs:
        _install(environment, *arguments)


def _install(environment: Environment, *arguments: str) -> None:
    """Install by pip; where the compiled fold can be built, it has to be, without a warning."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    can_compile = shutil.which("cc") is not None and header.is_file()
    pip = [str(environment.interpreter), "-m", "pip", "install", "--disable-pip-version-check"]
    run("installing", [*pip, *arguments], CKPT_EMA_BUILD="strict" if can_compile else "")


def _stop(_signal: int, _frame: FrameType | None) -> None:
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def _exit(reason: str, code: int = 1) -> NoReturn:
    print(f"environment: {reason}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    print(python())
