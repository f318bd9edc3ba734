"""The candidates of a selection, in a hidden folder beside the output that an interruption keeps.

They are evaluated there, and the best is given the output's name. What was made and evaluated is
noted in a file of lines, so that another run makes and evaluates only what is missing.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt_ema.output.publish import StagedOutput
from ckpt_ema.output.shape import COUNT, NUMBER, TEXT, fits
from ckpt_ema.output.workspace import as_failure, hidden_sibling, remove, write_all
from ckpt_ema.trainers.conventions import CARD_NAME, MANIFEST_NAME

if TYPE_CHECKING:
    from typing_extensions import Self

_KEY = "select"
_CANDIDATES = "candidates"
_NOTES = "evaluations"  # not LINES, which are void without an unpublished output

# The lines of the notes.
_MADE = {"made": TEXT, "folder": TEXT, "files": {...: [COUNT]}, "manifest": {}}
_EVALUATED = {"evaluated": TEXT, "by": TEXT, "metrics": {...: NUMBER}, "seconds": NUMBER}

Files = Mapping[str, tuple[int, ...]]  # size in bytes and time in ns, by name in the folder


class Evaluated(NamedTuple):
    """What evaluating one average gave, or why it failed."""

    metrics: Mapping[str, float] = {}
    failure: str = ""
    seconds: float = 0.0


class _Made(NamedTuple):
    fingerprint: str
    files: Files
    manifest: Mapping[str, Any]


class Changes(NamedTuple):
    """What differs in a folder from what was made."""

    altered: tuple[str, ...]  # files that have other bytes, or are gone
    added: tuple[str, ...]


class Candidates(StagedOutput):
    """The hidden folder of an output's candidates, locked; kept while it holds any."""

    def __init__(self, final: Path, overwrite: bool, *, sync: bool) -> None:
        """See `StagedOutput`."""
        super().__init__(final, _KEY, overwrite, sync=sync)
        self._notes = self.path / _NOTES
        self._made: dict[str, _Made] = {}  # by folder
        self._evaluated: dict[tuple[str, str], Evaluated] = {}

    def __enter__(self) -> "Self":
        super().__enter__()
        self.kept = True
        try:
            self._read_notes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _read_notes(self) -> None:
        for line in self._lines():
            if fits(line, _MADE):
                files = {name: tuple(one) for name, one in line["files"].items()}
                self._made[line["folder"]] = _Made(line["made"], files, line["manifest"])
            elif fits(line, _EVALUATED):
                found = Evaluated(line["metrics"], seconds=line["seconds"])
                self._evaluated[line["evaluated"], line["by"]] = found

    def __exit__(self, *error: Any) -> None:
        self.kept = self.kept and self.has_any
        super().__exit__(*error)

    @property
    def has_any(self) -> bool:
        """Whether candidates were made, which another run may take over."""
        return self.folder.exists()

    @property
    def folder(self) -> Path:
        """Where each candidate has a folder."""
        return self.path / _CANDIDATES

    def _lines(self) -> list[Any]:
        """Return what was noted; a killed run may have cut its last line."""
        with as_failure(self._notes):
            text = self._notes.read_text(errors="replace") if self._notes.exists() else ""
        found = []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def _note(self, line: Mapping[str, Any]) -> None:
        """Append a line, durably; it begins with a line break, since the last may be cut."""
        with as_failure(self._notes), self.open_file(self._notes) as fd:
            write_all(fd, b"\n" + json.dumps(line).encode(), os.fstat(fd).st_size)

    def note_made(self, fingerprint: str, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Note an average that has just been made in a folder: its files, and its manifest."""
        name, files = self._name(folder), files_in(folder)
        self._made[name] = _Made(fingerprint, files, manifest)
        self._note({"made": fingerprint, "folder": name, "files": files, "manifest": manifest})

    def _name(self, folder: Path) -> str:
        return os.path.relpath(folder, self.path)

    def manifest(self, folder: Path) -> Mapping[str, Any]:
        """Return the manifest of the average that was made in a folder."""
        return self._made[self._name(folder)].manifest

    def changes(self, fingerprint: str, folder: Path) -> Changes:
        """Compare a folder with what was noted when the average was made there."""
        made = self._made.get(self._name(folder))
        if made is None or made.fingerprint != fingerprint:
            return Changes((folder.name,), ())
        found = files_in(folder)
        # What publishing writes again may differ.
        names = made.files.keys() - {MANIFEST_NAME, CARD_NAME}
        altered = tuple(sorted(name for name in names if made.files[name] != found.get(name)))
        return Changes(altered, tuple(sorted(found.keys() - made.files.keys())))

    def evaluated(self, fingerprint: str, by: str) -> Evaluated | None:
        """Return what an evaluation of these bytes by this command gave, if it is known."""
        return self._evaluated.get((fingerprint, by))

    def note_evaluated(self, fingerprint: str, by: str, found: Evaluated) -> None:
        """Note the metrics of an average."""
        self._evaluated[fingerprint, by] = found
        line = {"evaluated": fingerprint, "by": by, "metrics": dict(found.metrics)}
        self._note({**line, "seconds": found.seconds})

    def move(self, made: Path, folder: Path) -> None:
        """Give an average that was made another folder, in the place of what is there."""
        remove(folder)
        with as_failure(folder):
            os.rename(made, folder)
        fingerprint, _, manifest = self._made[self._name(made)]
        self.note_made(fingerprint, folder, manifest)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove every candidate but these."""
        for name in os.listdir(self.folder):
            if name not in names:
                remove(self.folder / name)

    def publish_folder(self, folder: Path, files: Mapping[str, bytes]) -> None:
        """Publish a folder, with these files written into it; it stays a candidate if that fails.

        `folder` is that of a candidate or of all of them; names in `files` are relative to it.
        """
        remove(self.output)  # left by a run that was killed here
        with as_failure(self.final):
            os.rename(folder, self.output)
        try:
            for name, content in files.items():
                self.add(name, content)
            self.publish()
        except BaseException:
            if self.output.exists():
                os.rename(self.output, folder)
            raise
        self.kept = False


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and the time of every file, link and empty folder below a folder."""
    found = {}
    for path in folder.rglob("*"):
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder or not os.listdir(path):
            status = path.lstat()
            times = (0, 0) if is_folder else (status.st_size, status.st_mtime_ns)
            found[os.path.relpath(path, folder)] = times
    return found


def without(folder: Path, names: tuple[str, ...]) -> None:
    """Remove what was added to a folder, and the folders that this leaves empty."""
    for name in names:
        remove(folder / name)
    for home, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(home):
            os.rmdir(home)


def leftover(final: Path) -> Path | None:
    """Return the hidden folder of an output's candidates, if there is one."""
    path = hidden_sibling(Path(os.path.realpath(final)), _KEY)
    return path if path.exists() else None
