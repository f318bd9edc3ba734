"""The benchmark judges rightly, and gives its peers the same work."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import noise, read_safetensors, series, write_safetensors, write_shards

# Behind all else: one of the scripts is called test.py.
sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from contenders import Job, decay_of, run_uniform_mean, weights_files
from exactness import Errors, errors, folded, mean
from measuring import measure
from peers import linear_merge, write_merge


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints in bfloat16."""
    tensors = {"a": noise(3, 64, 3, dtype=torch.bfloat16), "b": noise(3, 5, dtype=torch.bfloat16)}
    for step, state in zip((100, 900, 1000), series(3, **tensors), strict=True):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        write_safetensors(folder / "model.safetensors", state)
    return tmp_path / "run"


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


def test_timms_loop_gives_the_mean_in_float32(run: Path, tmp_path: Path) -> None:
    run_uniform_mean(Job(run, tmp_path / "out", torch.get_num_threads()))
    found = errors(weights_files(run), {"mean": tmp_path / "out"}, mean)["mean"]
    assert (found.elements, found.wrong) == (197, 0)


def test_mergekit_gets_the_weights_of_the_average(run: Path) -> None:
    write_merge(run, "bfloat16")
    merge = yaml.safe_load((run.parent / "run-mergekit.yaml").read_text())
    assert [Path(model["model"]) for model in merge["models"]] == weights_files(run)
    first, second = decay_of(1), decay_of(2)
    by_hand = [first * second, (1 - first) * second, 1 - second]
    weights = [model["parameters"]["weight"] for model in merge["models"]]
    assert weights == pytest.approx(by_hand, rel=1e-15)
    del merge["models"]
    assert merge == {
        "merge_method": "linear",
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def test_mergekit_reads_any_path_and_any_weight() -> None:
    weights = {Path('/a run: "the 1st" #1'): 1e-06, Path("/café"): 0.1 + 0.2, Path("/c"): 1.0}
    merge = yaml.safe_load(linear_merge(weights, "float32"))
    read = {Path(m["model"]): m["parameters"]["weight"] for m in merge["models"]}
    assert read == weights
    assert all(type(weight) is float for weight in read.values())


def test_processor_seconds_are_those_of_the_process_and_its_children() -> None:
    child = "import time\nwhile time.process_time() < 0.1: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    measured, _ = measure(["-c", code])
    assert 0.1 < measured.processor_seconds < 10


def test_a_contender_that_fails_ends_the_benchmark_with_its_message() -> None:
    with pytest.raises(SystemExit, match="no such peer"):
        measure(["-c", "raise RuntimeError('no such peer')"])
