"""What a checkpoint says of its own place in the run, in the small files beside its weights."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.containers.source import Source
from ckpt_ema.trainers.conventions import TRAINER_STATE

_HEAD_BYTES = 4096


class _Source(NamedTuple):
    """A file that tells the step, relative to the checkpoint or with its stem as `{stem}`."""

    name: str
    read: Callable[[str], Mapping[str, int]]


def _json_numbers(**keys: str) -> Callable[[str], Mapping[str, int]]:
    """A reader of top-level integers in JSON: unit=key."""

    def read(text: str) -> Mapping[str, int]:
        found = {}
        for unit, key in keys.items():
            match = re.search(rf'^\s*[{{,]?\s*"{key}":\s*(\d{{1,18}})\s*[,}}]', text, re.MULTILINE)
            if match:
                found[unit] = int(match[1])
        return found or _parsed(text, keys)

    return read


def _parsed(text: str, keys: Mapping[str, str]) -> Mapping[str, int]:
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    values = {unit: content.get(key) for unit, key in keys.items()}
    return {unit: value for unit, value in values.items() if type(value) is int}


def _yaml_numbers(**keys: str) -> Callable[[str], Mapping[str, int]]:
    """A reader of top-level numbers in YAML; of a number with decimals, thousandths count."""

    def read(text: str) -> Mapping[str, int]:
        found = {}
        for unit, key in keys.items():
            match = re.search(rf"^{key}:\s*(\d{{1,15}})(?:\.(\d+))?\s*$", text, re.MULTILINE)
            if match:
                thousandths = int((match[2] or "").ljust(3, "0")[:3])
                found[unit] = int(match[1]) * (1000 if unit == "time" else 1)
                found[unit] += thousandths if unit == "time" else 0
        return found

    return read


_IN_FOLDER = (
    _Source(TRAINER_STATE, _json_numbers(step="global_step")),
    _Source("training_state/training_step.json", _json_numbers(step="step")),
    _Source("CKPT.yaml", _yaml_numbers(time="unixtime")),
)
_BESIDE_FILE = (_Source("{stem}.yaml", _yaml_numbers(step="step", epoch="epoch")),)


class Recorded(NamedTuple):
    """The "step", "epoch" or "time" (in thousandths of a second), and the file that tells them."""

    numbers: dict[str, int]
    source: str


def recorded_beside(path: Path, stem: str, source: Source) -> Recorded:
    """What the files beside a checkpoint tell; empty if none does.

    `path` is the checkpoint's folder or file and `stem` its name without extension.
    """
    is_folder = source.storage.is_folder(path)
    for told in _IN_FOLDER if is_folder else _BESIDE_FILE:
        file = (path if is_folder else path.parent) / told.name.format(stem=stem)
        # What the trainer logged follows after the step and can be megabytes.
        for most_bytes in (_HEAD_BYTES, sys.maxsize):
            content = source.storage.read(file, most_bytes) or b""
            found = told.read(content.decode("utf-8", "replace"))
            if found:
                return Recorded(dict(found), file.name)
            if len(content) < _HEAD_BYTES:
                break
    return Recorded({}, "")
