"""Of every case of the corpus: the exit code, the message, the time, the memory, what is left.

Each is the command in a process of its own, on a good run that the case has made bad.
"""

import os
import pickle
import re
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ckpt_ema.trainers.conventions import MANIFEST_NAME
from tests.command import Command, Done, ckpt_ema
from tests.conftest import read_safetensors
from tests.corpus import CASES
from tests.corpus.case import Case, good_run
from tests.corpus.running import prepare
from tests.corpus.torch_files import hostile, protocol_0

# Every sentence, to be read side by side; written anew by `pytest -n 0 --write-messages FILE`.
MESSAGES = Path(__file__).parent / "corpus" / "messages.txt"
CPU_SECONDS, GROWN_BYTES = 10.0, 100 << 20

PARAMETERS = [
    pytest.param(name, case, id=name, marks=[pytest.mark.sweep] * case.is_slow)
    for section, cases in CASES.items()
    for name, case in ((f"{section}: {case.name}", case) for case in cases)
]


def contents(folder: Path) -> dict[str, Any]:
    """What is below a folder, links and strange files included, without following any."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        what = path.lstat()
        found[str(path)] = stat.S_IFMT(what.st_mode)
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif stat.S_ISREG(what.st_mode):
            found[str(path)] = what.st_size, what.st_mtime_ns, what.st_ino
    return found


def messages() -> dict[str, list[str]]:
    """Read the golden file: of each case the lines that the user sees."""
    found: dict[str, list[str]] = {}
    for line in MESSAGES.read_text().splitlines():
        if line.startswith("    "):
            found[next(reversed(found))].append(line.strip())
        elif line:
            found[line] = []
    return found


def write_message(name: str, lines: list[str]) -> None:
    """Put the lines of one case into the golden file."""
    known = {**messages(), name: lines}
    names = [f"{section}: {case.name}" for section, cases in CASES.items() for case in cases]
    blocks = ["\n    ".join([one, *known[one]]) for one in names if one in known]
    MESSAGES.write_text("\n".join(blocks) + "\n")


def lines_seen(done: Done, run: Path, output: Path) -> list[str]:
    """Return the warnings and the error; and the notes that an ordinary run does not get."""
    text = done.stderr.replace(str(output), "OUT").replace(str(run), "RUN")
    lines = text.replace(str(run.parent), "FOLDER").splitlines()
    if done.returncode:
        return lines[-1:] if done.returncode == 2 else lines
    ordinary = ("note: Only", "note: --decay", "note: I64")
    said = [line for line in lines if line.startswith(("warning: ", "note: "))]
    return [line for line in said if not line.startswith(ordinary)]


def check_words(lines: list[str], case: Case) -> None:
    """Check that an error is one printable sentence, about the thing that is wrong."""
    assert all(line.isprintable() and "Traceback" not in line for line in lines)
    assert not any("error: " in line for line in lines) or case.code
    if case.says:
        assert re.search(case.says, lines[-1]), lines
    if case.code:
        [line] = lines
        assert case.names in line
        assert case.code not in (1, 3) or re.fullmatch(r"error: .*\.", line)


@pytest.mark.parametrize(("name", "case"), PARAMETERS)
def test_what_the_user_sees_and_what_is_left(
    name: str, case: Case, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run, output = tmp_path / "run", tmp_path / "out"
    good_run(run, case.form)
    case.make(run)
    before = contents(tmp_path)
    words = ["average", case.run, "-o", "OUT", "--device", "cpu", *["-q"] * bool(case.code)]
    words = [w.replace("RUN", str(run)).replace("OUT", str(output)) for w in (*words, *case.words)]
    needed = case.before or case.during
    prepared = partial(prepare, case.before, case.during, run) if needed else None
    done = ckpt_ema(*words, before=prepared, cwd=tmp_path)
    assert done.returncode == case.code, done.stderr
    lines = lines_seen(done, run, output)
    check_words(lines, case)
    if not case.says:
        if request.config.getoption("write_messages"):
            write_message(name, lines)
        assert lines == messages()[name]
    assert done.cpu_seconds < CPU_SECONDS * (1 + 9 * case.is_slow)
    assert done.grown_bytes < GROWN_BYTES * (1 + 9 * case.is_slow)
    after = contents(tmp_path)
    new = {path for path in after.keys() - before.keys() if not Path(path).is_relative_to(output)}
    if not case.during:
        assert {path: after.get(path) for path in before} == before
        assert new == set()
    assert {Path(path) for path in new} <= set(run.rglob("*"))
    if case.publishes:
        files = sorted(output.glob("*.safetensors"))
        assert all(read_safetensors(file) for file in files)
        assert files
    else:  # but for what another run has written meanwhile
        assert not (output / MANIFEST_NAME).exists()
        assert case.during or not output.exists()
    assert done.stdout == (f"{output}\n" if case.code == 0 else "")


def test_hostile_files_are_no_duds(tmp_path: Path) -> None:
    """What they would do is done where they are unpickled."""
    good_run(tmp_path / "run", "zip")
    hostile(protocol_0, ".bin")(tmp_path / "run")
    pickle.loads((tmp_path / "run/checkpoint-2/pytorch_model.bin").read_bytes())
    assert (tmp_path / "mark").exists()


def test_of_two_runs_to_one_output_one_wins_and_the_other_says_so(tmp_path: Path) -> None:
    good_run(tmp_path / "run", "safetensors")
    words = ("average", tmp_path / "run", "-o", tmp_path / "out", "--device", "cpu", "-q")
    racing = [Command(*words, "--decay", decay) for decay in ("0.1", "0.2")]
    won, lost = sorted((one.wait() for one in racing), key=lambda done: done.returncode)
    assert (won.returncode, won.stderr, lost.returncode) == (0, "", 3)
    assert re.search("another run wrote it|is not this average", lost.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_a_terminal_without_letters_gets_the_plan(tmp_path: Path) -> None:
    """ASCII alone, and a name that has others."""
    run = tmp_path / "läufe"
    good_run(run, "safetensors")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_ema", "plan", run],
        capture_output=True,
        env={**os.environ, **ascii_only},
    )
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert b"checkpoint-3" in done.stdout
