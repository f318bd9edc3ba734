"""Adds what is averaged or copied beside the model where an average is written back."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from ckpt_ema.containers.specs import Specs
from ckpt_ema.errors import Code, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.names import stem_of
from ckpt_ema.notices import Notice
from ckpt_ema.options import Reading
from ckpt_ema.planning.average import Weighted
from ckpt_ema.planning.masters import WithMasters, with_masters
from ckpt_ema.planning.same_model import Compared, compare_tensors, shared
from ckpt_ema.storage import Storage
from ckpt_ema.targets.checkpoint import with_all_files
from ckpt_ema.trainers import conventions


def with_copied_files(
    compared: Compared, averages: Sequence[Weighted], reading: Reading, storage: Storage
) -> Compared:
    """Add the masters in every checkpoint, and the files to copy in those that are written to.

    Warns of weights that are copied with the average and that a trainer may prefer to it.
    """
    newest = dict.fromkeys(average.checkpoints[-1] for average in averages)
    made = {
        one: with_masters(one, specs, compared.dropped, storage)
        for one, specs in compared.specs.items()
    }
    lacking = [one for one, found in made.items() if not found.apart]
    incomplete = lacking[0].name if 0 < len(lacking) < len(made) else None
    copies = set.intersection(*({*one.copies} for one in made.values()))
    left_out = {
        one: {*found.copies} - copies | {*(found.apart if incomplete else ())}
        for one, found in made.items()
    }
    of_masters = [_without(found.specs, left_out[one]) for one, found in made.items()]
    specs_of = dict(zip(made, shared(of_masters), strict=True))
    names = [checkpoint.name for checkpoint in made]
    warnings = [*compared.warnings, *compare_tensors(names, [*specs_of.values()])]
    for checkpoint in newest:
        own = specs_of[checkpoint]
        specs_of[checkpoint] = specs = with_all_files(checkpoint, own, storage)
        copied = [file.name for file in specs.files[len(own.files) :]]
        warnings += [*_other_models(checkpoint, own, copied), *_kept(made[checkpoint])]
        apart = made[checkpoint].apart
        warnings += [*_not_in_all(checkpoint, apart, incomplete)]
        warnings += [*_of_other_ranks(checkpoint, {*made[checkpoint].copies} - copies)]
        warnings += [*_whole([*own.tensors.keys() - compared.specs[checkpoint].tensors], reading)]
    last, last_made = list(made.items())[-1]
    averaged = [key for key in last_made.found if not (incomplete and key in last_made.apart)]
    notes = [*compared.notes, *_only_as_saved(last), *_averaged(averaged)]
    return compared._replace(specs=specs_of, warnings=[*dict.fromkeys(warnings)], notes=notes)


def _without(specs: Specs, left_out: Collection[str]) -> Specs:
    if not left_out:
        return specs
    tensors = {key: tensor for key, tensor in specs.tensors.items() if key not in left_out}
    return replace(specs, tensors=tensors)


def _of_other_ranks(newest: Checkpoint, copies: Collection[str]) -> Iterator[Notice]:
    """Warn of what ranks have for themselves, where other checkpoints are of other ranks."""
    if copies:
        text = f"Tensors that each rank has for itself ({some(sorted(copies), 2)}) keep the values"
        text = f"{text} of {newest.name}, since not every checkpoint is of the same ranks."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _not_in_all(
    newest: Checkpoint, apart: Sequence[str], incomplete: str | None
) -> Iterator[Notice]:
    """Warn of masters that are not averaged, since another checkpoint has none."""
    if apart and incomplete:
        text = f"The optimizer's own copy of the weights ({some(apart, 2)}) keeps the values of"
        text = f"{text} {newest.name}, since {incomplete} has none; a trainer that resumes takes it"
        text = f"{text} instead of the average."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _whole(apart: Sequence[str], reading: Reading) -> Iterator[Notice]:
    """Warn of copies of weights that are averaged although their weights may not be."""
    if apart and (reading.keep or reading.drop):
        text = f"Further copies of the weights ({some(sorted(apart), 2)}) are averaged whole, also"
        text = f"{text} where --keep or --drop matches a weight."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _other_models(checkpoint: Checkpoint, specs: Specs, copied: Sequence[str]) -> Iterator[Notice]:
    """Warn of further models, such as an average by the trainer, that keep their values."""
    files = [name for name in copied if _holds_average(name)]
    if others := [*specs.other_models, *files]:
        text = f"Other weights in {checkpoint.name} are copied as they are ({some(others)}); make"
        text = f"{text} sure that your loader does not prefer them to the average."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _holds_average(name: str) -> bool:
    words = (stem_of(part) for part in name.split("/"))
    is_named = any(map(conventions.AVERAGED_NAME.search, words))
    return is_named and bool(conventions.WEIGHTS_LIKE.search(name))


def _only_as_saved(newest: Checkpoint) -> Iterable[Notice]:
    """Note why the average is written back, if no other format of it would be loaded."""
    if only := newest.model.only_as_saved:
        text = f"{newest.name} is {only.what}, so the average is written back in its own format"
        yield Notice(Code.DECIDED, f"{text} (--save-as checkpoint).")


def _averaged(masters: Sequence[str]) -> Iterable[Notice]:
    """Note the masters that are averaged, and what is not."""
    if masters:
        text = f"The optimizer's own copy of the weights ({some(masters, 2)}) is averaged too;"
        text = f"{text} its moments, the random state and the schedule stay the newest."
        yield Notice(Code.DECIDED, text)


def _kept(newest: WithMasters) -> Iterator[Notice]:
    """Warn of weights that an optimizer keeps in higher precision and that are not averaged."""
    preferred = {masters: one for masters, one in newest.kept.items() if masters.ignored_with}
    for masters, names in preferred.items():
        text = f"The optimizer's own copy of the weights (fp32 masters, in {some(names, 2)}) is not"
        text = f"{text} averaged, and a trainer that resumes takes it instead of the average; load"
        text = f"{text} the output with {masters.ignored_with}."
        yield Notice(Code.OTHER_WEIGHTS, text)
