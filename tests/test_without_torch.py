"""Averages on the CPU need neither torch nor numpy: every command here finds neither.

The checkpoints are made of numbers, and the averages are exact fractions.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest

from ckpt_ema.fold import native
from tests.makers import by_hand
from tests.makers.by_hand import State, Values
from tests.makers.imports import imported_by

Write = Callable[[Path, State], None]
CONTAINERS = {
    "safetensors": by_hand.write_model,
    "shards": by_hand.write_shards,
    "torch.save": by_hand.write_torch,
    "distributed": by_hand.write_dcp,
}
STEPS = (100, 200, 300)
DTYPES = ("F64", "F32", "F16", "BF16")
# Weights of the checkpoints.
QUARTER = (Fraction(1, 16), Fraction(3, 16), Fraction(3, 4))  # at a decay of 1/4
HALF = (Fraction(1, 4), Fraction(1, 4), Fraction(1, 2))  # at a decay of 1/2
WARMUP = (Fraction(2, 44), Fraction(9, 44), Fraction(33, 44))  # by default: decays 2/11 and 3/12
CONSTANT = ("--schedule", "constant", "--decay")

pytestmark = pytest.mark.skipif(native.compiled() is None, reason=native.reason())

# Where torch is installed, this hides it from what follows.
HIDDEN = "import sys; sys.modules.update(torch=None, numpy=None)\n"
COMMAND = HIDDEN + "from ckpt_ema.cli.app import main; main()"
STOPPED = (
    HIDDEN
    + """
import ckpt_ema
def stop(done, total):
    if done:
        raise KeyboardInterrupt
run, output = sys.argv[1:]
options = dict(schedule="constant", decay=0.25, tile_size=64, threads=1, resume=True)
ckpt_ema.average(run, output=output, progress=stop, **options)
"""
)


def python(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run Python code with these arguments."""
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def average(*words: object) -> str:
    """Run `ckpt-ema` with these words, which must not fail; return what it prints."""
    done = python(COMMAND, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(step: int, place: int) -> float:
    """The number at a place in the checkpoint of a step; all of them are small integers."""
    return float((step // 100 * 37 + place * 11) % 101 - 50)


def state(step: int, count: int = 12) -> State:
    """A checkpoint: a tensor of `count` elements in each dtype, and the step."""
    numbers = [number(step, place) for place in range(count)]
    weights = {f"layer.{dtype}": Values(dtype, (count // 3, 3), numbers) for dtype in DTYPES}
    return {**weights, "steps": Values("I64", (2,), [step, step])}


def expected(weights: Sequence[Fraction], count: int = 12) -> dict[str, tuple[str, object, bytes]]:
    """The average: each element is the fraction that is rounded once; integers are the newest."""
    pairs = list(zip(weights, STEPS, strict=True))
    exact = [sum(w * Fraction(number(step, i)) for w, step in pairs) for i in range(count)]
    made = {
        name: values._replace(numbers=[float(fraction) for fraction in exact])
        if values.dtype in DTYPES
        else values
        for name, values in state(STEPS[-1], count).items()
    }
    return {name: (one.dtype, list(one.shape), one.packed) for name, one in made.items()}


def make_run(folder: Path, write: Write, count: int = 12) -> Path:
    """A run of three checkpoints."""
    for step in STEPS:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        write(checkpoint, state(step, count))
    return folder


def read(output: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """All tensors of an output."""
    found = dict[str, tuple[str, list[int], bytes]]()
    for path in output.glob("*.safetensors"):
        found |= by_hand.read(path)
    return found


@pytest.fixture(params=CONTAINERS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run in each kind of container."""
    return make_run(tmp_path / "run", CONTAINERS[request.param])


def test_every_container_is_averaged(run: Path, tmp_path: Path) -> None:
    assert average("average", run, "-o", tmp_path / "out", *CONSTANT, 0.25) == f"{tmp_path}/out\n"
    assert read(tmp_path / "out") == expected(QUARTER)


def test_the_default_is_averaged(run: Path, tmp_path: Path) -> None:
    average("average", run, "-o", tmp_path / "out")
    found, right = read(tmp_path / "out"), expected(WARMUP)
    for name in found.keys() - {"layer.F64"}:  # as wide as the fold, in which 2/11 is rounded too
        assert found[name] == right[name]


def test_several_averages_are_made_in_one_pass(run: Path, tmp_path: Path) -> None:
    average("average", run, "-o", tmp_path / "out", *CONSTANT, "0.25,0.5")
    assert read(tmp_path / "out/constant-0.25") == expected(QUARTER)
    assert read(tmp_path / "out/constant-0.5") == expected(HALF)


def test_parts_are_finished(run: Path, tmp_path: Path) -> None:
    for part in ("2/3", "1/3", "3/3"):
        average("average", run, "-o", tmp_path / "out", *CONSTANT, 0.25, "--part", part)
    average("finish", tmp_path / "out")
    assert read(tmp_path / "out") == expected(QUARTER)


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_interrupted_run_is_resumed(container: str, tmp_path: Path) -> None:
    count = 3000
    run, output = make_run(tmp_path / "run", CONTAINERS[container], count), tmp_path / "out"
    stopped = python(STOPPED, run, output)
    assert stopped.stderr.rstrip().endswith("KeyboardInterrupt")
    assert not output.exists()
    options = (*CONSTANT, 0.25, "--tile-size", 64, "--threads", 1, "--resume")
    average("average", run, "-o", output, *options)
    assert read(output) == expected(QUARTER, count)


def test_averaging_imports_neither_torch_nor_numpy(run: Path, tmp_path: Path) -> None:
    """Where they are installed, too, and without a try."""
    imported = imported_by("average", run, "-o", tmp_path / "out")
    assert "ckpt_ema.fold.engine" in imported
    homes = {name.partition(".")[0] for name in imported}
    assert not homes & {"torch", "numpy", "pydantic", "rich"}
    assert "safetensors.torch" not in imported


# An evaluation that finds constant-0.5 best.
SELECTING = ("--metric", "loss", "--greedy", "--eval")
BY_NAME = "test $CKPT_EMA_CANDIDATE = constant-0.5 && echo loss=1 || echo loss=2 # {}"


def test_a_selection_is_made_from_every_container(run: Path, tmp_path: Path) -> None:
    words = ("select", run, "-o", tmp_path / "out", *CONSTANT, "0.25,0.5", *SELECTING, BY_NAME)
    assert average(*words) == f"{tmp_path}/out\n"
    assert read(tmp_path / "out") == expected(HALF)


def test_a_selection_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", by_hand.write_model)
    imported = imported_by("select", run, *SELECTING, BY_NAME)
    assert "ckpt_ema.selection.soups" in imported
    homes = {name.partition(".")[0] for name in imported}
    assert not homes & {"torch", "numpy", "pydantic", "rich", "asyncio"}


def test_a_tensor_in_more_files_than_may_be_open(tmp_path: Path) -> None:
    count = 300  # elements in 100 rows, each in a file of its own
    run = make_run(tmp_path / "run", partial(by_hand.write_dcp, ranks=100), count)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
    words = ("average", run, "-o", tmp_path / "out", *CONSTANT, 0.25, "--threads", 4)
    done = python(limit + COMMAND, *words)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/out\n"), done.stderr
    assert read(tmp_path / "out") == expected(QUARTER, count)


def test_plan_needs_no_torch_either(run: Path) -> None:
    assert "checkpoint-300" in average("plan", run)


def test_an_accelerator_needs_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", by_hand.write_model)
    done = python(COMMAND, "average", run, "-o", tmp_path / "out", "--device", "cuda")
    assert done.returncode == 1
    assert "error: torch cannot be imported" in done.stderr


@pytest.mark.parametrize("container", ["torch.save", "distributed"])
def test_torch_reads_what_is_made_here(container: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    CONTAINERS[container](tmp_path, state(100))
    if container == "torch.save":
        found = torch.load(tmp_path / "pytorch_model.bin")
    else:
        format_utils = pytest.importorskip("torch.distributed.checkpoint.format_utils")
        format_utils.dcp_to_torch_save(tmp_path, tmp_path / "whole.pt")
        found = torch.load(tmp_path / "whole.pt")["model"]
    for name, values in state(100).items():
        assert found[name].flatten().tolist() == values.numbers
        assert tuple(found[name].shape) == values.shape
