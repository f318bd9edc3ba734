"""Sums over the elements of checkpoints: exact on few numbers, the same however they are made."""

import math
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_ema.fold import native
from ckpt_ema.measure.summing import summing
from ckpt_ema.measure.sums import STRIP, Block, Row, Sums, every_of, members_of, merged
from tests.makers.by_hand import Values

module = native.compiled()
VECTORS = module.vectors() if module else []
DTYPES = ("F64", "F32", "F16", "BF16")
NAMES = ("squares", "change", "turn", "away", "zeros", "nonfinite", "largest")
FLOATS = st.floats(-1e3, 1e3, width=16)


def block(columns: Sequence[Sequence[float]], dtypes: Sequence[str], strip: int = 0) -> Block:
    """The numbers of each checkpoint, in memory."""
    content, places = bytearray(), []
    for numbers, dtype in zip(columns, dtypes, strict=True):
        content += bytes(-len(content) % 8)
        places.append((dtype, len(content)))
        content += Values(dtype, (len(numbers),), numbers).packed
    return Block(content, places, len(columns[0]), strip)


def sums(
    columns: Sequence[Sequence[float]],
    weights: Sequence[float],
    dtypes: Sequence[str] | None = None,
    every: int = 1,
) -> Sums:
    """What is summed over checkpoints with these numbers."""
    members = range(len(columns))
    totals = summing(weights, members, every)
    totals.add(block(columns, dtypes or ["F64"] * len(columns)))
    return merged([totals], len(columns), len(columns))


def expected(columns: Sequence[Sequence[float]], weights: Sequence[float]) -> Sums:
    """The same in plain Python, element by element."""
    count = len(columns)
    rows = [dict.fromkeys(NAMES, 0.0) for _ in columns]
    products = [[0.0] * count for _ in columns]
    for values in zip(*columns, strict=True):
        finite = [math.isfinite(value) for value in values]
        shares = [w for w, is_finite in zip(weights, finite, strict=True) if is_finite]
        parts = [w * v for w, v in zip(weights, values, strict=True) if math.isfinite(v)]
        average = sum(parts) / sum(shares) if shares and sum(shares) else math.nan
        steps, apart = [0.0] * count, [0.0] * count
        for n, value in enumerate(values):
            if not finite[n]:
                rows[n]["nonfinite"] += 1
                continue
            apart[n] = 0.0 if math.isnan(average) else value - average
            steps[n] = value - values[n - 1] if n and finite[n - 1] else 0.0
            rows[n]["squares"] += value**2
            rows[n]["zeros"] += value == 0
            rows[n]["away"] += apart[n] ** 2
            rows[n]["change"] += steps[n] ** 2
            rows[n]["turn"] += steps[n] * steps[n - 1] if n else 0.0
            rows[n]["largest"] = max(rows[n]["largest"], abs(steps[n]))
        for i in range(count):
            for j in range(count):
                products[i][j] += apart[i] * apart[j]
    found = tuple(Row(**row) for row in rows)
    return Sums(found, tuple(map(tuple, products)), len(columns[0]))


def assert_close(found: Sums, right: Sums, tolerance: float = 1e-12) -> None:
    assert found.sampled == right.sampled
    scale = max(row.away for row in right.rows) + 1e-300
    for mine, theirs in zip(found.rows, right.rows, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance * (theirs.change + scale))
    for one, other in zip(found.products, right.products, strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance * scale)


# --- By hand --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_fold")
def test_three_checkpoints_by_hand() -> None:
    found = sums([[0.0, 3.0], [1.0, 3.0], [1.0, 5.0]], [0.25, 0.25, 0.5])
    # The average is [3/4, 4].
    assert found.rows == (
        Row(9.0, 0.0, 0.0, 25 / 16, 1.0, 0.0, 0.0),
        Row(10.0, 1.0, 0.0, 17 / 16, 0.0, 0.0, 1.0),
        Row(26.0, 4.0, 0.0, 17 / 16, 0.0, 0.0, 2.0),
    )
    assert found.products[2] == (-3 / 16 - 1, 1 / 16 - 1, 17 / 16)
    assert found.sampled == 2


@pytest.mark.usefixtures("either_fold")
def test_steps_in_one_direction_have_a_positive_product() -> None:
    found = sums([[0.0], [2.0], [5.0], [4.0]], [0.25] * 4)
    assert [row.turn for row in found.rows] == [0.0, 0.0, 6.0, -3.0]


@pytest.mark.usefixtures("either_fold")
def test_what_is_not_finite_counts_and_is_left_out() -> None:
    found = sums([[1.0, 1.0], [math.nan, 2.0], [3.0, -math.inf]], [0.5, 0.25, 0.25])
    # Averages of the others: of 1 and 3 by 2 : 1, and of 1 and 2 by 2 : 1.
    first, second, third = found.rows
    assert [row.nonfinite for row in found.rows] == [0, 1, 1]
    assert (first.squares, second.squares, third.squares) == (2.0, 4.0, 9.0)
    assert (second.change, third.change) == (1.0, 0.0)
    assert (first.away, second.away, third.away) == pytest.approx((4 / 9 + 1 / 9, 4 / 9, 16 / 9))


@pytest.mark.usefixtures("either_fold")
def test_a_checkpoint_of_nan_alone_leaves_the_others_as_they_would_be_without_it() -> None:
    columns = [[1.0, 2.0], [3.0, 5.0]]
    alone = sums(columns, [0.5, 0.5])
    found = sums([*columns, [math.nan] * 2], [0.25, 0.25, 0.5])
    assert found.rows[:2] == alone.rows
    assert found.rows[2] == Row(0, 0, 0, 0, 0, 2, 0)


def test_where_nothing_is_finite_nothing_is_summed() -> None:
    found = sums([[math.nan], [math.inf]], [0.5, 0.5])
    assert found.rows == (Row(0, 0, 0, 0, 0, 1, 0),) * 2
    assert found.products == ((0, 0), (0, 0))


# --- Against plain Python and torch ---------------------------------------------------------------


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[list[float]], list[float], list[str]]:
    """Checkpoints of any dtypes, of up to three strips, perhaps with gaps, and their weights."""
    count, length = draw(st.integers(1, 7)), draw(st.integers(1, 3 * STRIP))
    numbers = draw(st.lists(FLOATS, min_size=17, max_size=17))
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=count, max_size=count))
    columns = [[numbers[(i * (k + 3) + k * k) % 17] for i in range(length)] for k in range(count)]
    for checkpoint, place in draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 800)))):
        gap = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        columns[checkpoint % count][place % length] = gap
    shares = draw(st.lists(st.integers(1, 100), min_size=count, max_size=count))
    return columns, [share / sum(shares) for share in shares], dtypes


def as_stored(columns: Sequence[Sequence[float]], dtypes: Sequence[str]) -> list[list[float]]:
    """The numbers as tensors of these dtypes hold them."""
    found = []
    for numbers, dtype in zip(columns, dtypes, strict=True):
        packed = Values(dtype, (len(numbers),), numbers).packed
        if dtype == "BF16":
            halves = struct.unpack(f"<{len(numbers)}H", packed)
            packed, dtype = struct.pack(f"<{len(numbers)}I", *(h << 16 for h in halves)), "F32"
        code = {"F64": "d", "F32": "f", "F16": "e"}[dtype]
        found.append(list(struct.unpack(f"<{len(numbers)}{code}", packed)))
    return found


@pytest.fixture(params=[*VECTORS, "torch"])
def each_way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each vector unit of this machine in turn, and torch."""
    if request.param == "torch":
        pytest.importorskip("torch")
        from tests.makers.folds import by_torch

    with by_torch() if request.param == "torch" else nullcontext():
        if module and request.param != "torch":
            module.use_vector(request.param)
        yield request.param
    if module:
        module.use_vector(VECTORS[0])


def test_any_run_has_the_sums_of_plain_python(each_way: str) -> None:
    @settings(deadline=None, max_examples=60)
    @given(runs())
    def check(run: tuple[list[list[float]], list[float], list[str]]) -> None:
        columns, weights, dtypes = run
        found = sums(columns, weights, dtypes)
        assert_close(found, expected(as_stored(columns, dtypes), weights))

    check()


def test_torch_has_the_same_norms_and_distances(each_way: str) -> None:
    torch: Any = pytest.importorskip("torch")
    values = torch.randn(5, 3000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = [0.1, 0.2, 0.3, 0.25, 0.15]
    found = sums(values.tolist(), weights)
    average = torch.tensor(weights, dtype=torch.float64) @ values
    apart = values - average
    assert [row.squares for row in found.rows] == pytest.approx(values.square().sum(1).tolist())
    changes = (values[1:] - values[:-1]).norm(dim=1).square().tolist()
    assert [row.change for row in found.rows[1:]] == pytest.approx(changes)
    for mine, theirs in zip(found.products, (apart @ apart.T).tolist(), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-10)


# --- Properties -----------------------------------------------------------------------------------


def test_the_order_of_the_work_changes_no_digit(each_way: str) -> None:
    columns = [[math.sin(n * (k + 1)) * 10 ** (n % 9) for n in range(4000)] for k in range(3)]
    parts = [
        block([c[s : s + 512] for c in columns], ["F64"] * 3, s // STRIP)
        for s in range(0, 4000, 512)
    ]

    def total(shares: Sequence[Sequence[Block]]) -> Sums:
        threads = []
        for share in shares:
            threads.append(summing([0.2, 0.3, 0.5], range(3)))
            for part in share:
                threads[-1].add(part)
        return merged(threads, 3, 3)

    whole = total([parts])
    assert total([parts[::-1]]) == whole
    assert total([parts[::2], parts[1::2], []]) == whole


def test_a_sample_is_of_whole_strips_and_close_to_all(each_way: str) -> None:
    columns = [[math.sin(n * (k + 1)) for n in range(64 * STRIP + 5)] for k in range(2)]
    whole, sample = (sums(columns, [0.5, 0.5], every=every) for every in (1, 4))
    assert whole.sampled == 64 * STRIP + 5
    assert 8 * STRIP <= sample.sampled <= 24 * STRIP
    scaled = sample.products[0][1] * whole.sampled / sample.sampled
    assert scaled == pytest.approx(whole.products[0][1], rel=0.05)
    assert sample.rows == whole.rows  # all elements, whatever is sampled


def test_compiled_and_torch_sample_the_same_strips() -> None:
    if module is None:
        pytest.skip(native.reason())
    pytest.importorskip("torch")
    from tests.makers.folds import by_torch

    columns = [[math.sin(n * (k + 1)) for n in range(40 * STRIP)] for k in range(2)]
    compiled = sums(columns, [0.5, 0.5], every=3)
    with by_torch():
        assert_close(sums(columns, [0.5, 0.5], every=3), compiled)


def test_the_products_are_of_the_ends_and_of_checkpoints_between_them() -> None:
    for count in (1, 2, 63, 64, 65, 1000):
        members = members_of(count)
        assert members == sorted(set(members))
        assert (members[0], members[-1], len(members)) == (0, count - 1, min(count, 64))


@pytest.mark.parametrize("checkpoints", [2, 8, 16, 64, 500])
def test_the_share_of_the_sample_keeps_the_cost_of_an_element_constant(checkpoints: int) -> None:
    members = min(checkpoints, 64)
    each = members**2 / checkpoints / every_of(checkpoints, 10**9)  # products of an element
    assert each <= 8


# --- The module checks what it is given -----------------------------------------------------------


def arrays(**changed: Any) -> list[Any]:
    """The arguments of `measure` for two checkpoints of three numbers, some of them changed."""
    totals, scratch = module.measure_bytes(2, 1) if module else (0, 0)
    numbers = [2, 1, 3, 0, 1, *(3, 0), *(3, 24), 1]
    given = {
        "content": bytearray(48),
        "numbers": array("q", changed.pop("numbers", numbers)).tobytes(),
        "weights": array("d", [0.5, 0.5]).tobytes(),
        "totals": bytearray(totals),
        "scratch": bytearray(scratch),
        **changed,
    }
    return list(given.values())


@pytest.mark.parametrize(
    "changed",
    [
        {"content": bytearray(47)},
        {"weights": bytes(8)},
        {"totals": bytearray(8)},
        {"scratch": bytearray(8)},
        {"numbers": []},
        {"numbers": [2, 1, 3, 0, 1, 3, 0, 3, 24]},  # no members
        {"numbers": [2, 1, 3, 0, 1, 3, 0, 3, 24, 1, 1]},  # one too many
        {"numbers": [2, 1, 3, 0, 1, 3, 0, 3, 24, 2]},  # a member that is not there
        {"numbers": [2, 2, 3, 0, 1, 3, 0, 3, 24, 1, 0]},  # members out of order
        {"numbers": [0, 0, 3, 0, 1]},  # no checkpoints
        {"numbers": [2, 1, 3, 0, 0, 3, 0, 3, 24, 1]},  # every 0th strip
        {"numbers": [2, 1, -3, 0, 1, 3, 0, 3, 24, 1]},  # a negative length
        {"numbers": [2, 1, 4, 0, 1, 3, 0, 3, 24, 1]},  # beyond the content
        {"numbers": [2, 1, 3, 0, 1, 4, 0, 3, 24, 1]},  # no such dtype
        {"numbers": [2, 1, 2, 0, 1, 3, 0, 3, 25, 1]},  # not a whole element
        {"numbers": [2, 1, 1 << 39, 0, 1, 3, 0, 3, 24, 1]},
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_together_are_refused(
    compiled_module: ModuleType, changed: dict[str, Any]
) -> None:
    compiled_module.measure(*arrays())
    with pytest.raises(ValueError, match="do not fit together"):
        compiled_module.measure(*arrays(**changed))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 16])
def test_elements_that_differ_are_counted(compiled_module: ModuleType, width: int) -> None:
    one = bytes(range(1, 4 * width + 1))
    other = bytearray(one)
    assert compiled_module.differing(bytearray(one + other), len(one), 4, width) == 0
    other[0] ^= 1
    other[-1] ^= 128
    assert compiled_module.differing(bytearray(one + other), len(one), 4, width) == 2


@pytest.mark.parametrize(
    "sizes", [(4, 9, 1), (4, 4, 2), (-1, 1, 1), (4, -1, 1), (4, 1, 0), (4, 1, 17), (0, 1, 1)]
)
def test_counting_beyond_the_content_is_refused(
    compiled_module: ModuleType, sizes: tuple[int, int, int]
) -> None:
    with pytest.raises(ValueError, match="too short"):
        compiled_module.differing(bytearray(8), *sizes)
