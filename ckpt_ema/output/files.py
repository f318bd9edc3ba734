"""A file beside the output, such as a page about it: replaced whole or left as it was."""

import os
from pathlib import Path

from ckpt_ema.output.workspace import hidden_sibling, remove, write_all


def replace_file(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file, replacing any that exists; a link keeps leading to it. Raises `OSError`."""
    final = Path(os.path.realpath(path))
    temporary = hidden_sibling(final)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            write_all(fd, content)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, final)
    except BaseException:
        remove(temporary)
        raise
