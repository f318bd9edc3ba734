"""Laying out the output of one average: its files, what travels with them, and its fingerprint."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import Specs
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.found import Found
from ckpt_ema.options import DTYPES, Options
from ckpt_ema.options import Output as OutputOptions
from ckpt_ema.planning.average import Weighting
from ckpt_ema.schedules.weights import weights_of
from ckpt_ema.targets.companions import Companion, Companions, companions
from ckpt_ema.targets.safetensors_folder import Output, is_single_file, make_indexes, output_files


class Layout(NamedTuple):
    """An output, and folders with weights of their own that stay behind."""

    output: Output
    left_behind: tuple[str, ...]


def lay_out(
    weighting: Weighting,
    specs_of: Mapping[Checkpoint, Specs],
    found: Found,
    path: Path,
    options: Options,
    source: Source,
) -> Layout:
    """The output of one average at `path`, in the form of its newest checkpoint.

    It depends on this average alone, so that it is the same whatever else is made beside it.
    """
    newest = weighting.checkpoints[-1]
    single_name = path.name if is_single_file(path) else None
    travelling = _travelling(newest, specs_of[newest], found, options.output, single_name, source)
    fingerprint = _fingerprint(
        weighting, specs_of, travelling.files, {**options.deciding(), "file": single_name}, source
    )
    provenance = _provenance(weighting)
    if single_name:  # a folder has it in its manifest
        provenance["fingerprint"] = fingerprint
    files = output_files(specs_of[newest], DTYPES[options.output.dtype], single_name, provenance)
    part_names = [part.name for part in newest.model.members]
    indexes = () if single_name else tuple(make_indexes(files, part_names))
    output = Output(path, files, indexes, travelling.files, fingerprint)
    return Layout(output, travelling.models)


def _travelling(
    newest: Checkpoint,
    specs: Specs,
    found: Found,
    options: OutputOptions,
    single_name: str | None,
    source: Source,
) -> Companions:
    if single_name:
        return Companions((), ())
    return companions(
        newest.model.folder,
        [file.name for file in specs.files],
        _shared_folder(found),
        Path(options.config_from) if options.config_from is not None else None,
        source.storage,
        is_file=not source.storage.is_folder(newest.path),
    )


def _shared_folder(found: Found) -> Path | None:
    """The folder that all checkpoints share; None for a list from several folders."""
    folders = {os.path.dirname(os.path.abspath(c.path)) for c in found.checkpoints}
    return found.root if len(folders) == 1 else None


def _provenance(weighting: Weighting) -> dict[str, object]:
    """What the header of the output says of its making; the same wherever and whenever it runs."""
    rows = zip(weighting.checkpoints, weights_of(weighting.decays), strict=True)
    return {
        "schedule": weighting.rule.schedule,
        **weighting.rule.numbers,
        "checkpoints": [{"name": c.name, "step": c.step, "weight": share} for c, share in rows],
    }


def _fingerprint(
    weighting: Weighting,
    specs_of: Mapping[Checkpoint, Specs],
    travelling: Sequence[Companion],
    deciding: Mapping[str, Any],
    source: Source,
) -> str:
    """A digest of inputs (path, size, mtime, header of each file), weights and choices."""
    folders = source.storage.real_paths(
        checkpoint.model.folder for checkpoint in weighting.checkpoints
    )
    rows = zip(folders, weights_of(weighting.decays), weighting.checkpoints, strict=True)
    inputs = [(folder, share, *specs_of[c].files) for folder, share, c in rows]
    stats = [(file.name, source.storage.identity(file.source)) for file in travelling]
    side_files = [(name, *identity) for name, identity in stats]
    choices = [weighting.rule.schedule, dict(weighting.rule.numbers), deciding]
    return hashlib.sha256(json.dumps([inputs, side_files, choices]).encode()).hexdigest()
