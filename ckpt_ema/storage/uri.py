"""Paths of checkpoints: on a file system, or URIs of a remote storage."""

import os
import re
from pathlib import Path, PosixPath

from ckpt_ema.errors import Code, OptionError
from ckpt_ema.storage.protocol import Location

SCHEMES = ("s3", "gs", "az", "hf")
_URI = re.compile(rf"^(?P<scheme>{'|'.join(SCHEMES)}):(?=/|$)")
# The name of a repository of the Hub, and of a revision of it.
REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
REVISION = r"refs/(?:pr|convert)/[^/]+|[^/]+"
_OTHER = re.compile(r"^[a-z][a-z0-9+.-]*://")


class URI(PosixPath):
    """A path whose text is a URI, `s3://bucket/run`; only a `Storage` knows what is there."""

    def __str__(self) -> str:
        """Return the URI."""
        return super().__str__().replace(":/", "://", 1)


def scheme_of(location: Location) -> str:
    """Return the scheme of a URI; empty for a path on a file system.

    >>> scheme_of("s3://bucket/run"), scheme_of("runs/a:b")
    ('s3', '')
    """
    match = _URI.search(os.fspath(location))
    return match["scheme"] if match else ""


def path_of(location: Location) -> Path:
    """Return a path or a URI as an object.

    >>> path_of("hf://org/repo@step*").name
    'repo@step*'
    """
    if not scheme_of(location):
        text = os.fspath(location)
        if other := _OTHER.search(text):
            read = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            message = f"{other[0]} is not supported; use {read}."
            raise OptionError(message, code=Code.INVALID_OPTION)
        return Path(location)
    return URI(location)


def absolute(path: Location) -> str:
    """Return the text of a path that does not depend on the current folder."""
    return os.fspath(path) if scheme_of(path) else os.path.abspath(path)


def common_folder(paths: list[Path]) -> Path:
    """Return the deepest folder that holds all of some paths."""
    return path_of(os.path.commonpath([absolute(path) for path in paths]))


def suggestion(text: str) -> str | None:
    """Return the URI of a repository if a text could be its name; None for any other text.

    >>> suggestion("EleutherAI/pythia-14m"), suggestion("./runs/first")
    ('hf://EleutherAI/pythia-14m', None)
    """
    pattern = rf"{REPO}(?:@(?:{REVISION}))?"
    return f"hf://{text}" if re.fullmatch(pattern, text, re.ASCII) else None
