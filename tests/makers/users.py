"""Other users of the machine, whom root can act as."""

import os
import stat
from pathlib import Path

import pytest

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as somebody else")


def be_nobody() -> None:
    """Be the user nobody from now on."""
    os.setgroups([])
    os.setreuid(65534, 65534)


def let_others_in(run: Path) -> None:
    """Let other users read a run; pytest's folders are for their owner alone."""
    for folder in (run, *run.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            folder.chmod(0o755)
