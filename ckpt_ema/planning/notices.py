"""Warnings and notes about a run: its length, its times, and the kind of its weights."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from ckpt_ema.containers.model_key import ALREADY_AVERAGED
from ckpt_ema.containers.specs import Role, Specs
from ckpt_ema.errors import Code, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.names import stem_of
from ckpt_ema.notices import Notice
from ckpt_ema.planning.roles import Ruling
from ckpt_ema.trainers import conventions

# Copies and downloads finish in any order; runs are further apart than this.
_INVERSION_NS = 3600 * 10**9
# With so few, the trainer has often removed the others.
_FEW = 4


def run_warnings(specs_of: Mapping[Checkpoint, Specs]) -> Iterator[Notice]:
    """Yield the warnings about the checkpoints that take part, oldest first."""
    specs = list(specs_of.values())
    yield from _times(specs_of)
    if any(conventions.LORA_FACTOR.search(name) for name in specs[-1].tensors):
        yield Notice(
            Code.ADAPTER_FACTORS,
            "LoRA factors A and B are averaged separately, which only approximates the average of"
            " their products BA; for that, merge each adapter into its base model first.",
        )
    yield from _averaged(specs_of)
    yield from dict.fromkeys(warning for one in specs for warning in one.warnings)
    holes = {path: hole for one in specs for path, hole in one.holes.items()}
    for path, offset in list(holes.items())[:1]:
        more = f" (and {len(holes) - 1} more files)" if len(holes) > 1 else ""
        yield Notice(
            Code.HOLES,
            f"{path}{more} has a hole at byte {offset}, which reads as zeros: an interrupted save,"
            " or a sparse copy.",
        )


def run_notes(
    specs_of: Mapping[Checkpoint, Specs],
    found_in_all: int,
    rulings: Mapping[str, Ruling],
    other_models: Sequence[str],
) -> Iterator[Notice]:
    """Yield notes on the checkpoints that take part, oldest first.

    `found_in_all` is how many the run has, `rulings` are those on the tensors of the newest,
    `other_models` are folders in it that are not copied.
    """
    newest = list(specs_of)[-1]
    if 1 < found_in_all <= _FEW and not newest.is_given:
        yield Notice(
            Code.FEW_CHECKPOINTS,
            f"Only {found_in_all} checkpoints; if the trainer removed older ones, raise its limit"
            " (save_total_limit, save_top_k, max_history).",
        )
    if len(specs_of) > 1 and newest.unit == "save":
        yield Notice(
            Code.NO_STEPS,
            "Numbers in the names count saves, not steps (accelerate); gaps between checkpoints"
            " are unknown.",
        )
    kept: dict[str, list[str]] = {}
    for name, ruling in rulings.items():
        if ruling.made is Role.KEPT:
            kept.setdefault(specs_of[newest].tensors[name].dtype, []).append(name)
    for dtype, names in kept.items():
        message = f"{dtype} tensors are not averaged and keep the value of {newest.name}"
        yield Notice(Code.NOT_AVERAGED, f"{message}: {some(names)}.")
    yield from dict.fromkeys(note for one in specs_of.values() for note in one.notes)
    if other_models:
        message = f"Folders with other models are not copied: {some(other_models)}."
        yield Notice(Code.LEFT_OUT, message)


def _times(specs_of: Mapping[Checkpoint, Specs]) -> Iterator[Notice]:
    rows = [(checkpoint, specs.files[0].mtime_ns) for checkpoint, specs in specs_of.items()]
    for (earlier, first), (later, second) in pairwise(rows):
        if first - second > _INVERSION_NS:
            yield Notice(
                Code.OUT_OF_ORDER,
                f"{later.name} was written before {earlier.name}, though its step is later; the"
                " folder may hold two runs.",
            )
            return


def _averaged(specs_of: Mapping[Checkpoint, Specs]) -> Iterator[Notice]:
    by_name = [c.name for c in specs_of if conventions.AVERAGED_NAME.search(stem_of(c.name))]
    by_header = [
        checkpoint.name
        for checkpoint, specs in specs_of.items()
        if any(conventions.PROVENANCE_KEY in of_file for of_file in specs.metadata)
    ]
    for how, names in (("By their names", by_name), ("By their headers", by_header)):
        if names:
            message = f"{how}, {some(names, 2)} {ALREADY_AVERAGED}."
            yield Notice(Code.ALREADY_AVERAGED, message)
