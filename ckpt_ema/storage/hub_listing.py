"""Lists a model repository on the Hugging Face Hub: revisions, their commits, their files.

A URI is `hf://org/repo`, optionally with `@revision` or `@GLOB` (of branches and tags) and with
`/folder`; a slash in a revision is written `%2F`. The Hub's answers are validated like any input.
"""

import itertools
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar
from urllib.parse import quote

from ckpt_ema.errors import some
from ckpt_ema.storage.client import RemoteFile
from ckpt_ema.storage.protocol import SMALL_REQUESTS
from ckpt_ema.storage.uri import REPO, REVISION
from ckpt_ema.storage.waiting import requesting
from ckpt_ema.storage.web import Web, WebError

T = TypeVar("T")

MOST_NAMES = 200_000  # of files and folders, in all trees of one listing
MOST_PAGES = 10_000  # of one tree; the Hub puts a thousand names on each
_MOST_JSON_BYTES = 1 << 26
_URI = re.compile(
    rf"hf://(?:models/)?(?P<repo>{REPO})(?:@(?P<revision>{REVISION}))?(?:/(?P<path>.+))?",
    re.ASCII | re.DOTALL,
)
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")
_COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_DIGEST = re.compile("[0-9A-Za-z:_-]{8,128}")  # of a file; mirrors have other ones


class AbsentError(WebError):
    """A URI that is malformed, or a revision that does not exist."""


class HubURI(NamedTuple):
    """What a URI names."""

    repo: str  # with its organization
    revision: str  # or a glob of them
    path: str  # of a folder or a file; empty for the whole repository

    @property
    def is_glob(self) -> bool:
        """Whether it names all revisions that match."""
        return any(character in self.revision for character in "*?[")


def parse_uri(uri: str) -> HubURI:
    """Return what a URI names; raises `AbsentError` if it is none.

    >>> parse_uri("hf://models/org/repo@step*/last")
    HubURI(repo='org/repo', revision='step*', path='last')
    """
    found = _URI.fullmatch(uri)
    if found is None:
        raise AbsentError("a URI of the Hub is hf://org/repo[@revision][/folder]")
    if found["repo"].startswith(("datasets/", "spaces/")):
        raise AbsentError("only models are read from the Hub")
    revision = re.sub("%2f", "/", found["revision"] or "main", flags=re.IGNORECASE)
    return HubURI(found["repo"], _safe(revision), _safe(found["path"]) if found["path"] else "")


class Listing:
    """Requests to the Hub's interface at `endpoint`; all its methods raise `WebError`."""

    def __init__(self, web: Web, endpoint: str) -> None:
        self._web, self._api = web, f"{endpoint}/api/models"

    def commits(self, uri: HubURI) -> dict[str, str]:
        """Return the commit of each revision that a URI names, by the folder that stands for it.

        The folder is empty if the URI is no glob. A slash in a revision becomes two hyphens.
        """
        if uri.is_glob:
            return self._matching(uri)
        if _COMMIT.fullmatch(uri.revision):
            return {"": uri.revision}
        revision = quote(uri.revision, safe="")
        answer, _ = self._json(f"{self._api}/{uri.repo}/revision/{revision}?expand=sha")
        return {"": _commit(answer, "sha")}

    def files(self, uri: HubURI, commits: dict[str, str]) -> list[RemoteFile]:
        """Return the files below a URI, or the one at it, at these commits of it.

        Names begin with the folder of their commit, if that has a name.
        """
        counted = itertools.count()

        def listed(folder: str) -> list[RemoteFile]:
            tree = self._tree(uri, commits[folder], counted)
            return [f._replace(name=f"{folder}/{f.name}") for f in tree] if folder else list(tree)

        if not uri.is_glob:
            return listed("") or self._lone_file(uri, commits[""], counted)
        with requesting(SMALL_REQUESTS) as pool:
            return [file for files in pool.map(listed, commits) for file in files]

    def _matching(self, uri: HubURI) -> dict[str, str]:
        refs, _ = self._json(f"{self._api}/{uri.repo}/refs")
        rows = _entry(refs, "branches", list) + _entry(refs, "tags", list)
        named = sorted((_entry(row, "name", str), _commit(row, "targetCommit")) for row in rows)
        commits: dict[str, str] = {}
        for name, commit in named:
            if fnmatchcase(name, uri.revision):
                folder = _safe(name).replace("/", "--")
                if commits.setdefault(folder, commit) != commit:
                    raise WebError(f"two of its revisions would both be called {folder}")
        if not commits:
            names = some(name for name, _ in named)
            raise AbsentError(f"no branch or tag matches {uri.revision}; it has {names}")
        return commits

    def _tree(self, uri: HubURI, commit: str, counted: Iterator[int]) -> Iterator[RemoteFile]:
        """Yield the files below a folder, with names relative to it; none if it is absent."""
        for file in self._rows(uri, commit, counted):
            if uri.path and not file.name.startswith(f"{uri.path}/"):
                raise WebError("the Hub lists files of another folder")
            yield file._replace(name=file.name[len(uri.path) :].lstrip("/"))

    def _lone_file(self, uri: HubURI, commit: str, counted: Iterator[int]) -> list[RemoteFile]:
        """Return the file at a path that is no folder, under the empty name."""
        if not uri.path:
            return []
        parent = uri._replace(path=uri.path.rpartition("/")[0])
        beside = self._rows(parent, commit, counted, "false")
        return [file._replace(name="") for file in beside if file.name == uri.path]

    def _rows(
        self, uri: HubURI, commit: str, counted: Iterator[int], recursive: str = "true"
    ) -> Iterator[RemoteFile]:
        """Yield the files of a folder, page by page, with their names in the repository."""
        url = f"{self._api}/{uri.repo}/tree/{commit}"
        url += f"/{quote(uri.path)}" if uri.path else ""
        query: str | None = f"recursive={recursive}&expand=false"
        for _ in range(MOST_PAGES):
            try:
                rows, query = self._json(f"{url}?{query}")
            except WebError as error:
                if uri.path and _is_absent_entry(error):
                    return
                raise
            for row in _of_kind(rows, list):
                if next(counted) >= MOST_NAMES:
                    raise WebError(f"it has more than {MOST_NAMES} files")
                if _entry(row, "type", str) == "file":
                    yield _remote_file(row, commit)
            if query is None:
                return
        raise WebError(f"its listing has more than {MOST_PAGES} pages")

    def _json(self, url: str) -> tuple[object, str | None]:
        """Return what a URL of the interface answers, and the query of the next page."""

        def attempt() -> tuple[bytes, str]:
            answer = self._web.get(url)
            return answer.read(_MOST_JSON_BYTES), answer.headers.get("Link", "")

        body, link = self._web.retried(attempt)
        # Only its query: the address itself may be at another host than the endpoint.
        following = re.search(r'<[^<>?]*\?([^<>]*)>\s*;\s*rel="?next\b', link)
        try:
            return json.loads(body), following and following[1]
        except (ValueError, RecursionError):
            raise WebError("the Hub's answer is not JSON") from None


def _of_kind(value: object, kind: type[T]) -> T:
    if type(value) is not kind:  # a bool is no int here
        raise WebError("the Hub's answer does not have the documented form")
    return value


def _entry(row: object, key: str, kind: type[T]) -> T:
    return _of_kind(_of_kind(row, dict).get(key), kind)


def _commit(row: object, key: str) -> str:
    commit = _entry(row, key, str)
    if not _COMMIT.fullmatch(commit):
        raise WebError("the Hub's answer has no commit hash")
    return commit


def _safe(name: str) -> str:
    """Return a name that is a relative path without control characters; raises for others."""
    if _UNPRINTABLE.search(name) or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise WebError(f"the name {name!r} is not a plain relative path")
    return name


def _remote_file(row: object, commit: str) -> RemoteFile:
    name, large = _safe(_entry(row, "path", str)), _of_kind(row, dict).get("lfs")
    content = row if large is None else large
    size_bytes, digest = _entry(content, "size", int), _entry(content, "oid", str)
    if not (0 <= size_bytes < 1 << 63 and _DIGEST.fullmatch(digest)):
        raise WebError(f"the Hub gives no size or digest of {name}")
    return RemoteFile(name, size_bytes, 0, f"{digest}@{commit}" if large is None else digest)


def _is_absent_entry(error: WebError) -> bool:
    """Return whether the repository and the commit exist, and the path does not."""
    return error.status == 404 and error.error_code in ("", "EntryNotFound")
