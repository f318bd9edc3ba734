"""`compare` finds what differs between two checkpoints, whatever they are stored in."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema.errors import Code, FailedError, OptionError, RefusedError
from ckpt_ema.measure.compared import Comparison, TensorDifference
from ckpt_ema.measure.comparison import CompareKeywords
from ckpt_ema.options import OF_ONE
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, raw, series, write_safetensors
from tests.makers.any_container import CONTAINERS
from tests.makers.fake_hub import fake_hub
from tests.makers.fake_s3 import fake_s3
from tests.makers.imports import imported_by
from tests.makers.tensors import StateDict

Write = Callable[[str, StateDict], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes a checkpoint of one file, and returns its folder."""

    def write(name: str, state: StateDict) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", state)
        return folder

    return write


def compared(write: Write, a: StateDict, b: StateDict, **options: Any) -> Comparison:
    return ckpt_ema.compare(write("a", a), write("b", b), **options)


def only(found: Comparison) -> TensorDifference:
    """The one tensor that both have."""
    [tensor] = found.tensors
    return tensor


def numbers(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_fold")
def test_a_tensor_by_hand(write: Write) -> None:
    found = compared(write, {"w": numbers(3, 4, 0)}, {"w": numbers(3, 0, 0)})
    tensor = only(found)
    assert tensor.distance.relative_distance == pytest.approx(4 / 5)
    assert tensor.distance.cosine == pytest.approx(9 / 15)
    assert tensor.distance.max_abs_difference == 4
    assert (tensor.different_elements, tensor.nonfinite, tensor.is_equal) == (1, (0, 0), False)
    assert (tensor.name, tensor.shape, tensor.dtypes) == ("w", (3,), ("F32", "F32"))
    assert found.distance == tensor.distance
    assert not found.is_equal


@pytest.mark.usefixtures("either_fold")
@pytest.mark.parametrize(
    ("a", "b", "relative", "cosine"),
    [
        ((0, 0), (0, 0), 0, None),
        ((0, 0), (0, 2), 1, None),
        ((1, 2), (1, 2), 0, 1),
        ((1, 2), (-1, -2), 2, -1),
        ((1, 0), (0, 1), math.sqrt(2), 0),
        ((0.0,), (-0.0,), 0, None),
    ],
)
def test_distances_and_angles_at_their_limits(
    write: Write, a: tuple[float, ...], b: tuple[float, ...], relative: float, cosine: float | None
) -> None:
    distance = only(compared(write, {"w": numbers(*a)}, {"w": numbers(*b)})).distance
    assert distance.relative_distance == pytest.approx(relative)
    assert distance.cosine == (None if cosine is None else pytest.approx(cosine, abs=1e-15))


@pytest.mark.usefixtures("either_fold")
def test_zeros_of_two_signs_have_other_bits(write: Write) -> None:
    tensor = only(compared(write, {"w": numbers(0.0, 1)}, {"w": numbers(-0.0, 1)}))
    assert (tensor.different_elements, tensor.is_equal) == (1, False)
    assert tensor.distance.relative_distance == 0


@pytest.mark.usefixtures("either_fold")
def test_what_is_not_finite_counts_and_is_left_out_of_distances(write: Write) -> None:
    a, b = numbers(3, math.nan, 1, 4), numbers(3, 2, -math.inf, 0)
    tensor = only(compared(write, {"w": a}, {"w": b}))
    assert tensor.nonfinite == (1, 1)
    assert tensor.distance.max_abs_difference == 4
    assert tensor.distance.relative_distance == pytest.approx(4 / math.sqrt(26))
    assert tensor.distance.cosine is None
    assert tensor.different_elements == 3
    json.dumps(tensor.distance.relative_distance, allow_nan=False)


@pytest.mark.usefixtures("either_fold")
def test_tensors_of_any_size_are_those_of_torch(write: Write) -> None:
    shapes = {"small": (3,), "large": (1300, 1000), "odd": (257, 3), "none": (0, 4), "one": ()}
    a = {name: noise(1, *shape)[0] for name, shape in shapes.items()}
    b = {name: tensor + 0.01 * noise(2, *tensor.shape)[1] for name, tensor in a.items()}
    found = compared(write, a, b)
    assert len(found.tensors) == len(shapes)
    for tensor in found.tensors:
        one, other = a[tensor.name].double().flatten(), b[tensor.name].double().flatten()
        largest = float(max(one.norm(), other.norm()))
        relative = float((one - other).norm()) / largest if largest else 0
        assert tensor.distance.relative_distance == pytest.approx(relative, rel=1e-12)
        if largest:
            cosine = float(one @ other / one.norm() / other.norm())
            assert tensor.distance.cosine == pytest.approx(cosine, rel=1e-12)
        most = float((one - other).abs().max()) if len(one) else 0
        assert tensor.distance.max_abs_difference == most
        assert tensor.different_elements == int((one != other).sum())
    distances = [one.distance.relative_distance or 0 for one in found.tensors]
    assert distances == sorted(distances, reverse=True)
    whole = [torch.cat([one.double().flatten() for one in each.values()]) for each in (a, b)]
    relative = float((whole[0] - whole[1]).norm() / max(whole[0].norm(), whole[1].norm()))
    assert found.distance.relative_distance == pytest.approx(relative, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=9, max_size=9),
)
def test_comparing_is_symmetric_and_bounded(
    tmp_path_factory: pytest.TempPathFactory, a: list[float], b: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    for path, values in zip(paths, (a, b[: len(a)]), strict=True):
        write_safetensors(path, {"w": numbers(*values)})
    here, there = (only(ckpt_ema.compare(*pair)) for pair in (paths, paths[::-1]))
    assert here.distance == there.distance
    assert 0 <= (here.distance.relative_distance or 0) <= 2 + 1e-12
    assert -1 <= (here.distance.cosine or 0) <= 1
    assert here.is_equal == (raw(numbers(*a)) == raw(numbers(*b[: len(a)])))


# --- Dtypes, shapes and names ---------------------------------------------------------------------


@pytest.mark.usefixtures("either_fold")
def test_floats_of_other_dtypes_are_compared_as_numbers(write: Write) -> None:
    value = noise(1, 50)[0]
    found = compared(write, {"w": value}, {"w": value.bfloat16()})
    tensor = only(found)
    assert (tensor.dtypes, tensor.different_elements) == (("F32", "BF16"), None)
    assert 0 < (tensor.distance.relative_distance or 0) < 2**-8
    assert [(one.name, one.a, one.b) for one in found.other_dtype] == [("w", "F32", "BF16")]
    same = numbers(1, 2)
    exact = ckpt_ema.compare(write("c", {"w": same}), write("d", {"w": same.double()}))
    assert (only(exact).distance.relative_distance, exact.is_equal) == (0, False)


@pytest.mark.usefixtures("either_fold")
def test_json_has_no_infinity(write: Write) -> None:
    """The difference of two numbers may be larger than any number."""
    ends = [numbers(1e308, dtype=torch.float64), numbers(-1e308, dtype=torch.float64)]
    found = compared(write, {"w": ends[0]}, {"w": ends[1]})
    described = json.loads(json.dumps(found.described(), allow_nan=False))
    assert described["max_abs_difference"] == sys.float_info.max
    assert not described["equal"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_what_is_no_float_is_compared_by_its_bytes(write: Write, dtype: torch.dtype) -> None:
    a, b = (torch.tensor(values).to(dtype) for values in ([0, 1, 1], [1, 1, 0]))
    tensor = only(compared(write, {"n": a}, {"n": b}))
    assert (tensor.different_elements, tensor.is_equal) == (2, False)
    assert tensor.distance.relative_distance is None
    assert tensor.distance.max_abs_difference is None
    assert only(ckpt_ema.compare(write("c", {"n": a}), write("d", {"n": a}))).is_equal


@pytest.mark.usefixtures("either_fold")
def test_complex_numbers_are_pairs_of_numbers(write: Write) -> None:
    a, b = torch.tensor([3 + 4j, 1j]), torch.tensor([3 + 0j, 1j])
    tensor = only(compared(write, {"z": a}, {"z": b}))
    assert (tensor.distance.max_abs_difference, tensor.different_elements) == (4, 1)
    assert tensor.shape == (2,)


def test_what_cannot_be_compared_is_listed(write: Write) -> None:
    a = {"same": numbers(1), "shape": numbers(1, 2), "kind": numbers(1), "left": numbers(1)}
    b = {"same": numbers(1), "shape": numbers(1), "kind": torch.tensor([1]), "right": numbers(1)}
    found = compared(write, a, b)
    assert [one.name for one in found.tensors] == ["same"]
    assert (found.only_in_a, found.only_in_b) == (("left",), ("right",))
    assert [(one.name, one.a, one.b) for one in found.other_shape] == [("shape", "[2]", "[1]")]
    assert [(one.name, one.a, one.b) for one in found.other_dtype] == [("kind", "F32", "I64")]
    assert (found.equal_tensors, found.is_equal) == (1, False)
    text = command("compare", found.a, found.b).stdout
    for line in ("only in a: left", "only in b: right", "other shape: shape ([2], [1])"):
        assert line in text.splitlines()


def test_nothing_in_common_is_no_distance(write: Write) -> None:
    found = compared(write, {"a": numbers(1)}, {"b": numbers(1)})
    assert (found.tensors, found.distance.relative_distance, found.is_equal) == ((), None, False)


def test_names_that_a_wrapper_changed_go_together(write: Write) -> None:
    a = {"_orig_mod.w": numbers(1), "_orig_mod.b": numbers(2), "c": numbers(3)}
    found = compared(write, a, {"w": numbers(1), "b": numbers(2), "c": numbers(3)})
    assert found.is_equal
    [note] = found.notes
    assert note.code is Code.DIFFERENT_NAMES
    assert "w, b" in note.message


def test_groups_are_names_that_differ_in_numbers(write: Write) -> None:
    a = {f"layers.{n}.w": numbers(1, n) for n in range(12)} | {"head": numbers(1)}
    b = {**a, "layers.3.w": numbers(1, 4), "layers.11.w": numbers(2, 11)}
    found = compared(write, a, b)
    first, second = found.groups
    assert (first.pattern, first.tensors, first.equal_tensors) == ("layers.*.w", 12, 10)
    assert (second.pattern, second.equal_tensors) == ("head", 1)
    squares = sum(1 + n**2 for n in range(12)) + 7  # of b, whose norm is the larger one
    relative = math.sqrt(2 / (squares + 3))
    assert first.distance.relative_distance == pytest.approx(relative, rel=0.02)


def test_options_say_which_model_and_which_tensors(write: Write) -> None:
    a, b = {"model.w": numbers(1), "x": numbers(1)}, {"w": numbers(1), "x": numbers(2)}
    assert ckpt_ema.compare(
        write("a", a), write("b", b), strip_prefix="model.", drop=["x"]
    ).is_equal
    with pytest.raises(TypeError, match="unexpected keyword argument 'decay'"):
        ckpt_ema.compare("a", "b", decay=0.9)  # type: ignore[call-arg]
    with pytest.raises(OptionError):
        ckpt_ema.compare("a", "b", threads=0)


def test_the_command_has_the_options_of_the_library() -> None:
    assert CompareKeywords.__annotations__.keys() == OF_ONE


# --- What A and B may be --------------------------------------------------------------------------


def state(step: int) -> dict[str, torch.Tensor]:
    return {"w": noise(step, 40, 6)[-1], "b": noise(step, 5)[-1]}


@pytest.mark.usefixtures("either_fold")
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_is_compared_with_every_other(
    write: Write, tmp_path: Path, container: str
) -> None:
    plain = {step: write(str(step), state(step)) for step in (1, 2)}
    for step in (1, 2):
        CONTAINERS[container](tmp_path / "run", step, state(step))
    right = ckpt_ema.compare(plain[1], plain[2])
    found = ckpt_ema.compare(plain[1], f"{tmp_path}/run@2")
    assert [one.name for one in found.tensors] == [one.name for one in right.tensors]
    for one, other in zip(found.tensors, right.tensors, strict=True):
        assert one.distance.relative_distance == pytest.approx(other.distance.relative_distance)
    assert ckpt_ema.compare(f"{tmp_path}/run@1", plain[1]).is_equal


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    return make_run(series(3, w=noise(3, 40)), [100, 200, 300])


def test_a_step_is_given_by_its_number_or_its_name(run: Path) -> None:
    for name in ("200", "checkpoint-200"):
        assert ckpt_ema.compare(f"{run}@{name}", run / "checkpoint-200").is_equal
    for name in ("model.safetensors", ""):
        assert ckpt_ema.compare(run / "checkpoint-200", run / "checkpoint-200" / name).is_equal


def test_an_average_is_compared_as_it_is(run: Path, tmp_path: Path) -> None:
    folder = ckpt_ema.average(run, output=tmp_path / "out", device="cpu").output
    file = ckpt_ema.average(run, output=tmp_path / "out.safetensors", device="cpu").output
    assert ckpt_ema.compare(folder, file).is_equal
    assert not ckpt_ema.compare(folder, f"{run}@300").is_equal


def test_a_run_of_one_checkpoint_is_that_checkpoint(make_run: MakeRun) -> None:
    run = make_run(series(1, w=noise(1, 3)), [7])
    assert ckpt_ema.compare(run, run / "checkpoint-7").is_equal


def test_what_exists_under_the_whole_name_is_meant(run: Path) -> None:
    (run / "checkpoint-100").rename(run.parent / "run@300")
    assert not ckpt_ema.compare(f"{run}@300", run / "checkpoint-300").is_equal


@pytest.mark.parametrize(
    ("given_path", "code", "says"),
    [
        ("run", Code.NOT_A_CHECKPOINT, r"holds 3 checkpoints\. Pass one of them, .*run@300\."),
        ("run@700", Code.NO_SUCH_STEP, r"no checkpoint of step 700; its steps are 100, 200, 300\."),
        ("nowhere", Code.NOT_FOUND, r"nowhere does not exist\. Pass a checkpoint, or a step"),
        ("nowhere@3", Code.NOT_FOUND, r"nowhere@3 does not exist\."),
        ("run@", Code.NOT_FOUND, r"run@ does not exist\."),
        ("run/checkpoint-100/config.json", Code.NOT_A_CHECKPOINT, "config.json"),
        ("empty", Code.NO_CHECKPOINTS, "empty"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    run: Path, given_path: str, code: Code, says: str
) -> None:
    (run.parent / "empty").mkdir()
    with pytest.raises(RefusedError, match=says) as caught:
        ckpt_ema.compare(run / "checkpoint-100", run.parent / given_path)
    assert caught.value.code is code
    done = command("compare", run / "checkpoint-100", run.parent / given_path)
    assert (done.returncode, done.stdout) == (3, "")


def test_an_empty_name_is_not_the_folder_at_hand(run: Path) -> None:
    """A script may have left a variable empty."""
    for words in (("compare", "", run / "checkpoint-100"), ("verify", "")):
        done = command(*words, cwd=run / "checkpoint-100")
        assert (done.returncode, done.stderr) == (
            2,
            "error: No run and no checkpoints were given.\n",
        )


def test_an_incomplete_step_is_refused(run: Path) -> None:
    (run / "checkpoint-200/model.safetensors").write_bytes(b"")
    for broken in (f"{run}@200", f"{run}/checkpoint-200"):
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.compare(f"{run}@100", broken)
        assert caught.value.code is Code.INCOMPLETE


def test_a_format_that_is_not_read_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.compare(run / "checkpoint-100", tmp_path / "model.gguf")
    assert caught.value.code is Code.UNSUPPORTED_FORMAT


def test_a_file_that_changes_is_noticed(run: Path) -> None:
    def touch(*_: object) -> None:
        (run / "checkpoint-200/model.safetensors").touch()

    with pytest.raises(FailedError) as caught:
        ckpt_ema.compare(f"{run}@100", f"{run}@200", progress=touch)
    assert caught.value.code is Code.CHANGED


@pytest.mark.usefixtures("either_fold")
def test_the_hub_and_a_disk_are_compared(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(3, w=noise(3, 40)), [100, 200, 300], name="hub/org/run/main")
    with fake_hub(tmp_path / "hub") as hub, pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_ENDPOINT", hub.endpoint)
        for name in ("hf://org/run@200", "hf://org/run@main@200", "hf://org/run/checkpoint-200"):
            assert ckpt_ema.compare(name, run / "checkpoint-200").is_equal
        two = ckpt_ema.compare("hf://org/run@100", "hf://org/run@200")
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.compare("hf://org/absent@100", run / "checkpoint-200")
    right = ckpt_ema.compare(run / "checkpoint-100", run / "checkpoint-200")
    assert two.distance == right.distance
    assert caught.value.code in (Code.NOT_FOUND, Code.INACCESSIBLE)


def test_a_store_and_a_disk_are_compared(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    run = make_run(series(3, w=noise(3, 40)), [100, 200, 300], name="bucket/run")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with fake_s3(tmp_path) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        found = ckpt_ema.compare("s3://bucket/run@200", run / "checkpoint-200")
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.compare("s3://bucket/run@700", run / "checkpoint-200")
    assert found.is_equal
    assert caught.value.code is Code.NO_SUCH_STEP


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "words", "code"),
    [
        ((100, 100), ["--exit-code"], 0),
        ((100, 200), ["--exit-code"], 1),
        ((100, 200), [], 0),
        ((100, 200), ["--threads", "x"], 2),
    ],
)
def test_exit_codes(run: Path, pair: tuple[int, int], words: list[str], code: int) -> None:
    done = command("compare", f"{run}@{pair[0]}", f"{run}@{pair[1]}", *words)
    assert done.returncode == code
    assert ("equal: 1 tensor, every bit the same" in done.stdout) == (pair[0] == pair[1])


def test_json_has_what_the_library_returns(run: Path) -> None:
    done = command("compare", f"{run}@100", f"{run}@300", "--json")
    found = ckpt_ema.compare(f"{run}@100", f"{run}@300")
    assert json.loads(done.stdout) == json.loads(json.dumps(found.described()))


def test_the_tables_show_the_farthest_first_and_count_the_rest(write: Write) -> None:
    a = {f"layers.{n}.w": numbers(1, 2) for n in range(14)}
    b = {name: value * (1 + 0.01 * n) for n, (name, value) in enumerate(a.items())}
    done = command("compare", write("a", a), write("b", b))
    lines = done.stdout.splitlines()
    start = next(n for n, line in enumerate(lines) if line.endswith("tensor"))
    assert [line.split()[-1] for line in lines[start + 1 : start + 4]] == [
        *("layers.13.w", "layers.12.w", "layers.11.w"),
    ]
    assert "  ... 3 more" in lines
    assert "13 tensors different, 1 equal" in lines
    assert any(line.endswith("13 of 14  layers.*.w") for line in lines)


def test_it_imports_neither_torch_nor_numpy(run: Path) -> None:
    imported = imported_by("compare", f"{run}@100", f"{run}@300")
    homes = {name.partition(".")[0] for name in imported}
    assert not homes & {"torch", "numpy", "pydantic", "rich", "tqdm"}
