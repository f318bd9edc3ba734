"""Several folders as one run, if the steps of each go on after another's; else they are refused."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby, pairwise
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.candidates import Candidates
from ckpt_ema.find.checkpoint import Checkpoint, Found
from ckpt_ema.find.folder import in_folder
from ckpt_ema.find.logs import continuation, reader_of_logs
from ckpt_ema.options import Selection
from ckpt_ema.storage.uri import common_folder


def together(
    runs: Sequence[Candidates], selection: Selection, source: Source, above: Path | None = None
) -> Found:
    """Return the checkpoints of several folders, if the steps of each go on after another's.

    Folders that nobody named, in the folder `above`, are one run only if their logs prove it.
    """
    common = common_folder([one.folder for one in runs])
    labels = {one.folder: os.path.relpath(one.folder, common) for one in runs}
    numbered, unnumbered, unsupported = zip(*(one.undecided for one in runs), strict=True)
    verdicts = dict(chain(*(one.verdicts.items() for one in runs)))
    merged = Candidates(
        common,
        tuple(chain(*numbered)),
        tuple(chain(*unnumbered)),
        tuple(chain(*unsupported)),
        verdicts,
    )
    if above and len({entry.name for entry in merged.numbered}) < len(merged.numbered):
        raise _parallel(runs, above)
    try:
        found = in_folder(runs[-1].folder, merged, selection, source)
    except RefusedError as error:
        if error.code is Code.SAME_STEP:
            raise _parallel(runs, error.path) from error
        if above and error.code in _UNORDERED:
            names = some([one.folder for one in runs])
            text = f"{names} cannot be read as one run: {error.message}"
            raise RefusedError(
                text, "Pass one of them.", code=Code.SEVERAL_RUNS, path=above
            ) from error
        raise
    checkpoints = [one for one in found.checkpoints if one.path.parent in labels]
    in_turn = [folder for folder, _ in groupby(one.path.parent for one in checkpoints)]
    if len(in_turn) > len(set(in_turn)):
        raise _parallel(runs, in_turn[-1])
    if above:
        _check_proven(runs, checkpoints, above, source)
    return _labelled(replace(found, root=in_turn[-1]), labels)


def _check_proven(
    runs: Sequence[Candidates], checkpoints: Sequence[Checkpoint], above: Path, source: Source
) -> None:
    """Refuse folders that nobody named, unless each log goes on as that of the folder before."""
    log_of = reader_of_logs(source)
    for earlier, later in pairwise(checkpoints):
        if earlier.path.parent != later.path.parent:
            logs = continuation(log_of(earlier.path), log_of(later.path))
            if logs.contradiction:
                raise _parallel(runs, later.path)
            if not logs.is_proven:
                folders = [str(one.folder) for one in runs]
                text = f"{above} holds checkpoints in {some(folders)}, of one run or of several."
                command = f"ckpt-ema average {shlex.join(folders)}"
                hint = f"If a run was resumed, pass all its folders: {command}; else pass one."
                raise RefusedError(text, hint, code=Code.SEVERAL_RUNS, path=above)


_UNORDERED = (Code.SEVERAL_SERIES, Code.UNKNOWN_ORDER, Code.CONTRADICTORY_STEPS, Code.SEVERAL_RUNS)


def _parallel(runs: Sequence[Candidates], path: str | Path | None) -> RefusedError:
    """Return the error for runs of which none goes on where another ends."""
    names = some([one.folder for one in runs])
    text = f"{names} are {len(runs)} runs: none goes on where another ends."
    hint = (
        "An average across runs is not one over training: pass one of them, or the checkpoints that"
        " belong together, oldest first."
    )
    return RefusedError(text, hint, code=Code.SEVERAL_RUNS, path=path)


def _labelled(found: Found, labels: Mapping[Path, str]) -> Found:
    """Call each checkpoint by its folder too: those of several folders may have one name."""

    def name(path: Path, own: str) -> str:
        return f"{labels[path.parent]}/{own}" if path.parent in labels else own

    renamed = {one: replace(one, name=name(one.path, one.name)) for one in found.checkpoints}
    return replace(
        found,
        checkpoints=tuple(renamed.values()),
        judged=tuple(replace(one, name=name(one.path, one.name)) for one in found.judged),
        holes=tuple(
            hole._replace(earlier=renamed[hole.earlier], later=renamed[hole.later])
            for hole in found.holes
        ),
    )
