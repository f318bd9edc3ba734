"""The parts of a selection: metrics in what is printed, greedy soups, commands that are run."""

import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_ema.selection import commands
from ckpt_ema.selection.commands import Command, Ended, run_commands
from ckpt_ema.selection.greedy import greedy_soup
from ckpt_ema.selection.metrics import last_lines, numbers, problem_of, read_metrics
from tests.command import wait_for
from tests.makers.limits import cheap

# --- Metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stdout", "metric", "expected"),
    [
        ('{"loss": 1.5}', "loss", 1.5),
        ('{"loss": 9}\n{"loss": 1.5, "n": 2}\ndone\n', "loss", 1.5),
        ('{"loss": 1.5}\n{"time": 3}', "loss", 1.5),  # the last that has it
        ('{"results": {"hellaswag": {"acc,none": 0.25}}}', "results.hellaswag.acc,none", 0.25),
        ('{"eval.loss": 2}', "eval.loss", 2.0),
        ('noise {"loss": 1}\nloss=2', "loss", 2.0),
        ("loss=1\nloss = 2.5e-1", "loss", 0.25),
        ("loss: 1.5, acc: 3", "loss", 1.5),
        ("loss=1.5,acc=3", "loss", 1.5),
        ("acc: 93.2%", "acc", 93.2),
        ("Acc = 3.", "acc", 3.0),
        ('{\n  "loss": 1.5,\n  "n": 3\n}', "loss", 1.5),  # JSON on several lines
        ("10%\r50%\rloss=4\r100%", "loss", 4.0),
        ("loss: -.5", "loss", -0.5),
        ('{"loss": true}\nloss=3', "loss", 3.0),
        ('{"n": ' + "9" * 4000 + ', "loss": 1}', "loss", 1.0),
    ],
)
def test_the_last_metric_that_is_printed_counts(stdout: str, metric: str, expected: float) -> None:
    assert read_metrics(stdout, metric)[metric] == expected


@pytest.mark.parametrize(
    "stdout",
    [
        *("", "nothing", "loss", "loss=", "loss: high", "losses=3", "train_loss=3", "eval/loss=3"),
        *("loss: 5/10", "loss: 1,5", "loss=1.2.3", "loss=0x10", '{"loss": true}', '{"loss": "3"}'),
        *(
            '{"loss": [3]}',
            '{"loss": null}',
            '["loss", 3]',
            "{" * 100_000,
            '{"a":' * 950 + "1" + "}" * 950,
        ),
    ],
)
def test_what_is_no_number_of_that_name_is_none(stdout: str) -> None:
    assert read_metrics(stdout, "loss") == {}


@pytest.mark.parametrize(
    ("stdout", "problem"),
    [
        ('{"loss": NaN}', "loss is nan"),
        ("loss=nan", "loss is nan"),
        ("loss: -inf", "loss is -inf"),
        ('{"loss": 1e999}', "loss is inf"),
        ('{"loss": 1' + "0" * 400 + "}", "loss is inf"),
        ("", "no number called loss was reported"),
        ('{"loss": 0}', ""),
    ],
)
def test_only_a_finite_number_is_usable(stdout: str, problem: str) -> None:
    assert problem_of(read_metrics(stdout, "loss"), "loss") == problem


def test_other_metrics_are_named_if_the_one_is_missing() -> None:
    assert problem_of({"a": 1.0, "b": 2.0}, "loss").endswith("reported, only a, b")


@given(
    st.dictionaries(
        st.text(min_size=1), st.floats(allow_nan=False, allow_infinity=False), min_size=1
    ),
    st.text(),
)
def test_any_line_of_json_is_read_back(metrics: dict[str, float], before: str) -> None:
    name = min(metrics)
    assert read_metrics(f"{before}\n{json.dumps(metrics)}", name) == metrics


@given(st.floats(), st.text())
def test_any_number_after_a_name_is_read_back(value: float, before: str) -> None:
    found = read_metrics(f"{before}\nloss={value!r} s", "loss")["loss"]
    assert found == value or (math.isnan(found) and math.isnan(value))


def test_scalars_of_libraries_are_numbers() -> None:
    torch = pytest.importorskip("torch")
    reported = {"a": torch.tensor(0.5), "b": torch.tensor(True), "c": torch.ones(2), "d": "1"}
    assert numbers(reported) == {"a": 0.5}


def test_the_last_lines_have_no_control_characters() -> None:
    assert last_lines("a\n\n\x1b[31mred\nb  \n", 2) == ["\\x1b[31mred", "b"]


# --- Greedy soups --------------------------------------------------------------------------------


def test_a_greedy_soup_by_hand() -> None:
    """Points on a line, the metric is the closeness of their mean to 3."""
    points = [1.0, 4.0, 2.0, 6.0]
    asked: list[tuple[int, ...]] = []

    def closeness(members: Sequence[int]) -> float:
        asked.append(tuple(members))
        return -abs(sum(points[one] for one in members) / len(members) - 3)

    alone = [closeness([number]) for number in range(4)]
    assert alone == [-2, -1, -1, -3]
    asked.clear()
    members, steps = greedy_soup(alone, closeness, is_minimized=False)
    # 2 and 1 tie and the later is first; 2 + 1 is exact; 0 and 3 make it worse.
    assert asked == [(1, 2), (0, 1, 2), (1, 2, 3)]
    assert members == (1, 2)
    assert [(one.number, one.is_kept) for one in steps] == [
        *((2, True), (1, True), (0, False), (3, False))
    ]
    assert [one.value for one in steps] == [-1, 0, pytest.approx(-2 / 3), -1]


def test_a_tie_stays_in_the_soup_and_a_failure_does_not() -> None:
    values = {(0, 1): 5.0, (0, 1, 2): None, (0, 1, 3): 4.9}
    members, steps = greedy_soup([5.0, 5.0, 3.0, 2.0], values.get, is_minimized=False)
    assert members == (0, 1)
    assert [one.is_kept for one in steps] == [True, True, False, False]


def test_checkpoints_without_a_metric_are_left_out() -> None:
    members, steps = greedy_soup([None, 1.0, None], lambda _: 0.0, is_minimized=True)
    assert (members, len(steps)) == ((1,), 1)
    assert greedy_soup([None], lambda _: 0.0, is_minimized=True) == ((), [])


def recipe(values: list[float], score: Any) -> tuple[int, ...]:
    """Algorithm 1 of Wortsman et al. 2022, as it stands there; higher is better."""
    ingredients: list[int] = []
    for i in sorted(range(len(values)), key=lambda n: (values[n], n), reverse=True):
        if not ingredients or score([*ingredients, i]) >= score(ingredients):
            ingredients = [*ingredients, i]
    return tuple(sorted(ingredients))


POINTS = st.lists(st.integers(-8, 8).map(float), min_size=1, max_size=7)


@given(POINTS, st.integers(-8, 8), st.booleans())
def test_greedy_soups_are_those_of_the_paper_and_never_worse_than_the_best_checkpoint(
    points: list[float], target: int, is_minimized: bool
) -> None:
    sign = -1 if is_minimized else 1

    def score(members: Sequence[int]) -> float:
        """Few values, so that many tie; the same whatever the order of the members."""
        return -float(round(abs(sum(points[one] for one in members) / len(members) - target)))

    alone = [score([number]) for number in range(len(points))]
    members, steps = greedy_soup(
        [sign * one for one in alone], lambda m: sign * score(m), is_minimized=is_minimized
    )
    assert members == recipe(alone, score)
    assert score(members) >= max(alone)
    assert sorted(one.number for one in steps) == [*range(len(points))]
    assert members == tuple(sorted(one.number for one in steps if one.is_kept))


# --- Commands ------------------------------------------------------------------------------------


def ended(*texts: str, jobs: int = 1, timeout: float | None = 20) -> dict[int, Ended]:
    """Run commands to their ends."""
    return dict(run_commands([Command(text, {}) for text in texts], jobs, timeout))


def python(code: str) -> str:
    """A command of Python code that starts fast."""
    return shlex.join([sys.executable, "-S", "-E", "-c", code])


def test_a_command_has_its_streams_code_variables_and_no_stdin() -> None:
    text = "cat; echo out; echo err >&2; echo $NAME; exit 3"
    [(_, done)] = run_commands([Command(text, {"NAME": "a b"})], 1, 20)
    assert (done.code, done.stdout, done.stderr) == (3, "out\na b\n", "err\n")
    assert ended("kill -9 $$")[0].code == -9


def test_huge_output_is_kept_in_part_and_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    with cheap(8 << 20, most_seconds=10):
        done = ended("yes line | head -c 40000000; echo loss=1; printf '\\377\\n' >&2")[0]
    assert done.code == 0
    assert len(done.stdout) <= 1 << 20
    assert done.stdout.endswith("line\nloss=1\n")
    assert done.stderr == "�\n"


def test_one_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    """A child ignores SIGTERM, and one in the background too."""
    monkey = f"trap '' TERM; (trap '' TERM; sleep 60) & echo $! > {tmp_path}/pid; sleep 60"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(commands, "_GRACE_SECONDS", 0.2)
        done = ended(monkey, timeout=0.3)[0]
    assert done.code is None
    assert 0.3 <= done.seconds < 10
    wait_for(lambda: is_gone(int((tmp_path / "pid").read_text())))


def is_gone(pid: int) -> bool:
    """Whether a process has ended, if nobody has waited for it, too."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def test_one_may_clean_up_before_it_is_killed(tmp_path: Path) -> None:
    text = (
        f"trap 'sleep 0.3; touch {tmp_path}/clean; exit' TERM; touch {tmp_path}/up; sleep 60 & wait"
    )
    assert ended(text, timeout=1)[0].code is None
    assert (tmp_path / "clean").exists()


def test_what_a_command_leaves_in_the_background_is_killed(tmp_path: Path) -> None:
    """Even though it has the pipe open."""
    begin = time.monotonic()
    done = ended(f"sleep 60 & echo $! > {tmp_path}/pid; echo loss=1")[0]
    assert (done.code, done.stdout) == (0, "loss=1\n")
    assert time.monotonic() - begin < 10
    wait_for(lambda: is_gone(int((tmp_path / "pid").read_text())))


def test_a_daemon_outside_of_the_group_is_not_waited_for() -> None:
    code = "import os,time\nif not os.fork():\n os.setsid(); time.sleep(4); os._exit(0)\nprint(5)"
    begin = time.monotonic()
    assert ended(python(code))[0].stdout == "5\n"
    assert time.monotonic() - begin < 3.5


def test_several_run_at_a_time_and_no_more_than_asked_for(tmp_path: Path) -> None:
    """Each waits until as many are there as may be, and fails if there are more."""
    wait = (
        f"touch {tmp_path}/$$; n=0; while [ $(ls {tmp_path} | wc -l) -lt 2 ]; do sleep 0.02; done"
    )
    text = f"{wait}; ls {tmp_path} | wc -l; sleep 0.1"
    found = ended(text, text, jobs=2)
    assert [found[number].stdout.strip() for number in (0, 1)] == ["2", "2"]
    order = [number for number, _ in run_commands([Command("exit", {})] * 3, 1, 20)]
    assert order == [0, 1, 2]


def test_closing_early_kills_all_that_run(tmp_path: Path) -> None:
    sleepers = [f"echo $$ > {tmp_path}/{n}; exec sleep 60" for n in range(2)]
    every = run_commands([Command(text, {}) for text in ["exit", *sleepers]], 3, None)
    next(every)
    wait_for(lambda: all((tmp_path / str(n)).exists() for n in range(2)))
    every.close()
    pids = [int((tmp_path / str(n)).read_text() or 0) for n in range(2)]
    wait_for(lambda: all(map(is_gone, pids)))


def test_a_signal_while_waiting_kills_all_that_run(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            ended(f"echo $$ > {tmp_path}/pid; exec sleep 60", timeout=None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    wait_for(lambda: is_gone(int((tmp_path / "pid").read_text())))
