"""Weights from a file or a mapping: every form of it, and everything that is wrong with one."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema import OptionError, RefusedError
from ckpt_ema.errors import Code
from ckpt_ema.schedules.explicit import matched, read_weights
from tests.conftest import MakeRun, noise, series


@pytest.mark.parametrize(
    "text",
    [
        '{"checkpoint-10": 0.25, "20": 0.75}',
        "checkpoint-10 0.25\n20 0.75\n",
        "# my weights\n\ncheckpoint-10,0.25\n  20 ,\t.75\n# end",
        "checkpoint-10\t2.5e-1\r\n20\t7.5e-1\r\n",
    ],
)
def test_every_form_of_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "weights.txt"
    path.write_text(text)
    assert read_weights(path) == {"checkpoint-10": 0.25, "20": 0.75}


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff1000,0.25\n2000,0.75\n",
        "1000: 0.25\n2000: 0.75\n",
        '\ufeff{"1000": 0.25, "2000": 0.75}',
    ],
)
def test_marks_of_spreadsheets_and_colons_are_no_part_of_a_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "weights").write_text(text, encoding="utf-8")
    assert read_weights(tmp_path / "weights") == {"1000": 0.25, "2000": 0.75}


def test_a_checkpoint_without_a_step_is_not_called_none() -> None:
    with pytest.raises(RefusedError):
        matched({"None": 1.0}, [("final", None)], normalize=False)


def test_names_may_hold_blanks(tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    path.write_text("my run 3 0.5\nepoch=1-step=2.ckpt 0.5\n")
    assert read_weights(path) == {"my run 3": 0.5, "epoch=1-step=2.ckpt": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        b"checkpoint-10\n",
        b"checkpoint-10 much\n",
        b"a 0.5\na 0.5\n",
        b'{"a": 0.5, "a": 0.5}',
        b'{"a": 0.5',
        b'{"a": "0.5"}',
        b'{"a": true}',
        b'{"a": {"b": 1}}',
        b"a -0.5\nb 1.5",
        b"a nan",
        b"a inf",
        b"\xff\xfe\x00",
        b"a\x1b[31m x",
    ],
)
def test_what_is_no_file_of_weights_is_a_usage_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights"
    path.write_bytes(content)
    with pytest.raises(OptionError) as caught:
        read_weights(path)
    assert caught.value.code is Code.WRONG_WEIGHTS
    assert "\x1b" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_file_is_a_usage_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(OptionError) as caught:
            read_weights(path)
        assert (caught.value.code, caught.value.path) == (Code.NOT_FOUND, str(path))
        assert ("does not exist" in caught.value.message) is (not path.exists())


@pytest.mark.parametrize(
    ("weights", "fact"),
    [
        ({"1": 0.5, "2": 0.4}, "0.1 less than 1"),
        ({"1": 0.5, "2": 0.7}, "0.2 more than 1"),
        ({"1": 0.333333, "2": 0.333333, "3": 0.333333}, "1e-06 less than 1"),
        ({"1": 0.0}, "no checkpoint"),
        ({}, "no checkpoint"),
        ({"1": 0.5, "step-2": 0.5}, "step-2"),
        ({"1": 0.5, "checkpoint-1": 0.5}, "checkpoint-1"),
        ({"10": 1.0}, "names 10,"),  # exact, not the 1 in it
    ],
)
def test_weights_that_are_not_those_of_the_run_are_refused_before_a_tensor_is_read(
    make_run: MakeRun, weights: dict[str, float], fact: str
) -> None:
    run = make_run(series(3, w=noise(3, 5)))
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run, weights=weights)
    assert caught.value.code is Code.WRONG_WEIGHTS
    assert fact in caught.value.message


def test_a_sum_is_corrected_on_request(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 5)))
    [average] = ckpt_ema.plan(run, weights={"1": 1, "3": 3}, normalize=True).averages
    assert average.weights == (0.25, 0.75)
    assert average.members == (0, 1)  # the second checkpoint is not read


def test_weights_go_with_the_checkpoints_that_are_selected(make_run: MakeRun) -> None:
    run = make_run(series(3, w=noise(3, 5)))
    with pytest.raises(RefusedError):
        ckpt_ema.plan(run, weights={"1": 0.5, "3": 0.5}, last=2)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20).filter(lambda x: sum(x) > 1e-6))
def test_explicit_weights_are_the_weights(values: list[float]) -> None:
    total = math.fsum(values)
    shares = {str(number): value / total for number, value in enumerate(values)}
    names: list[Any] = [(f"name-{number}", number) for number in range(len(values))]
    assert matched(shares, names, normalize=False) == list(shares.values())
