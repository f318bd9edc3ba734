"""Install ckpt-ema without torch and numpy, and run the smoke test and all tests that need neither.

    python scripts/test_without_torch.py
    python scripts/test_without_torch.py python3.12 /opt/python/bin/python

Without arguments it takes those of Python 3.10, 3.12 and 3.13 that it finds. One wheel, built by
the first, is installed for each. Nothing but pip uses the network, and nothing stays behind.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import environment

_VERSIONS = ("3.10", "3.12", "3.13")
_TOOLS = ("hypothesis", "pytest")
_REQUIREMENTS = """
from importlib.metadata import requires
needed = [one for one in requires("ckpt-ema") if "extra ==" not in one]
print(*(one for one in needed if not one.startswith("torch")))
"""
_CHECK = """
import sys
from importlib.util import find_spec
from ckpt_ema.fold import native
assert native.__file__.startswith(sys.prefix), "PYTHONPATH leads elsewhere"
assert not find_spec("torch") and not find_spec("numpy"), "torch or numpy is installed"
assert native.compiled(), native.reason()
"""


def main(given: list[str]) -> int:
    """Test each interpreter; return the first exit code that is not 0."""
    interpreters = given or [found for version in _VERSIONS if (found := _found(version))]
    if not interpreters:
        sys.exit(f"test_without_torch: found none of Python {', '.join(_VERSIONS)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = environment.copy_sources(folder)
        wheel = _wheel(interpreters[0], sources, folder)
        # The tests would import these sources, which lack the module, not what is installed.
        shutil.rmtree(sources / "ckpt_ema")
        for number, interpreter in enumerate(interpreters):
            python = _environment(interpreter, folder / f"venv-{number}")
            _install(python, wheel)
            if code := _test(python, sources):
                return code
    return 0


def _found(version: str) -> str | None:
    """Return an interpreter of a version: pyenv's newest, or the one on the path."""
    of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(of_pyenv[-1]) if of_pyenv else shutil.which(f"python{version}")


def _environment(interpreter: str, folder: Path) -> str:
    """Make a virtual environment; return its interpreter."""
    environment.run("making an environment", [interpreter, "-m", "venv", str(folder)])
    return str(folder / "bin" / "python")


def _wheel(interpreter: str, sources: Path, folder: Path) -> str:
    """Build the wheel by an interpreter; return its path."""
    python = _environment(interpreter, folder / "venv-of-the-build")
    command = [python, "-m", "pip", "wheel", "--no-deps", "-w", str(folder), str(sources)]
    environment.run("building the wheel", command, CKPT_EMA_BUILD="strict")
    [wheel] = folder.glob("*.whl")
    return str(wheel)


def _install(python: str, wheel: str) -> None:
    """Install the wheel, what it needs except torch, and what the tests need."""
    elsewhere = Path(python).parent  # not where Python would find the sources
    pip = [python, "-m", "pip", "install"]
    environment.run("installing the wheel", [*pip, "--no-deps", wheel])
    asked = [python, "-c", _REQUIREMENTS]
    needed = subprocess.check_output(asked, cwd=elsewhere, text=True).split()
    environment.run("installing what it needs", [*pip, *needed, *_TOOLS])
    environment.run("checking the environment", [python, "-c", _CHECK], elsewhere)


def _test(python: str, sources: Path) -> int:
    """Run the smoke test and the tests; return the exit code of the first that fails, or 0."""
    print(f"== {_version(python)}", flush=True)
    # These are about the sources of the package, which are not here.
    ignored = ["--ignore=tests/test_build.py", "--ignore=tests/test_structure.py"]
    options = ["-p", "no:cacheprovider", *ignored]
    for command in (["scripts/smoke.py"], ["-m", "pytest", *options]):
        if code := subprocess.run([python, *command], cwd=sources).returncode:
            return code
    return 0


def _version(python: str) -> str:
    return subprocess.check_output([python, "--version"], text=True).strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
