"""Where the averages of a plan go, and the output of each: its files, companions, fingerprint."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.containers.specs import FileSpec, Specs
from ckpt_ema.errors import Code, OptionError, RefusedError
from ckpt_ema.find.checkpoint import Checkpoint, Found
from ckpt_ema.options import CHECKPOINT, DTYPES
from ckpt_ema.options import Output as OutputOptions
from ckpt_ema.planning.average import Weighted
from ckpt_ema.planning.fingerprint import fingerprint
from ckpt_ema.planning.roles import Ruling
from ckpt_ema.schedules.weights import weights_of
from ckpt_ema.storage import Storage, storage_for
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.storage.uri import absolute, path_of, scheme_of
from ckpt_ema.targets.checkpoint import CheckpointTarget
from ckpt_ema.targets.companions import Companions, companions
from ckpt_ema.targets.safetensors import target_for
from ckpt_ema.targets.target import Model, Output, Target


def find_destination(
    asked: str | None, found: Found, paths: Sequence[Path], storage: Storage
) -> Path:
    """Return where to write: `asked`, or a sibling of the run.

    Raises `RefusedError` for a path that overlaps an input or can never be written. Whether an
    output is there already is for `output.destination` to check.
    """
    output = path_of(asked) if asked is not None else sibling_of(found.root)
    links = [c.model.path for c in found.checkpoints if storage.is_link(c.model.path)]
    inputs = [*paths, *(checkpoint.path for checkpoint in found.checkpoints), *links]
    check_destination(output, inputs, storage)
    return output


def check_destination(output: Path, inputs: Sequence[Path], storage: Storage) -> None:
    """Raise `RefusedError` for an output that overlaps an input or can never be written."""
    if scheme_of(output):
        message = f"--output {output} is a URI; an output is written to a local folder."
        raise OptionError(message, code=Code.INVALID_OPTION)
    sources = storage.real_paths(inputs)
    storage = storage_for(output)
    [real] = storage.real_paths([output])
    for path, source in zip(inputs, sources, strict=True):
        if f"{real}/".startswith(f"{source}/") or f"{source}/".startswith(f"{real}/"):
            message = f"{output} overlaps the input {path}."
            hint = "Choose another output with --output."
            raise RefusedError(message, hint, code=Code.OUTPUT_OVERLAPS_INPUT, path=output)
    if not storage.is_folder(output.parent):
        message = f"{output.parent}, the folder of the output, is not an existing folder."
        hint = "Create it first."
        raise RefusedError(message, hint, code=Code.INVALID_OUTPUT, path=output.parent)
    if storage.exists(output) and storage.kind(output) not in (Kind.FILE, Kind.FOLDER):
        message = f"{output} exists and is neither a file nor a folder."
        raise RefusedError(message, code=Code.INVALID_OUTPUT, path=output)


def with_format(options: OutputOptions, checkpoints: Sequence[Checkpoint]) -> OutputOptions:
    """Return the options with the format that the checkpoints need, if they need one.

    Raises `RefusedError` if another was asked for, which no trainer would load.
    """
    found = ((one, one.model.only_as_saved) for one in checkpoints)
    only, reason = next(((one, why) for one, why in found if why), (None, None))
    if only is None or reason is None or options.save_as == CHECKPOINT:
        return options
    if options.save_as is None:
        return replace(options, save_as=CHECKPOINT)
    instead = reason.instead[0].lower() + reason.instead[1:]
    hint = f"Write it back with --save-as checkpoint, or {instead}"
    message = f"{only.path} is {reason.what}."
    raise RefusedError(message, hint, code=Code.UNSUPPORTED_FORMAT, path=only.path)


def named(path: str | os.PathLike[str]) -> Path:
    """Return the path with a name to call it by, which "." and ".." lack."""
    given = path_of(path)
    return given if given.name not in ("", "..") else path_of(absolute(given))


def sibling_of(root: Path) -> Path:
    """Return where the averages of a run are written unless somewhere is named."""
    run = named(root)
    if not run.name:
        message = "--output is missing; the checkpoints share no folder."
        raise OptionError(message, code=Code.INVALID_OPTION)
    if scheme_of(run):  # a revision is no part of the name
        return Path(f"{run.name.split('@')[0].removesuffix('.safetensors')}-ema")
    return run.parent / f"{run.name.removesuffix('.safetensors')}-ema"


class LaidOut(NamedTuple):
    """The outputs of a plan's averages, in their order."""

    outputs: list[Output]
    other_models: list[str]  # folders with weights of their own, which are not copied
    missing: list[str]  # configurations without which an output cannot be loaded


def lay_out(
    averages: Sequence[Weighted],
    specs_of: Mapping[Checkpoint, Specs],
    found: Found,
    destination: Path,
    options: OutputOptions,
    rulings: Mapping[Checkpoint, Mapping[str, Ruling]],
    choices: Mapping[str, Any],
    storage: Storage,
    files_of: Mapping[Checkpoint, Sequence[FileSpec]],
) -> LaidOut:
    """Lay out the output of each average, in the form of the newest of its checkpoints.

    It depends on this average alone, so it is the same whatever else is made beside it. `specs_of`
    has the checkpoints that are read, in their order, `files_of` all; `rulings` has the tensors of
    each newest one; `choices` are those that `fingerprint.deciding` returns.
    """
    shared = _shared_folder(found)
    copied_with = cache(lambda c: _companions(c, specs_of[c], shared, options, storage))
    outputs, other_models, missing = [], set[str](), set[str]()
    targets = _targets(destination, averages, options, storage)
    for average, target in zip(averages, targets, strict=True):
        newest = average.checkpoints[-1]
        is_single = target.is_single_file
        copied = Companions() if is_single else copied_with(newest)
        inputs = [(c.model.folder, files_of[c]) for c in average.checkpoints]
        provenance = _provenance(average)
        digest = fingerprint(inputs, copied.files, provenance, choices, storage)
        if is_single:  # a folder has it in its manifest
            provenance["fingerprint"] = digest
        roles = {name: one.made for name, one in rulings[newest].items()}
        is_file, dtype = not storage.is_folder(newest.path), DTYPES[options.dtype]
        layouts = [specs_of[c].tensors for c in average.checkpoints if c in specs_of]
        model = Model(specs_of[newest], roles, dtype, provenance, is_file, layouts)
        files = target.lay_out(model)
        indexes = target.finish(files, [member.name for member in newest.model.members])
        other_models, missing = other_models | {*copied.models}, missing | {*copied.missing}
        outputs.append(Output(target.path, is_single, files, indexes, copied.files, digest))
    _check_alike(outputs)
    return LaidOut(outputs, sorted(other_models), sorted(missing))


def _check_alike(outputs: Sequence[Output]) -> None:
    """Refuse averages together whose newest checkpoints store a tensor in different pieces."""
    pieces = [
        {(one.key, one.region) for file in output.files for one in file.tensors if one.region}
        for output in outputs
    ]
    for key, _ in (one for own in pieces for one in own ^ pieces[0]):
        message = f"Tensor {key} is stored in other pieces in one of the newest checkpoints."
        hint = "Make the averages one at a time."
        raise RefusedError(message, hint, code=Code.DIFFERENT_MODELS, tensor=key)


def _companions(
    newest: Checkpoint, specs: Specs, run: Path | None, options: OutputOptions, storage: Storage
) -> Companions:
    """Return the files that are copied beside the weights of `newest`."""
    folder = newest.model.folder if storage.is_folder(newest.path) else None
    if options.save_as == CHECKPOINT:  # a copy has its files already, or needs no other
        files = () if folder else companions(None, [], run, None, storage).files
        return Companions(files)
    config_from = path_of(options.config_from) if options.config_from is not None else None
    return companions(folder, [file.name for file in specs.files], run, config_from, storage)


def _targets(
    destination: Path, averages: Sequence[Weighted], options: OutputOptions, storage: Storage
) -> list[Target]:
    """Return where each average goes: to the destination, or to a folder in it for each."""
    is_one = len(averages) == 1
    if options.save_as == CHECKPOINT:
        paths = [destination if is_one else destination / one.name for one in averages]
        newest = [average.checkpoints[-1] for average in averages]
        return [CheckpointTarget(*one, storage) for one in zip(paths, newest, strict=True)]
    target = target_for(destination)
    if is_one:
        return [target]
    if target.is_single_file:
        problem = f"is one file, which cannot hold {len(averages)} averages; name a folder"
        message = f"--output {destination} {problem}."
        raise OptionError(message, code=Code.CONFLICTING_OPTIONS)
    return [target_for(destination / average.name) for average in averages]


def _shared_folder(found: Found) -> Path | None:
    """Return the folder that all checkpoints share; None for a list from several folders."""
    folders = {os.path.dirname(absolute(c.path)) for c in found.checkpoints}
    return found.root if len(folders) == 1 else None


def _provenance(average: Weighted) -> dict[str, object]:
    """Return what the headers of an output hold; the same wherever and whenever it is made."""
    rows = zip(average.checkpoints, weights_of(average.decays), strict=True)
    return {
        "schedule": average.rule.schedule,
        **average.rule.numbers,
        "checkpoints": [{"name": c.name, "step": c.step, "weight": weight} for c, weight in rows],
    }
