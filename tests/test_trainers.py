"""Each run of the data files is averaged or refused as its file expects.

`expect` in a data file is one expectation or a list of them:

    options      keywords of `ckpt_ema.average`
    path, paths  the folder or the list of checkpoints to average, instead of the whole run
    rows         numbers of the rows that take part, from 0; by default all
    checkpoints  the path of each
    steps, unit  by default `<step>` and `step`; null for steps if none is known
    gaps         distances between the steps
    output       files of the output and their tensors; by default `model.safetensors: !model`
    travels      files copied beside the weights, or blocks of such files; by default none
    left_out     other entries that the plan names, with the reason; by default none
    says         codes of warnings or notes that must appear, each with words of its sentence
    silent       codes that must not appear
    refused      the `code` of the error, `words` of its message, `offers`, the number of patterns
                 that it offers, and `late` if only reading the tensors shows it

Later expectations inherit the checkpoints, their steps and the output from the first. With options,
or with null, what travels and what is left out is not checked.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.find.names import numbers_in
from ckpt_ema.output.manifest import Result
from ckpt_ema.planning.plan import Plan
from ckpt_ema.trainers.table import TRAINERS
from tests.makers import trainer_runs as runs
from tests.makers.safetensors_files import read_safetensors
from tests.makers.trainer_runs import Run
from tests.makers.trainer_values import Row

Expected = Mapping[str, Any]
SHARED = ("checkpoints", "rows", "steps", "unit", "output")


class Case(NamedTuple):
    """One expectation of one run."""

    run: Run
    expected: Expected

    @property
    def rows(self) -> list[Row]:
        """The rows of the checkpoints that take part."""
        numbers = self.expected.get("rows") or range(len(self.run.rows))
        return [self.run.rows[number] for number in numbers]

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.expected.get("options", {}))

    def given(self, folder: Path) -> Path | list[Path]:
        """Return what is averaged."""
        if "paths" in self.expected:
            return [folder / path for path in self.expected["paths"]]
        return folder / str(self.expected.get("path", ""))

    def paths(self) -> list[str]:
        """Return the expected checkpoints."""
        return [runs.fill(self.expected["checkpoints"], row) for row in self.rows]


def cases(is_refused: bool) -> list[Any]:
    """Return all expectations of one kind."""
    found = []
    for name in runs.names():
        run = runs.run(name)
        for number, expected in enumerate(run.expect):
            if ("refused" in expected) == is_refused:
                shared = {key: run.expect[0][key] for key in SHARED if key in run.expect[0]}
                case = Case(run, {**(shared if number else {}), **expected})
                found.append(
                    pytest.param(case, id=" ".join([name, *map(str, case.options.items())]))
                )
    return found


READ, REFUSED = cases(is_refused=False), cases(is_refused=True)
INCOMPLETE = [
    pytest.param(runs.run(name), damage, id=f"{name} {damage}")
    for name in runs.names()
    for damage in runs.run(name).incomplete
]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Run], Path]:
    """Return a function from a run to its folder, which is made once and must not be changed."""
    folders: dict[str, Path] = {}

    def make(run: Run) -> Path:
        if run.name not in folders:
            folders[run.name] = run.make(tmp_path_factory.mktemp("made") / "run")
        return folders[run.name]

    return make


@pytest.mark.parametrize("case", READ)
def test_a_run_is_averaged_as_expected(
    case: Case, made: Callable[[Run], Path], tmp_path: Path
) -> None:
    folder, output = made(case.run), tmp_path / "out"
    result = ckpt_ema.average(case.given(folder), output=output, device="cpu", **case.options)
    check_plan(result.plan, case, folder)
    check_values(output, case)
    check_companions(output, result, case, folder)


# Of any run with such gaps, and of random numbers in place of an adapter's.
USUAL = {Code.UNEVEN_GAPS, Code.ADAPTER_FACTORS}


ORDINARY = [one for one in READ if not {"says", "options"} & one.values[0].expected.keys()]


@pytest.mark.parametrize("case", ORDINARY)
def test_an_ordinary_run_has_no_warning_under_strict(
    case: Case, made: Callable[[Run], Path], tmp_path: Path
) -> None:
    given, options = case.given(made(case.run)), {**case.options, "device": "cpu"}
    result = ckpt_ema.average(given, output=tmp_path / "out", **options)
    warned = {one.code for one in (*result.plan.warnings, *result.warnings)}
    assert warned <= USUAL
    if not warned:
        ckpt_ema.average(given, output=tmp_path / "strict", strict=True, **options)


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_is_refused_with_what_helps(
    case: Case, made: Callable[[Run], Path], tmp_path: Path
) -> None:
    folder, expected = made(case.run), case.expected["refused"]
    function = ckpt_ema.average if "late" in expected else ckpt_ema.plan
    with pytest.raises(RefusedError) as caught:
        function(case.given(folder), output=tmp_path / "out", device="cpu", **case.options)
    assert not (tmp_path / "out").exists()
    message = str(caught.value)
    assert message.isprintable()
    assert caught.value.code is Code(expected["code"])
    if caught.value.code is Code.UNSUPPORTED_FORMAT:
        assert caught.value.path is not None
        assert folder in Path(caught.value.path).parents
    for word in expected.get("words", ()):
        assert word in message
    if "offers" in expected:
        check_offers(message, folder, expected["offers"])


def check_offers(message: str, folder: Path, count: int) -> None:
    """Each pattern on offer finds a series of its own."""
    patterns = set(re.findall(r"--pattern '([^']+)'", message))
    assert len(patterns) >= count, message
    plans = [ckpt_ema.plan(folder, pattern=pattern) for pattern in patterns]
    found = [checkpoint.path for plan in plans for checkpoint in plan.checkpoints]
    assert all(len(plan.checkpoints) >= 2 for plan in plans)
    assert len(set(found)) == len(found)


def check_plan(plan: Plan, case: Case, folder: Path) -> None:
    """The plan has the expected checkpoints, and says of the rest what is expected."""
    expected = case.expected
    assert relative(plan, folder) == case.paths()
    steps = expected.get("steps", "<step>")
    if isinstance(steps, str):
        steps = [runs.fill(steps, row) for row in case.rows]
    assert [checkpoint.step for checkpoint in plan.checkpoints] == (
        steps or [None] * len(case.rows)
    )
    assert plan.checkpoints[-1].unit == expected.get("unit", "step")
    if "gaps" in expected:
        assert list(plan.averages[0].gaps) == expected["gaps"]
    left_out = expected.get("left_out", None if "options" in expected else {})
    if left_out is not None:
        named = {
            runs.fill(name, row): why for name, why in left_out.items() for row in case.run.rows
        }
        assert reasons(plan, folder) == named
    notices = [*plan.warnings, *plan.notes]
    for code, words in expected.get("says", {}).items():
        said = [str(notice) for notice in notices if notice.code is Code(code)]
        assert said
        for word in words:
            assert any(word in sentence for sentence in said), said
    assert not {notice.code.value for notice in notices} & set(expected.get("silent", ()))


def relative(plan: Plan, folder: Path) -> list[str]:
    return [str(checkpoint.path.relative_to(folder)) for checkpoint in plan.checkpoints]


def reasons(plan: Plan, folder: Path) -> dict[str, str]:
    """Return what is left out, with the reason as the data files write it."""
    return {
        str(judged.path.relative_to(folder)): judged.verdict.reason.name.lower().replace("_", "-")
        for judged in plan.left_out
    }


def check_values(output: Path, case: Case) -> None:
    """The output has the expected files, tensors and values."""
    described = case.expected.get("output", {"model.safetensors": runs.Tag("model", None)})
    models = [case.run.value(described, row) for row in case.rows]
    written = {str(path.relative_to(output)) for path in output.rglob("*.safetensors")}
    companions = {name for name in travels(case) or () if name.endswith(".safetensors")}
    assert written >= set(models[-1])
    assert travels(case) is None or written == set(models[-1]) | companions
    for file in models[-1]:
        actual, wanted = read_safetensors(output / file), shadow([model[file] for model in models])
        assert actual.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(actual[name], tensor, rtol=2**-23, atol=0)
    index = output / "model.safetensors.index.json"
    assert index.exists() == any("-of-" in file for file in models[-1])
    if index.exists():
        places = {name: file for file, model in models[-1].items() for name in model}
        assert json.loads(index.read_text())["weight_map"] == places


def shadow(models: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the moving average with the dynamic decay; integers keep the newest value."""
    average = {name: tensor.double() for name, tensor in models[0].items()}
    for updates, model in enumerate(models[1:], start=1):
        decay = min(0.999, (1 + updates) / (10 + updates))
        for name, tensor in model.items():
            average[name] = average[name] + (1 - decay) * (tensor.double() - average[name])
    return {
        name: average[name].to(newest.dtype) if newest.is_floating_point() else newest
        for name, newest in models[-1].items()
    }


def travels(case: Case) -> set[str] | None:
    """Return the names of the files to be copied beside the weights; None if not checked."""
    names = case.expected.get("travels", None if "options" in case.expected else [])
    blocks = case.run.parts[-1].blocks
    return None if names is None else {each for name in names for each in blocks.get(name, [name])}


def check_companions(output: Path, result: Result, case: Case, folder: Path) -> None:
    """Files beside the weights are the newest checkpoint's, or the run's, byte for byte."""
    names = travels(case)
    if names is None:
        return
    assert {companion.name for companion in result.plan.averages[0].output.companions} == names
    newest = folder / case.paths()[-1]
    for name in names:
        sources = list(newest.rglob(name)) or list(folder.rglob(name))
        assert (output / name).read_bytes() in [path.read_bytes() for path in sources]


# --- interrupted saves ---


def spoil(folder: Path, damage: Mapping[str, Any], row: Row) -> None:
    """Do to one checkpoint what an interrupted save leaves."""
    for verb in damage.keys() - {"to"}:
        path = folder / runs.fill(damage[verb], row)
        if verb == "cut":
            path.write_bytes(path.read_bytes()[: damage["to"]])
        elif verb == "rename":
            path.rename(path.with_name(damage["to"]))
        elif verb == "remove":
            path.unlink()
        else:
            path.touch()


@pytest.mark.parametrize(("run", "damage"), INCOMPLETE)
def test_an_incomplete_newest_checkpoint_is_skipped_with_a_warning(
    run: Run, damage: Mapping[str, Any], tmp_path: Path
) -> None:
    """A run that was stopped while saving is an everyday thing."""
    folder, case = run.make(tmp_path / "run"), Case(run, run.expect[0])
    spoil(folder, damage, run.rows[-1])
    plan = ckpt_ema.plan(folder)
    *others, newest = case.paths()
    assert relative(plan, folder) == others
    assert [
        notice
        for notice in plan.warnings
        if notice.code is Code.INCOMPLETE and Path(newest).name in str(notice)
    ]


@pytest.mark.parametrize(("run", "damage"), INCOMPLETE)
def test_an_incomplete_checkpoint_in_the_middle_is_refused_until_it_is_skipped(
    run: Run, damage: Mapping[str, Any], tmp_path: Path
) -> None:
    folder, case = run.make(tmp_path / "run"), Case(run, run.expect[0])
    spoil(folder, damage, run.rows[1])
    oldest, middle, newest = case.paths()
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(folder)
    assert caught.value.code is Code.INCOMPLETE
    assert Path(middle).name in str(caught.value)
    assert "--skip-incomplete" in str(caught.value)
    plan = ckpt_ema.plan(folder, skip_incomplete=True)
    assert relative(plan, folder) == [oldest, newest]
    assert reasons(plan, folder)[middle] == "incomplete"


# --- names, times and the data files ---


@pytest.mark.parametrize(("name", "numbers"), runs.numbered_names().items())
def test_the_numbers_in_a_name_have_units(name: str, numbers: dict[str, int]) -> None:
    assert numbers_in(name) == numbers


def test_times_that_a_copy_has_shuffled_do_not_matter(tmp_path: Path) -> None:
    folder = runs.run("even-gaps").make(tmp_path / "run")
    for position, step in enumerate((300, 500, 200, 100, 400)):
        for path in (folder / f"checkpoint-{step}").iterdir():
            os.utime(path, (1_800_000_000 + position,) * 2)
    codes = {notice.code for notice in ckpt_ema.plan(folder).warnings}
    assert Code.OUT_OF_ORDER not in codes


def test_every_trainer_of_the_table_has_a_data_file() -> None:
    """A trainer is one entry of the table and one data file."""
    assert runs.entries() == {trainer.name for trainer in TRAINERS}
