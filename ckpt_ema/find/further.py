"""Files of weights beside the model of a checkpoint: averaged too if every checkpoint has them.

A projector, a value head, a dictionary of speakers: a file counts by what it holds, and no list
has its name. What only some checkpoints have is warned of.
"""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import Member, ModelFiles
from ckpt_ema.errors import Code, IncompleteError, RefusedError, some
from ckpt_ema.find.checkpoint import Checkpoint, Found
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.select import Subsets
from ckpt_ema.find.weights_file import holds_weights, may_be_weights
from ckpt_ema.notices import Notice
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions


def with_further_files(found: Found, source: Source) -> Found:
    """Add to each checkpoint the files of weights beside its model."""
    names = {one: _names_beside(one, source) for one in found.checkpoints}
    newest_with = {name: one for one, beside in names.items() for name in beside}
    readable = {name: _is_readable(name, newest_with[name], source) for name in sorted(newest_with)}
    texts = [
        f"{n} holds weights that cannot be read as one model, and is left out."
        for n, is_read in readable.items()
        if is_read is False
    ]
    further = {one: [n for n in readable if n in names[one] and readable[n]] for one in names}
    checkpoints = tuple(_with_members(one, further[one]) for one in found.checkpoints)
    warnings = (*found.warnings, *(Notice(Code.OTHER_WEIGHTS, text) for text in texts))
    return replace(found, checkpoints=checkpoints, warnings=warnings)


def with_common_files(found: Found, chosen: Subsets, source: Source) -> tuple[Found, Subsets]:
    """Keep the further files that are one model in all chosen checkpoints, and warn of others."""
    taken = dict.fromkeys(one for subset in chosen.subsets for one in subset.checkpoints)
    having: dict[Member, list[Checkpoint]] = {}
    for one in taken:
        for member in one.model.members:
            if member.is_further:
                having.setdefault(member, []).append(one)
    chosen = chosen._replace(notes=(*chosen.notes, *_averages_beside([*taken][-1], source)))
    if not having:
        return found, chosen
    problems = {
        member: _problem(member, those, len(taken), source) for member, those in having.items()
    }
    left_out = [member for member, problem in problems.items() if problem]
    warnings, notes = [*chosen.warnings], [*chosen.notes]
    for member in left_out:
        text = f"{member.name} holds weights, but {problems[member]}, and it is left out."
        warnings.append(Notice(Code.OTHER_WEIGHTS, text))
    if common := [member.name for member in having if member not in left_out]:
        text = f"Every checkpoint also has {some(common)}, which is averaged too."
        notes.append(Notice(Code.DECIDED, text))
    kept = {one: _without_members(one, left_out) for one in taken}
    subsets = tuple(
        subset._replace(checkpoints=tuple(kept[one] for one in subset.checkpoints))
        for subset in chosen.subsets
    )
    checkpoints = tuple(kept.get(one, one) for one in found.checkpoints)
    found = replace(found, checkpoints=checkpoints)
    return found, Subsets(subsets, tuple(notes), tuple(warnings))


def _problem(member: Member, having: list[Checkpoint], count: int, source: Source) -> str:
    """Return why a file is not averaged, though it holds weights; empty if it is."""
    names = some([one.name for one in having], 2)
    if len(having) < count:
        return f"only {names} of {count} checkpoints have it"
    shapes = []
    for one in having:
        with suppress(IncompleteError):  # judged with its checkpoint
            tensors = source.read(_alone(member.name, one)).tensors
            shapes.append({name: tensor.shape for name, tensor in tensors.items()})
    is_one = all(one == shapes[0] for one in shapes)
    return "" if is_one else "its tensors differ in name or shape from checkpoint to checkpoint"


def _averages_beside(newest: Checkpoint, source: Source) -> list[Notice]:
    """Return a note of averages in files of their own, which are not taken."""
    model = newest.model
    if model.is_average or not source.storage.is_folder(newest.path):
        return []
    names = source.storage.names(model.folder)
    named = [n for n in sorted(names) if conventions.AVERAGED_NAME.search(stem_of(n))]
    found = [
        name
        for name in named
        if may_be_weights(name, names) and holds_weights(_alone(name, newest), source)
    ]
    text = f"{some(found)} holds an average by its name; the raw model weights are taken."
    return [Notice(Code.DECIDED, text)] if found else []


def _alone(name: str, checkpoint: Checkpoint) -> ModelFiles:
    """Return one file by itself, of which --which ema asks for no average."""
    return ModelFiles(checkpoint.model.folder, (Member(name),), is_average=True)


def _names_beside(checkpoint: Checkpoint, source: Source) -> set[str]:
    """Return the names of files that may hold weights beside the model in its folder."""
    model = checkpoint.model
    if source.reading.component or not source.storage.is_folder(checkpoint.path):
        return set()
    names = source.storage.names(model.folder)
    known = {member.name for member in model.members}
    return {
        name
        for name in names
        if may_be_weights(name.removesuffix(conventions.INDEX_SUFFIX), names)
        and name not in known
        and not conventions.AVERAGED_NAME.search(stem_of(name))
        and source.storage.kind(model.folder / name) is Kind.FILE
    }


def _is_readable(name: str, checkpoint: Checkpoint, source: Source) -> bool | None:
    """Return whether a file holds weights that can be averaged; None if it holds no weights."""
    model = _alone(name, checkpoint)
    if not holds_weights(model, source):
        return None
    try:
        source.read(model)
    except IncompleteError:  # judged with the checkpoint
        return True
    except RefusedError:
        return False
    return True


def _with_members(checkpoint: Checkpoint, names: list[str]) -> Checkpoint:
    stems = (stem_of(name.removesuffix(conventions.INDEX_SUFFIX)) for name in names)
    further = zip(names, stems, strict=True)
    members = tuple(Member(name, f"{stem}/", is_further=True) for name, stem in further)
    model = replace(checkpoint.model, members=(*checkpoint.model.members, *members))
    return replace(checkpoint, model=model) if members else checkpoint


def _without_members(checkpoint: Checkpoint, rare: Collection[Member]) -> Checkpoint:
    members = tuple(member for member in checkpoint.model.members if member not in rare)
    return replace(checkpoint, model=replace(checkpoint.model, members=members))
