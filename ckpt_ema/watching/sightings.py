"""What was seen of a run: whether anything is new in it, and which checkpoints have settled."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from ckpt_ema.errors import CkptEmaError
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.storage import Storage
from ckpt_ema.storage.protocol import Identity, Kind

_Files = Mapping[str, Identity]  # by name
_MOST_UNFINISHED = 16  # folders without a model that are looked into
_DEEPEST_MODEL = 2  # folders below a checkpoint's own


class Listing:
    """The names in the folders of a run, which change when something is saved or deleted."""

    def __init__(self, run: Path) -> None:
        self._folders = [run]
        self._unfinished: list[Path] = []
        self._names: dict[Path, set[str]] | None = None

    def has_changed(self, storage: Storage) -> bool:
        """Return whether a name has come or gone since the last call; True at the first."""
        before = self._names
        self._names = {folder: _names_in(folder, storage) for folder in self._folders}
        for folder in self._unfinished:
            self._names[folder] = _names_in(folder, storage, _DEEPEST_MODEL)
        return self._names != before

    def follow(self, checkpoints: Iterable[Checkpoint], unfinished: Sequence[Path]) -> None:
        """Look also into the folders between the run and these checkpoints, and unfinished ones.

        A trainer makes the folder of a checkpoint first, and its model in it later.
        """
        run = self._folders[0]
        folders = {run: None}
        for parent in {checkpoint.path.parent for checkpoint in checkpoints}:
            inside = [one for one in (parent, *parent.parents) if run in one.parents]
            folders.update(dict.fromkeys(inside))
        few = [*unfinished[-_MOST_UNFINISHED:]]
        if [*folders] != self._folders or few != self._unfinished:
            self._folders, self._unfinished, self._names = [*folders], few, None


def _names_in(folder: Path, storage: Storage, depth: int = 0) -> set[str]:
    try:
        return {*storage.files_below(folder, depth)} if depth else storage.names(folder)
    except CkptEmaError:  # not there yet, or no longer
        return set()


class Sightings:
    """Checkpoints that are waited for, with their files as they were last seen."""

    def __init__(self) -> None:
        self._files: dict[Path, _Files] = {}
        self._names: dict[Path, str] = {}
        self._settled: set[Path] = set()
        self._refused: tuple[str, _Files] = ("", {})
        self.has_news = False  # whether the last look has seen something new or changed

    def look(self, storage: Storage) -> None:
        """See whether the files of the checkpoints that are waited for have changed."""
        before = self._files
        self._files = {path: _files_at(path, storage) for path in before}
        self._settled = {path for path, files in self._files.items() if files == before[path] != {}}
        self.has_news = self._files != before

    def expect(self, path: Path, name: str, storage: Storage) -> None:
        """Wait for a checkpoint until it is forgotten; if it is deleted before, it was missed."""
        if path not in self._files:
            self._files[path], self._names[path] = _files_at(path, storage), name
            self.has_news = True

    def settled(self, new: Sequence[Checkpoint], storage: Storage) -> list[Checkpoint]:
        """Return the oldest of these checkpoints whose files were the same at the last two looks.

        One that has changed is waited for, with all that are newer.
        """
        for one in new:
            self.expect(one.path, one.name, storage)
        return [*takewhile(lambda one: one.path in self._settled, new)]

    def is_final(self, error: CkptEmaError, storage: Storage) -> bool:
        """Return whether a second look has found the same error and the same files it is about.

        A checkpoint that is being saved may look like anything.
        """
        before = self._refused
        self._refused = (str(error), _files_at(Path(error.path), storage) if error.path else {})
        return self._refused == before

    def are_growing(self) -> bool:
        """Return whether none of the checkpoints that are waited for looks as it did before."""
        return bool(self._files) and not self._settled

    def waits(self) -> bool:
        """Return whether a checkpoint is waited for."""
        return bool(self._files)

    def forget(self, paths: Iterable[Path]) -> None:
        """Wait no longer for the checkpoints at some paths."""
        for path in paths:
            self._files.pop(path, None)
            self._names.pop(path, None)

    def vanished(self, storage: Storage) -> dict[Path, str]:
        """Return the checkpoints that were waited for and are gone, by path, with their names."""
        absent = (path for path in self._files if storage.kind(path) is Kind.ABSENT)
        return {path: self._names[path] for path in absent}


def _files_at(path: Path, storage: Storage) -> _Files:
    """Return the files of a checkpoint; none if one of them cannot be seen."""
    try:
        if not storage.is_folder(path):
            return {path.name: storage.identity(path)}
        names = storage.files_below(path)
        return {name: storage.identity(path / name) for name in names}
    except CkptEmaError:
        return {}
