"""Adds what is averaged or copied beside the model where an average is written back."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from ckpt_ema.containers.source import Source
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


def with_copied_files(compared: Compared, averages: Sequence[Weighted], source: Source) -> Compared:
    """Add the masters in every checkpoint, and the files to copy in those that are written to.

    Warns of weights that are copied with the average and that a trainer may prefer to it.
    """
    masters = _MastersOfAll(compared, source.storage)
    specs_of = masters.specs()
    names = [checkpoint.name for checkpoint in specs_of]
    warnings = [*compared.warnings, *compare_tensors(names, [*specs_of.values()])]
    for newest in dict.fromkeys(average.checkpoints[-1] for average in averages):
        own, read = specs_of[newest], compared.specs[newest]
        specs_of[newest] = specs = with_all_files(newest, own, source.storage)
        copied = [file.name for file in specs.files[len(own.files) :]]
        warnings += _other_models(newest, own, copied)
        warnings += masters.warnings(newest)
        warnings += _whole(own.tensors.keys() - read.tensors.keys(), source.reading)
    last = list(specs_of)[-1]
    notes = [*compared.notes, *_only_as_saved(last), *masters.notes(last)]
    return compared._replace(specs=specs_of, warnings=[*dict.fromkeys(warnings)], notes=notes)


class _MastersOfAll:
    """The masters of all checkpoints; those that not every one has keep the newest value."""

    def __init__(self, compared: Compared, storage: Storage) -> None:
        self._found = {
            one: with_masters(one, specs, compared.dropped, storage)
            for one, specs in compared.specs.items()
        }
        lacking = [one for one, found in self._found.items() if not found.apart]
        self._lacking = lacking[0].name if 0 < len(lacking) < len(self._found) else None
        self._copies = set.intersection(*({*found.copies} for found in self._found.values()))

    def specs(self) -> dict[Checkpoint, Specs]:
        """Return the specs of each checkpoint, with the masters that are averaged."""
        added = [self._averaged(one) for one in self._found]
        return dict(zip(self._found, shared(added), strict=True))

    def _averaged(self, one: Checkpoint) -> Specs:
        found = self._found[one]
        left_out = {*found.copies} - self._copies | {*(found.apart if self._lacking else ())}
        if not left_out:
            return found.specs
        tensors = {key: t for key, t in found.specs.tensors.items() if key not in left_out}
        return replace(found.specs, tensors=tensors)

    def warnings(self, newest: Checkpoint) -> Iterator[Notice]:
        """Yield what of a checkpoint is not averaged, although its trainer may prefer it."""
        found = self._found[newest]
        yield from _kept(found)
        if self._lacking:
            yield from _not_in_all(newest, found.apart, self._lacking)
        yield from _of_other_ranks(newest, {*found.copies} - self._copies)

    def notes(self, newest: Checkpoint) -> Iterator[Notice]:
        """Yield the masters that are averaged."""
        found = self._found[newest]
        apart = {*found.apart} if self._lacking else set[str]()
        yield from _averaged([key for key in found.found if key not in apart])


def _of_other_ranks(newest: Checkpoint, copies: Collection[str]) -> Iterator[Notice]:
    """Warn of what ranks have for themselves, where other checkpoints are of other ranks."""
    if copies:
        text = f"Tensors that each rank has for itself ({some(sorted(copies), 2)}) keep the values"
        text = f"{text} of {newest.name}, since not every checkpoint is of the same ranks."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _not_in_all(newest: Checkpoint, apart: Sequence[str], lacking: str) -> Iterator[Notice]:
    """Warn of masters that are not averaged, since another checkpoint has none."""
    if apart:
        text = f"The optimizer's own copy of the weights ({some(apart, 2)}) keeps the values of"
        text = f"{text} {newest.name}, since {lacking} has none; a trainer that resumes takes it"
        text = f"{text} instead of the average."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _whole(apart: Collection[str], reading: Reading) -> Iterator[Notice]:
    """Warn of copies of weights that are averaged although their weights may not be."""
    if apart and (reading.keep or reading.drop):
        text = f"Further copies of the weights ({some(sorted(apart), 2)}) are averaged whole, also"
        text = f"{text} where --keep or --drop matches a weight."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _other_models(checkpoint: Checkpoint, specs: Specs, copied: Sequence[str]) -> Iterator[Notice]:
    """Warn of further models, such as an average by the trainer, that keep their values."""
    files = [name for name in copied if _holds_average(name)]
    if others := [*specs.other_models, *files, *_beside(copied)]:
        text = f"Other weights in {checkpoint.name} are copied as they are ({some(others)}); make"
        text = f"{text} sure that your loader does not prefer them to the average."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _beside(copied: Iterable[str]) -> list[str]:
    """Return what lies beside the folder of the model and holds files of weights, by its name."""
    found = dict[str, None]()
    for name in (name for name in copied if name.startswith("../")):
        first, *rest = parts = [part for part in name.split("/") if part != ".."]
        if conventions.WEIGHTS_LIKE.search(parts[-1]) and not any(map(_is_state, parts)):
            found[f"{first}/" if rest else first] = None
    return list(found)


def _is_state(name: str) -> bool:
    stem = stem_of(name)
    patterns = (conventions.STATE_NAME, conventions.STATE_KEY)
    return any(pattern.search(stem) or pattern.search(name) for pattern in patterns)


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
