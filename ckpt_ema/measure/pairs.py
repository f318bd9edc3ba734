"""Which tensors of two checkpoints are the same one, and whether they can be compared."""

from collections.abc import Sequence
from typing import NamedTuple

from ckpt_ema.containers.specs import AVERAGED, COMPLEX, DTYPE_BITS, Specs, TensorSpec, as_real
from ckpt_ema.planning.renaming import unwrapped
from ckpt_ema.trainers import conventions


class Pair(NamedTuple):
    """A tensor that both checkpoints have with one shape, and kinds of dtype that go together."""

    name: str  # in the second checkpoint
    own: TensorSpec  # in the first
    other: TensorSpec

    @property
    def has_numbers(self) -> bool:
        """Whether it is of floating-point or complex numbers, and not merely of bytes."""
        return self.own.dtype in AVERAGED

    @property
    def width(self) -> int:
        """The bytes of what is counted if it differs: elements, or bytes that several share."""
        return max(1, DTYPE_BITS[self.own.dtype] // 8)

    @property
    def sides(self) -> tuple[TensorSpec, TensorSpec]:
        """Both as real numbers."""
        return as_real(self.own), as_real(self.other)


class Other(NamedTuple):
    """A tensor that both have in another form."""

    name: str
    own: TensorSpec
    other: TensorSpec


class Paired(NamedTuple):
    """The tensors of two checkpoints."""

    pairs: Sequence[Pair]
    only: tuple[Sequence[str], Sequence[str]]  # in the first, in the second
    shapes: Sequence[Other]  # of another shape: not compared any further
    dtypes: Sequence[Other]  # of another dtype: compared if both are floats, or both complex
    renamed: Sequence[str]  # names of the second whose counterparts have what a wrapper adds


def paired(own: Specs, other: Specs) -> Paired:
    """Match the tensors of two checkpoints by name, whatever wrappers have added to names."""
    plain = unwrapped(name for name in own.tensors if name not in other.tensors)
    names = {
        name: name if name in own.tensors else plain.get(conventions.MAYBE_ADDED.sub("", name))
        for name in other.tensors
    }
    pairs, shapes, dtypes = [], [], []
    for name, own_name in names.items():
        if own_name is None:
            continue
        one = Other(name, own.tensors[own_name], other.tensors[name])
        if one.own.shape != one.other.shape:
            shapes.append(one)
            continue
        if one.own.dtype != one.other.dtype:
            dtypes.append(one)
            if _kind(one.own) != _kind(one.other) or one.own.dtype not in AVERAGED:
                continue
        pairs.append(Pair(*one))
    found = set(names.values())
    return Paired(
        pairs,
        (
            [name for name in own.tensors if name not in found],
            [name for name, own_name in names.items() if own_name is None],
        ),
        shapes,
        dtypes,
        [name for name, own_name in names.items() if own_name not in (None, name)],
    )


def _kind(tensor: TensorSpec) -> tuple[bool, bool]:
    return tensor.dtype in AVERAGED, tensor.dtype in COMPLEX
