"""Turns obstore's errors into ours: one line each, without credentials.

Their text quotes addresses and answers of servers, which may contain signatures. So they are not
chained, and of an answer only the status and the error code are shown.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from importlib import import_module

from ckpt_ema.errors import CkptEmaError, Code, FailedError, RefusedError
from ckpt_ema.storage import failures

_HINTS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE with boto3 installed, "
    "or AWS_SKIP_SIGNATURE=true for a public bucket; and AWS_REGION or AWS_ENDPOINT_URL.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account, or "
    "GOOGLE_SKIP_SIGNATURE=true for a public bucket.",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or "
    "AZURE_STORAGE_SAS_TOKEN, or AZURE_SKIP_SIGNATURE=true for a public container.",
}
_STATUS = re.compile(r"non-2xx status code: (\d{3})\b[^\n]*?(?:<Code>(\w+)</Code>|\n|$)")
# Where machines in a cloud get credentials from, which is asked if there are no others.
_OF_THE_MACHINE = re.compile(
    r"//(169\.254\.|metadata\.google\.)|/latest/(api/token|meta-data)|token request"
)
# The kind of the error and the request, with its address, stand before the reason.
_BEFORE_REASON = re.compile(r"^(Generic \w+ error: )*(Error performing .* - )?")
_USER = re.compile(r"//[^/\s@]*@")


class Operation(Enum):
    """What was being done: the same status means different things."""

    OPENING = "opening"
    LISTING = "listing"
    READING = "reading"  # of what was listed


@contextmanager
def translated(uri: str, operation: Operation) -> Iterator[None]:
    """Turn errors of obstore and boto3 into ours."""
    try:
        yield
    except _classes() as error:
        raise _ours(uri, operation, error) from None


def refused(uri: str, reason: str, code: Code = Code.INACCESSIBLE, hint: str = "") -> RefusedError:
    """Return the refusal of a URI."""
    return RefusedError(
        f"cannot access {_shown(uri)}: {reason}.", hint, code=code, path=_shown(uri)
    )


def _hint_of(uri: str) -> str:
    """Return which credentials to set."""
    return _HINTS[uri.partition(":")[0]]


def unreadable(uri: str, reason: str) -> FailedError:
    """Return the error of a read that gives no bytes."""
    message = f"{_shown(uri)} cannot be read: {reason}."
    return FailedError(message, code=Code.READ_FAILED, path=_shown(uri))


def changed(uri: str) -> FailedError:
    """Return the error of an object that is not the one that was listed."""
    return failures.changed(_shown(uri))


def _classes() -> tuple[type[Exception], ...]:
    found = [import_module("obstore.exceptions").BaseError, FileNotFoundError, ValueError]
    with suppress(ImportError):
        found.append(import_module("botocore.exceptions").BotoCoreError)
    return tuple(found)


def _path_errors() -> tuple[type[Exception], ...]:
    return ValueError, import_module("obstore.exceptions").InvalidPathError


def _ours(uri: str, operation: Operation, error: Exception) -> CkptEmaError:
    text = str(error).partition("\n\nDebug source")[0]
    answer = _STATUS.search(text)
    if _OF_THE_MACHINE.search(text):
        return refused(uri, "no valid credentials were found", hint=_hint_of(uri))
    if answer:
        return _of_an_answer(uri, operation, int(answer[1]), answer[2])
    if operation is not Operation.OPENING and isinstance(error, _path_errors()):
        return refused(uri, _line(text.replace("\n", "\\n")), Code.UNSAFE)  # the key is in it
    if operation is Operation.OPENING or "redirect" in text:
        # Of a variable that cannot be parsed the value is quoted.
        return refused(uri, re.sub('"[^"]*"', "a value", _line(text)), hint=_hint_of(uri))
    return unreadable(uri, _line(text))


def _of_an_answer(uri: str, operation: Operation, status: int, code: str | None) -> CkptEmaError:
    if operation is Operation.READING and status in (404, 412, 416):
        return changed(uri)
    if status == 404:
        reason = f"the bucket {uri.split('/')[2]} does not exist"
        return refused(uri, reason, Code.NOT_FOUND, _hint_of(uri))
    said = f"the store answered {status}" + (f" ({code})" if code else "")
    if status in (401, 403):
        return refused(uri, said, hint=_hint_of(uri))
    return unreadable(uri, said)


def _line(text: str) -> str:
    """Return the reason in the first line of an error, without addresses' queries and users."""
    reason = _BEFORE_REASON.sub("", text.partition("\n")[0])
    return _USER.sub("//", reason).partition("?")[0].rstrip(". ")


def _shown(uri: str) -> str:
    """Return a URI without what follows a question mark, which may be a signature."""
    return uri.partition("?")[0]
