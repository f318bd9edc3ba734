"""Files below URIs: listed once, and read by ranges through a client.

Small reads come from `Blocks`, the bytes of tensors from a `RemotePool`.
"""

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.storage.blocks import BLOCK_BYTES, Blocks
from ckpt_ema.storage.client import Client, RemoteFile
from ckpt_ema.storage.failures import unreadable
from ckpt_ema.storage.protocol import FilePool, Identity, Kind, Location
from ckpt_ema.storage.remote_pool import RemotePool
from ckpt_ema.storage.small_files import read_small

_MOST_LISTED = 1000  # files below a folder


def client_for(scheme: str) -> Client:
    """Return a client for the URIs of a scheme."""
    if scheme == "hf":
        from ckpt_ema.storage.hub import Hub

        return Hub()
    from ckpt_ema.storage.objects import Objects

    return Objects()


@dataclass
class _Tree:
    """What is below one root, by name relative to it; the root itself has the empty name."""

    files: dict[str, RemoteFile]
    folders: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.files:
            while name:
                folder, name_in_it = posixpath.split(name)
                held = self.folders.setdefault(folder, set())
                if name_in_it in held:
                    break
                held.add(name_in_it)
                name = folder

    def below(self, folder: str, prefix: str, depth: int | None) -> Iterator[str]:
        """Yield the names of the files below a folder, each after a prefix."""
        inside = sorted(self.folders.get(folder, ()))
        for name in inside:
            if posixpath.join(folder, name) in self.files:
                yield prefix + name
        for name in inside if depth != 0 else ():
            rest = None if depth is None else depth - 1
            yield from self.below(posixpath.join(folder, name), f"{prefix}{name}/", rest)


class Remote:
    """A `Storage` for the URIs of one scheme."""

    is_remote = True

    def __init__(self, scheme: str, make_client: Callable[[str], Client] = client_for) -> None:
        self._scheme, self._make_client = scheme, make_client
        self._roots: list[str] = []  # URIs below which files are listed
        self._trees: dict[str, _Tree] = {}

    def anew(self) -> "Remote":
        """Return a storage for the same scheme in which nothing is listed yet."""
        return Remote(self._scheme, self._make_client)

    @cached_property
    def client(self) -> Client:
        """The client, created for the first request."""
        return self._make_client(self._scheme)

    @cached_property
    def _blocks(self) -> Blocks:
        return Blocks(self.client)

    def add_root(self, uri: Location) -> None:
        """Add a URI given by the user; what is below it is listed on first use."""
        text = os.fspath(uri).rstrip("/")
        if not any(_is_below(text, root) for root in self._roots):
            self._roots.append(text)

    def _find(self, path: Location) -> tuple[str, _Tree, str]:
        """Return the root above a path, what is below that root, and the path relative to it.

        A path above the roots is a folder that holds nothing but them. A path beside them is never
        listed and counts as absent, except in the folder of a root that is a file.
        """
        text = os.fspath(path).rstrip("/")
        root = next((one for one in self._roots if _is_below(text, one)), None)
        if root is None and (folder := self._folder_of_file(text)):
            with suppress(RefusedError):  # it was not asked for
                self._trees[folder] = _Tree({one.name: one for one in self.client.files(folder)})
                self._roots.append(folder)
                root = folder
        if root is None:
            below = (one[len(text) + 1 :] for one in self._roots if _is_below(one, text))
            return text, _Tree({}, {"": {name.split("/")[0] for name in below}}), ""
        if root not in self._trees:
            self._trees[root] = _Tree({file.name: file for file in self.client.files(root)})
        return root, self._trees[root], text[len(root) + 1 :]

    def _folder_of_file(self, path: str) -> str | None:
        """Return the folder of a root that is a file, if a path is it or below it."""
        files = (root for root, tree in self._trees.items() if "" in tree.files)
        folders = {posixpath.dirname(root) for root in files}
        return next((one for one in folders if _is_below(path, one)), None)

    def _file(self, path: Location) -> tuple[str, RemoteFile]:
        """Return a file and the URI that was listed for it; raises `IncompleteError` if absent."""
        root, tree, name = self._find(path)
        if name not in tree.files:
            raise IncompleteError(f"{path} does not exist.", code=Code.NOT_FOUND, path=path)
        return root, tree.files[name]

    def kind(self, path: Location) -> Kind:
        """See `Storage.kind`."""
        _, tree, name = self._find(path)
        if name in tree.files:
            return Kind.FILE
        return Kind.FOLDER if tree.folders.get(name) else Kind.ABSENT

    def is_folder(self, path: Location) -> bool:
        """See `Storage.is_folder`."""
        return self.kind(path) is Kind.FOLDER

    def names(self, folder: Location) -> set[str]:
        """See `Storage.names`."""
        _, tree, name = self._find(folder)
        if name not in tree.folders:
            raise RefusedError(f"{folder} is not a folder.", code=Code.INACCESSIBLE, path=folder)
        return set(tree.folders[name])

    def can_list(self, _folder: Location) -> bool:
        """See `Storage.can_list`."""
        return True

    def is_link(self, _path: Location) -> bool:
        """See `Storage.is_link`."""
        return False

    def exists(self, path: Location) -> bool:
        """See `Storage.exists`."""
        return self.kind(path) is not Kind.ABSENT

    def files_below(self, folder: Location, most_depth: int | None = None) -> Iterator[str]:
        """See `Storage.files_below`; with a depth it ends after a thousand files."""
        _, tree, name = self._find(folder)
        found = tree.below(name, "", most_depth)
        return found if most_depth is None else islice(found, _MOST_LISTED)

    def file_id(self, path: Location) -> object:
        """See `Storage.file_id`."""
        return os.fspath(path)

    def real_paths(self, paths: Iterable[Location]) -> list[str]:
        """See `Storage.real_paths`."""
        return [os.fspath(path) for path in paths]

    def identity(self, path: Location) -> Identity:
        """See `Storage.identity`."""
        return _identity(self._file(path)[1])

    def read(self, path: Location, most_bytes: int | None = None) -> bytes | None:
        """See `Storage.read`."""
        return read_small(self, path, most_bytes)

    def range_of(self, root: str, file: RemoteFile, start: int, count: int) -> bytes:
        """Return a range of a file that was listed below `root`."""
        if count > BLOCK_BYTES:
            return self.client.read(root, file, start, count)
        return self._blocks.read(root, file, start, count, self._trees[root].files.values())

    @contextmanager
    def open(self, path: Location) -> Iterator["RemoteOpenFile"]:
        """See `Storage.open`."""
        root, file = self._file(path)
        yield RemoteOpenFile(os.fspath(path), _identity(file), self, root, file)

    def pool(
        self,
        expected: Mapping[str, Identity],
        read_in_turn: int = 1,  # noqa: ARG002 - the fold bounds what is requested
    ) -> FilePool:
        """See `Storage.pool`."""
        return RemotePool(self.client, {path: self._file(path) for path in expected})


def _is_below(path: str, root: str) -> bool:
    """Return whether a URI is another one or below it."""
    return f"{path}/".startswith(f"{root}/")


def _identity(file: RemoteFile) -> Identity:
    return Identity(file.size_bytes, file.mtime_ns, file.tag)


@dataclass(frozen=True)
class RemoteOpenFile:
    """An `OpenFile` whose reads are requests."""

    path: str
    identity: Identity
    storage: Remote
    root: str
    file: RemoteFile

    def read(self, count: int, offset: int) -> bytes:
        """See `OpenFile.read`."""
        if offset + count > self.file.size_bytes:
            raise unreadable(self.path, 0, self.file.size_bytes)
        return self.storage.range_of(self.root, self.file, offset, count)

    def first_hole(self) -> int | None:
        """See `OpenFile.first_hole`; remote files have no holes."""
        return None
