"""Files of weights beside the model of a checkpoint: averaged too if every checkpoint has them.

A projector, a value head, a dictionary of speakers: a file counts by what it holds, and no list
has its name. What only some checkpoints have is warned of.
"""

from collections.abc import Collection
from dataclasses import replace

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import Member, ModelFiles
from ckpt_ema.errors import Code, RefusedError, some
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


def with_common_files(found: Found, chosen: Subsets) -> tuple[Found, Subsets]:
    """Leave out the further files that only some of the chosen checkpoints have, with a warning."""
    taken = dict.fromkeys(one for subset in chosen.subsets for one in subset.checkpoints)
    having: dict[Member, list[str]] = {}
    for one in taken:
        for member in one.model.members:
            if member.is_further:
                having.setdefault(member, []).append(one.name)
    if not having:
        return found, chosen
    rare = {member: names for member, names in having.items() if len(names) < len(taken)}
    warnings, notes = [*chosen.warnings], [*chosen.notes]
    for member, names in rare.items():
        text = f"{member.name} holds weights, but only {some(names, 2)} of {len(taken)} checkpoints"
        warnings.append(Notice(Code.OTHER_WEIGHTS, f"{text} have it, and it is left out."))
    if common := [member.name for member in having if member not in rare]:
        text = f"Every checkpoint also has {some(common)}, which is averaged too."
        notes.append(Notice(Code.DECIDED, text))
    kept = {one: _without_members(one, rare) for one in taken}
    subsets = tuple(
        subset._replace(checkpoints=tuple(kept[one] for one in subset.checkpoints))
        for subset in chosen.subsets
    )
    checkpoints = tuple(kept.get(one, one) for one in found.checkpoints)
    found = replace(found, checkpoints=checkpoints)
    return found, Subsets(subsets, tuple(notes), tuple(warnings))


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
    try:
        return holds_weights(ModelFiles(checkpoint.model.folder, (Member(name),)), source) or None
    except RefusedError:
        return False


def _with_members(checkpoint: Checkpoint, names: list[str]) -> Checkpoint:
    stems = (stem_of(name.removesuffix(conventions.INDEX_SUFFIX)) for name in names)
    further = zip(names, stems, strict=True)
    members = tuple(Member(name, f"{stem}/", is_further=True) for name, stem in further)
    model = replace(checkpoint.model, members=(*checkpoint.model.members, *members))
    return replace(checkpoint, model=model) if members else checkpoint


def _without_members(checkpoint: Checkpoint, rare: Collection[Member]) -> Checkpoint:
    members = tuple(member for member in checkpoint.model.members if member not in rare)
    return replace(checkpoint, model=replace(checkpoint.model, members=members))
