"""The entries of one folder, sorted out by name: series of numbered ones, aliases, all else.

Nothing is opened but listings of folders; what the names cannot tell is for others to find out.
"""

import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles
from ckpt_ema.errors import RefusedError, printable, some
from ckpt_ema.find.globs import why_unwanted
from ckpt_ema.find.model_files import Blocked, locate
from ckpt_ema.find.names import (
    form_of,
    is_unnumbered_of,
    numbers_in,
    slots_in,
    stem_of,
    why_not_a_step,
)
from ckpt_ema.find.order import Entry
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions


@dataclass(slots=True)
class Scan:
    """The entries of one folder, sorted out by name."""

    series: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    aliases: list[Path] = field(default_factory=list)
    own_model: Path | None = None  # of the folder itself
    blocked: dict[Path, Blocked] = field(default_factory=dict)
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    without_weights: list[Path] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def scan(run: Path, selection: Selection, source: Source) -> Scan:
    """Sort out what is in a run's folder, or in the cache of the Hub for one model.

    Raises `RefusedError` if a folder cannot be listed, or holds two forms of its weights.
    """
    return (
        _scan_hub(run, selection, source)
        if is_hub_cache(run, source)
        else _scan_folder(run, selection, source)
    )


def is_hub_cache(folder: Path, source: Source) -> bool:
    """Whether it is the cache of the Hugging Face Hub for one model: revisions and snapshots."""
    return source.storage.is_folder(folder / "refs") and source.storage.is_folder(
        folder / "snapshots"
    )


def container(run: Path, selection: Selection, source: Source) -> tuple[Path, Scan] | None:
    """The one folder in `run` that holds its checkpoints, by the names that trainers give it."""
    hits: dict[Path, Scan] = {}
    for pattern in conventions.CONTAINERS:
        for folder in sorted(run.glob(pattern)):
            if folder not in hits and folder.is_dir():
                hits[folder] = scan(folder, selection, source)
    hits = {folder: found for folder, found in hits.items() if found.series or found.blocked}
    # Folders of trainer state beside those of models (prime-rl's checkpoints/ beside weights/).
    models = {folder: found for folder, found in hits.items() if _holds_models(found)}
    if len(models) == 1:
        hits = models
    if len(hits) > 1:
        names = [os.path.relpath(folder, run) for folder in hits]
        raise RefusedError(
            f"{printable(run)} contains {len(hits)} runs ({some(names)}); averaging across runs is"
            " not a trajectory.",
            "Pass one of them.",
        )
    return next(iter(hits.items()), None)


def _holds_models(found: Scan) -> bool:
    """Whether its checkpoints are model files, and not what ranks have written."""
    paths = [entry.model.path.name for members in found.series.values() for entry in members]
    return any(name != conventions.DCP_METADATA for name in paths)


def _scan_folder(run: Path, selection: Selection, source: Source) -> Scan:
    found = Scan()
    append = {os.path.basename(os.path.normpath(name)) for name in selection.append}
    names = source.storage.names(run)
    for name in sorted(names - set(conventions.FOLDER_WEIGHTS) - append):
        path = run / name
        paired = f"{stem_of(name)}.safetensors"
        if paired != name and paired in names and conventions.WEIGHTS_EXTENSION.search(name):
            found.left_out.append((path, f"{paired} has the weights"))
            continue
        kind = source.storage.kind(path)
        is_folder = kind is Kind.FOLDER
        if not (is_folder or conventions.WEIGHTS_EXTENSION.search(name) or slots_in(name)):
            found.others.append(name)
        elif unwanted := why_unwanted(name, selection.include, selection.exclude):
            if slots_in(name) or not is_folder:
                found.left_out.append((path, unwanted))
        elif selection.pattern and slots_in(name) and not re.search(selection.pattern, name):
            found.left_out.append((path, "not matched by --pattern"))
        else:
            _sort_out(path, kind, found, selection, source)
    if not found.series:
        _take_common_words(found, source)
    _tell_own_model(run, [name for name in conventions.FOLDER_WEIGHTS if name in names], found)
    return found


def _take_common_words(found: Scan, source: Source) -> None:
    """Where all names have `final` or `best` in them, it is a part of the run's name."""
    forms: dict[str, list[Entry]] = defaultdict(list)
    for path in found.aliases:
        model = locate(path, source) if slots_in(path.name) else None
        if isinstance(model, ModelFiles):
            entry = Entry(path, model)
            forms[form_of(entry.stem)].append(entry)
    found.series.update({form: members for form, members in forms.items() if len(members) > 1})
    taken = {entry.path for members in found.series.values() for entry in members}
    found.aliases = [path for path in found.aliases if path not in taken]


def _tell_own_model(run: Path, names: list[str], found: Scan) -> None:
    """A file by a usual name is the folder's own model, or the last of a series of such files."""
    for name in names:
        of_series = any(
            members[0].path.is_file() and is_unnumbered_of(stem_of(name), form)
            for form, members in found.series.items()
        )
        if of_series:
            found.aliases.append(run / name)
        elif found.own_model is None:
            found.own_model = run / name


def _sort_out(path: Path, kind: Kind, found: Scan, selection: Selection, source: Source) -> None:
    is_folder = kind is Kind.FOLDER
    name, stem = path.name, stem_of(path.name)
    numbers = numbers_in(stem)
    if kind in (Kind.ABSENT, Kind.OTHER) and (
        numbers or conventions.WEIGHTS_EXTENSION.search(name)
    ):
        found.left_out.append((path, "neither a regular file nor a folder"))
        return
    is_part = conventions.NO_CHECKPOINTS.search(name) or conventions.COMPONENT.search(name)
    if is_folder and not numbers and is_part:
        found.others.append(f"{name}/")
        return
    reason = _why_not(path, stem, is_folder, source)
    if reason and not selection.pattern:
        if numbers or not is_folder or _holds_model(path, source):
            found.left_out.append((path, reason))
        else:
            found.others.append(f"{name}/")
        return
    if is_folder and not numbers and not source.storage.can_list(path):
        found.left_out.append((path, "it cannot be listed"))
        return
    is_alias = conventions.ALIAS.search(stem) and not (selection.pattern and slots_in(stem))
    if is_alias or not (numbers or slots_in(stem)):
        if is_folder and not (is_alias or _holds_model(path, source)):
            found.others.append(f"{name}/")
        else:
            found.aliases.append(path)
        return
    model = locate(path, source)
    if isinstance(model, ModelFiles):
        entry = Entry(path, model)
        _add(found, entry)
    elif isinstance(model, Blocked):
        found.blocked[path] = model
    elif numbers:
        what = (
            f"for --component {source.reading.component}" if source.reading.component else "in it"
        )
        found.left_out.append((path, f"no model weights {what}"))
        found.without_weights.append(path)
    else:
        found.others.append(f"{name}/" if is_folder else name)


def _add(found: Scan, entry: Entry) -> None:
    """Put an entry into its series; a folder beside files of its name holds something else."""
    form = form_of(entry.stem)
    members = found.series[form]
    if members and members[0].path.is_file() != entry.path.is_file():
        folder = entry if entry.path.is_dir() else members[0]
        found.left_out.append((folder.path, "a folder beside a file of its name"))
        if folder is not entry:
            found.series[form] = [entry]
        return
    members.append(entry)


def _holds_model(path: Path, source: Source) -> bool:
    return isinstance(locate(path, source), ModelFiles)


def _why_not(path: Path, stem: str, is_folder: bool, source: Source) -> str | None:
    why = why_not_a_step(path.name, stem)
    try:
        if is_folder and source.storage.kind(path / conventions.MANIFEST_NAME) is not Kind.ABSENT:
            return "an output of ckpt-ema"
    except RefusedError:
        if why is None and numbers_in(stem):
            raise
    return why


def _scan_hub(run: Path, selection: Selection, source: Source) -> Scan:
    """The revisions in the cache of the Hugging Face Hub, by the names of their branches."""
    found = Scan()
    refs = run / "refs"
    files = [Path(root) / file for root, _, names in os.walk(refs) for file in names]
    for ref in sorted(files):
        name = os.path.relpath(ref, refs)
        commit = (source.storage.read(ref) or b"").decode("utf-8", "replace").strip()
        snapshot = run / "snapshots" / (commit if conventions.COMMIT.search(commit) else "-")
        model = locate(snapshot, source) if snapshot.is_dir() else None
        if unwanted := why_unwanted(name, selection.include, selection.exclude):
            found.left_out.append((ref, unwanted))
        elif not numbers_in(name) or (selection.pattern and not re.search(selection.pattern, name)):
            found.left_out.append((ref, "no step in the name of the revision"))
        elif isinstance(model, ModelFiles):
            found.series[form_of(name)].append(Entry(snapshot, model, name))
        elif isinstance(model, Blocked):
            found.blocked[snapshot] = model
        else:
            found.left_out.append((ref, "no snapshot with weights"))
    return found
