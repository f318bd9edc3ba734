"""Every error that ckpt-ema raises on purpose; it imports nothing of the package.

CkptEmaError            exit code 1
├── OptionError         2  the call contradicts itself or names an impossible value
├── RefusedError        3  the inputs, or what is at the output path, rule the average out
│   └── IncompleteError 3  a checkpoint is incomplete, for example after an interrupted save
└── FailedError         1  the machine failed while running; a retry may help
"""

import os
import re
from collections.abc import Iterable
from enum import Enum

_LONGEST_WORD, _LONGEST_MESSAGE = 200, 4000


class Code(Enum):
    """What an error or a warning is about. The values are stable: scripts may compare them."""

    # Options and the environment.
    INVALID_OPTION = "invalid-option"
    CONFLICTING_OPTIONS = "conflicting-options"
    MISSING_DEPENDENCY = "missing-dependency"
    DEVICE_UNAVAILABLE = "device-unavailable"
    # Paths and files.
    NOT_FOUND = "not-found"
    INACCESSIBLE = "inaccessible"
    NOT_A_FILE = "not-a-file"
    READ_FAILED = "read-failed"
    CHANGED = "changed"
    # Which checkpoints.
    NO_CHECKPOINTS = "no-checkpoints"
    NOT_A_CHECKPOINT = "not-a-checkpoint"
    UNSUPPORTED_FORMAT = "unsupported-format"
    SEVERAL_RUNS = "several-runs"
    SEVERAL_SERIES = "several-series"
    SEVERAL_MODELS = "several-models"
    UNKNOWN_ORDER = "unknown-order"
    CONTRADICTORY_STEPS = "contradictory-steps"
    SAME_STEP = "same-step"
    GIVEN_TWICE = "given-twice"
    NO_STEPS = "no-steps"
    NO_SUCH_STEP = "no-such-step"
    NO_MATCH = "no-match"
    NOTHING_SELECTED = "nothing-selected"
    NO_METRIC = "no-metric"
    WRONG_WEIGHTS = "wrong-weights"
    INCOMPLETE = "incomplete"
    # What a file holds.
    CUT_SHORT = "cut-short"
    DAMAGED = "damaged"
    WRONG_FORMAT = "wrong-format"
    UNSAFE = "unsafe"
    NO_MODEL = "no-model"
    PICKLED_OBJECT = "pickled-object"
    UNREADABLE_TENSOR = "unreadable-tensor"
    # Whether checkpoints go together.
    DIFFERENT_MODELS = "different-models"
    DIFFERENT_DTYPES = "different-dtypes"
    DIFFERENT_CONFIGS = "different-configs"
    DIFFERENT_NAMES = "different-names"
    NOT_AVERAGEABLE = "not-averageable"
    EMPTIED = "emptied-tensors"
    DUPLICATES = "duplicates"
    NONFINITE = "nonfinite"
    OVERFLOW = "overflow"
    # The output and the work.
    OUTPUT_OVERLAPS_INPUT = "output-overlaps-input"
    OUTPUT_EXISTS = "output-exists"
    OUTPUT_IN_USE = "output-in-use"
    INVALID_OUTPUT = "invalid-output"
    WRITE_FAILED = "write-failed"
    OUT_OF_MEMORY = "out-of-memory"
    PARTS_MISSING = "parts-missing"
    PARTS_DISAGREE = "parts-disagree"
    NO_PARTS = "no-parts"
    NO_MANIFEST = "no-manifest"
    NOT_AS_CLAIMED = "not-as-claimed"
    SOURCES_GONE = "sources-gone"
    NO_STATE = "no-state"
    NOT_EXTENDABLE = "not-extendable"
    FOLDED_BEFORE = "folded-before"
    STATE_DIFFERS = "state-differs"
    MISSED = "missed"
    LAUNCH_ENVIRONMENT = "launch-environment"
    RANK_FAILED = "rank-failed"
    # Evaluations of averages.
    EVALUATION_FAILED = "evaluation-failed"
    EVALUATION_WROTE = "evaluation-wrote"
    SAME_METRIC = "same-metric"
    # Warnings and notes.
    LEFT_OUT = "left-out"
    FEW_CHECKPOINTS = "few-checkpoints"
    OUT_OF_ORDER = "out-of-order"
    ALREADY_AVERAGED = "already-averaged"
    ADAPTER_FACTORS = "adapter-factors"
    NO_EFFECT = "no-effect"
    UNEVEN_WEIGHTS = "uneven-weights"
    UNEVEN_GAPS = "uneven-gaps"
    SAME_WEIGHTS = "same-weights"
    NOT_AVERAGED = "not-averaged"
    NOT_A_WEIGHT = "not-a-weight"
    CANCELLED = "cancelled"
    STANDS_OUT = "stands-out"
    OTHER_WEIGHTS = "other-weights"
    NO_CONFIG = "no-config"
    NOT_REMOVED = "not-removed"
    HOLES = "holes"
    ZEROS = "zeros"
    NOT_COMPILED = "not-compiled"
    DECIDED = "decided"


class CkptEmaError(Exception):
    """Base class: catch it to catch every error that this library raises on purpose.

    `code` says what went wrong, `path` and `tensor` where, `hint` what to do about it. The message
    is one sentence; control characters, which names in files may contain, are escaped in it.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        hint: str = "",
        *,
        code: Code,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
    ) -> None:
        self.message, self.hint = printable(message), printable(hint)
        super().__init__(self.message)
        self.code = code
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class OptionError(CkptEmaError, ValueError):
    """An option has an impossible value, or two options contradict each other."""

    exit_code = 2


class RefusedError(CkptEmaError):
    """The inputs cannot be averaged as asked, or the output path is taken."""

    exit_code = 3


class IncompleteError(RefusedError):
    """A checkpoint is incomplete: a file is missing, empty or cut short."""


class FailedError(CkptEmaError):
    """Reading, folding or writing failed on this machine; nothing was published."""


def some(names: Iterable[object], limit: int = 5) -> str:
    """List at most `limit` names for a message, and how many there are in all.

    >>> some(["a", "b", "c"], limit=2)
    'a, b, ... (3 in all)'
    """
    found = [printable(name) for name in names]
    shown = ", ".join(found[:limit])
    return shown if len(found) <= limit else f"{shown}, ... ({len(found)} in all)"


def printable(text: object) -> str:
    """Escape control characters in `text`, and shorten very long words and very long texts.

    >>> printable("a\\x1b[31mb"), len(printable("a" * 1000))
    ('a\\\\x1b[31mb', 200)
    """
    long_word = rf"\S{{{_LONGEST_WORD + 1},}}"
    words = re.sub(long_word, lambda m: _shortened(m[0], _LONGEST_WORD), escaped(str(text)))
    return words if len(words) <= _LONGEST_MESSAGE else _shortened(words, _LONGEST_MESSAGE)


def escaped(text: str) -> str:
    """Escape control characters in `text`, however long it is."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _shortened(text: str, limit: int) -> str:
    """Leave out the middle of `text`; its end tells more than its beginning."""
    return f"{text[: limit * 3 // 10]}...{text[-(limit * 7 // 10 - 3) :]}"


def flag(name: str) -> str:
    """Name an option as it is written on the command line.

    >>> flag("skip_incomplete"), flag("from_step")
    ('--skip-incomplete', '--from')
    """
    taken = {
        "from_step": "--from",
        "to_step": "--to",
        "evaluate": "--eval",
    }  # names of Python's own
    return taken.get(name) or "--" + name.replace("_", "-")


def counted(number: int, thing: str) -> str:
    """Return a number of things.

    >>> counted(1, "tensor"), counted(2, "tensor")
    ('1 tensor', '2 tensors')
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"
