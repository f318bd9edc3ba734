"""Where the averages of a plan go, and the output of each: its files, companions, fingerprint."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.containers.specs import Specs
from ckpt_ema.errors import Code, OptionError, RefusedError
from ckpt_ema.find.checkpoint import Checkpoint, Found
from ckpt_ema.options import DTYPES
from ckpt_ema.options import Output as OutputOptions
from ckpt_ema.planning.average import Weighted
from ckpt_ema.planning.fingerprint import fingerprint
from ckpt_ema.planning.roles import Ruling, judge
from ckpt_ema.schedules.weights import weights_of
from ckpt_ema.storage import Storage, storage_for
from ckpt_ema.storage.protocol import Kind
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
    output = Path(asked) if asked is not None else _sibling(found.root)
    links = [c.model.path for c in found.checkpoints if storage.is_link(c.model.path)]
    inputs = [*paths, *(checkpoint.path for checkpoint in found.checkpoints), *links]
    here = storage_for(output)
    [real] = here.real_paths([output])
    for path, source in zip(inputs, storage.real_paths(inputs), strict=True):
        if f"{real}/".startswith(f"{source}/") or f"{source}/".startswith(f"{real}/"):
            raise RefusedError(
                f"{output} overlaps the input {path}.",
                "Choose another output with --output.",
                code=Code.OUTPUT_OVERLAPS_INPUT,
                path=output,
            )
    if not here.is_folder(output.parent):
        raise RefusedError(
            f"{output.parent}, the folder of the output, is not an existing folder.",
            "Create it first.",
            code=Code.INVALID_OUTPUT,
            path=output.parent,
        )
    kind = here.kind(output)
    if kind is Kind.OTHER or (kind is Kind.ABSENT and here.is_link(output)):
        raise RefusedError(
            f"{output} exists and is neither a file nor a folder.",
            code=Code.INVALID_OUTPUT,
            path=output,
        )
    return output


def named(path: str | os.PathLike[str]) -> Path:
    """Return the path with a name to call it by, which "." and ".." lack."""
    given = Path(path)
    return given if given.name not in ("", "..") else Path(os.path.abspath(given))


def _sibling(root: Path) -> Path:
    run = named(root)
    if not run.name:
        raise OptionError(
            "--output is missing; the checkpoints share no folder.", code=Code.INVALID_OPTION
        )
    return run.parent / f"{run.name.removesuffix('.safetensors')}-ema"


class LaidOut(NamedTuple):
    """The outputs of a plan's averages, in their order."""

    outputs: list[Output]
    rulings: Mapping[str, Ruling]  # for each tensor of the newest checkpoint
    other_models: list[str]  # folders with weights of their own, which are not copied


def lay_out(
    averages: Sequence[Weighted],
    specs_of: Mapping[Checkpoint, Specs],
    found: Found,
    destination: Path,
    options: OutputOptions,
    choices: Mapping[str, Any],
    storage: Storage,
) -> LaidOut:
    """Lay out the output of each average, in the form of the newest of its checkpoints.

    It depends on this average alone, so it is the same whatever else is made beside it. `specs_of`
    is in the order of the checkpoints; `choices` are those that `fingerprint.deciding` returns.
    """
    layouts = list({id(specs.tensors): specs.tensors for specs in specs_of.values()}.values())
    newest = {average.checkpoints[-1] for average in averages} | {list(specs_of)[-1]}
    rulings = {c: judge(specs_of[c], layouts, c.name) for c in specs_of if c in newest}
    shared = _shared_folder(found)
    outputs, other_models = [], set()
    for average, target in zip(averages, _targets(destination, averages), strict=True):
        copied = _companions(average.checkpoints[-1], specs_of, shared, target, options, storage)
        other_models |= {*copied.models}
        roles = {name: one.made for name, one in rulings[average.checkpoints[-1]].items()}
        model = Model(
            specs_of[average.checkpoints[-1]], roles, DTYPES[options.dtype], _provenance(average)
        )
        inputs = [(c.model.folder, specs_of[c].files) for c in average.checkpoints]
        digest = fingerprint(inputs, copied.files, model.provenance, choices, storage)
        outputs.append(_output(target, model, average, copied, digest))
    return LaidOut(outputs, rulings[list(specs_of)[-1]], sorted(other_models))


def _targets(destination: Path, averages: Sequence[Weighted]) -> list[Target]:
    """Return where each average goes: to the destination, or to a folder in it for each."""
    target = target_for(destination)
    if len(averages) == 1:
        return [target]
    if target.is_single_file:
        raise OptionError(
            f"--output {destination} is one file, which cannot hold {len(averages)} averages; name"
            " a folder.",
            code=Code.CONFLICTING_OPTIONS,
        )
    return [target_for(destination / average.name) for average in averages]


def _companions(
    newest: Checkpoint,
    specs_of: Mapping[Checkpoint, Specs],
    shared_folder: Path | None,
    target: Target,
    options: OutputOptions,
    storage: Storage,
) -> Companions:
    if target.is_single_file:
        return Companions((), ())
    return companions(
        newest.model.folder if storage.is_folder(newest.path) else None,
        [file.name for file in specs_of[newest].files],
        shared_folder,
        Path(options.config_from) if options.config_from is not None else None,
        storage,
    )


def _shared_folder(found: Found) -> Path | None:
    """Return the folder that all checkpoints share; None for a list from several folders."""
    folders = {os.path.dirname(os.path.abspath(c.path)) for c in found.checkpoints}
    return found.root if len(folders) == 1 else None


def _provenance(average: Weighted) -> dict[str, object]:
    """Return what the headers of an output hold; the same wherever and whenever it is made."""
    rows = zip(average.checkpoints, weights_of(average.decays), strict=True)
    return {
        "schedule": average.rule.schedule,
        **average.rule.numbers,
        "checkpoints": [{"name": c.name, "step": c.step, "weight": weight} for c, weight in rows],
    }


def _output(
    target: Target, model: Model, average: Weighted, copied: Companions, digest: str
) -> Output:
    if target.is_single_file:  # a folder has it in its manifest
        model = model._replace(provenance={**model.provenance, "fingerprint": digest})
    files = target.lay_out(model)
    members = [member.name for member in average.checkpoints[-1].model.members]
    return Output(target, files, target.finish(files, members), copied.files, digest)
