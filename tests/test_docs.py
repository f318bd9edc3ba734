"""What the README and the scripts promise is true."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_ema.report import trainers
from tests.conftest import MakeRun, noise, read_safetensors, series

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
POST_TRAINING = ROOT / "scripts" / "post_training.sh"


def test_the_readmes_examples_are_true() -> None:
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.failed == 0
    assert result.attempted >= 5


def test_the_readme_shows_both_commands_on_its_first_screen() -> None:
    first_screen = README.splitlines()[:24]
    for command in ("python scripts/demo.py", "python scripts/test.py"):
        assert any(command in line for line in first_screen)


def test_every_path_and_option_that_the_readme_names_is_there() -> None:
    for path in re.findall(r"\]\(((?:dev|scripts|benchmarks|tests)/[^)]+)\)", README):
        assert (ROOT / path).exists(), path
    help_text = "".join(
        subprocess.run(
            [sys.executable, "-m", "ckpt_ema", command, "--help"],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        ).stdout
        for command in ("average", "formats")
    )
    options = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", README)) - {
        "--help",
        "--nproc-per-node",
        "--peers",
        "--size",
        "--workdir",
    }
    assert options
    assert {option for option in options if option not in help_text} == set()


def test_the_table_of_trainers_is_the_one_that_the_command_prints() -> None:
    table = README.split("--markdown` -->\n")[1].split("\n<!-- end -->")[0]
    assert table.splitlines() == trainers.markdown()


@pytest.mark.sweep  # .ci/run begins with it
def test_the_smoke_test_passes_within_seconds() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "smoke.py")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "ok: the average of (1.0, 2.0, 3.0) is 2.704545\n"


def post_training(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the pipeline step."""
    return subprocess.run(
        [str(POST_TRAINING), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHON": sys.executable},
    )


def test_the_pipeline_step_hands_on_a_path_that_loads(make_run: MakeRun) -> None:
    run = make_run(series(3, a=noise(3, 4), b=noise(3, 5)), shards=2)
    done = post_training(run, "--decay", "0.9", "--device", "cpu")
    assert (done.returncode, done.stdout) == (0, f"{run}-ema\n"), done.stderr
    assert "checked: 2 tensors in 2 file(s) load" in done.stderr
    shards = sorted(Path(done.stdout.strip()).glob("*.safetensors"))
    assert {name for shard in shards for name in read_safetensors(shard)} == {"a", "b"}


@pytest.mark.sweep
def test_the_pipeline_step_hands_on_every_one_of_several(make_run: MakeRun) -> None:
    run = make_run(series(3, a=noise(3, 4)))
    done = post_training(run, "--last", "2,3", "--device", "cpu")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        *(f"{run}-ema/dynamic-0.999-last-2", f"{run}-ema/dynamic-0.999-last-3")
    ]
    assert done.stderr.count("checked: 1 tensors in 1 file(s) load") == 2


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["nowhere"], 3), (["RUN", "-x"], 2)])
def test_the_pipeline_step_fails_with_an_empty_stdout(
    make_run: MakeRun, arguments: list[str], code: int
) -> None:
    run = make_run(series(2, a=noise(2, 4)))
    done = post_training(*(str(run) if word == "RUN" else word for word in arguments))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr
