"""`ckpt_ema.compare`: how far two checkpoints are from each other, tensor by tensor."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ckpt_ema.containers.reader import Reader
from ckpt_ema.errors import Code, some
from ckpt_ema.find.one import find_one
from ckpt_ema.measure.compared import (
    Comparison,
    Distance,
    GroupDifference,
    OtherForm,
    TensorDifference,
)
from ckpt_ema.measure.pair_sums import Difference, Side, differences, joined
from ckpt_ema.measure.pairs import Pair, Paired, paired
from ckpt_ema.notices import Notice
from ckpt_ema.options import OF_ONE, PathLike, make_options
from ckpt_ema.planning.decide import paths_of
from ckpt_ema.planning.renaming import without_prefix
from ckpt_ema.planning.roles import pattern_of
from ckpt_ema.planning.same_model import without_dropped
from ckpt_ema.planning.sizing import default_threads
from ckpt_ema.storage import storages_anew

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CompareKeywords(TypedDict, total=False):
    """The options of `compare`: which model in each of the checkpoints, and how it is read."""

    form: str
    which: str
    component: str | None
    key: str | None
    strip_prefix: str | None
    drop: Sequence[str]
    threads: int | str | None


def compare(
    a: PathLike,
    b: PathLike,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: "Unpack[CompareKeywords]",
) -> Comparison:
    """Compare two checkpoints: folders, files or URIs of any format, or steps of runs, RUN@STEP.

    Tensors go together by name, whatever wrappers added to it. Floats are compared as numbers,
    complex ones as pairs of numbers, all else by its bytes. `progress` is called with the bytes
    read so far and in all.

    Raises `RefusedError` for what is no checkpoint or cannot be read, `OptionError` for an
    impossible option, `FailedError` if reading fails.
    """
    if unused := sorted(options.keys() - OF_ONE):
        raise TypeError(f"compare() got an unexpected keyword argument {unused[0]!r}")
    start = time.monotonic()
    made = make_options(options)
    paths = [path for one in (a, b) for path in paths_of(one)]
    storages_anew(paths)
    found = [find_one(path, made.reading) for path in paths]
    specs = [source.read(checkpoint.model) for checkpoint, source in found]
    if made.reading.strip_prefix:
        specs = without_prefix(specs, made.reading.strip_prefix)
    specs, _ = without_dropped(specs, made.reading.drop)
    both = paired(*specs)
    with ExitStack() as stack:
        sides = []
        for (checkpoint, source), one in zip(found, specs, strict=True):
            reader = Reader(source.storage, [(checkpoint.model.folder, one)])
            sides.append(Side(source.storage, stack.enter_context(reader)))
        threads = made.engine.threads or default_threads()
        differing = differences(both.pairs, sides, threads, progress or (lambda *_: None))
    seconds = round(time.monotonic() - start, 3)
    return _compared([checkpoint.path for checkpoint, _ in found], both, differing, seconds)


def _compared(
    paths: Sequence[Path], both: Paired, found: Sequence[Difference], seconds: float
) -> Comparison:
    """Put together what was found."""
    tensors = [_tensor(*one) for one in zip(both.pairs, found, strict=True)]
    groups: dict[str, list[int]] = {}
    for number, pair in enumerate(both.pairs):
        groups.setdefault(pattern_of(pair.name), []).append(number)
    grouped = [
        GroupDifference(
            pattern,
            len(numbers),
            sum(tensors[number].is_equal for number in numbers),
            _distance([found[number] for number in numbers if both.pairs[number].has_numbers]),
        )
        for pattern, numbers in groups.items()
    ]
    numeric = [one for one, pair in zip(found, both.pairs, strict=True) if pair.has_numbers]
    shapes = [(one.name, str([*one.own.shape]), str([*one.other.shape])) for one in both.shapes]
    dtypes = [(one.name, one.own.dtype, one.other.dtype) for one in both.dtypes]
    return Comparison(
        a=paths[0],
        b=paths[1],
        distance=_distance(numeric),
        tensors=tuple(sorted(tensors, key=_farthest_first)),
        groups=tuple(sorted(grouped, key=lambda one: _key(one.distance))),
        only_in_a=tuple(both.only[0]),
        only_in_b=tuple(both.only[1]),
        other_shape=tuple(OtherForm(*one) for one in shapes),
        other_dtype=tuple(OtherForm(*one) for one in dtypes),
        bytes_read=sum(one.own.size_bytes + one.other.size_bytes for one in both.pairs),
        seconds=seconds,
        notes=_notes(both),
    )


def _tensor(pair: Pair, found: Difference) -> TensorDifference:
    return TensorDifference(
        name=pair.name,
        dtypes=(pair.own.dtype, pair.other.dtype),
        shape=pair.own.shape,
        distance=_distance([found] if pair.has_numbers else []),
        different_elements=found.different,
        nonfinite=(round(found.own.nonfinite), round(found.other.nonfinite)),
    )


def _distance(found: Sequence[Difference]) -> Distance:
    """Return the distance of all numbers of some tensors together.

    The cosine follows from three norms, by the law of cosines: it is 1 for what is equal.
    """
    if not found:
        return Distance(None, None, None)
    whole = joined(found)
    squares, other, change = whole.own.squares, whole.other.squares, whole.other.change
    largest = math.sqrt(max(squares, other))
    norms = math.sqrt(squares) * math.sqrt(other)
    is_finite = math.isfinite(largest) and math.isfinite(change)
    cosine = None
    if norms and is_finite and not (whole.own.nonfinite or whole.other.nonfinite):
        cosine = min(max((squares + other - change) / (2 * norms), -1.0), 1.0)
    relative = math.sqrt(change) / largest if largest else 0.0
    most = min(whole.other.largest, sys.float_info.max)  # JSON has no infinity
    return Distance(relative if is_finite else None, cosine, most)


def _farthest_first(one: TensorDifference) -> tuple[float, ...]:
    count = math.prod(one.shape) if one.different_elements is None else one.different_elements
    return (*_key(one.distance), -count)


def _key(distance: Distance) -> tuple[float, ...]:
    """Return what sorts the farthest first, and what is no float after all that differs."""
    return -(distance.relative_distance or 0.0), -(distance.max_abs_difference or 0.0)


def _notes(both: Paired) -> tuple[Notice, ...]:
    if not both.renamed:
        return ()
    text = f"Names that differ by what a wrapper adds go together: {some(both.renamed, 3)}."
    return (Notice(Code.DIFFERENT_NAMES, text),)
