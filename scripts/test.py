"""Check everything: format, lint, types, tests. Arguments are passed on to pytest."""

from __future__ import annotations

import subprocess
import sys

import environment

_STEPS = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "types": ["mypy"],
    "tests": ["pytest", "-n", "auto"],
}


def main(pytest_arguments: list[str]) -> int:
    """Run the steps in order; return the exit code of the first that fails, or 0."""
    interpreter = str(environment.python())
    for name, tool in _STEPS.items():
        arguments = pytest_arguments if name == "tests" else []
        print(f"== {name}: {' '.join([*tool, *arguments])}", flush=True)
        command = [interpreter, "-m", *tool, *arguments]
        code = subprocess.run(command, cwd=environment.REPOSITORY).returncode
        if code != 0:
            return code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
