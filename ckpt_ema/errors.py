"""Every error that ckpt-ema raises on purpose; it imports nothing.

    CkptEmaError            exit code 1
    ├── OptionError         2  the call contradicts itself or names an impossible value
    ├── RefusedError        3  the inputs, or what is at the output path, rule the average out
    │   └── IncompleteError 3  a checkpoint is not whole, as one whose save was interrupted
    └── FailedError         1  the machine failed while running; trying again may help

A message is one sentence that names the file (and the tensor) and what was found and expected;
`hint` says what to do about it.
"""


class CkptEmaError(Exception):
    """Base class: catch it to catch every error that this library raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class OptionError(CkptEmaError, ValueError):
    """An option has an impossible value, or two options contradict each other."""

    exit_code = 2


class RefusedError(CkptEmaError):
    """The inputs cannot be averaged as asked, or the output path is taken."""

    exit_code = 3


class IncompleteError(RefusedError):
    """A checkpoint is not whole: a file is missing, empty or cut short."""


class FailedError(CkptEmaError):
    """Reading, folding or writing failed on this machine; nothing was published."""


def some(names: list[str], limit: int = 5) -> str:
    """At most `limit` names for a message, and how many there are beyond them."""
    shown = ", ".join(printable(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


def one_line(text: str) -> str:
    """`text` without control characters, however long."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable(text: object) -> str:
    """`text` without control characters, which a file or tensor name may smuggle in; not too long.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    cleaned = one_line(str(text))
    return cleaned if len(cleaned) <= 200 else f"{cleaned[:60]}...{cleaned[-137:]}"


def flag(name: str) -> str:
    """What an option is called on the command line.

    >>> flag("skip_incomplete"), flag("from_step")
    ('--skip-incomplete', '--from')
    """
    return _FLAGS.get(name) or "--" + name.replace("_", "-")


# `from` is a word of Python's own.
_FLAGS = {"from_step": "--from", "to_step": "--to"}
