"""The table of options: what it takes and refuses, and that everything made from it agrees."""

import json
import math
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from ckpt_ema.errors import Code, OptionError, flag
from ckpt_ema.options import Keywords, Options, Row, make_options, table

ROOT = Path(__file__).parent.parent
ROWS = {row.name: row for row in table()}
IMPOSSIBLE: list[tuple[str, Any]] = [
    *(("decay", value) for value in (1.1, math.nan, "0.9,-0.1", "0.9,much", "", True)),
    ("decay", []),
    *(("decay_per_step", 2), ("sigma_rel", 0.3), ("sigma_rel", 0), ("sigma_rel", 1e-200)),
    *(("half_life", value) for value in (0, math.inf, 10**400)),
    *(("power", "x"), ("power", -1), ("inv_gamma", 0), ("num_updates", "epoch")),
    *(("last", value) for value in (2.5, math.inf, 0, "4,x")),
    *(("every", 1.5), ("every", 0), ("min_gap", -5), ("from_step", math.nan)),
    *(("steps", "100,x"), ("steps", "500-100"), ("steps", [])),
    *(("include", None), ("include", "a*"), ("append", [1]), ("append", [".."])),
    *(("pattern", "("), ("metric", 5), ("dtype", None), ("schedule", "cosine")),
    *(("output", 5), ("output", ""), ("output", "model.pt"), ("weights", [0.5, 0.5])),
    *(("threads", "many"), ("threads", 2000), ("tile_size", "3GiB"), ("max_memory", "1 pound")),
]


def parsed(options: Options, name: str) -> Any:
    """An option's value, whichever group has it."""
    if name in options.weighting.options:
        return options.weighting.options[name]
    return next(getattr(group, name) for group in options if hasattr(group, name))


def test_every_row_has_a_keyword_and_every_keyword_a_row() -> None:
    assert set(typing.get_type_hints(Keywords)) == ROWS.keys()
    assert len(ROWS) == len(table())


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_the_type_of_a_keyword_has_the_default_and_text(row: Row) -> None:
    hint = typing.get_type_hints(Keywords)[row.name]
    kinds = [str(kind) for kind in (typing.get_args(hint) or [hint])]
    if row.default is None:
        assert "<class 'NoneType'>" in kinds
    assert any("str" in kind for kind in kinds) != isinstance(row.default, bool)


def test_options_not_given_have_the_defaults_of_their_rows() -> None:
    options = make_options({})
    for group in options:
        for row in group.rows():
            assert getattr(group, row.name) == row.default
    assert options.given() == {}


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("every", "2", 2),
        ("threads", 4.0, 4),
        ("from_step", "100", 100),
        ("steps", 100, ((100, 100),)),
        ("steps", "100,200-300", ((100, 100), (200, 300))),
        ("steps", " 100 , 200 - 300 ", ((100, 100), (200, 300))),
        ("steps", [100, (200, 300)], ((100, 100), (200, 300))),
        ("steps", ["100", "200-300"], ((100, 100), (200, 300))),
        ("last", "4,8", (4, 8)),
        ("last", [4, 8], (4, 8)),
        ("decay", 0.5, (0.5,)),
        ("decay", "0.5,0.9", (0.5, 0.9)),
        ("power", "0.75", 0.75),
        ("tile_size", "4MiB", 4 << 20),
        ("max_memory", "1.5 GB", 1_500_000_000),
        ("output", Path("o"), "o"),
        ("append", [Path("a"), "b"], ("a", "b")),
        ("dtype", "bfloat16", "bfloat16"),
    ],
)
def test_a_value_may_be_a_text_or_of_its_own_type(name: str, given: Any, expected: Any) -> None:
    assert parsed(make_options({name: given}), name) == expected


@pytest.mark.parametrize(("name", "given"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_the_name_of_its_option(name: str, given: Any) -> None:
    with pytest.raises(OptionError) as caught:
        make_options({name: given})
    assert (caught.value.code, caught.value.exit_code) == (Code.INVALID_OPTION, 2)
    assert caught.value.message.startswith(f"{flag(name)} is ")


@pytest.mark.parametrize(
    "options",
    [
        {"best": 3},
        {"metric": "loss"},
        {"metric_mode": "max"},
        {"normalize": True},
        {"from_step": 9, "to_step": 3},
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        make_options(options)
    assert (caught.value.code, caught.value.exit_code) == (Code.CONFLICTING_OPTIONS, 2)


def test_an_unknown_name_is_an_unexpected_keyword() -> None:
    with pytest.raises(TypeError, match="'decays'"):
        make_options({"decays": 0.9})


def test_options_given_are_plain_values_for_json() -> None:
    given = {"decay": 0.5, "output": Path("o"), "weights": {1: 1.0}, "append": [Path("a"), "b"]}
    assert json.loads(json.dumps(make_options(given).given())) == {
        "decay": [0.5],
        "weights": {"1": 1.0},
        "append": ["a", "b"],
        "output": "o",
    }


def test_the_page_of_options_is_made_from_the_table() -> None:
    script = ROOT / "scripts" / "write_options.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "options.md").read_text() == done.stdout
