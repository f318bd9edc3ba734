"""`inspect` measures what `average` averages, names what stands out, and writes nothing."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import Code, FailedError, OptionError, RefusedError
from ckpt_ema.measure.inspection import InspectedCheckpoint
from ckpt_ema.measure.outliers import Reason
from tests.command import Done
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, series
from tests.makers.any_container import CONTAINERS
from tests.makers.fake_hub import fake_hub
from tests.makers.imports import imported_by
from tests.makers.tensors import StateDict

STEPS = [100, 200, 300, 400, 500, 600]


def walk(count: int = 6, size: int = 500, dtype: torch.dtype = torch.float32) -> list[StateDict]:
    """A run whose checkpoints are a random walk: a matrix, a vector, and what is no weight."""
    states: list[StateDict] = []
    w, b = noise(1, size)[0] * 20, noise(2, 7)[1]
    for one, other in zip(noise(count, size), noise(count + 1, 7), strict=False):
        w, b = w + one, b + other
        states.append({"w": w.to(dtype).reshape(-1, 5), "b": b, "n": torch.tensor([len(states)])})
    return states


def flat(state: StateDict) -> torch.Tensor:
    """All weights of a checkpoint in float64."""
    return torch.cat([state[name].double().flatten() for name in ("w", "b")])


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """A healthy run."""
    return make_run(walk(), STEPS)


def columns(checkpoints: Sequence[InspectedCheckpoint], name: str) -> list[float]:
    """A number of each checkpoint."""
    return [getattr(one, name) for one in checkpoints]


def damaged(make_run: MakeRun, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A run whose third checkpoint has a changed matrix."""
    states = walk()
    states[2] = {**states[2], "w": change(states[2]["w"].clone())}
    return make_run(states, STEPS, name="damaged")


def with_nan(values: torch.Tensor) -> torch.Tensor:
    values[0, 0], values[3, 1] = math.nan, math.inf
    return values


# --- What is measured -----------------------------------------------------------------------------


@pytest.mark.usefixtures("either_fold")
def test_two_checkpoints_by_hand(make_run: MakeRun) -> None:
    run = make_run(series(2, w=[torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])]), [10, 20])
    found = ckpt_ema.inspect(run, schedule="uniform")
    first, second = found.checkpoints
    assert (first.norm, second.norm) == (3, 5)
    assert (first.distance_to_previous, second.distance_to_previous) == (None, 4)
    assert (first.distance_to_average, second.distance_to_average) == (2, 2)
    assert (first.zeros_share, second.zeros_share) == (0.5, 0)
    assert (first.weight, first.step, first.name) == (0.5, 10, "checkpoint-10")
    assert found.gram == ((4, -4), (-4, 4))
    assert [y for _, y in found.plane] == [0, 0]
    assert [x for x, _ in found.plane] == pytest.approx([-2, 2])
    assert found.average_at == (0, 0)
    assert found.explained == pytest.approx((1, 0))
    assert (found.elements, found.bytes_read, found.unit) == (2, 16, "steps")


@pytest.mark.usefixtures("either_fold")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_norms_and_distances_are_those_of_torch(make_run: MakeRun, dtype: torch.dtype) -> None:
    states = walk(dtype=dtype)
    run = make_run(states, STEPS)
    found = ckpt_ema.inspect(run, decay=0.4)
    values = torch.stack([flat(state) for state in states])
    weights = torch.tensor([one.weight for one in found.checkpoints], dtype=torch.float64)
    assert weights.tolist() == list(ckpt_ema.plan(run, decay=0.4).averages[0].weights)
    apart = values - weights @ values
    assert [one.norm for one in found.checkpoints] == pytest.approx(values.norm(dim=1).tolist())
    away = [one.distance_to_average for one in found.checkpoints]
    assert away == pytest.approx(apart.norm(dim=1).tolist())
    changes = [one.distance_to_previous for one in found.checkpoints[1:]]
    assert changes == pytest.approx((values[1:] - values[:-1]).norm(dim=1).tolist())
    for mine, theirs in zip(found.gram, (apart @ apart.T).tolist(), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-9)
    assert found.sampled_share == 1
    assert found.elements == values.shape[1]
    assert not any(one.stands_out for one in found.checkpoints)


def test_the_distance_to_the_average_is_that_to_the_output_but_for_its_rounding(
    run: Path, tmp_path: Path
) -> None:
    output = ckpt_ema.average(run, output=tmp_path / "out", device="cpu", dtype="float32").output
    between = ckpt_ema.compare(run / "checkpoint-300", output).distance.relative_distance
    found = ckpt_ema.inspect(run).checkpoints
    largest = max(one.norm or 0 for one in found)
    assert between is not None
    assert between * largest == pytest.approx(found[2].distance_to_average, rel=0.1)


def test_threads_tiles_and_memory_change_no_digit_but_the_last(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_ema.measure import run_sums

    run = make_run(walk(size=200_000), STEPS)
    one = ckpt_ema.inspect(run, threads=1)
    assert ckpt_ema.inspect(run, threads=4).described() == one.described()
    monkeypatch.setattr(run_sums, "_BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(run_sums, "_READ_BYTES", 1)
    small = ckpt_ema.inspect(run, threads=4)
    for mine, theirs in zip(small.checkpoints, one.checkpoints, strict=True):
        assert mine.norm == pytest.approx(theirs.norm, rel=1e-14)
        assert mine.distance_to_average == pytest.approx(theirs.distance_to_average, rel=1e-13)
    limited = ckpt_ema.inspect(run, threads=2, max_memory="256KiB")
    assert limited.checkpoints[2].norm == pytest.approx(one.checkpoints[2].norm, rel=1e-14)


def test_many_checkpoints_have_a_plane_of_some(make_run: MakeRun) -> None:
    run = make_run(walk(70, 20), range(1, 71))
    found = ckpt_ema.inspect(run)
    assert (len(found.checkpoints), len(found.members), len(found.plane)) == (70, 64, 64)
    assert (found.members[0], found.members[-1]) == (0, 69)


def test_complex_numbers_are_pairs_and_tied_tensors_count_once(make_run: MakeRun) -> None:
    states = series(2, z=[torch.tensor([3 + 4j]), torch.tensor([0j])])
    found = ckpt_ema.inspect(make_run(states, [1, 2]))
    assert [one.norm for one in found.checkpoints] == [5, 0]
    assert (found.elements, found.checkpoints[1].zeros_share) == (2, 1)


def test_only_what_is_averaged_is_measured(run: Path) -> None:
    whole, part = ckpt_ema.inspect(run), ckpt_ema.inspect(run, drop=["b"], last=3)
    assert whole.elements == 507  # without the counter
    assert (part.elements, len(part.checkpoints)) == (500, 3)


@pytest.mark.usefixtures("either_fold")
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_is_measured_alike(
    make_run: MakeRun, tmp_path: Path, container: str
) -> None:
    states = [{name: state[name] for name in ("w", "b")} for state in walk()]
    here = ckpt_ema.inspect(make_run(states, STEPS)).checkpoints
    for step, state in zip(STEPS, states, strict=True):
        CONTAINERS[container](tmp_path / "other", step, state)
    there = ckpt_ema.inspect(tmp_path / "other").checkpoints
    assert [one.step for one in there] == STEPS
    for numbers in ("norm", "distance_to_average", "ratio"):
        assert columns(there, numbers) == pytest.approx(columns(here, numbers), rel=1e-12)
    assert columns(there[1:], "distance_to_previous") == pytest.approx(
        columns(here[1:], "distance_to_previous"), rel=1e-12
    )


# --- What stands out ------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_fold")
def test_a_foreign_checkpoint_is_named_with_the_option_that_leaves_it_out(
    make_run: MakeRun,
) -> None:
    run = damaged(make_run, lambda values: values.flip(0))
    found = ckpt_ema.inspect(run)
    assert [one.name for one in found.checkpoints if one.stands_out] == ["checkpoint-300"]
    third = found.checkpoints[2]
    assert third.reason is Reason.OFF_PATH
    assert (third.z_score or 0) > 3.5
    [warning] = found.warnings
    assert warning.code is Code.STANDS_OUT
    assert "--exclude checkpoint-300 leaves it out" in warning.message
    assert not any(
        one.stands_out for one in ckpt_ema.inspect(run, exclude=["checkpoint-300"]).checkpoints
    )


@pytest.mark.usefixtures("either_fold")
def test_values_that_are_not_finite_stand_out_and_spoil_nothing_else(make_run: MakeRun) -> None:
    healthy = ckpt_ema.inspect(make_run(walk(), STEPS, name="healthy")).checkpoints
    found = ckpt_ema.inspect(damaged(make_run, with_nan))
    assert [one.nonfinite for one in found.checkpoints] == [0, 0, 2, 0, 0, 0]
    assert found.checkpoints[2].reason is Reason.NONFINITE
    assert [warning.code for warning in found.warnings] == [Code.NONFINITE]
    assert "2 non-finite values" in found.warnings[0].message
    for name in ("norm", "distance_to_average"):
        here, there = columns(found.checkpoints, name), columns(healthy, name)
        assert here == pytest.approx(there, rel=0.02)
    here, there = (columns(one[1:], "distance_to_previous") for one in (found.checkpoints, healthy))
    assert here == pytest.approx(there, rel=0.02)


@pytest.mark.usefixtures("either_fold")
def test_a_checkpoint_of_nan_alone_has_no_distances_and_no_place(make_run: MakeRun) -> None:
    states = walk()
    states[2] = {**states[2], **{name: states[2][name] * math.nan for name in ("w", "b")}}
    found = ckpt_ema.inspect(make_run(states, STEPS))
    third, fourth = found.checkpoints[2:4]
    assert (third.norm, third.distance_to_previous, third.distance_to_average) == (None,) * 3
    assert fourth.distance_to_previous is None
    assert fourth.distance_to_average is not None
    assert found.members == (0, 1, 3, 4, 5)
    assert len(found.plane) == len(found.gram) == 5
    assert [one.name for one in found.checkpoints if one.stands_out] == ["checkpoint-300"]


def test_equal_neighbours_are_warned_of(make_run: MakeRun) -> None:
    states = walk()
    states[3] = states[2]
    found = ckpt_ema.inspect(make_run(states, STEPS))
    assert found.checkpoints[3].reason is Reason.DUPLICATE
    assert "has the same values as checkpoint-300" in found.warnings[0].message


def test_names_that_are_globs_are_quoted(make_run: MakeRun) -> None:
    states = walk()
    states[2] = {**states[2], "w": states[2]["w"].flip(0)}
    run = make_run(states, STEPS, pattern="step-{} [a]")
    [warning] = ckpt_ema.inspect(run).warnings
    assert "--exclude 'step-300 [[]a]' leaves it out" in warning.message
    assert not ckpt_ema.inspect(run, exclude=["step-300 [[]a]"]).warnings


def test_too_few_to_judge_is_noted(make_run: MakeRun) -> None:
    found = ckpt_ema.inspect(make_run(walk(4), STEPS[:4]))
    assert Code.FEW_CHECKPOINTS in [note.code for note in found.notes]
    assert [one.z_score for one in found.checkpoints] == [None] * 4
    one = ckpt_ema.inspect(make_run(walk(1), [100], name="one"))
    assert one.checkpoints[0].distance_to_average == 0
    assert one.plane == ((0, 0),)


def test_warnings_of_the_run_are_kept_and_those_of_the_output_are_not(run: Path) -> None:
    for folder in run.iterdir():
        (folder / "config.json").unlink()
    assert Code.NO_CONFIG in [one.code for one in ckpt_ema.plan(run).warnings]
    (run / "checkpoint-600/model.safetensors").write_bytes(b"")
    assert [one.code for one in ckpt_ema.inspect(run).warnings] == [Code.INCOMPLETE]


def test_strict_refuses_what_stands_out(make_run: MakeRun) -> None:
    run = damaged(make_run, with_nan)
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.inspect(run, strict=True)
    assert caught.value.code is Code.NONFINITE
    assert ckpt_ema.inspect(run, strict=True, exclude=["checkpoint-300"])


# --- What it is asked for -------------------------------------------------------------------------


def test_several_averages_are_refused(run: Path) -> None:
    with pytest.raises(OptionError) as caught:
        ckpt_ema.inspect(run, last=[2, 4])
    assert caught.value.code is Code.CONFLICTING_OPTIONS
    assert "these options ask for 2" in caught.value.message


@pytest.mark.parametrize("name", ["output", "dtype", "device", "save_as", "sync", "allow_zeros"])
def test_options_of_writing_are_unknown(run: Path, name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        ckpt_ema.inspect(run, **{name: "cpu"})  # type: ignore[arg-type]
    done = command("inspect", run, "--" + name.replace("_", "-"), "cpu")
    assert (done.returncode, "No such option" in done.stderr) == (2, True)


def test_too_little_memory_is_refused_with_what_is_needed(make_run: MakeRun) -> None:
    run = make_run(walk(70, 20), range(1, 71))
    with pytest.raises(OptionError) as caught:
        ckpt_ema.inspect(run, threads=1, max_memory="128KiB")
    assert caught.value.code is Code.INVALID_OPTION
    least = caught.value.message.rpartition("needs at least ")[2].rstrip(".")
    assert "inspecting 70 checkpoints" in caught.value.message
    assert ckpt_ema.inspect(run, threads=1, max_memory=least)


def test_what_is_at_the_output_path_does_not_matter_and_nothing_is_written(
    run: Path, tmp_path: Path
) -> None:
    Path(f"{run}-ema").mkdir()
    (Path(f"{run}-ema") / "model.safetensors").write_bytes(b"something else")
    before = sorted(tmp_path.rglob("*"))
    assert ckpt_ema.inspect(run).checkpoints
    assert command("inspect", run).returncode == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_changes_is_noticed(run: Path) -> None:
    def change(*_: object) -> None:
        (run / "checkpoint-100/model.safetensors").touch()

    with pytest.raises(FailedError) as caught:
        ckpt_ema.inspect(run, started=change)
    assert caught.value.code is Code.CHANGED


def test_progress_reaches_all_bytes(run: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = ckpt_ema.inspect(run, progress=lambda *read: seen.append(read))
    assert seen[-1] == (found.bytes_read, found.bytes_read)


# --- The command ----------------------------------------------------------------------------------


def test_the_table_is_readable_at_80_columns(make_run: MakeRun) -> None:
    run = damaged(make_run, with_nan)
    done = command("inspect", run)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines[1:])) <= 80  # but for the path of the run
    [row] = [line for line in lines if line.startswith("* checkpoint")]
    assert row.split()[1:3] == ["checkpoint-300", "300"]
    assert "* 1 of 6 checkpoints stands out" in lines
    assert done.stderr.startswith("warning: checkpoint-300 holds 2 non-finite values; --exclude")
    quiet = command("inspect", run, "-q")
    assert (quiet.stdout.count("\n"), quiet.stderr) == (len(lines), done.stderr)


def test_long_runs_are_shortened_but_for_what_stands_out(make_run: MakeRun) -> None:
    from ckpt_ema.report.inspection_text import inspection_text

    states = walk(30, 50)
    states[14] = {**states[14], "w": states[14]["w"] + 1000}
    found = ckpt_ema.inspect(make_run(states, range(1, 31)))
    text = inspection_text(found, None, 10)
    assert text.count("more\n") == 2
    assert "checkpoint-15 " in text
    assert "checkpoint-16 " not in text


def test_json_has_what_the_library_returns(run: Path) -> None:
    done = command("inspect", run, "--json", "--decay", "0.4")
    assert json.loads(done.stdout) == json.loads(
        json.dumps(ckpt_ema.inspect(run, decay=0.4).described())
    )


@pytest.mark.parametrize(
    ("words", "code"), [(["--strict"], 3), (["--last", "2,3"], 2), (["--last", "x"], 2)]
)
def test_exit_codes(make_run: MakeRun, words: list[str], code: int) -> None:
    done: Done = command("inspect", damaged(make_run, with_nan), *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ")


def test_it_imports_neither_torch_nor_numpy(run: Path) -> None:
    homes = {name.partition(".")[0] for name in imported_by("inspect", run)}
    assert not homes & {"torch", "numpy", "pydantic", "rich", "tqdm"}


def interrupted() -> None:
    """Have the first thread that measures anything interrupt the process."""
    from ckpt_ema.measure import pair_sums, run_sums

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    for module in (pair_sums, run_sums):
        pytest.MonkeyPatch().setattr(module, "summing", interrupt)


@pytest.mark.parametrize("name", ["inspect", "compare"])
def test_a_signal_ends_it_with_one_line(run: Path, name: str) -> None:
    words = [run] if name == "inspect" else [f"{run}@100", f"{run}@200"]
    done = command(name, *words, before=interrupted)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; nothing was written\n"


@pytest.mark.parametrize("name", ["inspect", "compare"])
def test_memory_does_not_grow_with_the_model(make_run: MakeRun, name: str) -> None:
    grown = []
    for size in (1 << 18, 1 << 24):
        states = series(3, w=[torch.full((size,), float(n)) for n in range(3)])
        run = make_run(states, STEPS[:3], name=f"of-{size}")
        words = [run] if name == "inspect" else [f"{run}@100", f"{run}@200"]
        done = command(name, *words, "--threads", "2")
        assert done.returncode == 0, done.stderr
        grown.append(done.grown_bytes)
    assert grown[1] - grown[0] < 24 << 20  # of files of 64 MiB


# --- Other storages and layouts -------------------------------------------------------------------


@pytest.mark.usefixtures("either_fold")
def test_a_run_on_the_hub_is_measured_alike(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(walk(), STEPS, name="hub/org/run/main")
    with fake_hub(tmp_path / "hub") as hub, pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_ENDPOINT", hub.endpoint)
        there = ckpt_ema.inspect("hf://org/run")
    here = ckpt_ema.inspect(run)
    for name in ("norm", "distance_to_average", "z_score"):
        found, right = columns(there.checkpoints, name), columns(here.checkpoints, name)
        assert found == pytest.approx(right, rel=1e-12)
    assert there.checkpoints[0].path == Path("hf:/org/run/checkpoint-100")


# --- The picture ----------------------------------------------------------------------------------


def texts_in(path: Path) -> set[str]:
    drawn = ElementTree.fromstring(path.read_text())
    return {"".join(one.itertext()) for one in drawn.iter("{http://www.w3.org/2000/svg}text")}


def test_the_picture_has_distances_norms_and_the_path(make_run: MakeRun, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = damaged(make_run, lambda values: values.flip(0))
    done = command("inspect", run, "--plot", tmp_path / "path.svg")
    assert done.returncode == 0, done.stderr
    texts = texts_in(tmp_path / "path.svg")
    assert {"distance", "norm", "training step", "average", "to the average"} <= texts
    assert {"checkpoint-100", "checkpoint-600"} <= texts
    assert any(text.startswith("first principal direction (") for text in texts)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_inspection_gives_the_same_picture(run: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    found = ckpt_ema.inspect(run)
    pictures = [ckpt_ema.plot(found, tmp_path / f"{name}.{kind}").content for name in "ab"]
    assert pictures[0] == pictures[1] == (tmp_path / f"a.{kind}").read_bytes()


def test_runs_of_one_checkpoint_and_without_finite_values_are_drawn(
    make_run: MakeRun, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    one = make_run(walk(1), [100], name="one")
    none = make_run(series(2, w=torch.full((3,), math.nan)), [1, 2], name="none")
    for run in (one, none):
        assert ckpt_ema.plot(ckpt_ema.inspect(run), tmp_path / "path.png").content


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("path.jpg", "must end in .png or .svg"),
        ("nowhere/path.svg", "a folder that does not exist"),
        ("run/checkpoint-100/path.svg", "is inside "),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_reading(
    run: Path, place: str, says: str
) -> None:
    done = command("inspect", run, "--plot", run.parent / place)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
