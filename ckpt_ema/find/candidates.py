"""The entries of one folder that may be steps, and the verdict on all others."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.entries import Entry, list_entries
from ckpt_ema.find.model_files import Unsupported
from ckpt_ema.find.names import captures_step, is_unnumbered_of
from ckpt_ema.find.rules import RULES, Folder, is_unnumbered
from ckpt_ema.find.verdict import Outcome, Reason, Verdict, judge
from ckpt_ema.options import Selection
from ckpt_ema.trainers import conventions


@dataclass(frozen=True)
class Candidates:
    """The entries of a folder: candidates of three kinds, and those that a rule decided."""

    folder: Path
    numbered: tuple[Entry, ...]
    unnumbered: tuple[Entry, ...]  # "last", "best", or a name without a number
    unsupported: tuple[Entry, ...]  # numbered ones, in a format that is not read
    verdicts: Mapping[Entry, Verdict]

    @property
    def entries(self) -> list[Entry]:
        """All entries of the folder."""
        return [*self.verdicts, *self.numbered, *self.unnumbered, *self.unsupported]

    @property
    def skipped(self) -> list[Entry]:
        """The entries that may hold a model, and that a rule left out."""
        return [e for e, verdict in self.verdicts.items() if verdict.outcome is Outcome.SKIPPED]

    @property
    def without_model(self) -> list[Entry]:
        """The numbered entries without a model."""
        return [e for e in self.skipped if self.verdicts[e].reason is Reason.NO_MODEL]

    def are_stray(self) -> bool:
        """Return whether lone numbered files (`value_head_1.pt`) lie beside a model.

        They do not make a run of their folder.
        """
        templates = Counter(entry.template for entry in self.numbered)
        has_last = any(
            is_unnumbered_of(entry.stem, template)
            for entry in self.unnumbered
            for template in templates
        )
        return not has_last and all(
            templates[entry.template] == 1 and not entry.is_folder for entry in self.numbered
        )


def candidates_in(folder: Path, selection: Selection, source: Source) -> Candidates:
    """List a folder and judge its entries one by one.

    Raises `RefusedError` if a folder cannot be listed, or holds two forms of its model.
    """
    entries = list_entries(folder, source)
    names = frozenset(entry.name for entry in entries)
    appended = frozenset(os.path.basename(os.path.normpath(name)) for name in selection.append)
    context = Folder(names, appended, selection)
    verdicts = {entry: judge(RULES, entry, context) for entry in entries}
    undecided = [entry for entry, verdict in verdicts.items() if verdict is None]
    numbered = [entry for entry in undecided if not is_unnumbered(entry, selection)]
    if not any(entry.model for entry in numbered):
        numbered += _with_common_word([one for one in undecided if is_unnumbered(one, selection)])
    if not captures_step(selection.pattern):
        numbered = _without_names_of_models(numbered)
    known = set(numbered)
    return Candidates(
        folder,
        tuple(entry for entry in numbered if entry.model),
        tuple(entry for entry in undecided if entry not in known),
        tuple(entry for entry in numbered if isinstance(entry.located, Unsupported)),
        {entry: verdict for entry, verdict in verdicts.items() if verdict},
    )


def _with_common_word(unnumbered: list[Entry]) -> list[Entry]:
    """Return series in which every name has `final` or `best`: a part of the run's name."""
    numbered = [entry for entry in unnumbered if entry.slots and entry.model]
    templates = Counter(entry.template for entry in numbered)
    return [entry for entry in numbered if templates[entry.template] > 1]


def _without_names_of_models(numbered: list[Entry]) -> list[Entry]:
    """Leave out "resnet50.pt" beside "resnet50_epoch_1.pt": its number is in the model's name."""
    templates = Counter(entry.template for entry in numbered if entry.model)
    larger = [template for template, count in templates.items() if count > 1]
    return [
        entry
        for entry in numbered
        if entry.is_folder
        or templates[entry.template] > 1
        or not any(is_unnumbered_of(entry.stem, template) for template in larger)
    ]


def container_of(run: Path, selection: Selection, source: Source) -> Candidates | None:
    """Return what is in the one folder of `run` that holds its checkpoints, if there is one.

    It is known by the names that trainers give it.
    """
    paths = [
        path for glob in conventions.CONTAINERS for path in _matching(run, glob.split("/"), source)
    ]
    inside = [candidates_in(path, selection, source) for path in dict.fromkeys(paths)]
    hits = [one for one in inside if one.numbered or one.unsupported]
    # Folders of training state beside those of models (prime-rl's checkpoints/ beside weights/).
    models = [one for one in hits if any(_is_model(entry) for entry in one.numbered)]
    if len(models) == 1:
        hits = models
    if len(hits) > 1:
        names = [os.path.relpath(one.folder, run) for one in hits]
        raise RefusedError(
            f"{run} contains {len(hits)} runs ({some(names)}), and an average across runs is not"
            " one over training.",
            "Pass one of them.",
            code=Code.SEVERAL_RUNS,
            path=run,
        )
    return hits[0] if hits else None


def _is_model(entry: Entry) -> bool:
    """Return whether it holds a model's files, and not what ranks have written."""
    return entry.model is not None and entry.model.path.name != conventions.DCP_METADATA


def _matching(folder: Path, globs: list[str], source: Source) -> Iterator[Path]:
    """Yield the folders at a glob, one of whose parts each level of folders matches."""
    if not globs:
        yield folder
    elif source.storage.can_list(folder):
        for name in sorted(source.storage.names(folder)):
            if fnmatchcase(name, globs[0]) and source.storage.is_folder(folder / name):
                yield from _matching(folder / name, globs[1:], source)
