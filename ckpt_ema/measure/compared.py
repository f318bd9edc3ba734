"""What a comparison of two checkpoints has found, as plain values."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_ema.notices import Notice


@dataclass(frozen=True, slots=True)
class Distance:
    """How far some numbers of one checkpoint are from those of another.

    Numbers that are not finite are left out. All three are None for what is no float.
    """

    relative_distance: float | None  # norm of the difference, by the larger of the two norms
    cosine: float | None  # of the angle between both; None where one is all zeros or not finite
    max_abs_difference: float | None


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that both checkpoints have in the same shape, and in dtypes that go together."""

    name: str  # in the second
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    distance: Distance
    different_elements: int | None  # in any bit; None where dtypes differ
    nonfinite: tuple[int, int]  # elements of each that are not

    @property
    def is_equal(self) -> bool:
        """Whether dtype and every bit are the same."""
        return self.different_elements == 0


@dataclass(frozen=True, slots=True)
class GroupDifference:
    """All tensors whose names differ in numbers alone."""

    pattern: str  # model.layers.*.weight
    tensors: int
    equal_tensors: int
    distance: Distance  # of all their numbers together


@dataclass(frozen=True, slots=True)
class OtherForm:
    """A tensor that the second checkpoint has in another shape or dtype."""

    name: str
    a: str  # the shape or dtype in the first
    b: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints beside each other; tensors and groups are in order, the farthest first."""

    a: Path
    b: Path
    distance: Distance  # of all numbers together
    tensors: tuple[TensorDifference, ...]
    groups: tuple[GroupDifference, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    other_shape: tuple[OtherForm, ...]  # which are not compared any further
    other_dtype: tuple[OtherForm, ...]  # compared if both are floats, or both complex
    bytes_read: int
    seconds: float
    notes: tuple[Notice, ...]

    @property
    def equal_tensors(self) -> int:
        """How many tensors are the same in dtype, shape and every bit."""
        return sum(one.is_equal for one in self.tensors)

    @property
    def is_equal(self) -> bool:
        """Whether both have the same tensors, in dtype, shape and every bit."""
        others = (self.only_in_a, self.only_in_b, self.other_shape, self.other_dtype)
        return not any(others) and self.equal_tensors == len(self.tensors)

    def described(self) -> dict[str, Any]:
        """Return it as plain values, ready for JSON; see docs/schema/comparison.schema.json."""
        return {
            "version": 1,
            "a": os.fspath(self.a),
            "b": os.fspath(self.b),
            "equal": self.is_equal,
            **_numbers(self.distance),
            "equal_tensors": self.equal_tensors,
            "tensors": [_described(one) for one in self.tensors],
            "groups": [
                {
                    "pattern": one.pattern,
                    "tensors": one.tensors,
                    "equal_tensors": one.equal_tensors,
                    **_numbers(one.distance),
                }
                for one in self.groups
            ],
            "only_in_a": [*self.only_in_a],
            "only_in_b": [*self.only_in_b],
            "other_shape": [{"name": one.name, "a": one.a, "b": one.b} for one in self.other_shape],
            "other_dtype": [{"name": one.name, "a": one.a, "b": one.b} for one in self.other_dtype],
            "bytes_read": self.bytes_read,
            "notes": [note.described() for note in self.notes],
        }


def _described(one: TensorDifference) -> dict[str, Any]:
    return {
        "name": one.name,
        **_numbers(one.distance),
        "equal": one.is_equal,
        "different_elements": one.different_elements,
        "nonfinite": [*one.nonfinite],
        "dtypes": [*one.dtypes],
        "shape": [*one.shape],
    }


def _numbers(distance: Distance) -> dict[str, float | None]:
    return {
        "relative_distance": distance.relative_distance,
        "cosine": distance.cosine,
        "max_abs_difference": distance.max_abs_difference,
    }
