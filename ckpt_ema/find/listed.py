"""Checkpoints that a person listed: taken in the order given, with only sanity checks."""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles
from ckpt_ema.errors import OptionError, RefusedError, flag, printable, some
from ckpt_ema.find.found import Found
from ckpt_ema.find.globs import all_unwanted, unmatched, why_unwanted
from ckpt_ema.find.model_files import Blocked, locate
from ckpt_ema.find.names import numbers_in
from ckpt_ema.find.order import Checkpoint, Entry, named_keys
from ckpt_ema.options import Selection
from ckpt_ema.trainers import conventions


def listed(given: Sequence[Path], selection: Selection, source: Source) -> Found:
    """The checkpoints at these paths, in this order.

    Raises `RefusedError` for what is no checkpoint and for one that is given twice.
    """
    for name in ("pattern", "append", "order", "aliases"):
        if getattr(selection, name) != getattr(Selection(), name):
            raise OptionError(f"{flag(name)} goes with a run's folder, not with a list.")
    everything = [_entry(path, source) for path in given]
    labels = _labels([entry.path for entry in everything])
    everything = [replace(e, label=label) for e, label in zip(everything, labels, strict=True)]
    names = [entry.label for entry in everything]
    reasons = [why_unwanted(name, selection.include, selection.exclude) for name in names]
    entries = [entry for entry, why in zip(everything, reasons, strict=True) if why is None]
    left_out = [(e.path, why) for e, why in zip(everything, reasons, strict=True) if why]
    warnings = unmatched(names, selection)
    if not entries:
        raise all_unwanted(names)
    _check_different(entries)
    unit, keys = named_keys(entries, source) or ("", [])
    checkpoints = tuple(
        Checkpoint(entry.path, key, entry.model, unit, entry.label, is_given=True)
        if unit
        else replace(single(entry.path, entry.model), name=entry.label, is_given=True)
        for entry, key in zip_longest(entries, keys)
    )
    warnings += _text_order(checkpoints)
    return Found(common_root(checkpoints), checkpoints, tuple(left_out), tuple(warnings))


def _check_different(entries: Sequence[Entry]) -> None:
    seen: set[Path] = set()
    for entry in entries:
        real = entry.path.resolve()
        if real in seen:
            raise RefusedError(
                f"{printable(entry.path)} is given twice.", "Give every checkpoint once."
            )
        seen.add(real)


def _entry(path: Path, source: Source) -> Entry:
    """A checkpoint that was given by its path."""
    if path.name in conventions.FOLDER_WEIGHTS:
        whole = locate(path.parent, source)
        if isinstance(whole, ModelFiles) and whole.path == path:
            path = path.parent  # its name is the folder's
    elif conventions.SHARD_NUMBER.search(path.name):
        raise RefusedError(
            f"{printable(path)} is one shard of a model.",
            "Pass its folder, or the index of shards.",
        )
    model = locate(path, source)
    if isinstance(model, Blocked):
        raise model.error(path)
    if model is None and source.reading.component:
        raise RefusedError(
            f"{printable(path)} holds no model weights for --component"
            f" {printable(source.reading.component)}.",
            "Inside one torch file, --key chooses.",
        )
    if model is None:
        raise RefusedError(
            f"{printable(path)} is no checkpoint: it holds none of"
            f" {some(list(conventions.FOLDER_WEIGHTS))}."
            if path.is_dir()
            else f"{printable(path)} is no checkpoint: its extension is not one of a model's.",
            "Pass a run's folder alone, or its checkpoints one by one.",
        )
    return Entry(path, model)


def _labels(paths: Sequence[Path]) -> list[str]:
    """What to call each path: its name, or the first part of it that differs where names do not."""
    if len({path.name for path in paths}) == len(paths):
        return ["" for _ in paths]
    columns = zip(*(Path(os.path.abspath(path)).parts for path in paths), strict=False)
    differing = next((column for column in columns if len(set(column)) == len(paths)), None)
    return list(differing) if differing else [str(path) for path in paths]


def single(path: Path, model: ModelFiles) -> Checkpoint:
    """A checkpoint whose step is what its name says, if it says one."""
    unit, step = next(iter(numbers_in(Entry(path, model).stem).items()), ("step", None))
    return Checkpoint(path, step, model, unit)


def _text_order(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """A warning for a list that looks as if a shell had sorted it as text."""
    for earlier, later in pairwise(checkpoints):
        if None not in (earlier.step, later.step) and (earlier.step or 0) > (later.step or 0):
            return [
                f"The list is kept in the order given, in which {printable(earlier.name)}"
                f" comes before {printable(later.name)}: a shell sorts names as text."
                " Pass the run's folder to have it ordered by number."
            ]
    return []


def common_root(checkpoints: Sequence[Checkpoint]) -> Path:
    """The folder that the checkpoints share; one without a number is its own root."""
    if len(checkpoints) == 1 and checkpoints[0].step is None:
        return checkpoints[0].path
    parents = {Path(os.path.abspath(checkpoint.path)).parent for checkpoint in checkpoints}
    if len(parents) == 1:
        return checkpoints[0].path.parent
    return Path(os.path.commonpath(parents))
