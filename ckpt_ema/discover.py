"""From a folder, or a list of paths, to checkpoints in training order; no tensor is read.

The folder is scanned once, its entries are put in series by the form of their names, one series is
chosen and ordered. Where two readings of a folder are possible, it stops and says which option
decides.
"""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from ckpt_ema import layouts
from ckpt_ema.aliases import resolve_aliases
from ckpt_ema.compare import same_values
from ckpt_ema.errors import RefusedError, printable, some
from ckpt_ema.formats.specs import Weights
from ckpt_ema.locate import Blocked, kind_of, locate, names_in
from ckpt_ema.names import (
    form_of,
    is_unnumbered_of,
    numbers_in,
    pattern_of,
    slots_in,
    stem_of,
    why_not_a_step,
)
from ckpt_ema.options import Options
from ckpt_ema.order import Checkpoint, Entry, Read, claims_of, ordered


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoints of a run, oldest first, and what was not taken for one and why."""

    root: Path  # the folder that the run lives in, or the one checkpoint that is all there is
    checkpoints: tuple[Checkpoint, ...]
    left_out: tuple[tuple[Path, str], ...] = ()
    warnings: tuple[str, ...] = ()
    is_list: bool = False  # given one by one, not found


def discover(paths: Sequence[Path], options: Options, read: Read) -> Found:
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
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return _in_run(paths[0], options, read)
    return _explicit(paths, options)


# --- A list -----------------------------------------------------------------------------------


def _explicit(given: Sequence[Path], options: Options) -> Found:
    checkpoints = []
    for path in given:
        if path.name in layouts.FOLDER_WEIGHTS:
            whole = locate(path.parent, options)
            if isinstance(whole, Weights) and whole.path == path:
                path = path.parent  # its name is the folder's
        weights = locate(path, options)
        if isinstance(weights, Blocked):
            raise weights.error(path)
        if weights is None:
            raise RefusedError(
                f"{printable(path)} is no checkpoint: it holds none of"
                f" {some(list(layouts.FOLDER_WEIGHTS))}."
                if path.is_dir()
                else f"{printable(path)} is no checkpoint: its extension is not one of a model's.",
                "Pass a run's folder alone, or its checkpoints one by one.",
            )
        checkpoints.append(_single(path, weights))
    seen: set[Path] = set()
    for checkpoint in checkpoints:
        real = checkpoint.path.resolve()
        if real in seen:
            raise RefusedError(
                f"{printable(checkpoint.path)} is given twice.", "Give every checkpoint once."
            )
        seen.add(real)
    root = _common_root(checkpoints)
    return Found(root, tuple(checkpoints), (), _text_order(checkpoints), is_list=True)


def _single(path: Path, weights: Weights) -> Checkpoint:
    """A checkpoint whose step is what its name says, if it says one."""
    numbers = numbers_in(Entry(path, weights).stem)
    unit, step = next(iter(numbers.items()), ("step", None))
    return Checkpoint(path, step, weights, unit)


def _text_order(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """A warning for a list that looks as if a shell had sorted it as text."""
    for earlier, later in pairwise(checkpoints):
        if None not in (earlier.step, later.step) and (earlier.step or 0) > (later.step or 0):
            return (
                f"The list is kept in the order given, in which {printable(earlier.path.name)}"
                f" comes before {printable(later.path.name)}: a shell sorts names as text."
                " Pass the run's folder to have it ordered by number.",
            )
    return ()


def _common_root(checkpoints: Sequence[Checkpoint]) -> Path:
    if len(checkpoints) == 1 and checkpoints[0].step is None:
        return checkpoints[0].path
    parents = {Path(os.path.abspath(checkpoint.path)).parent for checkpoint in checkpoints}
    if len(parents) == 1:
        return checkpoints[0].path.parent
    return Path(os.path.commonpath(parents))


# --- A folder ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Scan:
    """The entries of one folder, sorted out by name."""

    series: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    aliases: list[Path] = field(default_factory=list)
    blocked: dict[Path, Blocked] = field(default_factory=dict)
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    without_weights: list[Path] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def _in_run(run: Path, options: Options, read: Read) -> Found:
    if run.name == "snapshots" and _is_hub_cache(run.parent):
        run = run.parent  # revisions have their names there
    scan = _scan_hub(run, options) if _is_hub_cache(run) else _scan_folder(run, options)
    own = None
    if not scan.series or _are_stray_files(scan.series):
        container = None if scan.series or scan.blocked else _container(run, options)
        if container:
            found = _in_run(container, options, read)
            return Found(run, found.checkpoints, found.left_out, found.warnings)
        if options.pattern and not scan.series and not scan.blocked:
            raise RefusedError(
                f"{printable(run)} holds no checkpoint that matches --pattern"
                f" {printable(options.pattern)}; its names are {some(sorted(names_in(run)))}."
            )
        own = None if _is_run_of_others(run, scan) else locate(run, options)
        if isinstance(own, Weights) and not (scan.series and own.path in _paths(scan)):
            alone = _single(run, own)
            return Found(_common_root([alone]), (alone,))
    if not scan.series:
        for path, blocked in scan.blocked.items():
            raise blocked.error(path)
        if isinstance(own, Blocked):
            raise own.error(run)
        raise RefusedError(
            _nothing_found(run, scan),
            "If the weights are deeper, pass that folder, or choose names with --pattern.",
        )
    entries = _one_series(run, scan, options, read)
    forms = {form_of(entry.stem) for entry in entries}
    _check_blocked(scan, forms, options)
    members = ordered(_without_copies(entries, options, scan.left_out), options, read)
    aliases = _candidates_for_alias(scan, forms)
    checkpoints, said = resolve_aliases([*members], aliases, options, read, scan.left_out)
    checkpoints += [_appended(run / name, members, options) for name in options.append]
    unfinished = [path for path in scan.without_weights if form_of(path.name) in forms]
    own_model = [name for name in layouts.FOLDER_WEIGHTS if name in names_in(run)]
    if own_model:
        scan.left_out = [(path, why) for path, why in scan.left_out if not _is_shard(path, run)]
        scan.left_out.append((run / own_model[0], "the run's own model, not a step"))
    warnings = [
        f"{printable(path)} holds no model: an unfinished save? It is left out."
        for path in unfinished
    ]
    return Found(run, tuple(checkpoints), tuple(scan.left_out), (*warnings, *said))


def _is_shard(path: Path, run: Path) -> bool:
    """Whether a path is a part of the run's own model, which need not be said."""
    return path.parent == run and bool(layouts.SHARD_NUMBER.search(path.name))


def _is_run_of_others(run: Path, scan: _Scan) -> bool:
    """Whether a folder is a run whose checkpoints cannot be read, so that its model is no step."""
    return bool(scan.blocked or scan.without_weights) and not numbers_in(run.name)


def _paths(scan: _Scan) -> set[Path]:
    return {entry.weights.path for members in scan.series.values() for entry in members}


def _are_stray_files(series: dict[str, list[Entry]]) -> bool:
    """A lone numbered file beside a model (`value_head_1.pt`) does not make a run of its folder."""
    return all(len(members) == 1 and members[0].path.is_file() for members in series.values())


def _container(run: Path, options: Options) -> Path | None:
    """The one folder in `run` that holds its checkpoints, by the names that trainers give it."""
    hits = []
    for pattern in layouts.CONTAINERS:
        for folder in sorted(run.glob(pattern)):
            if folder not in hits and folder.is_dir() and _holds_checkpoints(folder, options):
                hits.append(folder)
    # Folders of trainer state beside those of models (prime-rl's checkpoints/ beside weights/).
    models = [folder for folder in hits if _holds_models(folder, options)]
    if len(models) == 1:
        return models[0]
    if len(hits) > 1:
        names = [os.path.relpath(folder, run) for folder in hits]
        raise RefusedError(
            f"{printable(run)} contains {len(hits)} runs ({some(names)}); averaging across runs is"
            " not a trajectory.",
            "Pass one of them.",
        )
    return hits[0] if hits else None


def _holds_checkpoints(folder: Path, options: Options) -> bool:
    scan = _scan_folder(folder, options)
    return bool(scan.series or scan.blocked)


def _holds_models(folder: Path, options: Options) -> bool:
    """Whether its checkpoints are model files, and not what ranks have written."""
    series = _scan_folder(folder, options).series
    paths = [entry.weights.path.name for members in series.values() for entry in members]
    return any(name != layouts.DCP_METADATA for name in paths)


def _scan_folder(run: Path, options: Options) -> _Scan:
    scan = _Scan()
    append = {os.path.normpath(name) for name in options.append}
    names = names_in(run)
    for name in sorted(names - set(layouts.FOLDER_WEIGHTS) - append):
        path = run / name
        paired = f"{stem_of(name)}.safetensors"
        if paired != name and paired in names and layouts.WEIGHTS_EXTENSION.search(name):
            scan.left_out.append((path, f"{paired} has the weights"))
            continue
        kind = kind_of(path)
        is_folder = kind == "folder"
        if not (is_folder or layouts.WEIGHTS_EXTENSION.search(name) or slots_in(name)):
            scan.others.append(name)
        elif options.pattern and slots_in(name) and not re.search(options.pattern, name):
            scan.left_out.append((path, "not matched by --pattern"))
        else:
            _sort_out(path, kind, scan, options)
    return scan


def _sort_out(path: Path, kind: str | None, scan: _Scan, options: Options) -> None:
    is_folder = kind == "folder"
    name, stem = path.name, stem_of(path.name)
    numbers = numbers_in(stem)
    if kind is None and (numbers or layouts.WEIGHTS_EXTENSION.search(name)):
        scan.left_out.append((path, "neither a regular file nor a folder"))
        return
    is_part = layouts.NO_CHECKPOINTS.search(name) or layouts.COMPONENT.search(name)
    if is_folder and not numbers and is_part:
        scan.others.append(f"{name}/")
        return
    reason = _why_not(path, stem, is_folder)
    if reason and not options.pattern:
        if numbers or not is_folder or _holds_model(path, options):
            scan.left_out.append((path, reason))
        else:
            scan.others.append(f"{name}/")
        return
    is_alias = bool(layouts.ALIAS.search(stem))
    if is_alias or not (numbers or slots_in(stem)):
        if is_folder and not (is_alias or _holds_model(path, options)):
            scan.others.append(f"{name}/")
        else:
            scan.aliases.append(path)
        return
    weights = locate(path, options)
    if isinstance(weights, Weights):
        entry = Entry(path, weights)
        scan.series[form_of(entry.stem)].append(entry)
    elif isinstance(weights, Blocked):
        scan.blocked[path] = weights
    elif numbers:
        scan.left_out.append((path, "no model weights in it"))
        scan.without_weights.append(path)
    else:
        scan.others.append(f"{name}/" if is_folder else name)


def _holds_model(path: Path, options: Options) -> bool:
    return isinstance(locate(path, options), Weights)


def _why_not(path: Path, stem: str, is_folder: bool) -> str | None:
    if is_folder and os.path.lexists(os.path.join(path, layouts.MANIFEST_NAME)):
        return "an output of ckpt-ema"
    return why_not_a_step(path.name, stem)


def _is_hub_cache(run: Path) -> bool:
    return os.path.isdir(run / "refs") and os.path.isdir(run / "snapshots")


def _scan_hub(run: Path, options: Options) -> _Scan:
    """The revisions in the cache of the Hugging Face Hub, by the names of their branches."""
    scan = _Scan()
    for name in sorted(names_in(run / "refs")):
        ref = run / "refs" / name
        snapshot = run / "snapshots" / ref.read_text(errors="replace").strip()[:64]
        weights = locate(snapshot, options) if snapshot.is_dir() else None
        if not numbers_in(name) or (options.pattern and not re.search(options.pattern, name)):
            scan.left_out.append((ref, "no step in the name of the revision"))
        elif isinstance(weights, Weights):
            scan.series[form_of(name)].append(Entry(snapshot, weights, name))
        elif isinstance(weights, Blocked):
            scan.blocked[snapshot] = weights
        else:
            scan.left_out.append((ref, "no snapshot with weights"))
    return scan


def _one_series(run: Path, scan: _Scan, options: Options, read: Read) -> list[Entry]:
    """The entries of the one series that the run is."""
    series = dict(scan.series)
    if len(series) == 1:
        return next(iter(series.values()))
    everything = [entry for members in series.values() for entry in members]
    pattern = re.compile(options.pattern or "")
    if pattern.groups:
        return everything
    if options.order != "name" and all(
        "step" in claims_of(entry, read, inside=False) for entry in everything
    ):
        return _merged(everything, read, scan.left_out)
    several = {form: members for form, members in series.items() if len(members) > 1} or series
    for form, members in series.items():
        if form not in several:
            scan.left_out += [(entry.path, "the only one of its name") for entry in members]
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


def _merged(entries: Sequence[Entry], read: Read, left_out: list[tuple[Path, str]]) -> list[Entry]:
    """Several series that tell their steps inside are one; of one step, one entry stays."""
    first: dict[int, Entry] = {}
    for entry in entries:
        step = claims_of(entry, read, inside=False)["step"]
        if step in first:
            left_out.append((entry.path, f"the same step as {first[step].label}"))
        else:
            first[step] = entry
    return list(first.values())


def _without_copies(
    entries: Sequence[Entry], options: Options, left_out: list[tuple[Path, str]]
) -> list[Entry]:
    """The entries without second names of one file or folder."""
    unique: dict[object, Entry] = {}
    kept = []
    # Links come after what they point to, so that the real folder is the one that stays.
    for entry in sorted(entries, key=lambda entry: (entry.path.is_symlink(), entry.path.name)):
        # An index may well be shared by different checkpoints; weights may not.
        file = os.path.join(entry.weights.folder, entry.weights.parts[0].name)
        is_index = file.endswith(layouts.INDEX_SUFFIX)
        of_its_own = not is_index and os.path.exists(file)
        status = os.stat(file if of_its_own else entry.path)
        first = unique.setdefault((status.st_dev, status.st_ino), entry)
        is_revision = entry.label != entry.path.name  # whose files are links to shared blobs
        if first is not entry and is_revision and not options.allow_duplicates:
            raise same_values(first.label, entry.label)
        if first is entry or is_revision:
            kept.append(entry)
        else:
            left_out.append((entry.path, f"the same file as {first.path.name}"))
    return kept


def _candidates_for_alias(scan: _Scan, forms: set[str]) -> list[Path]:
    """The names without a number that may belong to names of these forms; others are left out."""
    candidates = []
    for path in scan.aliases:
        stem = stem_of(path.name)
        if layouts.ALIAS.search(stem) or any(is_unnumbered_of(stem, form) for form in forms):
            candidates.append(path)
        else:
            scan.left_out.append((path, "no number in its name"))
    return candidates


def _check_blocked(scan: _Scan, forms: set[str], options: Options) -> None:
    """Refuse steps of the series in a form that is not read; those of other names are left out."""
    for path, blocked in scan.blocked.items():
        if form_of(stem_of(path.name)) in forms and not options.skip_incomplete:
            raise RefusedError(
                f"{printable(path)} is {blocked.what}, while other steps of the run can be read.",
                f"{blocked.instead} Or leave such steps out with --skip-incomplete.",
            )
        scan.left_out.append((path, blocked.what))


def _appended(path: Path, members: Sequence[Checkpoint], options: Options) -> Checkpoint:
    if not os.path.exists(path):
        raise RefusedError(f"--append {printable(path.name)}: {printable(path)} does not exist.")
    for member in members:
        if os.path.samefile(path, member.path):
            raise RefusedError(
                f"--append {printable(path.name)}: it is {printable(member.name)} by another name."
            )
    weights = locate(path, options)
    if isinstance(weights, Blocked):
        raise weights.error(path)
    if weights is None:
        raise RefusedError(f"--append {printable(path.name)}: it holds no model weights.")
    return Checkpoint(path, None, weights)


def _nothing_found(run: Path, scan: _Scan) -> str:
    message = (
        f"No checkpoints found in {printable(run)}; looked for numbered folders or files with"
        " model weights (checkpoint-500, step_100, epoch=1-step=100.ckpt, ...)"
    )
    seen = [f"{path.name} ({reason})" for path, reason in scan.left_out]
    seen += [path.name for path in scan.aliases]
    if seen:
        return f"{message} and left out {some(seen)}."
    if scan.others:
        return (
            f"{message} and found {len(scan.others)} entries, none with model weights:"
            f" {some(scan.others)}."
        )
    return f"{message}; the folder is empty."
