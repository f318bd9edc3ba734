"""The frozen `Plan` of one or several averages: everything is decided before a tensor is read."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ckpt_ema.containers.specs import Specs
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.verdict import Judged
from ckpt_ema.notices import Notice
from ckpt_ema.options import Engine, Reading
from ckpt_ema.planning.average import Average, Folding, foldings_of
from ckpt_ema.planning.roles import Ruling, TensorRole, by_pattern
from ckpt_ema.planning.sizing import (
    KEPT_BYTES,
    element_bytes,
    fetched_elements,
    prefetched_bytes,
)
from ckpt_ema.planning.state import State
from ckpt_ema.planning.work import Work
from ckpt_ema.storage import Storage
from ckpt_ema.storage.protocol import REQUEST_BYTES


@dataclass(frozen=True, slots=True)
class PlannedCheckpoint:
    """One checkpoint of the plan and what its headers hold."""

    path: Path
    name: str  # for people
    step: int | None
    unit: str  # what `step` counts
    folder: Path  # what the file names in `specs` are relative to
    specs: Specs

    @classmethod
    def of(cls, one: Checkpoint, specs: Specs) -> "PlannedCheckpoint":
        """Return a checkpoint that was found, with its specs."""
        return cls(one.path, one.name, one.step, one.unit, one.model.folder, specs)

    @classmethod
    def of_state(cls, one: State) -> "PlannedCheckpoint":
        """Return the shadow of earlier checkpoints, which is read like a checkpoint."""
        newest = one.checkpoints[-1]
        return cls(one.path, one.label, newest.step, newest.unit, one.path.parent, one.specs)


@dataclass(frozen=True, slots=True)
class Plan:
    """One or several averages, decided. Checkpoints are oldest first; sizes are in bytes."""

    run: str
    paths: tuple[str, ...]  # what was given: the run, or checkpoints; absolute
    checkpoints: tuple[PlannedCheckpoint, ...]  # all that some average has a share of
    inputs: tuple[PlannedCheckpoint, ...]  # what is read: states, then the other checkpoints
    states: tuple[State, ...]  # of the averages, where checkpoints were folded before
    averages: tuple[Average, ...]
    rulings: Mapping[str, Ruling]  # on each tensor, by key
    storage: Storage
    engine: Engine
    given: Mapping[str, Any]  # the options that are not at their defaults
    dtype: str  # of averaged tensors, "same" for each its own
    card: bool
    reading: Reading
    output: Path  # of the one average, or the folder of all: they appear together
    work: Work
    threads: int
    tile_elements: int  # elements that a thread folds at a time
    judged: tuple[Judged, ...]  # every entry of the run, with its verdict
    notes: tuple[Notice, ...]
    warnings: tuple[Notice, ...]

    @property
    def left_out(self) -> tuple[Judged, ...]:
        """The entries that take no part although they might be expected to."""
        return tuple(entry for entry in self.judged if entry.is_left_out)

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """The paths of the checkpoints."""
        return tuple(checkpoint.path for checkpoint in self.checkpoints)

    @property
    def tensor_roles(self) -> tuple[TensorRole, ...]:
        """What becomes of tensors, by pattern of their names."""
        return by_pattern(self.rulings)

    @property
    def is_single_file(self) -> bool:
        """Whether `output` is one file instead of a folder."""
        return self.averages[0].output.is_single_file

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data to read, each once."""
        return sum(span.bytes_read(self.work.layout_of) for span in self.work.spans)

    @property
    def requests(self) -> int | None:
        """How many requests read that from a remote storage; None for a file system."""
        if not self.storage.is_remote:
            return None
        fetched, kept = self.fetched_elements, self.tile_elements * KEPT_BYTES
        return sum(
            span.requests(self.work.layout_of, fetched if span.averaged else kept, REQUEST_BYTES)
            for span in self.work.spans
        )

    @property
    def fetched_elements(self) -> int:
        """Elements of each checkpoint of a remote run that are fetched at a time."""
        if self.engine.tile_size:
            return self.tile_elements
        return max(self.tile_elements, fetched_elements(self.engine, self.work))

    @property
    def keeps_state(self) -> bool:
        """Whether states are written, and perhaps read."""
        return self.averages[0].output.state is not None

    @property
    def bytes_written(self) -> int:
        """Bytes of the model files and states to write."""
        return sum(file.size_bytes for one in self.foldings for file in one.files)

    @property
    def neighbours(self) -> list[tuple[int, int]]:
        """The inputs that follow each other in some average, by index, without states."""
        pairs = {pair for one in self.averages for pair in pairwise(one.reads)}
        return sorted(pair for pair in pairs if pair[0] >= len(self.states))

    @property
    def foldings(self) -> list[Folding]:
        """What the fold makes, in the order in which files are numbered."""
        return foldings_of(self.averages)

    @property
    def work_id(self) -> str:
        """A short digest of what decides the output's bytes and the numbers of the tiles."""
        outputs = [one.output for one in self.averages]
        parts = [f"{output.path.name}:{output.fingerprint}" for output in outputs]
        text = "\n".join([*parts, str(self.tile_elements)])
        return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]

    @property
    def memory_bytes(self) -> int:
        """The most that the fold allocates, without torch's own, whatever the size of the model.

        Includes what is fetched ahead from a remote storage.
        """
        each = element_bytes(self.engine, self.work, len(self.foldings))
        fold = self.threads * self.tile_elements * each
        return fold + 2 * prefetched_bytes(self.engine) * self.storage.is_remote
