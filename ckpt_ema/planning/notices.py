"""What a person should know of a run before it is averaged: warnings and notes, as sentences."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from ckpt_ema.containers.model_key import ALREADY_AVERAGED
from ckpt_ema.containers.specs import AVERAGED, Specs
from ckpt_ema.errors import printable, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.names import stem_of
from ckpt_ema.trainers import conventions

# Copies and downloads finish in any order; runs are further apart than this.
_INVERSION_NS = 3600 * 10**9
# With so few, the trainer has often removed the others.
_FEW = 4


def run_warnings(
    checkpoints: Sequence[Checkpoint], specs: Sequence[Specs], found_in_all: int
) -> list[str]:
    """Warnings about the run: its length, times, and the kind of its weights.

    `checkpoints` are those that take part, of `found_in_all` that the run has. Whoever lists
    checkpoints knows how many there are.
    """
    return [
        *([] if checkpoints[0].is_given else _few(found_in_all)),
        *_times(checkpoints, specs),
        *_adapters(specs[-1]),
        *_averaged(checkpoints, specs),
        *dict.fromkeys(warning for one in specs for warning in one.warnings),
        *_holes({path: hole for one in specs for path, hole in one.holes.items()}),
    ]


def run_notes(checkpoints: Sequence[Checkpoint], specs: Sequence[Specs]) -> list[str]:
    """Notes on what was chosen and what is not averaged."""
    notes = []
    if len(checkpoints) > 1 and checkpoints[-1].unit == "save":
        notes.append(
            "The numbers in the names count saves, not steps (accelerate): their order is known,"
            " their distances are not."
        )
    kept: dict[str, list[str]] = {}
    for name, tensor in specs[-1].tensors.items():
        if tensor.dtype not in AVERAGED:
            kept.setdefault(tensor.dtype, []).append(name)
    for dtype, names in kept.items():
        notes.append(
            f"{dtype} tensors are not averaged but keep the value of"
            f" {printable(checkpoints[-1].name)}: {some(names)}."
        )
    return [*notes, *sorted({f"{str(n).rstrip('.')}." for one in specs for n in one.notes})]


def _holes(holes: Mapping[str, int]) -> list[str]:
    if not holes:
        return []
    path, offset = next(iter(holes.items()))
    first = f"{printable(path)} has a hole at byte {offset}, which reads as zeros"
    if len(holes) == 1:
        return [f"{first}: an interrupted save, or a sparse copy."]
    return [f"{first}; so have {len(holes) - 1} more files: interrupted saves, or sparse copies."]


def _few(count: int) -> list[str]:
    if not 1 < count <= _FEW:
        return []
    return [
        f"There are {count} checkpoints only; if the trainer removed older ones, raise its limit"
        " (save_total_limit, save_top_k, max_history)."
    ]


def _times(checkpoints: Sequence[Checkpoint], specs: Sequence[Specs]) -> list[str]:
    times = [one.files[0].mtime_ns for one in specs]
    rows = zip(checkpoints, times, strict=True)
    for (earlier, first), (later, second) in pairwise(rows):
        if first - second > _INVERSION_NS:
            return [
                f"{printable(later.name)} was written before {printable(earlier.name)}, though its"
                " step is later: two runs in one folder?"
            ]
    return []


def _averaged(checkpoints: Sequence[Checkpoint], specs: Sequence[Specs]) -> list[str]:
    named = [c.name for c in checkpoints if conventions.AVERAGED_NAME.search(stem_of(c.name))]
    ours = [
        checkpoint.name
        for checkpoint, one in zip(checkpoints, specs, strict=True)
        if any(conventions.PROVENANCE_KEY in of_file for of_file in one.metadata)
    ]
    return [
        f"{how}, {some(names, 2)} {ALREADY_AVERAGED}."
        for how, names in (("By their names", named), ("By what ckpt-ema wrote into them", ours))
        if names
    ]


def _adapters(newest: Specs) -> list[str]:
    if not any(conventions.LORA_FACTOR.search(name) for name in newest.tensors):
        return []
    return [
        "The factors A and B of the adapters are averaged each by itself, which is near the average"
        " of their products BA but is not it; for that, merge each into its base model first."
    ]
