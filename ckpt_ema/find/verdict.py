"""What becomes of each entry of a run, and why."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Outcome(Enum):
    """What an entry turned out to be."""

    STEP = "step"  # a checkpoint of the run
    ALIAS = "alias"  # another name of a step, or a step under a name without a number
    SKIPPED = "skipped"  # weights that do not take part; said to the user
    REFUSED = "refused"  # a checkpoint that cannot be read
    OTHER = "other"  # no checkpoint


class Reason(Enum):
    """Why an entry has its verdict; the values are stable and shown to people."""

    NUMBERED = "numbered"
    LATER_THAN_LAST = "a later step than the last numbered one"
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
    MODULE = "a module of a model"
    AVERAGE = "already an average"
    OWN_OUTPUT = "an output of ckpt-ema"
    WEIGHTS_ELSEWHERE = "its weights are in another file"
    NOT_REGULAR = "neither a regular file nor a folder"
    NOT_LISTABLE = "it cannot be listed"
    BROKEN_LINK = "a link that leads nowhere"
    NO_MODEL = "no model weights in it"
    NO_NUMBER = "no number in its name"
    BESIDE_FILE = "a folder beside a file of its name"
    ONLY_ONE = "the only one of its name"
    SAME_STEP = "the same step as another"
    SAME_FILE = "the same file as another"
    COPY = "a copy of a step"
    COPY_OF_BEST = "a copy of the best step"
    EARLIER = "an earlier step"
    ANOTHER_MODEL = "another model than the steps'"
    OWN_MODEL = "the run's own model, not a step"
    UNREADABLE = "it cannot be read"
    INCOMPLETE = "incomplete"
    UNSUPPORTED = "a format that is not read"
    NO_CHECKPOINT = "no checkpoint"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one entry. `rule` names the rule that decided, `detail` the particulars."""

    outcome: Outcome
    reason: Reason
    rule: str
    detail: str = ""  # such as the other name; may be empty

    def __str__(self) -> str:
        return self.detail or self.reason.value


@dataclass(frozen=True, slots=True)
class Judged:
    """An entry of the run, by its path, and its verdict; each entry has exactly one."""

    path: Path
    name: str
    verdict: Verdict

    @property
    def is_left_out(self) -> bool:
        """Whether users should know that it does not take part."""
        return self.verdict.outcome in (Outcome.ALIAS, Outcome.SKIPPED, Outcome.REFUSED)
