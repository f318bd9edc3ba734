"""What becomes of each entry of a run, and why."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TypeVar


class Outcome(Enum):
    """What an entry turned out to be."""

    STEP = "step"  # a checkpoint of the run
    ALIAS = "alias"  # another name of a step, a copy, or an earlier state
    SKIPPED = "skipped"  # may hold a model, and takes no part
    REFUSED = "refused"  # a checkpoint that cannot be read
    OTHER = "other"  # not a checkpoint


class Reason(Enum):
    """Why an entry has its verdict; the values are stable and shown to people."""

    NUMBERED = "numbered"
    LATER = "a later step than the last numbered one"
    APPENDED = "added by --append"
    GIVEN = "given by name"
    ALONE = "the only model"
    EXCLUDED = "left out by --exclude"
    NOT_INCLUDED = "not matched by --include"
    NOT_MATCHED = "not matched by --pattern"
    NO_ALIASES = "left out by --no-aliases"
    UNFINISHED_NAME = "a temporary or unfinished save"
    TRAINING_STATE = "optimizer or trainer state"
    SHARD = "one shard or rank of a model"
    MERGED = "a merged copy"
    MODULE = "one module of a model"
    AVERAGE = "already an average"
    RAW = "raw weights beside the average"
    OWN_OUTPUT = "an output of ckpt-ema"
    WEIGHTS_ELSEWHERE = "its weights are in another file"
    NOT_REGULAR = "neither a regular file nor a folder"
    NOT_LISTABLE = "cannot be listed"
    BROKEN_LINK = "a broken link"
    NO_MODEL = "no model weights in it"
    NO_NUMBER = "no number in its name"
    BESIDE_FILE = "a folder beside a file of the same name"
    ONLY_ONE = "no other name is like it"
    SAME_STEP = "the same step as another"
    SAME_FILE = "the same file as another"
    BEST = "a copy of the best step"
    COPY = "a copy of a step"
    EARLIER = "an earlier step"
    ANOTHER_MODEL = "a different model"
    OWN_MODEL = "the run's own model, not a step"
    OWN_MODEL_UNLIKE = "the run's own model, unlike every step"
    UNREADABLE = "cannot be read"
    INCOMPLETE = "incomplete"
    UNSUPPORTED = "an unsupported format"
    NOT_A_CHECKPOINT = "not a checkpoint"


# Reasons that are globs of names.
UNSELECTED = (Reason.EXCLUDED, Reason.NOT_INCLUDED)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one entry and why, with the name of the rule that decided."""

    outcome: Outcome
    reason: Reason
    rule: str = ""
    detail: str = ""  # the particulars for people, such as the other name

    def __str__(self) -> str:
        return self.detail or self.reason.value


APPENDED = Verdict(Outcome.STEP, Reason.APPENDED, "appended")


def skipped(reason: Reason, detail: str = "") -> Verdict:
    """Return the verdict that an entry is left out, which is reported."""
    return Verdict(Outcome.SKIPPED, reason, detail=detail)


def alias(reason: Reason, detail: str = "") -> Verdict:
    """Return the verdict that an entry is another name or copy of a step, or an earlier state."""
    return Verdict(Outcome.ALIAS, reason, detail=detail)


def other(reason: Reason = Reason.NOT_A_CHECKPOINT) -> Verdict:
    """Return the verdict that an entry is not a checkpoint, which is not reported."""
    return Verdict(Outcome.OTHER, reason)


@dataclass(frozen=True, slots=True)
class Judged:
    """An entry of the run and its verdict; each entry has exactly one."""

    path: Path
    name: str  # of its path, or of the Hub's revision
    verdict: Verdict

    @property
    def is_left_out(self) -> bool:
        """Whether users should know that it does not take part."""
        return self.verdict.outcome in (Outcome.ALIAS, Outcome.SKIPPED, Outcome.REFUSED)


Subject = TypeVar("Subject")
Context = TypeVar("Context")
Rules = Sequence[tuple[str, Callable[[Subject, Context], Verdict | None]]]


def judge(rules: Rules[Subject, Context], one: Subject, context: Context) -> Verdict | None:
    """Return the verdict of the first rule that decides; None if none does."""
    verdicts = ((name, rule(one, context)) for name, rule in rules)
    return next((replace(verdict, rule=name) for name, verdict in verdicts if verdict), None)
