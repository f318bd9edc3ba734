"""From a folder, or a list of paths, to checkpoints in training order; no tensor is read.

Order comes from the numbers that the trainer wrote into the names, compared as integers; never
from text order or modification times. Where two readings of a folder are possible, it stops.
"""

import os
import re
import stat
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from ckpt_ema import layouts
from ckpt_ema.errors import RefusedError, printable, some


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved state of the model: a folder, or a file that holds the model by itself."""

    path: Path
    step: int | None  # the number in its name, in whatever unit the trainer counts
    weights: Path  # the file from which its tensors are found: a weights file or an index

    @property
    def folder(self) -> Path:
        """The folder that the names in an index are relative to."""
        return self.weights.parent


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoints of a run, oldest first, and what was not taken for one and why."""

    checkpoints: tuple[Checkpoint, ...]
    left_out: tuple[tuple[Path, str], ...] = ()
    warnings: tuple[str, ...] = ()


def discover(paths: Sequence[str | os.PathLike[str]]) -> Found:
    """Find the checkpoints in one folder, or take the given folders and files in their order.

    Raises `RefusedError` if a path does not exist, if nothing is found, or if the folder can be
    read in two ways (two series of names, one step twice).
    """
    given = [Path(path) for path in paths]
    for path in given:
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise RefusedError(f"{printable(path)} does not exist.", "Check the path.") from error
        except OSError as error:
            raise RefusedError(f"{printable(path)} is out of reach: {error.strerror}.") from error
    if len(given) == 1 and os.path.isdir(given[0]):
        return _discover_run(given[0])
    return _explicit(given)


def _explicit(given: list[Path]) -> Found:
    checkpoints = []
    for path in given:
        if path.name in layouts.FOLDER_WEIGHTS and _weights_of(path.parent) == path:
            path = path.parent  # its name is the folder's
        weights = _weights_of(path)
        if weights is None:
            raise RefusedError(
                f"{printable(path)} is no checkpoint: it holds none of"
                f" {', '.join(layouts.FOLDER_WEIGHTS)}."
                if path.is_dir()
                else f"{printable(path)} is no checkpoint: its extension is not one of a model's.",
                "Pass a run's folder alone, or its checkpoints one by one.",
            )
        number = _number_in(_stem(path.name))
        checkpoints.append(Checkpoint(path, number and number[1], weights))
    seen: set[Path] = set()
    for checkpoint in checkpoints:
        real = checkpoint.path.resolve()
        if real in seen:
            raise RefusedError(
                f"{printable(checkpoint.path)} is given twice.", "Give every checkpoint once."
            )
        seen.add(real)
    steps = [checkpoint.step for checkpoint in checkpoints if checkpoint.step is not None]
    warnings = []
    for earlier, later in pairwise(checkpoints):
        if len(steps) == len(checkpoints) and (earlier.step or 0) > (later.step or 0):
            warnings.append(
                f"The list is kept in the order given, in which {printable(earlier.path.name)}"
                f" comes before {printable(later.path.name)}: a shell sorts names as text."
                " Pass the run's folder to have it ordered by number."
            )
            break
    return Found(tuple(checkpoints), (), tuple(warnings))


@dataclass(slots=True)
class _Candidates:
    """Numbered entries of one folder, grouped by the form of their names."""

    series: dict[str, list[Checkpoint]] = field(default_factory=lambda: defaultdict(list))
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    without_weights: list[Path] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def _discover_run(run: Path) -> Found:
    candidates = _scan(run)
    own = _weights_of(run)
    series = dict(candidates.series)
    if own is not None and (not series or _are_stray_files(series)):
        number = _number_in(run.name)
        return Found((Checkpoint(run, number and number[1], own),))
    if len(series) > 1:
        series = {form: members for form, members in series.items() if len(members) > 1} or series
        for form, members in candidates.series.items():
            if form not in series:
                candidates.left_out += [(m.path, "the only one of its name") for m in members]
    if len(series) > 1:
        raise RefusedError(
            f"{printable(run)} holds {len(series)} sets of checkpoints:"
            f" {' and '.join(f'{len(members)} x {form}' for form, members in series.items())};"
            " they may be the same moments saved twice.",
            "Pass the checkpoints of one set, oldest first.",
        )
    if not series:
        raise RefusedError(_nothing_found(run, candidates), "Pass the folder that holds them.")
    form, members = next(iter(series.items()))
    members = _ordered(members, candidates.left_out)
    warnings = [
        f"{printable(path)} holds no model: an unfinished save? It is left out."
        for path in candidates.without_weights
        if _form(path.name) == form
    ]
    if own is not None:
        candidates.left_out.append((own, "the run's own model, not a step"))
    return Found(tuple(members), tuple(candidates.left_out), tuple(warnings))


def _are_stray_files(series: dict[str, list[Checkpoint]]) -> bool:
    """A lone numbered file beside a model (`value_head_1.pt`) does not make a run of its folder."""
    return all(len(members) == 1 and members[0].path.is_file() for members in series.values())


def _scan(run: Path) -> _Candidates:
    candidates = _Candidates()
    for name in sorted(_names_in(run) - set(layouts.FOLDER_WEIGHTS)):
        path = run / name
        stem = _stem(name)
        number = _number_in(stem)
        is_folder = _kind(path) == "folder"
        # A folder is a step only by a step's name; a flat file may carry its number anywhere.
        if number or (not is_folder and layouts.WEIGHTS_EXTENSION.search(name)):
            _consider(path, stem, number, candidates)
        elif is_folder and _weights_of(path):
            candidates.left_out.append((path, _why_not(path, stem) or "no number in its name"))
        else:
            candidates.others.append(f"{name}/" if is_folder else name)
    return candidates


def _consider(
    path: Path, stem: str, number: tuple[str, int] | None, candidates: _Candidates
) -> None:
    reason = _why_not(path, stem)
    if reason:
        candidates.left_out.append((path, reason))
        return
    weights = _weights_of(path)
    if weights is None:
        candidates.left_out.append((path, "no model weights in it"))
        candidates.without_weights.append(path)
        return
    if number is None:
        slots = re.findall(r"\d+", re.sub(r"\d+\.\d+", "", stem))
        if not slots:
            candidates.left_out.append((path, "no number in its name"))
            return
        number = ("slots", int(slots[-1]))
    candidates.series[_form(stem)].append(Checkpoint(path, number[1], weights))


def _why_not(path: Path, stem: str) -> str | None:
    if _kind(path) is None:
        return "neither a regular file nor a folder"
    if os.path.isdir(path) and layouts.MANIFEST_NAME in _names_in(path):
        return "an output of ckpt-ema"
    # A folder's name has no extension: what looks like one ("tmp.5.tmp") is part of the name.
    names = {stem, path.name}
    for reason, pattern in layouts.NOT_A_STEP.items():
        if any(pattern.search(name) for name in names):
            return reason
    return None


def _ordered(members: list[Checkpoint], left_out: list[tuple[Path, str]]) -> list[Checkpoint]:
    members = _number_by_the_varying_slot(members)
    unique: dict[object, Checkpoint] = {}
    # Links come after what they point to, so that the real folder is the one that stays.
    for member in sorted(members, key=lambda member: (member.path.is_symlink(), member.path.name)):
        first = unique.setdefault(_identity(member), member)
        if first is not member:
            left_out.append((member.path, f"the same file as {first.path.name}"))
    ordered = sorted(unique.values(), key=lambda member: (member.step or 0, member.path.name))
    for earlier, later in pairwise(ordered):
        if earlier.step == later.step:
            raise RefusedError(
                f"{printable(earlier.path.name)} and {printable(later.path.name)} are both step"
                f" {later.step}.",
                "Pass the checkpoints that belong together, oldest first.",
            )
    return ordered


def _identity(member: Checkpoint) -> object:
    """Equal for two names of one checkpoint. An index may well be shared by different ones."""
    if member.weights.suffix == ".json":
        return os.path.realpath(member.path)
    status = member.weights.stat()
    return status.st_dev, status.st_ino


def _number_by_the_varying_slot(members: list[Checkpoint]) -> list[Checkpoint]:
    """Where names say no unit, the step is the one number that differs from name to name."""
    stems = [_stem(member.path.name) for member in members]
    if any(_number_in(stem) for stem in stems) or len(members) == 1:
        return members
    slots = [re.findall(r"\d+", re.sub(r"\d+\.\d+", "", stem)) for stem in stems]
    varying = [column for column in zip(*slots, strict=True) if len(set(column)) > 1]
    if len(varying) != 1:
        raise RefusedError(
            f"{printable(stems[0])} and {printable(stems[1])} differ in {len(varying)} numbers, so"
            " their order is unknown.",
            "Pass the checkpoints one by one, oldest first.",
        )
    return [
        Checkpoint(member.path, int(number), member.weights)
        for member, number in zip(members, varying[0], strict=True)
    ]


def _nothing_found(run: Path, candidates: _Candidates) -> str:
    message = (
        f"No checkpoints found in {printable(run)}; looked for numbered folders or files with"
        " model weights (checkpoint-500, step_100, epoch=1-step=100.ckpt, ...)"
    )
    if candidates.left_out:
        names = [f"{path.name} ({reason})" for path, reason in candidates.left_out]
        return f"{message} and left out {some(names)}."
    if candidates.others:
        return f"{message} and found {some(candidates.others)}."
    return f"{message}; the folder is empty."


def _weights_of(path: Path) -> Path | None:
    """The file that leads to the tensors of a checkpoint folder or file, None if there is none."""
    if not os.path.isdir(path):
        return path if layouts.WEIGHTS_EXTENSION.search(path.name) else None
    names = _names_in(path)
    present = [name for name in layouts.FOLDER_WEIGHTS if name in names]
    single, index = layouts.FOLDER_WEIGHTS[:2]
    if single in present and index in present:
        raise RefusedError(
            f"{printable(path)} holds both {single} and {index}: one of them is stale, and"
            f" loaders take {single}.",
            "Remove the stale one.",
        )
    return path / present[0] if present else None


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise RefusedError(f"{printable(folder)} cannot be listed: {error.strerror}.") from error


def _number_in(stem: str) -> tuple[str, int] | None:
    """The unit and the number in a name: ("step", 100) for "epoch=1-step=100"; None if neither."""
    for unit, pattern in layouts.STEP_NAMES.items():
        match = pattern.search(stem)
        if match:
            return unit, int(next(group for group in match.groups() if group))
    return None


def _form(stem: str) -> str:
    """A name with its numbers left open: those of one form are one series."""
    return re.sub(r"\d+", "<n>", re.sub(r"\d+\.\d+", "<f>", stem))


def _stem(name: str) -> str:
    return layouts.WEIGHTS_EXTENSION.sub("", name)


def _kind(path: Path) -> str | None:
    """Whether a path leads to a folder or a regular file; None for a broken link, a FIFO, ..."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else None
