"""A trainer that saves slowly and rotates, and a clock on which it works while a watch sleeps."""

import shutil
from collections.abc import Iterator
from pathlib import Path


class Trainer:
    """Saves copies of whole checkpoints into a run, in pieces, and keeps a few of them."""

    def __init__(
        self, whole: Path, run: Path, limit: int = 0, *, last: str = "", is_eager: bool = False
    ) -> None:
        """Keep the `limit` newest of the checkpoints in `whole`, or all.

        Files whose names contain `last` are written last. An eager one deletes before it saves.
        """
        self.whole, self.run = whole, run
        self.names = sorted((one.name for one in whole.iterdir()), key=lambda name: _step(name))
        self._limit, self._last, self._is_eager = limit, last, is_eager

    def saves(self, *names: str) -> Iterator[None]:
        """Save checkpoints, by default all, and yield wherever time passes."""
        for name in names or self.names:
            if self._is_eager:
                self._rotate(self._limit - 1)
            yield from self.save(name)
            if not self._is_eager:
                self._rotate(self._limit)
            yield  # the second look finds it as it was
            yield

    def save(self, name: str) -> Iterator[None]:
        """Save one checkpoint: of each file the first half, then all of it."""
        source, target = self.whole / name, self.run / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            target.mkdir(exist_ok=True)
            yield
        for file in self._files(source):
            path = target / file.relative_to(source) if source.is_dir() else target
            path.parent.mkdir(exist_ok=True)
            content = file.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            yield
            path.write_bytes(content)
            shutil.copystat(file, path)
            yield

    def put(self, *names: str) -> None:
        """Have these checkpoints, whole."""
        for name in names:
            for _ in self.save(name):
                pass

    def remove(self, *names: str) -> None:
        """Delete checkpoints."""
        for name in names:
            path = self.run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _files(self, source: Path) -> list[Path]:
        files = [one for one in sorted(source.rglob("*")) if one.is_file()] or [source]
        return sorted(files, key=lambda one: bool(self._last) and self._last in one.name)

    def _rotate(self, keep: int) -> None:
        if self._limit:
            there = sorted((one.name for one in self.run.glob("*[0-9]*")), key=_step)
            self.remove(*there[: len(there) - keep])


def _step(name: str) -> int:
    return int("".join(filter(str.isdigit, name)))


class Clock:
    """Stands for the module `time`: what others do happens while one sleeps, and takes no time."""

    def __init__(self, doing: Iterator[object] | None = None) -> None:
        self.doing, self.now, self.looks = doing, 1000.0, 0

    def monotonic(self) -> float:
        """Return the time, which only sleeping changes."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let others do their next thing; a test in which nothing happens any more fails."""
        self.now += seconds
        self.looks += 1
        assert self.looks < 2000
        if self.doing is not None:
            next(self.doing, None)
