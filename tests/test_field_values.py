"""What people's own tensors need: those that are no weights are kept, refused or warned of."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.fold.monitors.factors import deviation, rotation_deviation
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, read_safetensors, series

pytestmark = pytest.mark.usefixtures("either_fold")

WEIGHTS = (1 / 22, 9 / 44, 3 / 4)  # of three checkpoints by the dynamic decay
Tensor = torch.Tensor


def drift(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Three states of a weight that training changes a little."""
    base, step = noise(2, *shape)
    return [(base + 0.01 * number * step).to(dtype) for number in range(3)]


def codes(*shape: int, dtype: torch.dtype = torch.int8) -> list[Tensor]:
    """Three states of codes."""
    return [
        torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(n)).to(dtype)
        for n in range(3)
    ]


def averaged(run: Path, **options: Any) -> dict[str, Tensor]:
    """The tensors of the output."""
    output = ckpt_ema.average(run, device="cpu", overwrite=True, **options).output
    return {
        name: tensor
        for file in output.glob("*.safetensors")
        for name, tensor in read_safetensors(file).items()
    }


def warned(run: Path, **options: Any) -> dict[Code, str]:
    """The warnings of an average, by code; it must succeed."""
    result = ckpt_ema.average(run, device="cpu", overwrite=True, **options)
    return {one.code: str(one) for one in (*result.plan.warnings, *result.warnings)}


def refused(run: Path, **options: Any) -> RefusedError:
    """The error of an average, which leaves nothing."""
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.average(run, device="cpu", **options)
    assert {path.name for path in run.parent.iterdir()} == {run.name}
    return caught.value


def mean(values: list[Tensor]) -> Tensor:
    """The average of three checkpoints."""
    rows = zip(WEIGHTS, values, strict=True)
    return torch.stack([weight * _wide(value) for weight, value in rows]).sum(0)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


# --- A: codes and scales ---

QUANTISED: dict[str, Mapping[str, Any]] = {
    "fp8": {"l.weight": codes(8, 8, dtype=torch.float8_e4m3fn), "l.weight_scale_inv": drift(1, 1)},
    "int8": {"l.weight": codes(8, 8), "l.SCB": drift(8)},
    "nf4": {"l.weight": codes(32, 1, dtype=torch.uint8), "l.weight.absmax": drift(4)},
    "nvfp4": {
        "l.weight": codes(8, 4, dtype=torch.uint8),
        "l.weight_scale": codes(8, 1, dtype=torch.float8_e4m3fn),
        "l.weight_scale_2": drift(),
    },
    "compressed-tensors": {
        "l.weight_packed": codes(8, 2, dtype=torch.int32),
        "l.weight_scale": drift(8, 1),
        "l.weight_shape": torch.tensor([8, 16]),
    },
    "MLX": {
        "l.weight": codes(8, 2, dtype=torch.uint32),
        "l.scales": drift(8, 1),
        "l.biases": drift(8, 1),
    },
    "AWQ": {
        "l.qweight": codes(8, 2, dtype=torch.int32),
        "l.qzeros": codes(1, 2, dtype=torch.int32),
        "l.scales": drift(1, 8),
    },
    "MXFP4": {
        "mlp.gate_up_proj_blocks": codes(2, 4, 2, 16, dtype=torch.uint8),
        "mlp.gate_up_proj_scales": codes(2, 4, 2, dtype=torch.uint8),
    },
    "packed in one dimension": {
        "l.W_q": codes(32, dtype=torch.uint8),
        "l.scale": drift(8, 1),
        "l.zero": drift(8, 1),
    },
    "scales alone change": {"l.weight": torch.ones(8, 8).to(torch.int8), "l.scale": drift(8)},
}


@pytest.mark.parametrize("tensors", QUANTISED.values(), ids=QUANTISED)
def test_quantised_weights_that_training_changes_are_refused(
    make_run: MakeRun, tensors: Mapping[str, Any]
) -> None:
    error = refused(make_run(series(3, **tensors, **{"norm.weight": drift(8)})))
    assert error.code is Code.NOT_AVERAGEABLE
    assert error.tensor in tensors
    assert "--keep" in error.hint


def test_frozen_codes_and_buffers_of_integers_do_no_harm(make_run: MakeRun) -> None:
    """QLoRA saves its frozen base too; GPT-2 has masks, Swin an index of positions."""
    frozen = {
        "q.weight": codes(8, 8, dtype=torch.uint8)[0],
        "q.weight.absmax": noise(1, 8)[0],
        "attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril(),
        "attn.relative_position_index": torch.arange(16).view(4, 4),
    }
    run = make_run(series(3, **frozen, **{"q.bias": drift(8), "attn.table": drift(4, 4)}))
    assert warned(run) == {}
    result = averaged(run)
    assert all(torch.equal(result[name], value) for name, value in frozen.items())


def test_integers_that_change_are_warned_of_with_their_share(make_run: MakeRun) -> None:
    run = make_run(series(3, w=drift(6, 10), table=codes(2, 10, dtype=torch.int64)))
    assert "table hold integers that change in training, 25.0% of all" in str(
        warned(run)[Code.NOT_AVERAGED]
    )
    assert Code.NOT_AVERAGED not in warned(make_run(series(3, w=drift(6), n=drift(2)), name="b"))


def test_a_person_may_keep_what_is_refused(make_run: MakeRun) -> None:
    tensors = {"l.weight": codes(8, 8), "l.SCB": drift(8), "norm.weight": drift(8)}
    run = make_run(series(3, **tensors), name="a/run")
    assert refused(run, keep=["l.weight"]).tensor == "l.SCB"  # or it would be averaged alone
    result = averaged(run, keep=["l.*"])
    assert torch.equal(result["l.weight"], tensors["l.weight"][2])
    assert torch.equal(result["l.SCB"], tensors["l.SCB"][2])
    assert torch.allclose(result["norm.weight"].double(), mean(tensors["norm.weight"]))


# --- B: buffers that are no weights ---


def units(*shape: int) -> list[Tensor]:
    """Three unit vectors that are not alike."""
    return [vector / vector.norm() for vector in noise(3, *shape)]


MASKS = [
    torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1]]),
    torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1]]),
    torch.tensor([[1.0, 0, 1, 1], [1, 0, 0, 1]]),
]
KEPT: dict[str, Mapping[str, Any]] = {
    "spectral norm": {"l.weight_orig": drift(4, 4), "l.weight_u": units(4), "l.weight_v": units(4)},
    "its successor": {
        "l.parametrizations.weight.original": drift(4, 4),
        "l.parametrizations.weight.0._u": units(4),
        "l.parametrizations.weight.0._v": units(4),
    },
    "pruning": {"l.weight_orig": drift(2, 4), "l.weight_mask": MASKS},
    "parametrized pruning": {
        "l.parametrizations.weight.original": drift(2, 4),
        "l.parametrizations.weight.0.mask": [mask.bool() for mask in MASKS],
    },
    "a mask by name and content": {"l.weight": drift(2, 4), "l.mask": MASKS},
    "quantisation-aware training": {
        "l.weight": drift(2, 4),
        "l.weight_fake_quant.scale": drift(1),
        "l.weight_fake_quant.zero_point": [torch.tensor([n], dtype=torch.int32) for n in range(3)],
        "l.activation_post_process.min_val": drift(),
        "l.activation_post_process.max_val": drift(),
        "l.activation_post_process.histogram": drift(9),
    },
    "a queue of features": {
        "encoder.weight": drift(2, 4),
        "queue": noise(3, 4, 8),
        "queue_ptr": [torch.tensor([n]) for n in (0, 2, 4)],
    },
    "counters": {
        "l.weight": drift(2, 4),
        "num_updates": [torch.tensor(float(n)) for n in (100, 200, 300)],
        "l.step": [torch.tensor([n], dtype=torch.bfloat16) for n in (8.0, 9.0, 10.0)],
    },
}


@pytest.mark.parametrize("tensors", KEPT.values(), ids=KEPT)
def test_buffers_keep_the_newest_together_and_a_note_says_so(
    make_run: MakeRun, tensors: Mapping[str, Any]
) -> None:
    run = make_run(series(3, **tensors))
    weight, *buffers = tensors
    result = averaged(run)
    assert torch.allclose(result[weight].double(), mean(tensors[weight]))
    assert all(torch.equal(result[name], tensors[name][2]) for name in buffers)
    notes = " ".join(map(str, ckpt_ema.plan(run).notes))
    assert all(name in notes for name in buffers)
    assert warned(run) == {}


def test_statistics_of_batch_norm_are_averaged_without_a_word(make_run: MakeRun) -> None:
    tensors = {"bn.running_mean": drift(4), "bn.running_var": drift(4), "bn.weight": drift(4)}
    counts = [torch.tensor(100 * n) for n in range(3)]
    run = make_run(series(3, **tensors, **{"bn.num_batches_tracked": counts}))
    result = averaged(run)
    for name, values in tensors.items():
        assert torch.allclose(result[name].double(), mean(values))
    assert result["bn.num_batches_tracked"] == 200
    assert warned(run) == {}


@pytest.mark.parametrize("tile_size", [32, 1 << 20])
def test_an_unknown_unit_vector_is_warned_of(make_run: MakeRun, tile_size: int) -> None:
    run = make_run(series(3, a=drift(50), u0=units(1, 30), w=drift(7, 9)))
    found = warned(run, tile_size=tile_size)
    assert list(found) == [Code.NOT_A_WEIGHT]
    assert found[Code.NOT_A_WEIGHT].startswith("u0 have norm 1 in every checkpoint but not in")
    assert warned(run, average=["u0"], tile_size=tile_size) == {}
    assert warned(run, keep=["u0"], tile_size=tile_size) == {}
    frozen = units(30)[0]
    assert warned(make_run(series(3, w=drift(7), u=frozen), name="frozen")) == {}


@pytest.mark.parametrize("tile_size", [16, 1 << 20])
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_a_tensor_of_two_values_that_changes_is_warned_of(
    make_run: MakeRun, low: float, tile_size: int
) -> None:
    gates = [torch.where(mask > 0, 1.0, low) for mask in MASKS]
    run = make_run(series(3, w=drift(50), gate=gates, ones=torch.ones(9), half=[*drift(9)]))
    found = warned(run, tile_size=tile_size)
    assert list(found) == [Code.NOT_A_WEIGHT]
    assert f"gate hold two values only ({low:g} and 1)" in found[Code.NOT_A_WEIGHT]
    assert warned(run, keep=["gate"]) == {}
    frozen = make_run(series(3, w=drift(50), gate=gates[2]), name="frozen")
    assert warned(frozen, tile_size=tile_size) == {}


@pytest.mark.parametrize("tile_size", [16, 1 << 20])
def test_an_average_that_cancels_is_warned_of(make_run: MakeRun, tile_size: int) -> None:
    base = noise(1, 6, 7)[0]
    run = make_run(series(2, w=drift(50)[:2], basis=[base, -base]))
    found = warned(run, tile_size=tile_size, weights={"1": 0.5, "2": 0.5})
    assert list(found) == [Code.CANCELLED]
    assert "The average of basis has less than half of the norm in checkpoint-2" in str(
        found[Code.CANCELLED]
    )
    assert warned(run, tile_size=tile_size) == {}  # 2/11 and 9/11: 0.64 of the norm is left


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_monitors_change_no_value_however_many_tensors_share_a_tile(
    make_run: MakeRun, dtype: torch.dtype
) -> None:
    tensors = {f"layers.{n}.w": drift(3, 4, dtype=dtype) for n in range(20)}
    run = make_run(series(3, **tensors))
    assert warned(run) == {}
    result = averaged(run)
    for name, values in tensors.items():
        torch.testing.assert_close(result[name], mean(values).to(dtype), rtol=1e-7, atol=0)


def test_half_of_a_vector_is_no_unit_vector(make_run: MakeRun) -> None:
    """Cut by a tile, its first half has norm 1 and all of it has not."""
    halves = [torch.cat([unit, 2 * unit]) for unit in units(8)]
    run = make_run(series(3, v=halves))
    assert warned(run, tile_size=32) == warned(run, tile_size=1 << 20) == {}


def test_what_was_seen_survives_parts(make_run: MakeRun) -> None:
    run = make_run(series(3, a=drift(50), u0=units(30), gate=MASKS, w=drift(7, 9)))
    output = run.parent / "parts"
    for part in ("1/3", "2/3", "3/3"):
        ckpt_ema.average_part(run, part, output=output, device="cpu", tile_size=32)
    whole = ckpt_ema.average(run, device="cpu").warnings
    assert ckpt_ema.finish(output).warnings == whole
    assert len(whole) == 2


# --- C: complex weights ---


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128], ids=str)
def test_complex_weights_are_averaged_as_two_real_numbers(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    parts = list(zip(drift(3, 4), noise(3, 3, 4), strict=True))
    values = [torch.complex(a.double(), b.double()) for a, b in parts]
    for step, value in enumerate(values, start=1):
        strided = value.t().contiguous().t().to(dtype)  # a view that is not row-major
        torch.save({"model": {"w": value.to(dtype), "v": strided}}, tmp_path / f"step_{step}.pt")
    run = tmp_path
    result = averaged(run, output=tmp_path.parent / f"out-{dtype}", tile_size=16)
    expected = mean([value.to(dtype) for value in values])
    for name in ("w", "v"):
        assert result[name].dtype is torch.complex64
        assert torch.equal(result[name], expected.to(torch.complex64))


def test_complex_safetensors_stay_complex_whatever_the_dtype(make_run: MakeRun) -> None:
    values = noise(3, 5, dtype=torch.complex64)
    run = make_run(series(3, spec=values, w=drift(4)))
    result = averaged(run, dtype="bfloat16")
    expected = mean(values)
    assert torch.equal(result["spec"], expected.to(torch.complex64))
    assert result["w"].dtype is torch.bfloat16
    values[1].view(torch.float32)[3] = math.nan
    error = refused(make_run(series(3, spec=values), name="nan/run"))
    assert (error.code, error.tensor) == (Code.NONFINITE, "spec")


def test_a_shadow_averages_complex_numbers() -> None:
    shadow = ckpt_ema.Shadow(0.5)
    for number in (1 + 2j, 3 - 2j):
        shadow.apply({"w": torch.tensor([number], dtype=torch.complex64)})
    decay = 2 / 11
    assert shadow.average("w").item() == pytest.approx(decay * (1 + 2j) + (1 - decay) * (3 - 2j))


def test_real_and_complex_weights_do_not_mix(make_run: MakeRun) -> None:
    values = [noise(1, 4)[0], *noise(2, 4, dtype=torch.complex64)]
    assert refused(make_run(series(3, w=values))).code is Code.DIFFERENT_DTYPES


# --- G: emptied tensors ---


@pytest.mark.parametrize("emptied", [("b",), ("a", "b"), ("a", "b", "c")])
def test_one_emptied_tensor_is_refused(make_run: MakeRun, emptied: tuple[str, ...]) -> None:
    tensors = {name: drift(3, 4) for name in ("a", "b", "c", "d")}
    states = series(3, **{**tensors, **dict.fromkeys(emptied, torch.empty(0))})
    error = refused(make_run(states))
    assert (error.code, error.tensor) == (Code.EMPTIED, emptied[0])
    assert "ZeRO-3" in error.message


def test_an_emptied_tensor_in_one_checkpoint_is_refused(make_run: MakeRun) -> None:
    values = drift(3, 4)
    assert "[0]" in refused(make_run(series(3, w=[values[0], torch.empty(0), values[2]]))).message


def test_a_tensor_that_is_empty_in_the_model_can_be_kept(make_run: MakeRun) -> None:
    run = make_run(series(3, w=drift(4), rows=torch.empty(0, 5), dummy=torch.empty(0)))
    assert averaged(run, keep=["dummy"])["dummy"].shape == (0,)
    assert "dummy" not in averaged(run, drop=["dummy"])


# --- L: half-written files ---


def half_written(run: Path, name: str, share: float) -> None:
    """Overwrite the end of a file with zeros."""
    path = run / name / "model.safetensors"
    content = path.read_bytes()
    kept = len(content) - int(share * (len(content) - 400))
    path.write_bytes(content[:kept] + bytes(len(content) - kept))


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_half_written_checkpoint_is_refused_wherever_it_is(
    make_run: MakeRun, step: int, share: float
) -> None:
    states = series(3, **{f"layers.{n}.w": drift(5, 20) for n in range(4)})
    run = make_run(states)
    half_written(run, f"checkpoint-{step}", share)
    assert command("average", run, "-q").returncode == 3
    error = refused(run)
    assert error.code is Code.ZEROS
    assert f"checkpoint-{step}" in error.message
    assert f"--exclude checkpoint-{step}" in error.hint
    assert Code.ZEROS in warned(run, allow_zeros=True)


def test_a_hole_of_zeros_in_the_middle_of_a_file_is_refused(make_run: MakeRun) -> None:
    states = series(4, **{f"layers.{n}.w": [one[:3] for one in noise(4, 5, 20)] for n in range(9)})
    for name in ("layers.3.w", "layers.4.w"):
        states[1][name] = torch.zeros(3, 20)
    error = refused(make_run(states))
    assert (error.code, error.tensor) == (Code.ZEROS, "layers.3.w")
    assert "checkpoint-2" in error.message


def test_zeros_that_training_starts_from_are_no_half_written_file(make_run: MakeRun) -> None:
    run = make_run(series(3, w=drift(5, 20), lora_b=[torch.zeros(30), *drift(30)[:2]]))
    assert averaged(run)["lora_b"].shape == (30,)


# --- X: adapters ---

ADAPTERS = {
    "LoRA": ("q.lora_A.weight", "q.lora_B.weight"),
    "kohya": ("x.lora_down.weight", "x.lora_up.weight"),
    "LoHa": ("x.hada_w1_a", "x.hada_w1_b", "x.hada_w2_a", "x.hada_w2_b"),
    "LoKr": ("x.lokr_w1", "x.lokr_w2_a", "x.lokr_w2_b"),
    "OFT": ("x.oft_blocks",),
}


@pytest.mark.parametrize("names", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_is_warned_of_with_a_bound(make_run: MakeRun, names: tuple[str, ...]) -> None:
    run = make_run(series(3, **{name: noise(3, 2, 4, 4) for name in names}))
    text = warned(run)[Code.ADAPTER_FACTORS]
    assert "% of" in text
    assert "merge each adapter" in text
    still = make_run(series(3, **{n: noise(1, 4, 4)[0] for n in names}, w=drift(3)), name="still")
    assert warned(still) == {}


@pytest.mark.parametrize("tile_size", [32, 1 << 20])
@pytest.mark.parametrize("seed", range(5))
def test_the_bound_of_lora_is_one(make_run: MakeRun, seed: int, tile_size: int) -> None:
    """By an oracle: the products themselves, averaged."""
    torch.manual_seed(seed)
    a, b = torch.randn(2, 9), torch.randn(7, 2)
    states = {
        "q.lora_A.weight": [a + 0.3 * torch.randn_like(a) for _ in range(3)],
        "q.lora_B.weight": [b + 0.3 * torch.randn_like(b) for _ in range(3)],
    }
    run = make_run(series(3, **states))
    share = float(
        warned(run, tile_size=tile_size)[Code.ADAPTER_FACTORS].split("at most ")[1].split("%")[0]
    )
    down, up = (mean(values) for values in states.values())
    products = mean([y.double() @ x.double() for x, y in zip(*states.values(), strict=True)])
    deviates = float((products - up @ down).norm() / (up.norm() * down.norm()))
    assert deviates <= share / 100 <= 20 * deviates


def test_the_bound_by_hand() -> None:
    """Of x = 1, 3 and y = 1, 3: the mean of xy is 5, the product of the means 4."""
    assert deviation([0.5, 0.5], [[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]]) == pytest.approx(1 / 4)
    # With a third factor z = 1, 3: the mean of xyz is 14, the product of the means 8.
    assert deviation([0.5, 0.5], [[2.0, 1.0, 1.0]] * 3) >= 6 / 8


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_of_a_rotation_is_one(seed: int) -> None:
    torch.manual_seed(seed)
    blocks = [0.2 * torch.randn(6, 6, dtype=torch.float64) for _ in range(2)]

    def rotation(block: Tensor) -> Tensor:
        skew, one = block - block.T, torch.eye(6, dtype=torch.float64)
        rotated: Tensor = torch.linalg.solve(one - skew, one + skew)
        return rotated

    middle = (blocks[0] + blocks[1]) / 2
    average = torch.stack([rotation(block) for block in blocks]).mean(0)
    deviates = (average - rotation(middle)).norm() / math.sqrt(6)
    norms = [float((block - middle).norm()) for block in blocks]
    assert deviates <= rotation_deviation([0.5, 0.5], [[math.sqrt(6), *norms]])


# --- options ---


def test_globs_settle_roles_and_are_recorded(make_run: MakeRun) -> None:
    run = make_run(series(3, **{"a.w": drift(3), "b.w": drift(3), "b.mask": MASKS, "c": drift(2)}))
    options: dict[str, Any] = {"keep": ["a.*"], "average": ["b.mask"], "drop": ["c"]}
    result = ckpt_ema.average(run, device="cpu", **options)
    tensors = averaged(run, **options)
    assert torch.equal(tensors["a.w"], drift(3)[2])
    assert torch.allclose(tensors["b.mask"].double(), mean(MASKS))
    assert "c" not in tensors
    assert result.manifests[0]["options"] == {**options, "device": "cpu"}
    assert {one.rule for one in result.plan.tensor_roles} == {"asked", "float"}
    assert result.outputs != ckpt_ema.average(run, device="cpu", output=run.parent / "b").outputs


def test_a_tensor_of_older_checkpoints_alone_can_be_dropped(make_run: MakeRun) -> None:
    states = series(3, w=drift(3), aux=drift(2))
    del states[2]["aux"]
    run = make_run(states)
    assert refused(run).code is Code.DIFFERENT_MODELS
    assert averaged(run, drop=["aux"]).keys() == {"w"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": ["nothing*"]}, "--keep nothing* matches no tensor"),
        ({"average": ["n"]}, "--average matches n, which is I64"),
        ({"keep": ["w"], "average": ["*"], "drop": ["n"]}, "--average and --keep both match w"),
        ({"keep": ["w"], "drop": ["w"]}, "--keep w matches no tensor"),
        ({"drop": ["w"]}, "no floating-point tensor"),
    ],
)
def test_a_glob_that_cannot_be_meant_is_refused(
    make_run: MakeRun, options: dict[str, Any], words: str
) -> None:
    run = make_run(series(3, w=drift(3), n=torch.arange(3)))
    with pytest.raises(ckpt_ema.CkptEmaError, match=r"match|floating") as caught:
        ckpt_ema.plan(run, **options)
    assert words in str(caught.value)


def test_strict_makes_every_warning_an_error(make_run: MakeRun) -> None:
    known = make_run(series(3, w=drift(3), table=codes(2, 10, dtype=torch.int64)), name="a/run")
    error = refused(known, strict=True)
    assert error.code is Code.NOT_AVERAGED
    seen = make_run(series(3, w=drift(3), u0=units(9)), name="b/run")
    assert refused(seen, strict=True).code is Code.NOT_A_WEIGHT
    ckpt_ema.average(seen, device="cpu")
    with pytest.raises(RefusedError) as caught:  # though it is up to date
        ckpt_ema.average(seen, device="cpu", strict=True)
    assert caught.value.code is Code.NOT_A_WEIGHT
    fine = make_run(series(3, w=drift(3)), name="c/run")
    assert warned(fine, strict=True) == {}


def test_warnings_are_annotations_in_github_actions(make_run: MakeRun) -> None:
    run = make_run(series(3, **{"w%": drift(3), "100%": units(9)}))
    done = command("average", run, "-q", "--json", env={"GITHUB_ACTIONS": "true"})
    [line] = done.stderr.splitlines()
    assert line.startswith("::warning title=ckpt-ema::100%25 have norm 1")
    [warning] = json.loads(done.stdout)["warnings_of_reading"]
    assert warning["code"] == "not-a-weight"


def test_what_nothing_bounds_is_warned_of_too(make_run: MakeRun) -> None:
    run = make_run(series(3, **{"q.boft_R": drift(2, 4, 4), "q.boft_s": drift(8, 1)}))
    assert "is not known" in warned(run)[Code.ADAPTER_FACTORS]


def test_complex_numbers_of_another_width_are_noted(tmp_path: Path) -> None:
    for step, value in enumerate(noise(3, 4, dtype=torch.complex128), start=1):
        torch.save({"w": value}, tmp_path / f"step_{step}.pt")
    notes = " ".join(map(str, ckpt_ema.plan(tmp_path, output=tmp_path.parent / "o").notes))
    assert "w are written as complex64" in notes
