"""Warnings and notes about a run: its length, its times, and the kind of its weights."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from ckpt_ema.containers.model_key import ALREADY_AVERAGED
from ckpt_ema.containers.specs import Role, Specs
from ckpt_ema.errors import Code, some
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.order import Checkpoint
from ckpt_ema.notices import Notice
from ckpt_ema.planning.roles import Ruling
from ckpt_ema.trainers import conventions

# Copies and downloads finish in any order; runs are further apart than this.
_INVERSION_NS = 3600 * 10**9
# With so few, the trainer has often removed the others.
_FEW = 4


def run_warnings(specs_of: Mapping[Checkpoint, Specs]) -> list[Notice]:
    """Return the warnings about the checkpoints that take part, oldest first."""
    checkpoints, specs = list(specs_of), list(specs_of.values())
    return [
        *_times(checkpoints, specs),
        *_adapters(specs[-1]),
        *_averaged(checkpoints, specs),
        *dict.fromkeys(str(warning) for one in specs for warning in one.warnings),
        *_holes({path: hole for one in specs for path, hole in one.holes.items()}),
    ]


def run_notes(
    specs_of: Mapping[Checkpoint, Specs],
    found_in_all: int,
    rulings: Mapping[str, Ruling],
    other_models: Sequence[str],
) -> list[Notice]:
    """Return notes on the checkpoints that take part, oldest first.

    `found_in_all` is how many the run has, `rulings` are those on the tensors of the newest,
    `other_models` are folders in it that are not copied.
    """
    newest = list(specs_of)[-1]
    notes = [] if newest.is_given else _few(found_in_all)
    if len(specs_of) > 1 and newest.unit == "save":
        notes.append(
            Notice(
                Code.NO_STEPS,
                "Numbers in the names count saves, not steps (accelerate); gaps between checkpoints"
                " are unknown.",
            )
        )
    kept: dict[str, list[str]] = {}
    for name, ruling in rulings.items():
        if ruling.made is Role.KEPT:
            kept.setdefault(specs_of[newest].tensors[name].dtype, []).append(name)
    for dtype, names in kept.items():
        message = f"{dtype} tensors are not averaged and keep the value of {newest.name}"
        notes.append(Notice(Code.NOT_AVERAGED, f"{message}: {some(names)}."))
    notes += dict.fromkeys(note for one in specs_of.values() for note in one.notes)
    if other_models:
        message = f"Folders with other models are not copied: {some(other_models)}."
        notes.append(Notice(Code.LEFT_OUT, message))
    return notes


def _few(count: int) -> list[Notice]:
    if not 1 < count <= _FEW:
        return []
    return [
        Notice(
            Code.FEW_CHECKPOINTS,
            f"Only {count} checkpoints; if the trainer removed older ones, raise its limit"
            " (save_total_limit, save_top_k, max_history).",
        )
    ]


def _times(checkpoints: Iterable[Checkpoint], specs: Iterable[Specs]) -> list[Notice]:
    rows = zip(checkpoints, (one.files[0].mtime_ns for one in specs), strict=True)
    for (earlier, first), (later, second) in pairwise(rows):
        if first - second > _INVERSION_NS:
            return [
                Notice(
                    Code.OUT_OF_ORDER,
                    f"{later.name} was written before {earlier.name}, though its step is later;"
                    " the folder may hold two runs.",
                )
            ]
    return []


def _adapters(newest: Specs) -> list[Notice]:
    if not any(conventions.LORA_FACTOR.search(name) for name in newest.tensors):
        return []
    return [
        Notice(
            Code.ADAPTER_FACTORS,
            "LoRA factors A and B are averaged separately, which only approximates the average of"
            " their products BA; for that, merge each adapter into its base model first.",
        )
    ]


def _averaged(checkpoints: Sequence[Checkpoint], specs: Sequence[Specs]) -> list[Notice]:
    by_name = [c.name for c in checkpoints if conventions.AVERAGED_NAME.search(stem_of(c.name))]
    ours = [
        checkpoint.name
        for checkpoint, one in zip(checkpoints, specs, strict=True)
        if any(conventions.PROVENANCE_KEY in of_file for of_file in one.metadata)
    ]
    return [
        Notice(Code.ALREADY_AVERAGED, f"{how}, {some(names, 2)} {ALREADY_AVERAGED}.")
        for how, names in (("By their names", by_name), ("By their headers", ours))
        if names
    ]


def _holes(holes: Mapping[str, int]) -> list[Notice]:
    if not holes:
        return []
    path, offset = next(iter(holes.items()))
    more = f" (and {len(holes) - 1} more files)" if len(holes) > 1 else ""
    return [
        Notice(
            Code.HOLES,
            f"{path}{more} has a hole at byte {offset}, which reads as zeros: an interrupted save,"
            " or a sparse copy.",
        )
    ]
