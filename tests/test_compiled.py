"""The compiled fold: bits as exact arithmetic has them on any vector unit, and no crash, ever."""

import hashlib
import math
import random
import struct
from array import array
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema.fold import compiled_fold, native
from tests.makers import by_hand
from tests.makers.by_hand import Values

module: Any = native.compiled()
pytestmark = pytest.mark.skipif(module is None, reason=native.reason())
VECTORS = module.vectors() if module else []
MANY = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DTYPES = ("F64", "F32", "F16", "BF16")
# Of each dtype: the largest number, the smallest, and the distance from 1 to the next.
LIMITS = {
    "F64": (1e300, 5e-324, 2.0**-52),
    "F32": (2.0**127, 2.0**-149, 2.0**-23),
    "F16": (65504.0, 2.0**-24, 2.0**-10),
    "BF16": (2.0**127, 2.0**-133, 2.0**-7),
}


@pytest.fixture(params=VECTORS, autouse=True)
def vector(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each vector unit of this machine in turn."""
    module.use_vector(request.param)
    yield request.param
    module.use_vector(VECTORS[0])


def fma(one: float, other: float, third: float) -> float:
    """one * other + third, rounded once."""
    exact = Fraction(one) * Fraction(other) + Fraction(third)
    # Of a sum that is zero, IEEE 754 has the sign of both, if they have one.
    is_negative = (
        math.copysign(1, third) < 0 and math.copysign(1, one) * math.copysign(1, other) < 0
    )
    return float(exact) if exact else -0.0 if is_negative else 0.0


def exact_fold(values: Sequence[float], decays: Sequence[float]) -> float:
    """What `fold_` computes, in rational arithmetic that is rounded where it says so."""
    shadow = values[0]
    for value, decay in zip(values[1:], decays, strict=True):
        if decay in (0.0, 1.0):
            shadow = shadow if decay else value
        elif decay > 0.5:
            shadow = fma(-(shadow - value), 1.0 - decay, shadow)
        else:
            shadow = fma(-(value - shadow), 1.0 - (1.0 - decay), value)
    return shadow


def rounded(dtype: str, number: float) -> bytes:
    """A float64 number in a dtype, by way of float32, as torch rounds it."""
    if dtype != "F64":
        number = struct.unpack("f", struct.pack("f", number))[0]
    return Values(dtype, (1,), [number]).packed


def as_read(dtype: str, number: float) -> float:
    """A number as a tensor of a dtype holds it."""
    packed = rounded(dtype, number)
    if dtype == "BF16":
        return float(struct.unpack("f", b"\0\0" + packed)[0])
    return float(struct.unpack({"F64": "d", "F32": "f", "F16": "e"}[dtype], packed)[0])


def make_run(folder: Path, states: Sequence[by_hand.State]) -> Path:
    """A run of safetensors checkpoints."""
    for step, state in enumerate(states, start=1):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        by_hand.write_model(checkpoint, state)
    return folder


def averaged(run: Path, **options: Any) -> dict[str, bytes]:
    """The bytes of each tensor of each average of a run, by folder and name."""
    allowed: dict[str, Any] = {"allow_duplicates": True, "allow_zeros": True}
    options = {"schedule": "constant", "allow_nonfinite": True, **allowed, **options}
    result = ckpt_ema.average(run, device="cpu", overwrite=True, **options)
    return {
        f"{output.name} {name}": content
        for output in result.outputs
        for name, (_, _, content) in by_hand.read(output / "model.safetensors").items()
    }


class Case(NamedTuple):
    """What is averaged: a tensor of one dtype, in some checkpoints."""

    dtype: str
    columns: list[list[float]]  # of each element, its value in each checkpoint
    decays: list[float]
    tile_size: int

    @property
    def checkpoints(self) -> int:
        """How many there are."""
        return len(self.columns[0])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Numbers of all sizes, and those that lie halfway between two."""
    dtype = draw(st.sampled_from(DTYPES))
    largest, smallest, epsilon = LIMITS[dtype]
    special = [0.0, -0.0, largest, -largest, smallest, -3 * smallest, 1.0, 1 + epsilon, 1 - epsilon]
    some = st.floats(-100, 100) | st.floats(-largest, largest)
    number = st.builds(as_read, st.just(dtype), st.sampled_from(special) | some)
    checkpoints = draw(st.integers(1, 20))
    column = st.lists(number, min_size=checkpoints, max_size=checkpoints)
    columns = draw(st.lists(column, min_size=1, max_size=5))
    columns *= draw(st.integers(1, 120))  # to more than a strip
    decay = st.sampled_from([0.0, 1.0, 0.5, 0.25, 0.75, 0.999]) | st.floats(0, 1)
    decays = draw(st.lists(decay, min_size=1, max_size=3, unique=True))
    return Case(dtype, columns, decays, draw(st.sampled_from([8, 100, 4096])))


@given(cases())
@example(Case("BF16", [[1.0, 1 + 2.0**-7]], [0.5], 64))  # halfway: to even
@example(Case("F16", [[2.0**-24, 2.0**-23]] * 9, [0.5], 64))
@MANY
def test_every_bit_is_that_of_exact_arithmetic(
    tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    rows = zip(*case.columns, strict=True)
    states = [{"w": Values(case.dtype, (len(row),), row)} for row in rows]
    run = make_run(tmp_path_factory.mktemp("run"), states)
    found = averaged(run, decay=case.decays, tile_size=case.tile_size)
    expected = [
        b"".join(
            rounded(case.dtype, exact_fold(column, [decay] * (case.checkpoints - 1)))
            for column in case.columns
        )
        for decay in case.decays
    ]
    assert [*found.values()] == expected


def pseudo_random(seed: int) -> random.Random:
    """Numbers that are the same for ever."""
    return random.Random(seed)


def golden_run(folder: Path) -> Path:
    """Twelve checkpoints of four dtypes, in tensors from one element to 70 000."""
    numbers = pseudo_random(1)
    states = []
    for _ in range(12):
        state = {}
        for dtype in DTYPES:
            for count in (1, 255, 257, 70_000):
                values = [numbers.random() - 0.5 for _ in range(count)]
                state[f"{dtype}.{count}"] = Values(dtype, (count,), values)
        states.append(state)
    return make_run(folder, states)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden run, made once."""
    return golden_run(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tile_size", [None, 12_345])
def test_the_bytes_are_the_same_for_ever(golden: Path, tile_size: int | None, threads: int) -> None:
    found = averaged(golden, decay=[0.3, 0.5, 0.9, 0.999], tile_size=tile_size, threads=threads)
    digest = hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()
    assert digest == "6db629b3d7e25ad63ee608a5141c1bdf2298c98056d47ab67d2df56aa2f72ceb"


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_that_never_change_stay_and_nan_is_one_nan(dtype: str, tmp_path: Path) -> None:
    infinity, nan = math.inf, math.nan
    columns = [
        [infinity, infinity, infinity],
        [-infinity, -infinity, -infinity],
        [1.0, 2.0, 3.0],
        [infinity, 1.0, infinity],
        [1.0, infinity, 2.0],
        [1.0, 2.0, -nan],
        [1.0, 2.0, infinity],
    ]
    states = [{"w": Values(dtype, (7,), row)} for row in zip(*columns, strict=True)]
    [found] = averaged(make_run(tmp_path / "run", states), decay=0.25).values()
    exact = exact_fold(columns[2], [0.25] * 2)
    expected = [infinity, -infinity, exact, infinity, nan, nan, nan]
    quiet = {
        "F64": b"\0" * 6 + b"\xf8\x7f",
        "F32": b"\0\0\xc0\x7f",
        "F16": b"\0\x7e",
        "BF16": b"\xc0\x7f",
    }
    packed = [quiet[dtype] if math.isnan(one) else rounded(dtype, one) for one in expected]
    assert found == b"".join(packed)


def test_payloads_of_nan_and_signals_of_nan_are_seen(tmp_path: Path) -> None:
    """One with all bits set would round to -0.0, if its exponent were not looked at first."""
    patterns = {"F32": (b"\xff\xff\xff\x7f", b"\1\0\x80\x7f"), "BF16": (b"\xff\x7f", b"\x81\x7f")}
    for dtype, payloads in patterns.items():
        for number, payload in enumerate(payloads):
            run = tmp_path / f"{dtype}{number}"
            states = [
                {"w": Values(dtype, (300,), [float(i + n) for i in range(300)])} for n in (1, 2)
            ]
            make_run(run, states)
            path = run / "checkpoint-2/model.safetensors"
            path.write_bytes(path.read_bytes()[: -len(payload)] + payload)
            with pytest.raises(ckpt_ema.RefusedError, match="1 NaN values"):
                ckpt_ema.average(run, device="cpu")


@given(
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan]) | st.floats(-9, 9)),
)
@MANY
def test_elements_are_described_and_compared(dtype: str, numbers: list[float]) -> None:
    values = [as_read(dtype, number) for number in numbers]
    content = bytearray(Values(dtype, (len(values),), values).packed)
    code = native.DTYPES.index(dtype)
    squares, low, high, others, nans, infinities = module.describe(content, code, len(values))
    known = [value for value in values if not math.isnan(value)]
    assert low == min(known, default=math.inf)
    assert high == max(known, default=-math.inf)
    assert others == sum(value not in (low, high) for value in values)
    assert nans == len(values) - len(known)
    assert infinities == sum(map(math.isinf, values))
    assert squares == pytest.approx(sum(value**2 for value in values), nan_ok=True)
    zeros = bytearray(8 * len(values))
    distance = module.distance(content, code, zeros, native.DTYPES.index("F64"), len(values))
    assert distance == pytest.approx(squares, nan_ok=True)


class Call(NamedTuple):
    """The arguments of a call that is right."""

    arguments: tuple[Any, ...]

    def with_numbers(self, place: int, numbers: Sequence[int]) -> "Call":
        """Return the call with another array of numbers."""
        arguments = [*self.arguments]
        arguments[place] = array("q", numbers).tobytes()
        return Call(tuple(arguments))


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """A call as averaging makes it, on files that stay open."""
    import os

    folder = tmp_path_factory.mktemp("call")
    states = [
        {
            f"w{n}": Values("F32", (5, 60), [float(step + i + n) for i in range(300)])
            for n in range(3)
        }
        for step in range(3)
    ]
    taken: list[tuple[Any, ...]] = []
    real = compiled_fold.Kernel.__init__

    class Taking:
        scratch_bytes = staticmethod(module.scratch_bytes)
        describe = staticmethod(module.describe)

        def fold(self, *arguments: Any) -> Any:
            taken.append(arguments)
            return module.fold(*arguments)

    def taking(kernel: Any, _module: Any, *rest: Any) -> None:
        real(kernel, Taking(), *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compiled_fold.Kernel, "__init__", taking)
        run = make_run(folder / "run", states)
        ckpt_ema.average(
            run, device="cpu", threads=1, decay=[0.3, 0.9], schedule="constant", keep_state=True
        )
    files = [os.open(path / "model.safetensors", os.O_RDONLY) for path in sorted(run.iterdir())]
    outputs = [os.open(folder / f"out{n}", os.O_RDWR | os.O_CREAT) for n in range(4)]
    arguments = [*taken[0]]
    arguments[13] = bytearray(1)  # that run is over, and has set it
    right = Call(tuple(arguments))
    right = right.with_numbers(4, [n for i, fd in enumerate(files) for n in (fd, i)])
    yield right.with_numbers(5, outputs)
    for fd in (*files, *outputs):
        os.close(fd)


NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 3, 255, 256, 257, 1 << 20, 1 << 40, (1 << 63) - 1, -(1 << 63)]
)


@given(st.data())
@settings(MANY, max_examples=400)
def test_no_arguments_make_it_crash(call: Call, data: st.DataObject) -> None:
    """It refuses arrays that do not fit together, or the files end; under sanitizers too."""
    place = data.draw(st.integers(0, 14))
    old = call.arguments[place]
    if isinstance(old, bytes):
        numbers = [*memoryview(old).cast("q")]
        # What is written to is its own files or none: other numbers are files of this process.
        others = (
            st.sampled_from([*numbers, -1, 9999]) if place == 5 else st.integers(0, 999) | NUMBERS
        )
        for _ in range(data.draw(st.integers(1, 3))):
            numbers[data.draw(st.integers(0, len(numbers) - 1))] = data.draw(others)
        size = data.draw(st.just(len(numbers)) | st.integers(0, len(numbers) + 2))
        changed = call.with_numbers(place, (numbers + [0] * 2)[:size])
    else:
        size = data.draw(st.integers(0, len(old)))
        arguments = [*call.arguments]
        arguments[place] = bytearray(old[:size])
        changed = Call(tuple(arguments))
    try:
        what, *_ = module.fold(*changed.arguments)
    except ValueError as error:
        assert str(error) == "fold: the arrays do not fit together"
    else:
        assert what in range(4)


def test_what_ends_a_call_is_told(call: Call) -> None:
    assert module.fold(*call.arguments)[0] == 0
    *arguments, stop, scratch = call.arguments
    assert module.fold(*arguments, bytearray(b"\1"), scratch)[0] == 3
    closed = call.with_numbers(4, [9999, 0, 9999, 1, 9999, 2])
    assert module.fold(*closed.arguments)[:3] == (1, 0, 9)
    assert module.fold(*call.with_numbers(5, [9999] * 4).arguments)[:3] == (2, 0, 9)
    assert stop == bytearray(1)


def test_what_does_not_fit_is_refused() -> None:
    for wrong in ((bytearray(8), 9, 1), (bytearray(8), 2, 3), (bytearray(8), -1, 1)):
        with pytest.raises(ValueError, match="do not fit"):
            module.describe(*wrong)
    with pytest.raises(ValueError, match="no such vector unit"):
        module.use_vector("mmx")
