"""The model card: the run's own YAML kept, tags added, the weights told; and the picture."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema.errors import Code, FailedError, OptionError, RefusedError
from ckpt_ema.report import figure
from ckpt_ema.report.card import TAGS, front_matter
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, series


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """Five checkpoints, 1000 steps apart."""
    return make_run(series(5, w=noise(5, 5)), steps=range(1000, 6000, 1000))


def parsed(card: str) -> Any:
    """The YAML at the top of a card."""
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


OWN = """---
# a comment
license: apache-2.0
base_model:
  - meta/base
language: [en, de]
tags:
  - trl
  - sft
model-index:
- name: mine
  results:
  - task:
      type: text-generation

    metrics:
    - value: 0.9
library_name: peft
---
# The model
Its loss is 1.5.
"""


def test_the_card_of_the_newest_checkpoint_keeps_its_yaml_but_results(run: Path) -> None:
    (run / "README.md").write_text("---\nlicense: mit\n---\n")
    (run / "checkpoint-5000/README.md").write_text(OWN)
    output = ckpt_ema.average(run, device="cpu", half_life=1000).output
    card = (output / "README.md").read_text()
    assert parsed(card) == {
        "license": "apache-2.0",
        "base_model": ["meta/base"],
        "language": ["en", "de"],
        "tags": ["weight-averaging", "ckpt-ema", "trl", "sft"],
        "library_name": "peft",
    }
    assert "# a comment\nlicense: apache-2.0\nbase_model:\n  - meta/base\n" in card
    assert "Its loss" not in card
    assert "| checkpoint-4000 | 4000 | 1000 | 0.5000 | 25.00% |" in card
    assert "half-life 1000 steps" in card


def test_the_run_has_a_card_where_checkpoints_have_none(run: Path) -> None:
    (run / "README.md").write_text("\ufeff---\nlicense: mit\n---\n")
    output = ckpt_ema.average(run, device="cpu").output
    assert parsed((output / "README.md").read_text())["license"] == "mit"


@pytest.mark.parametrize(
    ("before", "tags"),
    [
        ("", [*TAGS]),
        ("license: mit\n", [*TAGS]),
        ("tags: []\n", [*TAGS]),
        ("tags:\n", [*TAGS]),
        ("tags: null\nlicense: mit\n", [*TAGS]),
        ("tags: one\n", [*TAGS, "one"]),
        ("tags: [a, b]\n", [*TAGS, "a", "b"]),
        ("tags: [a,\n  b]\nlicense: mit\n", [*TAGS, "a", "b"]),
        ("tags:\n- a\n- b\nlicense: mit\n", [*TAGS, "a", "b"]),
        ("tags:\n    - a\n    - b\n", [*TAGS, "a", "b"]),
        ("tags: # of it\n  - a\n", [*TAGS, "a"]),
        ("tags:\n- ckpt-ema\n- a\n", ["weight-averaging", "ckpt-ema", "a"]),
        ("tags: ['ckpt-ema', \"weight-averaging\"]\n", ["ckpt-ema", "weight-averaging"]),
        ("model-index:\n- name: x\ntags: [a]\n", [*TAGS, "a"]),
        ("model-index:\n- name: x\n# of it\n  results: []\ntags: [a]\n", [*TAGS, "a"]),
        ('"model-index" : []\n"tags": [a]\n', [*TAGS, "a"]),
        ("tags : [a]\n", [*TAGS, "a"]),
        ("tags:\n- stochastic-weight-averaging\n", [*TAGS, "stochastic-weight-averaging"]),
        ("{}\n", [*TAGS]),
        ('{"license": "mit", "tags": ["a"]}\n', [*TAGS, "a"]),
    ],
)
def test_tags_are_added_to_any_form_of_a_list(before: str, tags: list[str]) -> None:
    found = front_matter(f"---\n{before}---\n# Title\n")
    content = yaml.safe_load(found)
    assert content.pop("tags") == tags
    kept = yaml.safe_load(before) or {}
    assert content == {key: v for key, v in kept.items() if key not in ("tags", "model-index")}


@pytest.mark.parametrize(
    "text",
    [
        *("", "# No YAML\n", "---\nnever closed\n", "----\n", "text\n---\na: b\n---\n"),
        *("---\n---\n# T\na: b\n---\n", "---\n{not: json}\n---\n"),
    ],
)
def test_a_card_without_yaml_gets_some(text: str) -> None:
    assert yaml.safe_load(front_matter(text)) == {"tags": [*TAGS]}


def test_lines_that_end_as_on_windows_are_read() -> None:
    assert yaml.safe_load(front_matter("---\nlicense: mit\n...\n"))["license"] == "mit"
    assert yaml.safe_load(front_matter("---\r\nlicense: mit\r\n---\r\n"))["license"] == "mit"


WORDS = st.text("abcdefgh-:# é'\"[]{}", min_size=1, max_size=8)


@settings(deadline=None)
@given(
    st.dictionaries(
        WORDS.filter(lambda key: key not in ("tags", "model-index")),
        st.one_of(st.integers(), WORDS, st.lists(WORDS, max_size=3), st.none(), st.booleans()),
        max_size=5,
    ),
    st.lists(WORDS, max_size=4),
    st.booleans(),
)
def test_whatever_yaml_holds_is_kept(content: dict[str, Any], tags: list[str], flow: bool) -> None:
    text = yaml.safe_dump({**content, "tags": tags}, default_flow_style=None if flow else False)
    found = yaml.safe_load(front_matter(f"---\n{text}---\n"))
    assert found.pop("tags") == [*(tag for tag in TAGS if tag not in tags), *tags]
    assert found == content


def test_a_card_can_be_done_without_and_a_single_file_has_none(run: Path) -> None:
    output = ckpt_ema.average(run, device="cpu", card=False).output
    assert not (output / "README.md").exists()
    ckpt_ema.average(run, device="cpu", output=run.parent / "one.safetensors")
    assert sorted(path.name for path in run.parent.iterdir()) == [
        "one.safetensors",
        "run",
        "run-ema",
    ]


def test_each_of_several_has_a_card_of_its_own(run: Path) -> None:
    for output in ckpt_ema.average(run, device="cpu", half_life="1000,2000").outputs:
        card = (output / "README.md").read_text()
        assert f"# {output.name}\n" in card
        assert card.count("| checkpoint-5000 |") == 1


# --- The picture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"half_life": "500,1000,2000"}, {"last": 1}])
def test_a_plan_is_drawn(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    plan = ckpt_ema.plan(run, **options)
    ckpt_ema.plot(plan, tmp_path / "weights.png")
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")
    ckpt_ema.plot(plan, tmp_path / "weights.SVG")
    drawn = ElementTree.parse(tmp_path / "weights.SVG")
    texts = {
        "".join(element.itertext()) for element in drawn.iter("{http://www.w3.org/2000/svg}text")
    }
    assert {"weight", "equivalent learning rate", "training step"} <= texts
    if len(plan.averages) > 1:
        assert {average.name for average in plan.averages} <= texts


def test_the_same_plan_gives_the_same_picture(run: Path, tmp_path: Path) -> None:
    plan = ckpt_ema.plan(run, half_life="500,1000")
    for kind in ("png", "svg"):
        pictures = [ckpt_ema.plot(plan, tmp_path / f"{name}.{kind}").content for name in "ab"]
        assert pictures[0] == pictures[1] == (tmp_path / f"a.{kind}").read_bytes()


def test_the_learning_rate_falls_by_its_weight_at_each_checkpoint() -> None:
    xs, ys = figure.learning_rate_steps([2, 3, 6], [0.25, 0.25, 0.5], start=1)
    assert list(zip(xs, ys, strict=True)) == [
        *((1, 1.0), (2, 1.0), (2, 0.75), (3, 0.75), (3, 0.5), (6, 0.5), (6, 0.0)),
    ]


def test_averages_in_different_units_share_an_axis_of_checkpoints(
    run: Path, tmp_path: Path
) -> None:
    (run / "checkpoint-1000").rename(run / "final")
    plan = ckpt_ema.plan(run, append=["final"], last="2,3")
    newer = ckpt_ema.plan(run, last=4, aliases=False).averages
    mixed = replace(plan, averages=(*plan.averages, *newer))
    ckpt_ema.plot(mixed, tmp_path / "weights.svg")
    assert "training step" not in (tmp_path / "weights.svg").read_text()


@pytest.mark.parametrize("place", ["run-ema/weights.png", "run/checkpoint-1000/weights.png"])
def test_a_picture_is_never_drawn_into_an_input_or_the_output(run: Path, place: str) -> None:
    ckpt_ema.average(run, device="cpu")
    with pytest.raises(OptionError) as caught:
        ckpt_ema.plot(ckpt_ema.plan(run), run.parent / place)
    assert caught.value.path == str(run.parent / place)


def test_nothing_is_drawn_where_the_output_is_taken(run: Path, tmp_path: Path) -> None:
    ckpt_ema.average(run, device="cpu")
    with pytest.raises(RefusedError):
        ckpt_ema.average(run, device="cpu", decay=0.2, plot=tmp_path / "weights.png")
    assert not (tmp_path / "weights.png").exists()


def test_the_picture_goes_into_every_card(run: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "weights.svg"
    made = ckpt_ema.average(run, device="cpu", half_life="500,1000", plot=drawn)
    for output in made.outputs:
        assert (output / "ckpt_ema.svg").read_bytes() == drawn.read_bytes()
        assert "](ckpt_ema.svg)" in (output / "README.md").read_text()


@pytest.mark.parametrize("name", ["weights.pdf", "weights", "nowhere/weights.png"])
def test_a_picture_that_cannot_be_is_refused_before_anything_is_read(
    run: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(OptionError) as caught:
        ckpt_ema.average(run, device="cpu", plot=tmp_path / name)
    assert (caught.value.code, caught.value.path) == (Code.INVALID_OPTION, str(tmp_path / name))
    assert not (run.parent / "run-ema").exists()


def test_a_picture_that_cannot_be_written_fails_by_name(run: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.png").mkdir()
    with pytest.raises(FailedError) as caught:
        ckpt_ema.plot(ckpt_ema.plan(run), tmp_path / "weights.png")
    assert caught.value.code is Code.WRITE_FAILED
    assert caught.value.path == str(tmp_path / "weights.png")


def hide_matplotlib() -> None:
    """Be where it is not installed."""
    pytest.MonkeyPatch().setitem(sys.modules, "matplotlib", None)


def test_without_matplotlib_all_works_but_pictures(run: Path, tmp_path: Path) -> None:
    words = ("average", run, "--plot", tmp_path / "weights.png", "--device", "cpu")
    done = command(*words, before=hide_matplotlib)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'ckpt-ema[plot]'" in done.stderr
    assert command("average", run, "-q", before=hide_matplotlib).returncode == 0


def test_without_numpy_all_works_but_pictures(run: Path) -> None:
    """In a fresh interpreter, since torch imports it if it is there."""
    code = "import sys; sys.modules['numpy'] = None; from ckpt_ema.cli.app import main; main()"
    words = [sys.executable, "-c", code, "average", str(run), "-q", "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_picture_no_matplotlib(run: Path) -> None:
    code = "import sys, ckpt_ema; ckpt_ema.plan(sys.argv[1]); sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(run)]).returncode == 0
