"""The errors of files that change or cannot be read, in the same words for every storage."""

import os

from ckpt_ema.errors import Code, FailedError


def unreadable(path: str, code: int, offset: int) -> FailedError:
    """Return the error of a read at `offset`; `code` is its errno, 0 where the file ends."""
    if code:
        message = f"{path} cannot be read: {os.strerror(code)}."
        return FailedError(message, code=Code.READ_FAILED, path=path)
    message = f"{path} ended at byte {offset} while being read."
    hint = "It was replaced or truncated meanwhile; nothing was published."
    return FailedError(message, hint, code=Code.CHANGED, path=path)


def changed(path: str) -> FailedError:
    """Return the error of a file that is not the one whose header was read."""
    message = f"{path} changed or vanished since the plan was made."
    hint = "Is the run still being saved or rotated? Nothing was published; run it again."
    return FailedError(message, hint, code=Code.CHANGED, path=path)
