"""What the command imports."""

import subprocess
import sys


def imported_by(*words: object) -> set[str]:
    """Run the command, which must not fail, and return the modules that it imports.

    Those that Python imports at each start, here, are not among them.
    """
    return _imported("-m", "ckpt_ema", *map(str, words)) - _imported("-c", "pass")


def _imported(*words: str) -> set[str]:
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[-1].strip() for line in lines}
