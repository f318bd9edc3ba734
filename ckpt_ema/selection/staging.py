"""Making averages where they are evaluated, in the hidden folder of the candidates."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ckpt_ema.output.candidates import Candidates, without
from ckpt_ema.output.workspace import remove
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan
from ckpt_ema.run import RunKeywords, make
from ckpt_ema.selection.competing import moved
from ckpt_ema.selection.evaluation import Trial


class Entrant(NamedTuple):
    """A candidate that was planned, and where it is evaluated."""

    plan: Plan
    average: Average
    folder: Path

    @property
    def fingerprint(self) -> str:
        """The digest of everything that decides its bytes."""
        return self.average.output.fingerprint


def make_averages(plan: Plan, folder: Path, stage: Candidates, how: RunKeywords) -> list[Entrant]:
    """Make the averages of a plan in one pass, each in a folder of its name below `folder`.

    Averages that an interrupted run has made there are taken over.
    """
    entrants = [Entrant(plan, one, folder / one.name) for one in plan.averages]
    if not all(_is_intact(one, stage) for one in entrants):
        remove(folder)
        there = moved(plan, folder)
        made = make(lambda **_: there, how)
        for one, manifest in zip(entrants, made.manifests, strict=True):
            stage.note_made(one.fingerprint, one.folder, manifest)
    return entrants


def _is_intact(entrant: Entrant, stage: Candidates) -> bool:
    altered, added = stage.changes(entrant.fingerprint, entrant.folder)
    if not altered:
        without(entrant.folder, added)  # by an evaluation that was interrupted
    return not altered


def trials(entrants: Sequence[Entrant], names: Sequence[str]) -> list[Trial]:
    """Return candidates as what is to be evaluated, with names for people."""
    return [
        Trial(name, one.fingerprint, one.folder) for one, name in zip(entrants, names, strict=True)
    ]
