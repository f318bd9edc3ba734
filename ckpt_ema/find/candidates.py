"""The entries of one folder that may be steps, and the verdict on all others."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.find.entries import Entry, list_entries
from ckpt_ema.find.names import captures_step, is_unnumbered_of
from ckpt_ema.find.rules import RULES, Folder, is_unnumbered
from ckpt_ema.find.verdict import Outcome, Reason, Verdict, judge
from ckpt_ema.options import Selection
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.table import Refusal


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

    def skipped(self, *reasons: Reason) -> list[Entry]:
        """Return the entries that may hold a model and that a rule left out for these reasons."""
        rows = self.verdicts.items()
        return [e for e, one in rows if one.outcome is Outcome.SKIPPED and one.reason in reasons]

    def are_stray(self) -> bool:
        """Return whether lone numbered files (`value_head_1.pt`) lie beside a model.

        They do not make a run of their folder.
        """
        templates = {entry.template for entry in self.numbered}
        is_series = len(templates) < len(self.numbered) or any(e.is_folder for e in self.numbered)
        has_last = any(
            is_unnumbered_of(e.stem, template) for e in self.unnumbered for template in templates
        )
        return not is_series and not has_last


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
        # A series in which every name has `final` or `best`, a part of the run's name.
        others = [e for e in undecided if e.slots and e.model and is_unnumbered(e, selection)]
        several = _several(others)
        numbered += [entry for entry in others if entry.template in several]
    if not captures_step(selection.pattern):
        # "resnet50.pt" beside "resnet50_epoch_1.pt": its number is in the model's name.
        several = _several(entry for entry in numbered if entry.model)
        numbered = [e for e in numbered if e.is_folder or not _is_model_of(e, several)]
    known = set(numbered)
    return Candidates(
        folder,
        tuple(entry for entry in numbered if entry.model),
        tuple(entry for entry in undecided if entry not in known),
        tuple(entry for entry in numbered if isinstance(entry.located, Refusal)),
        {entry: verdict for entry, verdict in verdicts.items() if verdict},
    )


def _several(entries: Iterable[Entry]) -> set[str]:
    """Return the templates that more than one of the entries has."""
    counts = Counter(entry.template for entry in entries)
    return {template for template, count in counts.items() if count > 1}


def _is_model_of(entry: Entry, templates: set[str]) -> bool:
    """Return whether a name outside of these series is that of one with its number left out."""
    return entry.template not in templates and any(
        is_unnumbered_of(entry.stem, template) for template in templates
    )


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
