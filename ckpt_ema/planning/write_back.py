"""Adds to the checkpoints what writing an average back needs: masters, and files to copy."""

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


def with_masters_and_files(
    compared: Compared, averages: Sequence[Weighted], source: Source
) -> Compared:
    """Add the masters of every checkpoint, and to each newest one the files that are copied.

    Warns of further weights that a trainer may load instead of the average.
    """
    masters = _MastersOfAll(compared, source.storage)
    specs_of = masters.specs()
    names = [checkpoint.name for checkpoint in specs_of]
    warnings = [*compared.warnings, *compare_tensors(names, [*specs_of.values()])]
    for newest in dict.fromkeys(average.checkpoints[-1] for average in averages):
        own, read = specs_of[newest], compared.specs[newest]
        specs_of[newest] = specs = with_all_files(newest, own, source.storage)
        copied = [file.name for file in specs.files[len(own.files) :]]
        warnings += _warn_of_other_models(newest, own, copied)
        warnings += masters.warnings(newest)
        warnings += _warn_of_ignored_patterns(own.tensors.keys() - read.tensors, source.reading)
    last = list(specs_of)[-1]
    notes = [*compared.notes, *_note_own_format(last), *masters.notes(last)]
    return compared._replace(specs=specs_of, warnings=[*dict.fromkeys(warnings)], notes=notes)


class _MastersOfAll:
    """The masters of all checkpoints; those that not every one has keep the newest value."""

    def __init__(self, compared: Compared, storage: Storage) -> None:
        self._of = {
            one: with_masters(one, specs, compared.dropped, storage)
            for one, specs in compared.specs.items()
        }
        lacking = [one for one, found in self._of.items() if not found.unnamed]
        self._lacking = lacking[0].name if 0 < len(lacking) < len(self._of) else None
        self._of_all_ranks = set.intersection(*({*found.of_ranks} for found in self._of.values()))

    def _not_averaged(self, one: Checkpoint) -> tuple[list[str], list[str]]:
        """Return a checkpoint's masters and tensors of ranks that not every checkpoint has."""
        found = self._of[one]
        masters = found.unnamed if self._lacking else []
        return masters, sorted({*found.of_ranks} - self._of_all_ranks)

    def specs(self) -> dict[Checkpoint, Specs]:
        """Return the specs of each checkpoint, with what is averaged besides the model."""
        added = [self._averaged(one) for one in self._of]
        return dict(zip(self._of, shared(added), strict=True))

    def _averaged(self, one: Checkpoint) -> Specs:
        specs, (masters, of_ranks) = self._of[one].specs, self._not_averaged(one)
        left_out = {*masters, *of_ranks}
        if not left_out:
            return specs
        return replace(specs, tensors={k: t for k, t in specs.tensors.items() if k not in left_out})

    def warnings(self, newest: Checkpoint) -> Iterator[Notice]:
        """Yield what is not averaged, although its trainer may prefer it to the average."""
        masters, of_ranks = self._not_averaged(newest)
        yield from _warn_of_masters_not_found(self._of[newest])
        if self._lacking:
            yield from _warn_of_masters_not_in_all(newest, masters, self._lacking)
        yield from _warn_of_tensors_of_ranks(newest, of_ranks)

    def notes(self, newest: Checkpoint) -> Iterator[Notice]:
        """Yield the masters that are averaged."""
        masters, _ = self._not_averaged(newest)
        yield from _note_masters([key for key in self._of[newest].masters if key not in masters])


def _warn_of_tensors_of_ranks(newest: Checkpoint, of_ranks: Sequence[str]) -> Iterator[Notice]:
    if of_ranks:
        text = f"Tensors that differ between ranks ({some(of_ranks, 2)}) keep the values of"
        text = f"{text} {newest.name}, since the checkpoints are of different numbers of ranks."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _warn_of_masters_not_in_all(
    newest: Checkpoint, masters: Sequence[str], lacking: str
) -> Iterator[Notice]:
    if masters:
        text = f"The optimizer's own copy of the weights ({some(masters, 2)}) keeps the values of"
        text = f"{text} {newest.name}, since {lacking} has none; a trainer that resumes uses it"
        text = f"{text} instead of the average."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _warn_of_ignored_patterns(added: Collection[str], reading: Reading) -> Iterator[Notice]:
    if added and (reading.keep or reading.drop):
        text = f"Further copies of the weights ({some(sorted(added), 2)}) are averaged in full,"
        text = f"{text} even where --keep or --drop matches a weight."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _warn_of_other_models(
    checkpoint: Checkpoint, specs: Specs, copied: Sequence[str]
) -> Iterator[Notice]:
    files = [name for name in copied if _holds_average(name)]
    if others := [*specs.other_models, *files, *_beside(copied)]:
        text = f"Other weights in {checkpoint.name} are copied as they are ({some(others)}); make"
        text = f"{text} sure that your loader does not prefer them to the average."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _beside(copied: Iterable[str]) -> list[str]:
    """Return the names of folders and files with weights that lie beside the model's folder."""
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


def _note_own_format(newest: Checkpoint) -> Iterator[Notice]:
    if only := newest.model.only_as_saved:
        text = f"{newest.name} is {only.what}, so the average is written back in its own format"
        yield Notice(Code.DECIDED, f"{text} (--save-as checkpoint).")


def _note_masters(masters: Sequence[str]) -> Iterator[Notice]:
    if masters:
        text = f"The optimizer's own copy of the weights ({some(masters, 2)}) is averaged too;"
        text = f"{text} moments, random state and schedule are the newest checkpoint's."
        yield Notice(Code.DECIDED, text)


def _warn_of_masters_not_found(newest: WithMasters) -> Iterator[Notice]:
    preferred = {kind: names for kind, names in newest.not_found.items() if kind.ignored_with}
    for kind, names in preferred.items():
        text = f"The optimizer's own copy of the weights (fp32 masters, in {some(names, 2)}) is not"
        text = f"{text} averaged, and a trainer that resumes uses it instead of the average; load"
        text = f"{text} the output with {kind.ignored_with}."
        yield Notice(Code.OTHER_WEIGHTS, text)
