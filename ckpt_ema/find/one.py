"""One checkpoint, as a person names it: by its path or URI, or as a step of a run, RUN@STEP."""

import os
from collections.abc import Sequence
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.complete import check_complete, without_incomplete
from ckpt_ema.find.further import with_further_files
from ckpt_ema.find.given import listed
from ckpt_ema.find.model_files import locate, unsupported
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.run import discover
from ckpt_ema.options import Reading, Selection
from ckpt_ema.storage import storage_for
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.storage.uri import path_of
from ckpt_ema.trainers.table import Refusal


def find_one(path: Path, reading: Reading) -> tuple[Checkpoint, Source]:
    """Return the checkpoint at a path, or the step that `RUN@STEP` names, and what reads it.

    What exists under the whole name is meant, for `hf://org/repo@revision` too. A step is given by
    its number or by the name of its checkpoint. Raises `RefusedError` if nothing is there, or
    several checkpoints are.
    """
    source = Source(storage_for(path), reading)
    absent = _absence(path, source)
    if absent is None:
        return _at(path, source), source
    run_name, _, step = os.fspath(path).rpartition("@")
    if not run_name or not step:
        raise absent
    run = path_of(run_name)
    source = Source(storage_for(run), reading)
    if _absence(run, source) is not None:
        raise absent
    found = discover([run], Selection(), source)
    checkpoint = _step_of(found.checkpoints, step, run)
    check_complete([checkpoint], found)
    return checkpoint, source


def _absence(path: Path, source: Source) -> RefusedError | None:
    """Return the error that nothing is at a path; None if something is."""
    try:
        if source.storage.kind(path) is not Kind.ABSENT:
            return None
    except RefusedError as error:
        if error.code is not Code.NOT_FOUND:
            raise
        return error
    hint = "Pass a checkpoint, or a step of a run as RUN@STEP."
    return RefusedError(f"{path} does not exist.", hint, code=Code.NOT_FOUND, path=path)


def _at(path: Path, source: Source) -> Checkpoint:
    """Return the checkpoint at a path; the only one of a run too."""
    located = locate(path, source, is_given=True)
    if isinstance(located, Refusal):
        raise unsupported(path, located)
    if isinstance(located, ModelFiles):
        found = with_further_files(listed([path], Selection(), source), source)
        return without_incomplete(found, Selection(), source).checkpoints[0]
    checkpoints = discover([path], Selection(), source).checkpoints
    if len(checkpoints) == 1:
        return checkpoints[0]
    newest = checkpoints[-1]
    step = newest.name if newest.step is None else newest.step
    text = f"{path} holds {len(checkpoints)} checkpoints."
    hint = f"Pass one of them, or its step: {path}@{step}."
    raise RefusedError(text, hint, code=Code.NOT_A_CHECKPOINT, path=path)


def _step_of(checkpoints: Sequence[Checkpoint], step: str, run: Path) -> Checkpoint:
    for one in checkpoints:
        if step in (str(one.step), one.name, stem_of(one.name)):
            return one
    known = [one.name if one.step is None else one.step for one in checkpoints]
    text = f"{run} has no checkpoint of step {step}; its steps are {some(known, 10)}."
    raise RefusedError(text, code=Code.NO_SUCH_STEP, path=run)
