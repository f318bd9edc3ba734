"""The package builds without a compiler; our own builds say what they could not build."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mode", ["", "strict"])
def test_without_a_compiler_only_our_own_builds_fail(tmp_path: Path, mode: str) -> None:
    made = [f"--build-{kind}={tmp_path / kind}" for kind in ("lib", "temp")]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *made],
        cwd=ROOT,
        env={**os.environ, "CC": "/bin/false", "CKPT_EMA_BUILD": mode},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (1 if mode else 0), done.stderr
    assert "native/fold.c" in done.stderr  # says what it could not build
    assert not [*(tmp_path / "lib").rglob("*.so")]
