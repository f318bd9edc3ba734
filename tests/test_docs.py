"""What README, docs and scripts promise is true."""

import ast
import doctest
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ckpt_ema.report import trainers
from ckpt_ema.trainers.table import TRAINERS
from tests.command import ckpt_ema
from tests.conftest import MakeRun, noise, read_safetensors, series
from tests.makers.winding_run import winding_run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TRAINERS_PAGE = (ROOT / "docs" / "trainers.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
POST_TRAINING = ROOT / "scripts" / "post_training.sh"


# --- README and docs -----------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 7000


def test_the_readme_shows_both_commands_on_its_first_screen() -> None:
    first_screen = README.splitlines()[:24]
    for command in ("python scripts/demo.py", "python scripts/test.py"):
        assert any(command in line for line in first_screen)


def test_the_readme_shows_what_plan_prints(make_run: MakeRun) -> None:
    """All but the paths and sizes of the demo, which takes two minutes to train."""
    run = make_run(series(20, w=noise(20, 4)), range(50, 1001, 50))
    shown = re.search(r"\$ ckpt-ema plan \S+ (.*)\n(?s:(.*?))```", README)
    assert shown
    done = ckpt_ema("plan", run, *shown[1].split())
    assert done.returncode == 0, done.stderr
    part = slice(1, -3)  # without the paths above and the sizes below
    assert shown[2].splitlines()[part] == done.stdout.splitlines()[part]


def test_the_page_about_output_shows_what_a_report_prints(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(series(20, w=noise(20, 50)), range(50, 1001, 50), name=".demo/run")
    page = (ROOT / "docs" / "output.md").read_text()
    shown = re.search(r"\$ ckpt-ema (.*--report (\S+).*)\n((?:[^`].*\n)*)```", page)
    assert shown
    done = ckpt_ema(*shown[1].split(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, shown[3])
    assert (tmp_path / shown[2]).read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("words", ["inspect runs/", "compare runs@600 runs@700"])
def test_the_page_on_inspecting_shows_what_is_printed(
    words: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the last line of stdout, which has the time that it took."""
    monkeypatch.chdir(winding_run(make_run).parent)
    page = (ROOT / "docs" / "inspect.md").read_text()
    shown = page.split(f"$ ckpt-ema {words}\n")[1].split("\n```")[0]
    done = ckpt_ema(*words.split(), cwd=Path.cwd())
    *printed, _ = done.stdout.splitlines()
    assert shown.splitlines()[: len(printed)] == printed
    assert " ".join(shown.splitlines()[len(printed) + 1 :]) == done.stderr.strip()


def test_the_page_on_verifying_shows_what_is_printed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(winding_run(make_run).parent)
    page = (ROOT / "docs" / "verify.md").read_text()
    whole, damaged = re.findall(r"\$ ckpt-ema verify runs-ema\n((?:[^`].*\n)*)```", page)
    ckpt_ema("average", "runs", cwd=Path.cwd())
    assert ckpt_ema("verify", "runs-ema", cwd=Path.cwd()).stderr == whole
    path = Path("runs-ema/model.safetensors")
    content = bytearray(path.read_bytes())
    place = int(re.search(r"at byte (\d+)", damaged)[1])  # type: ignore[index]
    content[place] ^= 1
    path.write_bytes(content)
    done = ckpt_ema("verify", "runs-ema", cwd=Path.cwd())
    assert (done.returncode, done.stderr) == (1, damaged)


def test_the_page_on_selecting_shows_what_select_prints(make_run: MakeRun, tmp_path: Path) -> None:
    """With the losses that the page shows, which are those of the demo."""
    run = make_run(series(20, w=noise(20, 4)), range(50, 1001, 50))
    page = (ROOT / "docs" / "select.md").read_text()
    block = page.split("```console\n$ ckpt-ema ")[1].split("```")[0]
    words, shown = shlex.split(block.split("...\n")[0].replace("\\\n", "")), block.split("...\n")[1]
    losses = re.findall(r"^(\S+): loss (\S+)", shown, re.MULTILINE)
    assert len(losses) == 5
    cases = "".join(f"{name}) echo loss={loss};;" for name, loss in losses)
    words[words.index("--eval") + 1] = f"case $CKPT_EMA_CANDIDATE in {cases} esac # {{}}"
    words[words.index(".demo/run")] = str(run)
    done = ckpt_ema(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "selected\n"), done.stderr
    printed = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    printed = printed[-len(shown.splitlines()) :]
    seconds = re.compile(r" in \S+ s$")
    assert [seconds.sub("", line) for line in printed] == [
        seconds.sub("", line) for line in shown.splitlines()
    ]


def test_the_page_about_runs_that_go_on_shows_what_is_printed(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """Of checkpoints that come one or two at a time; all but the times, which are other ones."""
    steps = [100, 200, 300, 400, 500]
    make_run(series(5, w=[1 + one / 100 for one in noise(5, 4)]), steps, name="all")
    page = (ROOT / "docs" / "update.md").read_text()
    shown = re.findall(r"\$ ckpt-ema (.*)\n((?:(?!\$)[^`].*\n)*)", page)
    assert [words.split()[0] for words, _ in shown] == ["average", "update", "watch"]
    (tmp_path / "runs").mkdir()
    for (words, output), new in zip(shown, (steps[:2], steps[2:3], steps[3:]), strict=True):
        for step in new:
            name = f"checkpoint-{step}"
            (tmp_path / "all" / name).rename(tmp_path / "runs" / name)
        interval = ["--interval", "0.05"] if words.startswith("watch") else []
        done = ckpt_ema(*words.split(), *interval, cwd=tmp_path)
        assert done.returncode == 0
        printed = f"{done.stderr}{done.stdout}".replace(str(tmp_path), "/data")
        time = re.compile(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
        assert time.sub("", printed) == time.sub("", output)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_in_python_are_true(
    page: Path, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run beside `runs/`, which has five checkpoints."""
    make_run(series(5, w=noise(5, 4)), [100, 200, 300, 400, 500], name="runs")
    monkeypatch.chdir(tmp_path)
    assert doctest.testfile(str(page), module_relative=False).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    paths = re.findall(r"`(?:python )?((?:ckpt_ema|tests|scripts|docs|dev|\.ci)/[\w./]+)", text)
    for path in [page.parent / link for link in links] + [ROOT / path for path in paths]:
        assert path.exists(), path


def test_every_option_that_a_page_names_exists() -> None:
    known = {"--array", "--inplace", "--nproc-per-node", "--wrap"}  # of other programs
    known |= {"--version", "--verbose"}  # of no command
    commands = ("average", "plan", "inspect", "compare", "finish", "formats")
    for command in (*commands, "update", "watch", "verify", "select"):
        known |= options_of_command(command)
    for script in (ROOT / "scripts").glob("*.py"):
        known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', script.read_text()))
    named = {
        option
        for page in PAGES
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text())
    }
    assert named - known == set()
    assert len(named) > 40


def options_of_command(name: str) -> set[str]:
    """Return the options in the help of a command; a flag can be written both ways."""
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_ema", name, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    found = set(re.findall(r"--[a-z][a-z-]+", done.stdout))
    return found | {option.replace("--no-", "--") for option in found}


def test_an_issue_begins_with_the_explained_plan() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    texts = [field["attributes"].get("description", "") for field in form["body"]]
    assert any("ckpt-ema plan RUN --explain --json" in text for text in texts)


# --- Trainers ------------------------------------------------------------------------------------


def test_the_table_of_trainers_is_the_one_that_the_command_prints() -> None:
    table = TRAINERS_PAGE.split("--markdown` -->\n")[1].split("\n<!-- end -->")[0]
    assert table.splitlines() == trainers.markdown()


def test_every_trainer_that_is_read_has_lines_that_load_its_result() -> None:
    read = [trainer.name for tier in "12" for trainer in TRAINERS if trainer.tier == tier]
    assert [name for name, _ in loading()] == read
    for name, lines in loading():
        code = [line for line in re.findall(r"`([^`]+)`", lines) if re.search(r"\w\(", line)]
        assert code, name
        for line in code:
            ast.parse(line)


def loading() -> Iterator[tuple[str, str]]:
    """Yield the rows of the table of how to load results: a trainer and the lines."""
    table = TRAINERS_PAGE.split("| Trainer | Load with |\n|---|---|\n")[1].split("\n\n")[0]
    for row in table.splitlines():
        name, _, lines = row.strip("| ").partition(" | ")
        yield name, lines


# --- Scripts -------------------------------------------------------------------------------------


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
