"""The benchmark measures whole processes, judges rightly, and gives its peers the same work."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import ckpt_ema
from tests.conftest import noise, read_safetensors, series, write_safetensors, write_shards

# Behind all else: one of the scripts is called test.py.
sys.path.append(str(Path(__file__).parent.parent / "scripts"))

import bench
import contenders
import layouts
import runs
from bench import TINY
from contenders import decay_of, linear_merge, weights_files, weights_of
from exactness import Errors, errors, folded, mean
from measuring import (
    PEAK,
    WALL,
    WRONG,
    Check,
    Contender,
    Measured,
    Part,
    Result,
    Round,
    measure,
    measure_part,
    on_tiny,
    others_cores,
)
from runs import MIB, Run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints in bfloat16."""
    tensors = {"a": noise(3, 64, 3, dtype=torch.bfloat16), "b": noise(3, 5, dtype=torch.bfloat16)}
    for step, state in zip((100, 900, 1000), series(3, **tensors), strict=True):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        write_safetensors(folder / "model.safetensors", state)
    return tmp_path / "run"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


# --- Judging averages ----------------------------------------------------------------------------


def exact(run: Path) -> dict[str, torch.Tensor]:
    """The average of the run in float64, by the tests' own reader."""
    states = [read_safetensors(path) for path in weights_files(run)]
    return {name: folded(state[name] for state in states) for name in states[0]}


def judge(run: Path, **outputs: Path) -> dict[str, Errors]:
    return errors(weights_files(run), outputs, folded)


def test_the_average_rounded_once_has_no_error(run: Path, tmp_path: Path) -> None:
    rounded = {name: value.bfloat16() for name, value in exact(run).items()}
    for name in ("whole", "shards"):
        (tmp_path / name).mkdir()
    write_safetensors(tmp_path / "whole" / "model.safetensors", rounded)
    write_shards(tmp_path / "shards", rounded, 2)
    found = judge(run, whole=tmp_path / "whole", shards=tmp_path / "shards")
    assert found["whole"] == found["shards"]
    assert (found["whole"].elements, found["whole"].wrong) == (197, 0)
    assert found["whole"].times_rounding == 1


def test_each_wrong_element_is_counted(run: Path, tmp_path: Path) -> None:
    rounded = {name: value.bfloat16() for name, value in exact(run).items()}
    rounded["a"][7, 1] *= 1.5
    rounded["b"][4] = 3
    write_safetensors(tmp_path / "model.safetensors", rounded)
    found = judge(run, wrong=tmp_path)["wrong"]
    assert found.wrong == 2
    assert found.times_rounding > 2


def test_an_output_is_judged_in_its_own_dtype(run: Path, tmp_path: Path) -> None:
    rounded = {name: value.float() for name, value in exact(run).items()}
    write_safetensors(tmp_path / "model.safetensors", rounded)
    assert judge(run, wide=tmp_path)["wide"].wrong == 0
    narrow = {name: value.bfloat16().float() for name, value in rounded.items()}
    write_safetensors(tmp_path / "model.safetensors", narrow)
    assert judge(run, narrowed=tmp_path)["narrowed"].wrong > 150


def test_errors_in_multiples_of_rounding_by_hand() -> None:
    found = Errors()
    # Above 1, bfloat16 has steps of 1/128. Rounding loses a quarter of one, and here it is 3/4.
    exactly = torch.tensor([1 + 0.25 / 128], dtype=torch.float64)
    found.add(torch.tensor([1 + 1 / 128], dtype=torch.bfloat16), exactly)
    assert (found.wrong, found.times_rounding) == (1, 3)


# --- The contenders ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loop", "averaged-model"])
def test_the_loops_make_the_average_that_they_are_compared_with(
    name: str, run: Path, output: Path
) -> None:
    contenders.CONTENDERS[name](run, output)
    made = read_safetensors(output / "model.safetensors")
    for tensor, value in exact(run).items():
        torch.testing.assert_close(made[tensor].double(), value, rtol=0.02, atol=0.01)


def test_timms_loop_gives_the_mean_in_float32(run: Path, output: Path) -> None:
    contenders.uniform_mean(run, output)
    found = errors(weights_files(run), {"mean": output}, mean)["mean"]
    assert (found.elements, found.wrong) == (197, 0)


def test_mergekit_gets_the_weights_of_the_average(run: Path) -> None:
    first, second = decay_of(1), decay_of(2)
    by_hand = [first * second, (1 - first) * second, 1 - second]
    assert weights_of(3) == pytest.approx(by_hand, rel=1e-15)
    planned = ckpt_ema.plan(run, decay=contenders.DECAY).averages[0].weights
    assert weights_of(3) == pytest.approx(list(planned), rel=1e-15)


def test_mergekit_reads_any_path_and_any_weight() -> None:
    weights = {Path('/a run: "the 1st" #1'): 1e-06, Path("/café"): 0.1 + 0.2, Path("/c"): 1.0}
    merge = yaml.safe_load(linear_merge(weights, "float32"))
    models = merge.pop("models")
    read = {Path(model["model"]): model["parameters"]["weight"] for model in models}
    assert read == weights
    assert all(type(weight) is float for weight in read.values())
    assert merge == {
        "merge_method": "linear",
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": "float32",
    }


def test_copying_reads_all_and_writes_the_newest_checkpoint(run: Path, output: Path) -> None:
    contenders.read(run, output)
    contenders.read_and_write(run, output)
    written = (output / "model.safetensors").read_bytes()
    assert written == weights_files(run)[-1].read_bytes()


def test_a_durable_contender_syncs_file_and_folders_before_and_after_the_rename(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path))

    monkeypatch.setattr(os, "fsync", fsync)
    contenders.main("write", str(run), str(tmp_path / "out"), "--durable")
    assert synced == [Path("out.tmp/model.safetensors"), Path("out.tmp"), Path()]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    synced.clear()
    contenders.main("write", str(run), str(tmp_path / "other"))
    assert synced == []


# --- Runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", [TINY, Run("float32", 2, 100_000, tensors=10)], ids=lambda run: run.name
)
def test_a_run_has_the_size_that_was_asked_for(wanted: Run, tmp_path: Path) -> None:
    runs.make(wanted, tmp_path)
    files = weights_files(tmp_path)
    assert len(files) == wanted.checkpoints
    for file in files:
        state = load_file(file)
        assert sum(value.nbytes for value in state.values()) == pytest.approx(100_000, rel=0.02)
        assert all(value.isfinite().all() for value in state.values())
    assert files[0].read_bytes() != files[1].read_bytes()


def test_a_sparse_run_is_in_shards_and_takes_no_room(tmp_path: Path) -> None:
    runs.make(Run("bfloat16", 2, 14 * 10**9, is_sparse=True), tmp_path)
    shards = list(tmp_path.rglob("*.safetensors"))
    assert len(shards) == 6
    assert sum(shard.stat().st_size for shard in shards) > 27 * 10**9
    assert sum(shard.stat().st_blocks * 512 for shard in shards) < MIB
    assert len(ckpt_ema.plan(tmp_path).checkpoints) == 2


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_run_in_a_layout_of_a_trainer_has_the_same_weights(layout: str, tmp_path: Path) -> None:
    wanted = Run("float32", 2, 400_000, layout=layout)
    runs.make(wanted, tmp_path / "run")
    ckpt_ema.average(tmp_path / "run", output=tmp_path / "out")
    averaged = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: list(value.shape) for name, value in averaged.items()} == wanted.shapes
    assert all(value.std() > 0.01 for value in averaged.values())


def test_the_newest_checkpoint_is_copied(tmp_path: Path) -> None:
    for layout, name in (("torch file", "checkpoint-10.pt"), ("DCP", "step-10/.metadata")):
        runs.make(Run("float32", 10, 100_000, layout=layout), tmp_path / layout)
        contenders.main(
            "copy-newest", str(tmp_path / layout), str(tmp_path / name[:4]), "--durable"
        )
        copy = tmp_path / name[:4] / name
        assert copy.read_bytes() == (tmp_path / layout / name).read_bytes()


def test_a_run_is_made_once_and_again_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: made.append(command[2]))
    folder = str(runs.ready(TINY, tmp_path))
    runs.ready(TINY, tmp_path)
    assert made == [folder]
    monkeypatch.setattr(subprocess, "run", interrupted)
    larger = replace(TINY, checkpoints=4)
    with pytest.raises(KeyboardInterrupt):
        runs.ready(larger, tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: made.append(command[2]))
    runs.ready(larger, tmp_path)
    assert made == [folder, str(tmp_path / larger.name)]


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# --- Measuring -----------------------------------------------------------------------------------


def test_the_benchmark_lends_no_memory_to_what_it_measures() -> None:
    """A process begins with the peak of its parent, which must be a small one."""
    code = """
import bench, sys
from measuring import MIB, measure
few, many = (measure(["-c", f"bytearray(b'x') * {size}"]).resident_bytes for size in (1, 100 * MIB))
assert few < 40 * MIB and 80 * MIB < many - few < 105 * MIB, (few, many)
sys.exit(bool({"torch", "numpy"} & {*sys.modules}))
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts").returncode == 0


def test_processor_seconds_are_those_of_the_process_and_its_children() -> None:
    child = "import time\nwhile time.process_time() < 0.1: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert 0.1 < measure(["-c", code]).processor_seconds < 10


def test_a_contender_that_fails_ends_the_benchmark_with_its_message() -> None:
    with pytest.raises(SystemExit, match="no such peer"):
        measure(["-c", "raise RuntimeError('no such peer')"])


def test_a_part_is_measured_and_judged_in_its_rounds(tmp_path: Path) -> None:
    ours = bench.ours()
    checks = (Check(WALL, ours.name, "Python alone"), Check(WRONG, ours.name, None, 0))
    part = Part("part", "A part", TINY, (bench.INTERPRETER, ours), checks, average="folded")
    result = measure_part(part, tmp_path, 1)
    assert 1 <= len(result.rounds) + result.left_out <= 2
    assert result.is_met(checks[1])
    assert checks[0].found(result.rounds) > 2
    report = "\n".join(bench.report(result))
    assert "| wrong: ckpt-ema " in report
    assert [path.name for path in tmp_path.iterdir() if TINY.name not in path.name] == []


# --- Promises ------------------------------------------------------------------------------------


def measured(
    wall_seconds: float, mib: int = 0, others: float = 0, wrong: float | None = None
) -> Measured:
    return Measured(wall_seconds, wall_seconds, mib * MIB, others, 0, wrong, wrong)


def result(rounds: list[Round], *checks: Check, is_quiet: bool = True) -> Result:
    named = tuple(Contender(name, ()) for name in rounds[0])
    return Result(Part("durable", "Title", TINY, named, checks), rounds, is_quiet=is_quiet)


def test_ratios_are_medians_of_rounds_and_peaks_are_the_largest() -> None:
    rounds = [
        {"a": measured(wall, mib), "b": measured(2)} for wall, mib in ((1, 9), (3, 7), (8, 8))
    ]
    assert Check(WALL, "a", "b").each(rounds) == [0.5, 1.5, 4]
    assert Check(WALL, "a", "b").found(rounds) == 1.5
    assert Check(PEAK, "a").found(rounds) == 9


def test_net_figures_are_without_the_median_of_what_the_tiny_run_takes() -> None:
    rounds = [
        {"a": measured(7), "b": measured(3), on_tiny("a"): measured(a), on_tiny("b"): measured(1)}
        for a in (1, 0, 5)
    ]
    assert Check(WALL, "a", "b", is_net=True).each(rounds) == [3, 3, 3]


def test_a_fold_that_is_lost_in_the_noise_of_starting_is_no_fold_that_keeps_a_promise() -> None:
    whole, start_up = {"a": measured(1), "b": measured(3)}, {on_tiny("a"): measured(2)}
    rounds = [whole | start_up | {on_tiny("b"): measured(1)}]
    assert result(rounds).is_met(Check(WALL, "a", "b", 2, is_net=True)) is False


def test_a_promise_is_met_up_to_its_limit() -> None:
    rounds = [{"a": measured(2, 64), "b": measured(4)}]
    found = result(rounds)
    assert found.is_met(Check(WALL, "a", "b", 0.5)) is True
    assert found.is_met(Check(WALL, "a", "b", 0.49)) is False
    assert found.is_met(Check(WALL, "a", "b")) is None


def test_seconds_of_a_busy_machine_are_not_judged_but_memory_is() -> None:
    found = result([{"a": measured(2, 64)}], is_quiet=False)
    assert found.is_met(Check(WALL, "a", None, 1)) is None
    assert found.is_met(Check(PEAK, "a", None, 63)) is False


def test_cores_of_others_are_those_of_the_whole_round() -> None:
    assert others_cores({"a": measured(1, others=0.5), "b": measured(4, others=0)}) == 0.1


def test_every_promise_is_about_contenders_of_its_part() -> None:
    for part in bench.all_parts(["bfloat16", "float32"], 6, 256 * MIB, peers=True):
        names = {contender.name for contender in part.contenders}
        assert len(names) == len(part.contenders)
        for check in part.checks:
            wanted = {check.contender, check.over or check.contender}
            assert wanted <= names
            assert not check.is_net or {on_tiny(name) for name in wanted} <= names


def test_the_report_names_each_promise_that_was_missed() -> None:
    rounds = [{"a": measured(2, 70), "b": measured(4)}]
    checks = (Check(WALL, "a", "b", 0.5), Check(PEAK, "a", None, 64), Check(WALL, "b"))
    told = list(bench.summary([result(rounds, *checks)]))
    assert told == [
        "Promises: 1 met, 1 missed, 0 not judged.\n",
        "- MISSED: peak MiB: a: 70.00 (Title)",
        "",
    ]


def test_tables_leave_empty_columns_out() -> None:
    told = list(bench.table(["name", "empty", "s"], [["a", "", "1.00"], ["bcdef", "", ""]]))
    assert told == [
        "| name  | s    |",
        "| ----- | ---- |",
        "| a     | 1.00 |",
        "| bcdef |      |",
        "",
    ]


def test_the_table_of_the_readme_is_the_end_of_a_record() -> None:
    page = (ROOT / "README.md").read_text()
    pasted = page.split("bench.py` -->\n")[1].split("<!-- end -->")[0].strip()
    records = [path.read_text() for path in (ROOT / "benchmarks").glob("*-*.md")]
    assert not pasted or any(record.strip().endswith(pasted) for record in records)
