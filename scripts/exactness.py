"""Judge averages, element by element, against the same averages in float64.

    python scripts/exactness.py folded|mean RUN OUTPUT...

prints the errors of each output as JSON.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from contenders import decay_of, weights_files
from runs import CHUNK_ELEMENTS, ITEM_BYTES, SAFETENSORS_NAMES

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


class Place(NamedTuple):
    """Where a tensor lies."""

    path: Path
    begin: int  # in the file
    elements: int
    dtype: str

    def read(self, skipped: int, elements: int) -> "Tensor":
        """Some elements of it, those at the front skipped."""
        import torch

        item_bytes = ITEM_BYTES[self.dtype]
        with self.path.open("rb") as file:
            file.seek(self.begin + skipped * item_bytes)
            data = bytearray(file.read(elements * item_bytes))
        return torch.frombuffer(data, dtype=getattr(torch, self.dtype))


@dataclass
class Errors:
    """How far an average is from the exact one, over all elements so far."""

    elements: int = 0
    wrong: int = 0  # that are not the exact value, rounded once to the dtype of the output
    squares: float = 0.0  # of the errors
    least_squares: float = 0.0  # of the errors that rounding once makes

    def add(self, found: "Tensor", exact: "Tensor") -> None:
        """Take some more elements into account."""
        rounded = exact.to(found.dtype)
        self.elements += exact.numel()
        self.wrong += int((found != rounded).sum())
        self.squares += float((found.double() - exact).square_().sum())
        self.least_squares += float((rounded.double() - exact).square_().sum())

    @property
    def times_rounding(self) -> float:
        """Root mean square of the error, in multiples of that of rounding once."""
        if self.squares == self.least_squares:
            return 1.0
        return math.sqrt(self.squares / self.least_squares) if self.least_squares else math.inf


def places(paths: Iterable[Path]) -> dict[str, Place]:
    """Where the tensors of these files lie."""
    found = {}
    for path in paths:
        with path.open("rb") as file:
            size_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, elements = 8 + size_bytes + entry["data_offsets"][0], math.prod(entry["shape"])
            found[name] = Place(path, begin, elements, DTYPES[entry["dtype"]])
    return found


def folded(parts: Iterable["Tensor"]) -> "Tensor":
    """The float64 fold, with the decays of `decay_of`, of the same elements of each checkpoint."""
    first, *later = parts
    shadow = first.double()
    for fold, part in enumerate(later, start=1):
        shadow.lerp_(part.double(), 1 - decay_of(fold))
    return shadow


def mean(parts: Iterable["Tensor"]) -> "Tensor":
    """Their float64 mean."""
    first, *later = parts
    return sum((part.double() for part in later), start=first.double()) / (1 + len(later))


def errors(
    checkpoints: Sequence[Path],
    outputs: dict[str, Path],
    average: Callable[[Iterable["Tensor"]], "Tensor"],
) -> dict[str, Errors]:
    """Errors of each output, a folder of safetensors, as an average of these checkpoints."""
    inputs = [places([path]) for path in checkpoints]
    averaged = {name: places(folder.glob("*.safetensors")) for name, folder in outputs.items()}
    found = {name: Errors() for name in outputs}
    for tensor, place in inputs[0].items():
        for skipped in range(0, place.elements, CHUNK_ELEMENTS):
            window = skipped, min(CHUNK_ELEMENTS, place.elements - skipped)
            exact = average(held[tensor].read(*window) for held in inputs)
            for name, held in averaged.items():
                found[name].add(held[tensor].read(*window), exact)
    return found


AVERAGES = {"folded": folded, "mean": mean}


def main(average: str, run: str, *outputs: str) -> None:
    """Print the share of wrong elements, and the error, of each output."""
    folders = {output: Path(output) for output in outputs}
    found = errors(weights_files(Path(run)), folders, AVERAGES[average]).values()
    print(json.dumps([(one.wrong / one.elements, one.times_rounding) for one in found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
