"""The plan on a terminal of any width, with or without colours and blocks, and its explanation."""

import io
from pathlib import Path
from typing import Any

import pytest

import ckpt_ema
from ckpt_ema.containers.specs import Role
from ckpt_ema.find.verdict import Judged, Outcome, Verdict
from ckpt_ema.find.verdict import Reason as EntryReason
from ckpt_ema.planning.roles import Reason, TensorRole
from ckpt_ema.report.explain import explanation
from ckpt_ema.report.table import markdown_lines
from ckpt_ema.report.terminal import plan_text
from tests.conftest import MakeRun, noise, series


class Terminal(io.StringIO):
    """A stream with an encoding, on a terminal or not."""

    def __init__(self, encoding: str = "utf-8", is_terminal: bool = False) -> None:
        super().__init__()
        self._encoding, self._is_terminal = encoding, is_terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """Five checkpoints, 1000 steps apart."""
    return make_run(series(5, w=noise(5, 5)), steps=range(1000, 6000, 1000))


def shown(run: Path, stream: Terminal | None = None, rows: int = 24, **options: Any) -> list[str]:
    """The lines of a plan."""
    return plan_text(ckpt_ema.plan(run, **options), stream or Terminal(), rows).splitlines()


def test_one_average_on_80_columns(run: Path) -> None:
    lines = shown(run, half_life=1000, output="averaged")
    assert lines == [
        f"{run} -> averaged",
        "half-life 1000 steps; 5 checkpoints",
        "",
        "  checkpoint       step   gap   decay  weight",
        "  checkpoint-1000  1000     -       -   6.25%  ███▊",
        "  checkpoint-2000  2000  1000  0.5000   6.25%  ███▊",
        "  checkpoint-3000  3000  1000  0.5000  12.50%  ███████▌",
        "  checkpoint-4000  4000  1000  0.5000  25.00%  ███████████████",
        "  checkpoint-5000  5000  1000  0.5000  50.00%  ██████████████████████████████",
        "",
        "  effective number of checkpoints      3.0",
        "  mean age                             938 steps",
        "  weight on the last 10 % of training  50.0%",
        "  equivalent half-life                 1000 steps",
        "  equivalent sigma_rel                 0.209",
        "",
        "1 tensor averaged, 100 B to read, 508 B to write",
        "working memory at most 22.0 MiB",
        "also copies config.json",
    ]


def test_several_averages_side_by_side_on_80_columns(run: Path) -> None:
    lines = shown(run, half_life="1000,2000", last="2,5", output="averaged")
    assert lines[1:6] == [
        "4 averages in one pass, each in its own folder:",
        "  (1) half-life-1000-last-2: half-life 1000 steps; 2 checkpoints",
        "  (2) half-life-2000-last-2: half-life 2000 steps; 2 checkpoints",
        "  (3) half-life-1000-last-5: half-life 1000 steps; 5 checkpoints",
        "  (4) half-life-2000-last-5: half-life 2000 steps; 5 checkpoints",
    ]
    assert lines[7].split() == ["checkpoint", "step", "(1)", "(2)", "(3)", "(4)"]
    assert lines[8].split() == ["checkpoint-1000", "1000", "-", "-", "6.25%", "25.00%"]
    assert lines[12].split() == ["checkpoint-5000", "5000", "50.00%", "29.29%", "50.00%", "29.29%"]
    figures = [line for line in lines if line.startswith("  half-life (steps)")]
    assert [line.split()[2:] for line in figures] == [["1000", "2000", "1000", "2000"]]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_no_line_of_a_table_is_wider_than_the_terminal_and_no_average_is_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, width: int, count: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = shown(run, decay=[n / 100 for n in range(1, count + 1)])
    start = next(n for n, line in enumerate(lines) if line.startswith("  checkpoint"))
    end = next(n for n, line in enumerate(lines) if " to read, " in line)
    table = lines[start:end]
    assert max(map(len, table)) <= max(width, 40)
    if count > 1:
        headings = " ".join(line for line in table if line.startswith("  checkpoint  "))
        headings += " ".join(line for line in table if "(1)" in line or f"({count})" in line)
        assert f"({count})" in headings


def test_without_blocks_bars_are_of_signs_and_all_is_ascii(run: Path) -> None:
    text = "\n".join(shown(run, Terminal("ascii"), half_life=1000, output="averaged"))
    assert text.isascii()
    assert "50.00%  ##############################\n" in text
    assert " 6.25%  ####\n" in text


def test_colours_only_where_they_arrive(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" not in "\n".join(shown(run))
    assert "\x1b[" in "\n".join(shown(run, Terminal(is_terminal=True)))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in "\n".join(shown(run, Terminal(is_terminal=True)))


def test_of_many_checkpoints_the_middle_is_one_row_with_its_sum(make_run: MakeRun) -> None:
    run = make_run(series(30, w=noise(30, 2)))
    lines = shown(run, rows=9, schedule="uniform")
    rows = [line.split()[0] for line in lines if "checkpoint-" in line]
    assert rows == [
        *(f"checkpoint-{n}" for n in (1, 2)),
        *(f"checkpoint-{n}" for n in range(25, 31)),
    ]
    [hidden] = [line for line in lines if "... 22 more" in line]
    assert hidden.split() == ["...", "22", "more", "73.33%"]


def test_long_names_are_cut_and_paths_are_not(make_run: MakeRun) -> None:
    pattern = "a-long-name-that-says-everything-about-the-model-step-{}"
    run = make_run(series(2, w=noise(2, 5)), pattern=pattern, name="r" * 90)
    lines = shown(run)
    assert lines[0] == f"{run} -> {run}-ema"
    assert any(line.startswith("  a-long-name-t...e-model-step-1 ") for line in lines)


def test_names_cannot_write_on_the_terminal(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 5)), pattern="[red]\x1b[31m-step-{}")
    text = "\n".join(shown(run, Terminal(is_terminal=True)))
    assert "[red]\\x1b[31m-step-1" in text
    assert "\x1b[31m" not in text


def test_steps_that_are_unknown_are_counted_in_checkpoints(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 5)), pattern="checkpoint_{}")
    lines = shown(run)
    assert any("mean age" in line and line.endswith("checkpoints") for line in lines)


def test_the_same_as_markdown(run: Path) -> None:
    plan = ckpt_ema.plan(run, half_life="1000,2000")
    assert markdown_lines(plan, plan.averages)[:3] == [
        "| checkpoint | step | half-life-1000 | half-life-2000 |",
        "| :--- | ---: | ---: | ---: |",
        "| checkpoint-1000 | 1000 | 6.25% | 25.00% |",
    ]
    one = markdown_lines(plan, plan.averages[:1])
    assert one[0] == "| checkpoint | step | gap | decay | weight |"
    assert one[-1] == "| checkpoint-5000 | 5000 | 1000 | 0.5000 | 50.00% |"


@pytest.mark.parametrize("columns", [1, 40, 43, 50, 60, 80, 132])
@pytest.mark.parametrize("half_life", ["1000", "1,900,1000,1e9,2000,3000,4000,5000,6000,7000"])
def test_no_number_is_ever_cut(
    run: Path, monkeypatch: pytest.MonkeyPatch, columns: int, half_life: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    plan = ckpt_ema.plan(run, half_life=half_life)
    text = plan_text(plan, None, 24)
    assert "…" not in text
    words = text.split()
    for average in plan.averages:
        assert {f"{weight:.2%}" for weight in average.weights} <= set(words)
        assert f"{average.statistics.effective_number:.1f}" in words
    assert {"1000", "2000", "3000", "4000", "5000"} <= set(words)


def test_an_explanation_has_a_line_for_each_entry_and_each_pattern_of_tensors() -> None:
    judged = [
        Judged(
            Path("runs/a/step_1"), "step_1", Verdict(Outcome.STEP, EntryReason.NUMBERED, "numbered")
        ),
        Judged(
            Path("runs/a/l\x1b[31mast"),
            "last",
            Verdict(Outcome.ALIAS, EntryReason.COPY, "copies", "a copy of step_1"),
        ),
        Judged(
            Path("other/logs"),
            "logs",
            Verdict(Outcome.OTHER, EntryReason.NO_MODEL, "without weights"),
        ),
    ]
    roles = [
        TensorRole("model.layers.*.weight", Role.AVERAGED, "floats", Reason.FLOAT, 24),
        TensorRole("steps", Role.KEPT, "other dtypes", Reason.NOT_FLOAT, 1),
    ]
    assert explanation("runs/a", judged, roles).splitlines() == [
        "entry         taken for  rule             reason",
        "other/",
        "  logs        other      without weights  no model weights in it",
        "l\\x1b[31mast  alias      copies           a copy of step_1",
        "step_1        step       numbered         numbered",
        "",
        "tensors                count  role         rule          reason",
        "model.layers.*.weight  24     averaged     floats        floating point",
        "steps                  1      kept newest  other dtypes  not floating point",
    ]
