"""The fold in memory: TensorFlow's numbers, bits that must not change, an independent oracle."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ckpt_ema import RefusedError, Shadow
from ckpt_ema.fold.shadow import fold_, fold_keeping_infinities_, is_finite


def test_tensorflow_gives_the_same_numbers() -> None:
    """tensorflow-cpu 2.21, graph mode, ExponentialMovingAverage(0.99, step) of one variable."""
    shadow = Shadow(0.99, initial={"v": torch.tensor(0.0)})
    value, averages = 0.0, []
    for i in range(1, 6):
        value += i
        shadow.apply({"v": torch.tensor(value)}, num_updates=0)
        averages.append(shadow.average("v").item())
    assert averages == pytest.approx([0.9, 2.79, 5.679, 9.5679, 14.45679], rel=2e-5)
    step, averages = 0, []
    for i in (1, 4, 7, 10, 13, 16, 19):
        step += i
        shadow.apply({"v": torch.tensor(5.0)}, num_updates=step)
        averages.append(shadow.average("v").item())
    expected = [6.7194166, 5.6877666, 5.4064074, 5.292105, 5.233684, 5.199206, 5.176795]
    assert averages == pytest.approx(expected, rel=2e-5)


def test_without_initial_the_first_apply_initialises_and_the_first_fold_has_n_1() -> None:
    shadow = Shadow(0.999)
    for value in (1.0, 2.0):
        shadow.apply({"w": torch.tensor(value, dtype=torch.float64)})
    assert shadow.average("w").item() == pytest.approx(1 * 2 / 11 + 2 * 9 / 11)


def test_with_initial_the_first_apply_has_n_0() -> None:
    shadow = Shadow(0.999, initial={"w": torch.tensor(1.0, dtype=torch.float64)})
    shadow.apply({"w": torch.tensor(2.0, dtype=torch.float64)})
    assert shadow.average("w").item() == pytest.approx(0.1 * 1 + 0.9 * 2)


def test_torch_folds_the_same_with_a_constant_decay() -> None:
    values = [torch.randn(1000, dtype=torch.float64) for _ in range(6)]
    torch_fold = get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
    ours, theirs = values[0].clone(), [values[0].clone()]
    for value in values[1:]:
        fold_(ours, value, 0.9)
        torch_fold(theirs, [value], 1)
    torch.testing.assert_close(ours, theirs[0], rtol=1e-14, atol=1e-15)


@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50),
    decay=st.floats(0, 1),
)
@settings(deadline=None)
def test_a_value_that_never_changes_stays_bit_for_bit(bits: list[int], decay: float) -> None:
    """For every float32 that is a number, -0.0, denormals and infinities among them."""
    floats = struct.unpack(f"{len(bits)}f", struct.pack(f"{len(bits)}I", *bits))
    value = torch.tensor([x for x in floats if not math.isnan(x)] or [0.0]).double()
    shadow = value.clone()
    for _ in range(3):
        fold_keeping_infinities_(shadow, value, decay)
    assert torch.equal(shadow.view(torch.int64), value.view(torch.int64))


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("count", [1, 3, 8, 17])
def test_a_negative_zero_stays_one_in_vectors_of_any_length(count: int, decay: float) -> None:
    shadow = torch.full((count,), -0.0, dtype=torch.float64)
    fold_(shadow, shadow.clone(), decay)
    assert shadow.signbit().all()


@given(st.floats(0, 1))
@settings(deadline=None)
def test_both_folds_give_the_same_bits_where_all_is_finite(decay: float) -> None:
    generator = torch.Generator().manual_seed(7)
    shadow, value = torch.randn(2, 997, dtype=torch.float64, generator=generator).unbind()
    shadow[0], value[0], shadow[1], value[1] = -0.0, 0.0, 0.0, -0.0
    fast, careful = shadow.clone(), shadow.clone()
    fold_(fast, value, decay)
    fold_keeping_infinities_(careful, value, decay)
    assert torch.equal(fast.view(torch.int64), careful.view(torch.int64))


def test_an_element_does_not_depend_on_where_its_slice_begins() -> None:
    """Vector body and scalar tail of the kernel must round alike."""
    shadow, value = torch.randn(2, 100_003, dtype=torch.float64).unbind()
    whole = shadow.clone()
    fold_(whole, value, 0.3076923)
    pieces = shadow.clone()
    for start in range(0, 100_003, 1237):
        fold_(pieces[start : start + 1237], value[start : start + 1237], 0.3076923)
    assert torch.equal(whole, pieces)


def test_infinities_that_never_change_survive_and_others_become_nan() -> None:
    infinity = math.inf
    shadow = Shadow(0.9)
    shadow.apply({"mask": torch.tensor([-infinity, infinity, 0.0])})
    shadow.apply({"mask": torch.tensor([-infinity, -infinity, 1.0])})
    average = shadow.average("mask")
    assert average[0] == -infinity
    assert math.isnan(average[1])
    assert average[2].item() == pytest.approx(9 / 11)


def test_bfloat16_moves_although_each_fold_is_below_its_resolution() -> None:
    """In bfloat16 itself, 1000 folds of 1.01 into 1.0 at 0.999 never move."""
    shadow = Shadow(0.999, initial={"w": torch.ones(1, dtype=torch.bfloat16)})
    for _ in range(1000):
        shadow.apply({"w": torch.full((1,), 1.0078125, dtype=torch.bfloat16)}, num_updates=10**6)
    exact = 1.0078125 - 0.0078125 * 0.999**1000
    assert shadow.average("w") == torch.tensor(exact).bfloat16()


def test_integers_keep_the_last_value_and_their_dtype() -> None:
    shadow = Shadow(0.9)
    for count in (16777217, 2**53 + 1):
        shadow.apply({"n": torch.tensor(count)})
    assert shadow.average("n").dtype == torch.int64
    assert shadow.average("n").item() == 2**53 + 1


def test_the_shadow_does_not_share_memory_with_what_is_applied() -> None:
    value = {"w": torch.ones(2, dtype=torch.float64), "n": torch.ones(2, dtype=torch.int64)}
    shadow = Shadow(0.9)
    shadow.apply(value)
    for tensor in value.values():
        tensor.zero_()
    assert shadow.average("w").tolist() == [1, 1]
    assert shadow.average("n").tolist() == [1, 1]
    shadow.average("w").zero_()
    assert shadow.average("w").tolist() == [1, 1]


def test_other_names_or_shapes_are_refused_and_change_nothing() -> None:
    shadow = Shadow(0.9)
    shadow.apply({"a": torch.zeros(2), "b": torch.zeros(2)})
    others: list[dict[str, torch.Tensor]] = [
        {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)},
        {"a": torch.ones(2), "b": torch.ones(1)},
        {"a": torch.ones(2), "b": torch.ones(2).long()},
    ]
    for state in others:
        with pytest.raises(RefusedError) as caught:
            shadow.apply(state)
        assert caught.value.tensor == ("b" if len(state) == 2 else None)
    assert shadow.average("a").tolist() == [0, 0]
    assert shadow.num_applied == 1


def test_is_finite_sees_nan_and_infinity() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        assert not is_finite(torch.tensor([1.0, bad, 2.0]))
    assert is_finite(torch.tensor([1.0, -2.0]))
    assert is_finite(torch.tensor([]))


def test_a_shadow_keeps_the_dtype_of_the_last_integers() -> None:
    shadow = Shadow(0.9)
    shadow.apply({"n": torch.tensor(1, dtype=torch.int32)})
    shadow.apply({"n": torch.tensor(2**40 + 5)})
    assert shadow.average("n").item() == 2**40 + 5


@pytest.mark.parametrize("decay", [0.999, 0.99999, 0.3])
def test_float32_accumulators_weigh_as_they_should(decay: float) -> None:
    shadow, value = torch.zeros(5), torch.ones(5)
    fold_(shadow, value, decay)
    assert shadow.tolist() == pytest.approx([1 - decay] * 5, rel=2e-7)
    zero = torch.tensor([-0.0, 0.0])
    frozen = zero.clone()
    fold_(frozen, zero, decay)
    assert frozen.signbit().tolist() == [True, False]
