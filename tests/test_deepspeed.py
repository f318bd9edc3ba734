"""DeepSpeed's folders: the float32 weights of all ranks, under the model's names, or a refusal."""

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.containers import deepspeed
from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.source import read_specs
from ckpt_ema.containers.specs import Member, ModelFiles, Specs
from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.options import Reading
from ckpt_ema.storage.local import Local
from tests.makers.deepspeed_folders import save
from tests.makers.safetensors_files import read_safetensors
from tests.makers.tensors import DTYPES, raw
from tests.makers.torch_files import archive, hostile_pickles, records
from tests.makers.trainer_values import build, importable

State = dict[str, torch.Tensor]
BUFFERS = ("norm.mean", "norm.count")
FROZEN = ("frozen.weight", "frozen.bias")
TIED = {"head.weight": "embedding.weight"}
PARTS: Mapping[str, Any] = {"buffers": BUFFERS, "frozen": FROZEN, "tied": TIED}
LAYOUTS = [(0, 1), *product((1, 2, 3), (1, 2, 3))]  # stage, ranks


def model(seed: int) -> State:
    """A model of odd sizes; what is frozen is the same in every step."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    embedding = noise(7, 5)
    return {
        "scale": noise(1),
        "empty": noise(0, 3),
        "embedding.weight": embedding,
        "conv.weight": noise(3, 2, 3, 1),
        "norm.weight": noise(9),
        "norm.mean": noise(9),
        "norm.count": torch.tensor(seed),
        "frozen.weight": torch.arange(15.0).view(3, 5),
        "frozen.bias": torch.arange(4.0),
        "scalar": noise(),
        "head.weight": embedding,
    }


def specs_of(folder: Path, reading: Reading | None = None) -> tuple[ModelFiles, Specs]:
    """The headers of one checkpoint."""
    storage = Local()
    name = deepspeed.model_file(storage.names(folder))
    assert name is not None
    files = ModelFiles(folder, (Member(name),))
    return files, read_specs(files, storage, reading or Reading())


def read(folder: Path, reading: Reading | None = None) -> State:
    """Every tensor of one checkpoint, by our own reader."""
    dtype_of = {name: dtype for dtype, name in DTYPES.items()}
    files, specs = specs_of(folder, reading)
    found = {}
    with Reader(Local(), [(files.folder, specs)]) as reader:
        for name, spec in specs.tensors.items():
            content = bytearray(spec.size_bytes)
            reader.read_into(0, spec, 0, memoryview(content))
            dtype = dtype_of[spec.dtype]
            flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0)
            found[name] = flat.to(dtype).view(spec.shape)
    return found


def check(found: State, expected: State) -> None:
    """The same names in the same order, and the same bytes."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


@pytest.mark.parametrize(("stage", "ranks"), LAYOUTS)
def test_the_weights_of_all_ranks_are_those_of_the_model(
    tmp_path: Path, stage: int, ranks: int
) -> None:
    """Buffers, frozen, tied, empty and scalar ones too, in the order of the model."""
    expected = model(1)
    check(read(save(tmp_path / "step", expected, stage=stage, ranks=ranks, **PARTS)), expected)


@pytest.mark.parametrize(("stage", "ranks"), [one for one in LAYOUTS if one[0]])
def test_masters_win_over_rounded_weights(tmp_path: Path, stage: int, ranks: int) -> None:
    options: Any = {"stage": stage, "ranks": ranks, "dtype": torch.bfloat16, **PARTS}
    found, expected = read(save(tmp_path / "step", model(1), **options)), model(1)
    for name in FROZEN:  # have no master
        expected[name] = expected[name].to(torch.bfloat16)
    check(found, expected)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (3, {"sub_group": 4}),  # weights cross the groups of a rank
        (1, {"keeps_padding": True}),  # as releases before 0.4 and the optimizer for bfloat16 do
        (2, {"keeps_padding": True}),
        (2, {"alignment": 4}),  # paddings after each weight
    ],
)
def test_other_ways_to_lay_out_the_partitions(
    tmp_path: Path, stage: int, options: dict[str, Any]
) -> None:
    for ranks in (1, 2, 3):
        folder = save(tmp_path / str(ranks), model(1), stage=stage, ranks=ranks, **PARTS, **options)
        check(read(folder), model(1))


def test_a_tied_weight_is_one_place_under_two_names(tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        _, specs = specs_of(save(tmp_path / str(stage), model(1), stage=stage, **PARTS))
        assert specs.tensors["head.weight"] == specs.tensors["embedding.weight"]


def fold(models: list[State]) -> State:
    """The average that is promised: float64, oldest first, the dynamic decay, rounded once."""
    shadow = {name: tensor.double() for name, tensor in models[0].items()}
    for n, state in enumerate(models[1:], start=1):
        decay = min(0.999, (1 + n) / (10 + n))
        for name, tensor in state.items():
            shadow[name] = shadow[name] + (1 - decay) * (tensor.double() - shadow[name])
    newest = models[-1]
    return {
        name: shadow[name].to(one.dtype) if one.is_floating_point() else one
        for name, one in newest.items()
    }


RANKS_OF_STEPS = (2, 3, 1)  # each step is complete in itself


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a run of three steps, saved by different numbers of ranks."""

    def make(stage: int, **options: Any) -> Path:
        for number, ranks in enumerate(RANKS_OF_STEPS, start=1):
            folder = tmp_path / "run" / f"global_step{number * 10}"
            given = {"ranks": ranks if stage else 1, "step": number * 10, **PARTS, **options}
            save(folder, model(number), stage=stage, **given)
        (tmp_path / "run/latest").write_text("global_step30")
        return tmp_path / "run"

    return make


@pytest.mark.usefixtures("either_fold")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_average_is_the_fold_of_the_full_weights_for_any_tile(
    make: Callable[..., Path], tmp_path: Path, stage: int
) -> None:
    run, written = make(stage), set()
    for number, (tile, threads) in enumerate([(4, 1), (28, 3), (1 << 20, 2)]):
        output = tmp_path / str(number)
        ckpt_ema.average(run, output=output, device="cpu", tile_size=tile, threads=threads)
        written.add((output / "model.safetensors").read_bytes())
    assert len(written) == 1
    found, expected = read_safetensors(output / "model.safetensors"), fold([*map(model, (1, 2, 3))])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2**-23, atol=0)
    roles = {role.pattern: role.role.value for role in ckpt_ema.plan(run).tensor_roles}
    assert roles["head.weight"] == "tied"
    assert roles["norm.count"] == "kept newest"
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "ckpt_ema.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_average_is_written_back_into_the_masters_and_the_rounded_weights(
    make: Callable[..., Path], tmp_path: Path, stage: int, dtype: torch.dtype
) -> None:
    """The files are those that the ranks would have saved of the average."""
    saved: Any = {"ranks": 3 if stage else 1, "dtype": dtype}
    run = make(stage, **saved)
    ckpt_ema.average(run, output=tmp_path / "whole", device="cpu")
    average = read_safetensors(tmp_path / "whole/model.safetensors")
    weights = {name: average[TIED.get(name, name)].clone() for name in model(3)}
    expected = save(tmp_path / "expected", weights, stage=stage, step=30, **saved, **PARTS)
    output = tmp_path / "out"
    for tile, threads in ((4, 1), (1 << 20, 2)):
        options: Any = {"tile_size": tile, "threads": threads, "overwrite": True}
        ckpt_ema.average(run, output=output, device="cpu", save_as="checkpoint", **options)
        for path in expected.iterdir():
            assert records(output / "global_step30" / path.name) == records(path)
    assert (output / "latest").read_text() == "global_step30"


def test_the_output_has_the_dtype_that_is_asked_for(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    run = make(2, dtype=torch.bfloat16)
    for dtype in ("same", "bfloat16"):
        ckpt_ema.average(run, output=tmp_path / dtype, dtype=dtype)
    found = read_safetensors(tmp_path / "same/model.safetensors")
    rounded = read_safetensors(tmp_path / "bfloat16/model.safetensors")
    assert found["conv.weight"].dtype == torch.float32
    assert rounded["conv.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(
        found["conv.weight"].to(torch.bfloat16), rounded["conv.weight"], rtol=2**-7, atol=0
    )


def test_the_steps_in_the_files_count_more_than_those_in_names(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    run = make(2)
    for number, name in enumerate(("epoch1", "epoch2", "epoch3"), start=1):
        (run / f"global_step{number * 10}").rename(run / name)
    checkpoints = ckpt_ema.plan(run).checkpoints
    assert [(one.name, one.step) for one in checkpoints] == [
        ("epoch1", 10),
        ("epoch2", 20),
        ("epoch3", 30),
    ]
    (run / "epoch1").rename(run / "epoch4")
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run)
    assert caught.value.code is Code.CONTRADICTORY_STEPS


def test_the_rounded_weights_are_read_by_themselves_if_asked(tmp_path: Path) -> None:
    folder = save(tmp_path / "step", model(1), stage=2, dtype=torch.bfloat16, **PARTS)
    for path in folder.glob("*optim_states.pt"):
        path.unlink()
    with pytest.raises(IncompleteError, match="--key module"):
        read(folder)
    found = read(folder, Reading(key="module"))
    assert found["conv.weight"].dtype == torch.bfloat16


def test_a_second_model_that_a_client_saved_is_warned_of_or_chosen(tmp_path: Path) -> None:
    other = {"w": torch.zeros(2, 2)}
    folder = save(tmp_path / "one", model(1), stage=3, state={"ema": other}, **PARTS)
    check(read(folder), model(1))
    assert specs_of(folder)[1].notes
    check(read(folder, Reading(which="ema")), other)


def change(path: Path, how: Callable[[Any], object]) -> None:
    """Change one file of our own."""
    with importable():
        content = torch.load(path, weights_only=False)
    how(content)
    with importable():
        torch.save(content, path)


MODEL, OTHER_MODEL = (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1))
OPTIMIZER, OTHER = (f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))


def optimizer(key: str, value: object) -> Callable[[Any], object]:
    return lambda content: content["optimizer_state_dict"].update({key: value})


BROKEN: dict[str, tuple[int, str, Callable[[Any], object], str]] = {
    "two saves of ranks": (2, OTHER, optimizer("partition_count", [3, 3]), "of two saves"),
    "two saves of steps": (
        2,
        OTHER,
        optimizer("base_optimizer_state", {"state": {0: {"step": torch.tensor(7.0)}}}),
        "has done 7 updates",
    ),
    "two saves of steps that are integers": (
        1,
        OTHER,
        optimizer("base_optimizer_state", {"state": {0: {"step": 7}}}),
        "has done 7 updates",
    ),
    "two saves of models": (3, OTHER_MODEL, lambda c: c.update(global_steps=7), "is of step 7"),
    "shorter": (
        2,
        OTHER,
        optimizer("single_partition_of_fp32_groups", [torch.zeros(3), torch.zeros(3)]),
        "elements of weights where group 0",
    ),
    "longer": (
        2,
        OTHER,
        optimizer("single_partition_of_fp32_groups", [torch.zeros(90), torch.zeros(90)]),
        "elements of weights where group 0",
    ),
    "shorter in ZeRO-3": (
        3,
        OTHER,
        optimizer("fp32_flat_groups", [torch.zeros(9), torch.zeros(9)]),
        "elements of weights where zero_pp_rank_1",
    ),
    "other groups": (
        2,
        OTHER,
        optimizer("single_partition_of_fp32_groups", [torch.zeros(9)]),
        "other groups",
    ),
    "other dtype": (
        2,
        OTHER,
        optimizer("single_partition_of_fp32_groups", [torch.zeros(9).half()] * 2),
        "other groups",
    ),
    "no tensors": (2, OTHER, optimizer("single_partition_of_fp32_groups", [1, 2]), "not a tensor"),
    "not flat": (
        3,
        OTHER,
        optimizer("fp32_flat_groups", [torch.zeros(3, 3)] * 2),
        "not flat",
    ),
    "no weights": (
        2,
        OPTIMIZER,
        lambda content: content.pop("optimizer_state_dict"),
        "no weights in the layout of ZeRO",
    ),
    "no count": (2, OPTIMIZER, optimizer("partition_count", "many"), "no number of partitions"),
    "paddings": (
        2,
        OPTIMIZER,
        optimizer("param_alignment_paddings", [["many"]]),
        "paddings that are not element counts",
    ),
    "no list of paddings": (2, OPTIMIZER, optimizer("param_alignment_paddings", 5), "paddings"),
    "ranks beyond number": (2, OPTIMIZER, optimizer("partition_count", 2**62), "of two saves"),
    "shapes beyond number": (
        3,
        MODEL,
        lambda content: content.update(param_shapes=[{"w": torch.Size([2**40] * 60)}]),
        "elements of weights where",
    ),
    "several dtypes": (
        2,
        OPTIMIZER,
        optimizer("single_partition_of_fp32_groups", [torch.zeros(9), torch.zeros(9).half()]),
        "several dtypes",
    ),
    "fewer paddings": (
        2,
        OPTIMIZER,
        optimizer("param_alignment_paddings", [[0]]),
        "other groups of weights",
    ),
    "experts": (
        3,
        OPTIMIZER,
        optimizer("ds_zero_partition_groups", [{"ranks": [0]}]),
        "mixture of experts",
    ),
    "no fragment": (
        3,
        OTHER_MODEL,
        lambda content: content["frozen_param_fragments"].pop("frozen.bias"),
        "frozen.bias is frozen and not in the files of all ranks",
    ),
    "short fragment": (
        3,
        OTHER_MODEL,
        lambda content: content["frozen_param_fragments"].update({"frozen.bias": torch.zeros(1)}),
        "the fragments of frozen.bias",
    ),
    "shapes": (
        3,
        MODEL,
        lambda content: content.update(param_shapes=[{"w": "wide"}]),
        "param_shapes that do not map names to shapes",
    ),
    "no dict": (
        3,
        MODEL,
        lambda content: content.update(param_shapes=[5]),
        "do not map names to shapes",
    ),
    "another shape": (
        2,
        "mp_rank_00_model_states.pt",
        lambda content: content["module"].update({"conv.weight": torch.zeros(2, 9)}),
        r"conv.weight is \[2, 9\], and \[3, 2, 3, 1\] in the ranks' files",
    ),
}


@pytest.mark.parametrize("label", BROKEN)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, label: str) -> None:
    stage, name, how, words = BROKEN[label]
    folder = save(tmp_path / "step", model(1), stage=stage, **PARTS)
    change(folder / name, how)
    with pytest.raises(RefusedError, match=words) as caught:
        read(folder)
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("stage", "name", "words"),
    [
        (1, OTHER, r"lacks files of 1 of 3 ranks \(1\)"),
        (3, OTHER, r"lacks files of 1 of 3 ranks \(1\)"),
        (3, OTHER_MODEL, r"lacks files of 1 of 3 ranks \(1\)"),
        (2, "mp_rank_00_model_states.pt", "lacks mp_rank_00_model_states.pt"),
        (3, MODEL, f"lacks {MODEL}"),
    ],
)
def test_a_missing_file_is_an_incomplete_save(
    tmp_path: Path, stage: int, name: str, words: str
) -> None:
    folder = save(tmp_path / "step", model(1), stage=stage, ranks=3, **PARTS)
    (folder / name).unlink()
    with pytest.raises(IncompleteError, match=words):
        read(folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_files_of_an_earlier_save_by_more_ranks_are_refused(tmp_path: Path, stage: int) -> None:
    folder = save(tmp_path / "step", model(1), stage=stage, ranks=3, **PARTS)
    save(folder, model(2), stage=stage, ranks=2, **PARTS)
    with pytest.raises(RefusedError, match="two saves"):
        read(folder)


def test_files_of_an_earlier_save_of_another_kind_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "stages", model(1), stage=2, **PARTS)
    save(folder, model(2), stage=3, **PARTS)
    with pytest.raises(RefusedError, match="two saves"):
        read(folder)
    folder = save(tmp_path / "dtypes", model(1), **PARTS)
    save(folder, model(2), dtype=torch.bfloat16, **PARTS)
    with pytest.raises(RefusedError, match="two saves"):
        read(folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_file_cut_short_is_an_incomplete_save(tmp_path: Path, stage: int) -> None:
    for name in [path.name for path in save(tmp_path / "whole", model(1), stage=stage).iterdir()]:
        folder = save(tmp_path / name, model(1), stage=stage)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(IncompleteError, match="cut short"):
            read(folder)


@pytest.mark.parametrize("label", sorted(hostile_pickles(Path("mark"))))
@pytest.mark.parametrize("name", [MODEL, OTHER_MODEL, OPTIMIZER, OTHER])
def test_no_code_runs_in_any_of_the_files(tmp_path: Path, label: str, name: str) -> None:
    mark = tmp_path / "mark"
    folder = save(tmp_path / "step", model(1), stage=3, **PARTS)
    archive(folder / name, hostile_pickles(mark)[label], _0=bytes(24))
    try:
        read(folder)
    except RefusedError as error:
        assert error.path is not None
    assert not mark.exists()


def test_what_deepspeed_pickles_beside_tensors_never_runs(tmp_path: Path) -> None:
    state = {"args": build("code", None, {}), "ds_config": {"hook": build("code", None, {})}}
    folder = save(tmp_path / "step", model(1), stage=3, state=state, **PARTS)
    check(read(folder), model(1))
