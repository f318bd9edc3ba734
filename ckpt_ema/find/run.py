"""From a folder, or a list of paths, to checkpoints in training order; no tensor is read.

The folder is scanned once, its entries are put in series by the form of their names, one series is
chosen and ordered. Where two readings of a folder are possible, it stops and says which option
decides.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles
from ckpt_ema.errors import OptionError, RefusedError, printable, some
from ckpt_ema.find.aliases import resolve_aliases
from ckpt_ema.find.entries import Scan, container, is_hub_cache, scan
from ckpt_ema.find.found import Found
from ckpt_ema.find.globs import UNWANTED, all_unwanted, matches, unmatched
from ckpt_ema.find.listed import common_root, listed, single
from ckpt_ema.find.model_files import Blocked, locate
from ckpt_ema.find.names import form_of, is_unnumbered_of, numbers_in, stem_of
from ckpt_ema.find.order import STEP_UNITS, Checkpoint, ordered
from ckpt_ema.find.series import (
    ONLY_ONE,
    one_series,
    without_averages,
    without_copies,
)
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions


def discover(paths: Sequence[Path], selection: Selection, source: Source) -> Found:
    """Find the checkpoints in one folder, or take the given folders and files in their order.

    `read` gives the specs of a checkpoint; only what must be opened to be put in order is.
    Raises `RefusedError` if a path does not exist, if nothing is found, if it is in a form that is
    not read, or if the folder can be read in two ways.
    """
    for path in paths:
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise RefusedError(f"{printable(path)} does not exist.", "Check the path.") from error
        except OSError as error:
            raise RefusedError(f"{printable(path)} is out of reach: {error.strerror}.") from error
    if len(paths) == 1 and source.storage.is_folder(paths[0]):
        return _in_run(paths[0], selection, source)
    return listed(paths, selection, source)


def _in_run(
    run: Path,
    selection: Selection,
    source: Source,
    *,
    given: Path | None = None,
    scanned: Scan | None = None,
) -> Found:
    """The checkpoints in a folder; `given` is the folder that a person gave, if it is above."""
    if run.name == "snapshots" and is_hub_cache(run.parent, source):
        run = run.parent  # revisions have their names there
    scanned = scanned or scan(run, selection, source)
    if not scanned.series or _are_stray_files(scanned):
        inner = None if scanned.blocked else container(run, selection, source)
        if inner:
            folder, inside = inner
            found = _in_run(folder, selection, source, given=run, scanned=inside)
            return replace(found, root=run, warnings=(*found.warnings, *_above(run, scanned)))
        alone = _alone(run, scanned, selection, source)
        if alone:
            return Found(common_root([alone]), (alone,), tuple(scanned.left_out))
    pattern_warnings = unmatched(_names_seen(run, scanned, source), selection)
    entries = without_averages(
        one_series(run, scanned, selection, source), source, scanned.left_out
    )
    if not entries:
        raise RefusedError(_nothing_found(run, scanned))
    forms = {form_of(entry.stem) for entry in entries}
    _check_blocked(scanned, forms, source.storage.is_folder(entries[0].path), selection, source)
    members = ordered(without_copies(entries, source, scanned.left_out), selection, source)
    aliases = _candidates_for_alias(scanned, forms)
    checkpoints, remarks = resolve_aliases(members, aliases, selection, source, scanned.left_out)
    for name in selection.append:
        places = [run / name, (given or run) / name, Path(name)]
        path = next(
            (place for place in places if source.storage.kind(place) is not Kind.ABSENT), run / name
        )
        checkpoints.append(_appended(path, checkpoints, selection, source))
    folders = source.storage.is_folder(members[-1].path)
    unfinished = [
        path for path in scanned.without_weights if folders and form_of(path.name) in forms
    ]
    warnings = [
        f"{printable(path)} holds no model: an unfinished save? It is left out."
        for path in unfinished
    ]
    left_out = _with_own_model(run, scanned)
    warnings += _later_ones_left_out(members[-1], left_out)
    warnings += [
        f"--append {printable(appended.name)} puts it after {printable(members[-1].name)}, though"
        " its name has a number of its own."
        for appended in checkpoints[len(checkpoints) - len(selection.append) :]
        if form_of(stem_of(appended.name)) in forms
    ]
    return Found(run, tuple(checkpoints), tuple(left_out), (*pattern_warnings, *warnings, *remarks))


def _names_seen(run: Path, scanned: Scan, source: Source) -> set[str]:
    """What a pattern of names can mean: the entries of a folder, the revisions of a cache."""
    labels = {entry.label for members in scanned.series.values() for entry in members}
    return source.storage.names(run) | labels | {path.name for path, _ in scanned.left_out}


def _later_ones_left_out(newest: Checkpoint, left_out: list[tuple[Path, str]]) -> list[str]:
    """A warning if what is left out seems to be a later step than the newest."""
    for path, why in left_out:
        numbers = numbers_in(stem_of(path.name))
        units = STEP_UNITS if newest.unit in STEP_UNITS else (newest.unit,)
        later = any(numbers.get(unit, 0) > (newest.step or 0) for unit in units)
        if why == ONLY_ONE and later:
            return [
                f"{printable(path.name)} seems to come after {printable(newest.name)}, and is left"
                " out since its name is not like the others'; --pattern can take it in."
            ]
    return []


def _above(run: Path, scanned: Scan) -> list[str]:
    """A warning of models beside the folder of checkpoints, which are not looked into."""
    names = [path.name for path in scanned.aliases if conventions.ALIAS.search(stem_of(path.name))]
    if not names:
        return []
    return [
        f"{printable(run)} also holds {some(names)}, outside its folder of checkpoints; if that is"
        f" a later step, add it with --append {printable(names[0])}."
    ]


def _alone(run: Path, scanned: Scan, selection: Selection, source: Source) -> Checkpoint | None:
    """The one checkpoint that the folder itself is; None if there is a series in it after all.

    Raises `RefusedError` if there is neither.
    """
    if selection.pattern and not scanned.series and not scanned.blocked:
        names = some(sorted(source.storage.names(run)))
        raise RefusedError(
            f"{printable(run)} holds no checkpoint that matches --pattern"
            f" {printable(selection.pattern)}; its names are {names}."
        )
    unwanted = [p.name for p, why in scanned.left_out if why in UNWANTED]
    if unwanted and not scanned.series:
        unmatched(_names_seen(run, scanned, source), selection)
        raise all_unwanted(unwanted)
    # What lies deeper than a checkpoint's own folders may belong to several runs.
    own = None if _is_run_of_others(run, scanned) else locate(run, source, depth=1)
    if isinstance(own, ModelFiles) and not (scanned.series and own.path in _paths(scanned)):
        return single(run, own)
    if scanned.series:
        return None
    for path, blocked in scanned.blocked.items():
        raise blocked.error(path)
    if isinstance(own, Blocked):
        raise own.error(run)
    raise RefusedError(
        _nothing_found(run, scanned),
        "If the weights are deeper, pass that folder, or choose names with --pattern.",
    )


def _with_own_model(run: Path, scanned: Scan) -> list[tuple[Path, str]]:
    """What is left out, with the run's own model said once, however many shards it has."""
    if scanned.own_model is None:
        return scanned.left_out
    others = [(path, why) for path, why in scanned.left_out if not _is_shard(path, run)]
    return [*others, (scanned.own_model, "the run's own model, not a step")]


def _is_shard(path: Path, run: Path) -> bool:
    """Whether a path is a part of the run's own model, which need not be said."""
    return path.parent == run and bool(conventions.SHARD_NUMBER.search(path.name))


def _is_run_of_others(run: Path, scanned: Scan) -> bool:
    """Whether a folder is a run whose checkpoints cannot be read, so that its model is no step."""
    return bool(scanned.blocked or scanned.without_weights) and not numbers_in(run.name)


def _paths(scanned: Scan) -> set[Path]:
    return {entry.model.path for members in scanned.series.values() for entry in members}


def _are_stray_files(scanned: Scan) -> bool:
    """A lone numbered file beside a model (`value_head_1.pt`) does not make a run of its folder."""
    last_ones = [
        path
        for path in scanned.aliases
        if any(is_unnumbered_of(stem_of(path.name), form) for form in scanned.series)
    ]
    return not last_ones and all(
        len(members) == 1 and members[0].path.is_file() for members in scanned.series.values()
    )


def _candidates_for_alias(scanned: Scan, forms: set[str]) -> list[Path]:
    """The names without a number that may belong to names of these forms; others are left out."""
    averages = []
    for path in scanned.aliases:
        stem = stem_of(path.name)
        if conventions.ALIAS.search(stem) or any(is_unnumbered_of(stem, form) for form in forms):
            averages.append(path)
        else:
            scanned.left_out.append((path, "no number in its name"))
    return averages


def _check_blocked(
    scanned: Scan, forms: set[str], is_folder: bool, selection: Selection, source: Source
) -> None:
    """Refuse steps of the series in a form that is not read; those of other names are left out."""
    for path, blocked in scanned.blocked.items():
        same_kind = source.storage.is_folder(path) == is_folder
        if same_kind and form_of(stem_of(path.name)) in forms and not selection.skip_incomplete:
            raise RefusedError(
                f"{printable(path)} is {blocked.what}, while other steps of the run can be read.",
                f"{blocked.instead} Or leave such steps out with --skip-incomplete.",
            )
        scanned.left_out.append((path, blocked.what))


def _appended(
    path: Path, members: Sequence[Checkpoint], selection: Selection, source: Source
) -> Checkpoint:
    if any(matches(path.name, pattern) for pattern in selection.exclude):
        raise OptionError(f"--append {printable(path.name)} is also left out by --exclude.")
    if source.storage.kind(path) is Kind.ABSENT:
        raise RefusedError(f"--append {printable(path.name)}: {printable(path)} does not exist.")
    for member in members:
        if os.path.samefile(path, member.path):
            raise RefusedError(
                f"--append {printable(path.name)}: it is {printable(member.name)}, which is there"
                " already."
            )
    model = locate(path, source)
    if isinstance(model, Blocked):
        raise model.error(path)
    if model is None:
        raise RefusedError(f"--append {printable(path.name)}: it holds no model weights.")
    return Checkpoint(path, None, model, members[-1].unit, is_given=True)


def _nothing_found(run: Path, scanned: Scan) -> str:
    message = (
        f"No checkpoints found in {printable(run)}; looked for numbered folders or files with"
        " model weights (checkpoint-500, step_100, epoch=1-step=100.ckpt, ...)"
    )
    seen = [f"{path.name} ({reason})" for path, reason in scanned.left_out]
    seen += [path.name for path in scanned.aliases]
    if seen:
        return f"{message} and left out {some(seen)}."
    if scanned.others:
        return (
            f"{message} and found {len(scanned.others)} entries, none with model weights:"
            f" {some(scanned.others)}."
        )
    return f"{message}; the folder is empty."
