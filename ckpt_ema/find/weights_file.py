"""Whether one file holds a model: by its name, or by its first bytes if the name says nothing."""

import re
from functools import lru_cache
from pathlib import Path

from ckpt_ema.containers import safetensors, torch_file
from ckpt_ema.containers.checks import HEAD_BYTES, packed_as
from ckpt_ema.containers.rank_files import split_by_rank
from ckpt_ema.containers.reader import hold_the_same
from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import AVERAGED, Member, ModelFiles
from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.find.names import stem_of
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.table import Refusal

_SMALLEST = 64  # bytes of a file with a tensor; those of /proc, which may block, have none

Located = ModelFiles | Refusal | None  # a refusal is for a format that is not read


def locate_file(path: Path, source: Source, *, is_given: bool = False) -> Located:
    """Return the model that a file is, a refusal of what it is instead, or None.

    A file that a person has given is looked into whatever its name.
    """
    if refusal := refusal_of([path.name], certain_only=True):
        return refusal
    model = ModelFiles(path.parent, (Member(path.name),))
    if conventions.WEIGHTS_EXTENSION.search(path.name):
        return _of_ranks(path, model, source) or model
    may_be = is_given or not conventions.NO_WEIGHTS_EXTENSION.search(path.name)
    if source.storage.kind(path) is Kind.FILE and may_be:
        size_bytes = source.storage.identity(path).size_bytes
        head = source.storage.read(path, HEAD_BYTES) if size_bytes >= _SMALLEST else b""
        head = head or b""
        if safetensors.is_header(head, size_bytes) or torch_file.is_torch_file(head):
            return _of_ranks(path, model, source) or model
        packed = packed_as(head)
        if packed and (is_given or conventions.PACKED_WEIGHTS.search(path.name)):
            return Refusal(re.compile(""), packed[0], f"Unpack each first: `{packed[1]}`.")
    return refusal_of([path.name])


def may_be_weights(name: str, beside: set[str]) -> bool:
    """Return whether a file in a checkpoint's folder may hold weights under a name of its own."""
    is_copy = f"{stem_of(name)}.safetensors" in beside and not name.endswith(".safetensors")
    return not is_copy and _is_own_name(name)


@lru_cache  # the folders of a run hold the same names
def _is_own_name(name: str) -> bool:
    return (
        stem_of(name) != name
        and name not in conventions.FOLDER_WEIGHTS
        and not any(pattern.search(name) for pattern in conventions.NOT_A_MODEL)
        and not conventions.STAYS_BEHIND.search(name)
    )


def holds_weights(model: ModelFiles, source: Source) -> bool:
    """Return whether a file holds tensors that can be averaged, and is not training state.

    It is True of what cannot be read as it is and is refused when it is read with its checkpoint.
    """
    try:
        specs = source.read(model)
    except IncompleteError:
        return True
    except RefusedError as error:
        # NO_MATCH: raw weights where --which asks for an average.
        return error.code in (Code.SEVERAL_MODELS, Code.UNREADABLE_TENSOR, Code.NO_MATCH)
    return any(spec.dtype in AVERAGED for spec in specs.tensors.values())


def refusal_of(names: list[str], *, certain_only: bool = False) -> Refusal | None:
    """Return the refusal of a format that is not read, if one of the names is of such."""
    refusals = (one for one in conventions.REFUSALS if one.is_certain or not certain_only)
    return next((one for one in refusals if any(map(one.name.search, names))), None)


def _of_ranks(path: Path, model: ModelFiles, source: Source) -> Refusal | None:
    """Return the refusal of one rank's file if the file of another rank holds other tensors.

    A file of the first rank alone is a whole model, and so are copies of it. Tensors that say
    themselves that they are parts are read with those of the other ranks.
    """
    before, after, rank = split_by_rank(path.name)
    others = [
        other
        for other in sorted(source.storage.names(path.parent) if rank else ())
        if other != path.name and split_by_rank(other)[:2] == (before, after)
    ]
    theirs = ModelFiles(path.parent, tuple(Member(other) for other in others[:1]))
    try:
        if not others or len(source.read(model).files) > 1 or not holds_weights(theirs, source):
            return None
        read = (source.read(model), source.read(theirs))
    except RefusedError:  # which is said when the first rank's file is read, if it has the same
        return None
    if hold_the_same((model, read[0]), (theirs, read[1]), source.storage):
        return None
    what = f"of {len(others) + 1} ranks, whose files hold different tensors"
    instead = "Gather the ranks first, or save the full state dict on the first rank."
    return Refusal(re.compile(""), what, instead)
