"""The names in a run's folder, each with what is known of it without reading a tensor."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ckpt_ema.containers import deepspeed
from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles, is_safetensors
from ckpt_ema.containers.torch_file import read_recorded
from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.find.model_files import locate
from ckpt_ema.find.names import is_unnumbered_of, numbers_in, slots_in, stem_of, template_of
from ckpt_ema.find.verdict import Judged, Verdict
from ckpt_ema.find.weights_file import Located
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers import conventions

STRANGE = (Kind.ABSENT, Kind.OTHER)  # a broken link, a FIFO, a socket or a device
_DEEPEST_REF = 5
_HEAD_BYTES = 4096
_LINES = {  # suffix of a file -> pattern of a line, with groups for an integer and its decimals
    ".json": r'^\s*[{{,]?\s*"{key}":\s*(\d{{1,18}})()\s*[,}}]',
    ".yaml": r"^{key}:\s*(-?\d{{1,15}})(?:\.(\d+))?\s*$",
}


@dataclass(frozen=True, eq=False)
class Entry:
    """One name in a run's folder. Facts are found out when they are first asked for."""

    path: Path
    source: Source = field(repr=False)
    name: str = ""  # that of its path, or of the Hub's revision
    is_given: bool = False  # by a person, so that it is a checkpoint whatever its name

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.path.name)

    @cached_property
    def kind(self) -> Kind:
        """What its path leads to."""
        return self.source.storage.kind(self.path)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, or a link to one."""
        return self.kind is Kind.FOLDER

    @property
    def is_revision(self) -> bool:
        """Whether the Hub's cache has it under the name of a branch or tag."""
        return self.name != self.path.name

    @cached_property
    def stem(self) -> str:
        """Its name without extension and without the suffix of a name that was taken."""
        stem = self._bare
        return conventions.VERSION.sub("", stem) if self.name.endswith(".ckpt") else stem

    @property
    def is_version(self) -> bool:
        """Whether Lightning added a suffix to its name, which was taken."""
        return self.stem != stem_of(self.name)

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The numbers in its name, by unit."""
        return numbers_in(self.stem)

    @cached_property
    def slots(self) -> list[int]:
        """All integers in its name."""
        return slots_in(self._bare)

    @property
    def _bare(self) -> str:
        """Its name without an extension, also without one that only some trainers use."""
        stem = stem_of(self.name)
        return conventions.OTHER_EXTENSION.sub("", stem) if stem == self.name else stem

    @cached_property
    def template(self) -> str:
        """Its name with the numbers left open, which it shares with its series."""
        return template_of(self.stem)

    def is_unnumbered_of(self, templates: Iterable[str]) -> bool:
        """Return whether its name is that of one of these series with a number left out."""
        return any(is_unnumbered_of(self.stem, template) for template in templates)

    @property
    def has_weights_extension(self) -> bool:
        """Whether its name has the extension of a file that may be a model."""
        return stem_of(self.name) != self.name

    @cached_property
    def located(self) -> Located:
        """The model that it holds, by names alone; None without one."""
        return locate(self.path, self.source, is_given=self.is_given)

    @property
    def model(self) -> ModelFiles | None:
        """The model that it holds, if it can be read."""
        return self.located if isinstance(self.located, ModelFiles) else None

    @property
    def is_of_deepspeed(self) -> bool:
        """Whether its model is one that DeepSpeed saved for itself."""
        return self.model is not None and deepspeed.claims(self.model.path.name)

    @cached_property
    def recorded(self) -> Mapping[str, int]:
        """The "step", "epoch" or "time" that it records outside of torch files."""
        beside, _ = recorded_beside(self.path, self.source)
        is_told = is_safetensors(self.path.name) or self.is_of_deepspeed
        return beside or (self._recorded_inside() if is_told else {})

    @cached_property
    def recorded_anywhere(self) -> Mapping[str, int]:
        """The same, torch files included, which have to be opened for it."""
        return self.recorded or self._recorded_inside()

    def _recorded_inside(self) -> Mapping[str, int]:
        with contextlib.suppress(IncompleteError):
            if self.model and self.is_of_deepspeed:
                return deepspeed.recorded(os.fspath(self.model.path), self.source.storage)
            if self.model and not self.is_folder:
                return self.source.read(self.model).recorded
            beside = self.path / conventions.SHARDED_STATE
            if self.model and self.source.storage.kind(beside) is Kind.FILE:
                return read_recorded(os.fspath(beside), self.source.storage)
        return {}

    def judged(self, verdict: Verdict) -> Judged:
        """Return it with its verdict, at the path where its name is."""
        is_snapshot = self.is_revision and conventions.COMMIT.search(self.path.name)
        path = self.path.parent.parent / "refs" / self.name if is_snapshot else self.path
        return Judged(path, self.name, verdict)


Verdicts = Mapping[Entry, Verdict]


def list_entries(folder: Path, source: Source) -> list[Entry]:
    """Return the entries of a folder by name, or the revisions in a cache of the Hub."""
    names = names_in(folder, source)
    if is_hub_cache(folder, source):
        return _revisions(folder, source)
    return [Entry(folder / name, source) for name in sorted(names)]


def names_in(folder: Path, source: Source) -> set[str]:
    """Return the names in a folder; raises if it may not be listed and entered."""
    names = source.storage.names(folder)
    if not source.storage.can_list(folder):
        text = f"cannot access {folder}: Permission denied."
        raise RefusedError(text, code=Code.INACCESSIBLE, path=folder)
    return names


def is_hub_cache(folder: Path, source: Source) -> bool:
    """Return whether a folder is the Hugging Face Hub's cache of one model."""
    return all(source.storage.is_folder(folder / name) for name in ("refs", "snapshots"))


def _revisions(cache: Path, source: Source) -> list[Entry]:
    refs = cache / "refs"
    found = []
    for name in sorted(source.storage.files_below(refs, _DEEPEST_REF)):
        commit = (source.storage.read(refs / name) or b"").decode("utf-8", "replace").strip()
        snapshot = cache / "snapshots" / commit
        is_there = conventions.COMMIT.search(commit) and source.storage.is_folder(snapshot)
        found.append(Entry(snapshot if is_there else refs / name, source, name))
    return found


def recorded_beside(path: Path, source: Source) -> tuple[Mapping[str, int], str]:
    """Return the "step", "epoch" or "time" (in ms) of a checkpoint, and the file's name."""
    is_folder = source.storage.is_folder(path)
    stem = stem_of(path.name)
    for record in conventions.RECORDS:
        if is_folder == ("{stem}" in record.file):
            continue
        file = (path if is_folder else path.parent) / record.file.format(stem=stem)
        # The trainer's log follows the step and can be megabytes.
        for most_bytes in (_HEAD_BYTES, None):
            content = source.storage.read(file, most_bytes) or b""
            found = _numbers(content.decode("utf-8", "replace"), file.suffix, record.keys)
            if found:
                return found, file.name
            if len(content) < _HEAD_BYTES:
                break
    return {}, ""


def _numbers(text: str, suffix: str, keys: Mapping[str, str]) -> dict[str, int]:
    """Return the numbers at the top of a JSON or YAML file, or of its head, by unit."""
    found = {}
    for unit, key in keys.items():
        match = re.search(_LINES[suffix].format(key=key), text, re.MULTILINE)
        if match:
            decimals = (match[2] or "").ljust(3, "0")[:3] if unit == "time" else ""
            found[unit] = int(match[1] + decimals)
    if found or suffix != ".json":
        return found
    values = {unit: json_object(text).get(key) for unit, key in keys.items()}
    return {unit: value for unit, value in values.items() if type(value) is int}


def json_object(text: str | bytes | None) -> Mapping[str, Any]:
    """Return the object in a JSON text, empty if there is none."""
    try:
        content = json.loads(text or "")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
