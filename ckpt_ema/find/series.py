"""Which of a folder's series is the run: one of them, or several that tell their steps inside."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ckpt_ema.containers.compare import same_values
from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import is_safetensors
from ckpt_ema.errors import IncompleteError, RefusedError, printable
from ckpt_ema.find.entries import Scan
from ckpt_ema.find.names import bare_of, is_unnumbered_of, pattern_of
from ckpt_ema.find.order import Entry, recorded_of
from ckpt_ema.options import Selection
from ckpt_ema.trainers import conventions

ONLY_ONE = "the only one of its name"


def one_series(run: Path, scan: Scan, selection: Selection, source: Source) -> list[Entry]:
    """The entries of the one series that the run is."""
    series = dict(scan.series)
    if len(series) == 1:
        return next(iter(series.values()))
    everything = [entry for members in series.values() for entry in members]
    pattern = re.compile(selection.pattern or "")
    if pattern.groups:
        return everything
    one_name = len({bare_of(form) for form in series}) == 1
    if (
        one_name
        and selection.order != "name"
        and all("step" in recorded_of(entry, source, inside=False) for entry in everything)
    ):
        return _merged(everything, source, scan.left_out)
    several = {form: members for form, members in series.items() if len(members) > 1} or series
    for form, members in series.items():
        if form in several:
            continue
        for entry in members:
            # "resnet50.pt" beside "resnet50_epoch_1.pt": its number is part of the model's name.
            if entry.path.is_file() and any(is_unnumbered_of(entry.stem, f) for f in several):
                scan.aliases.append(entry.path)
            else:
                scan.left_out.append((entry.path, ONLY_ONE))
    if len(several) > 1:
        forms = [f"{len(members)} × {form}" for form, members in several.items()]
        patterns = [
            f"--pattern '{pattern_of(form, members[0].label)}'" for form, members in several.items()
        ]
        raise RefusedError(
            f"{printable(run)} holds {len(several)} sets of checkpoints: {' and '.join(forms)};"
            " they may be the same moments saved twice.",
            f"Choose one: {' or '.join(patterns)}.",
        )
    return next(iter(several.values()))


def _merged(
    entries: Sequence[Entry], source: Source, left_out: list[tuple[Path, str]]
) -> list[Entry]:
    """Several series that tell their steps inside are one; of one step, one entry stays."""
    first: dict[int, Entry] = {}
    for entry in entries:
        step = recorded_of(entry, source, inside=False)["step"]
        if step in first:
            left_out.append((entry.path, f"the same step as {first[step].label}"))
        else:
            first[step] = entry
    return list(first.values())


def _identity(entry: Entry) -> object:
    """Equal for two names of one checkpoint: of all its files, or of its folder.

    Lists of shards or chunks may well be shared by different checkpoints, and so may a part.
    """
    files = [os.path.join(entry.model.folder, part.name) for part in entry.model.members]
    is_list = any(f.endswith((conventions.INDEX_SUFFIX, conventions.DCP_METADATA)) for f in files)
    if is_list or not all(map(os.path.exists, files)):
        files = [os.fspath(entry.path)]
    return tuple((status.st_dev, status.st_ino) for status in map(os.stat, files))


def without_averages(
    entries: Sequence[Entry], source: Source, left_out: list[tuple[Path, str]]
) -> list[Entry]:
    """The entries without files that we wrote; folders of ours are never entries."""
    kept = []
    for entry in entries:
        if is_safetensors(entry.path.name) and entry.path.is_file() and _is_ours(entry, source):
            left_out.append((entry.path, "an average that ckpt-ema made"))
        else:
            kept.append(entry)
    return kept


def _is_ours(entry: Entry, source: Source) -> bool:
    try:
        return any(
            conventions.PROVENANCE_KEY in of_file for of_file in source.read(entry.model).metadata
        )
    except IncompleteError:  # which is for others to tell
        return False


def without_copies(
    entries: Sequence[Entry], source: Source, left_out: list[tuple[Path, str]]
) -> list[Entry]:
    """The entries without second names of one file or folder."""
    unique: dict[object, Entry] = {}
    kept = []
    # Links come after what they point to, so that the real folder is the one that stays.
    for entry in sorted(entries, key=lambda entry: (entry.path.is_symlink(), entry.path.name)):
        first = unique.setdefault(_identity(entry), entry)
        is_revision = entry.label != entry.path.name  # whose files are links to shared blobs
        if first is not entry and is_revision and not source.reading.allow_duplicates:
            raise same_values(first.label, entry.label)
        if first is entry or is_revision:
            kept.append(entry)
        else:
            left_out.append((entry.path, f"the same file as {first.path.name}"))
    return kept
