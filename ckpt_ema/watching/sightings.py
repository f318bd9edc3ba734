"""What was seen of a run: whether anything is new in it, and which checkpoints have settled."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ckpt_ema.errors import CkptEmaError
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.storage import Storage
from ckpt_ema.storage.protocol import Identity, Kind

_Files = Mapping[str, Identity]  # by name


class Listing:
    """The names in the folders of a run, which change when something is saved or deleted."""

    def __init__(self, run: Path) -> None:
        self._folders = [run]
        self._names: dict[Path, set[str]] | None = None

    def has_changed(self, storage: Storage) -> bool:
        """Return whether a name has come or gone since the last call; True at the first."""
        before = self._names
        self._names = {folder: _names_in(folder, storage) for folder in self._folders}
        return self._names != before

    def follow(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Look also into the folders between the run and these checkpoints."""
        run = self._folders[0]
        folders = {run: None}
        for parent in {checkpoint.path.parent for checkpoint in checkpoints}:
            inside = [one for one in (parent, *parent.parents) if run in one.parents]
            folders.update(dict.fromkeys(inside))
        if [*folders] != self._folders:
            self._folders, self._names = [*folders], None


def _names_in(folder: Path, storage: Storage) -> set[str]:
    try:
        return storage.names(folder)
    except CkptEmaError:  # not there yet, or no longer
        return set()


class Sightings:
    """Checkpoints that are waited for, with their files as they were last seen."""

    def __init__(self) -> None:
        self._files: dict[Checkpoint, _Files] = {}

    def settled(self, new: Sequence[Checkpoint], storage: Storage) -> list[Checkpoint]:
        """Return the oldest of these checkpoints that look as they did at the last call.

        One that has changed is waited for, with all that are newer.
        """
        before = self._files
        self._files = {one: _files_of(one, storage) for one in new}
        settled: list[Checkpoint] = []
        for checkpoint, files in self._files.items():
            if not files or before.get(checkpoint) != files:
                break
            settled.append(checkpoint)
        return settled

    def waits(self) -> bool:
        """Return whether a checkpoint is waited for."""
        return bool(self._files)

    def forget(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Wait no longer for some checkpoints."""
        for one in checkpoints:
            self._files.pop(one, None)

    def vanished(self, storage: Storage) -> list[Checkpoint]:
        """Return the checkpoints that were waited for and are gone."""
        return [one for one in self._files if storage.kind(one.path) is Kind.ABSENT]


def _files_of(checkpoint: Checkpoint, storage: Storage) -> _Files:
    """Return the files of a checkpoint; none if one of them cannot be seen."""
    path = checkpoint.path
    try:
        if not storage.is_folder(path):
            return {path.name: storage.identity(path)}
        names = storage.files_below(path)
        return {name: storage.identity(path / name) for name in names}
    except CkptEmaError:
        return {}
