"""Run tests of the compiled fold under gcc's AddressSanitizer and UndefinedBehaviorSanitizer.

    python scripts/sanitize.py
    python scripts/sanitize.py tests/test_native.py -k version

Arguments are those of pytest, in place of the modules named here. The instrumented module is built
in a copy of the repository, which is removed; the one in use stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import environment

TESTS = [
    *("tests/test_native.py", "tests/test_compiled.py"),
    *("tests/test_sums.py", "tests/test_without_torch.py"),
]
_SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"
_VARIABLES = {
    "CC": "gcc",
    "CFLAGS": f"{_SANITIZERS} -fno-omit-frame-pointer -g",
    "LDFLAGS": _SANITIZERS,
    "CKPT_EMA_BUILD": "strict",
    # Python itself leaks at exit, and its own allocator would hide what runs out of a block.
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "PYTHONMALLOC": "malloc",
}


def main(arguments: list[str]) -> int:
    """Build the module, run the tests; return the exit code."""
    if shutil.which("gcc") is None:
        sys.exit("sanitize: gcc is not installed")
    python = str(environment.python())
    library = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
    with tempfile.TemporaryDirectory() as name:
        sources = environment.copy_sources(Path(name))
        build = [python, "setup.py", "build_ext", "--inplace"]
        environment.run("building the module", build, sources, **_VARIABLES)
        test = [python, "-m", "pytest", "-p", "no:cacheprovider", *(arguments or TESTS)]
        variables = {**os.environ, **_VARIABLES, "LD_PRELOAD": library}
        return subprocess.run(test, cwd=sources, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
