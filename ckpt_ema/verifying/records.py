"""Reads the manifests of outputs for verifying; people may have changed them.

Only the kinds of values are checked here: whether they are true is for verifying to find out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.output.destination import outputs_at
from ckpt_ema.output.manifest import read_manifest
from ckpt_ema.output.shape import COUNT, NUMBER, TEXT, fits
from ckpt_ema.storage.local import Local
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.trainers.conventions import MANIFEST_NAME

_MANIFEST: Mapping[str, Any] = {
    "name": TEXT,
    "output": TEXT,
    "schedule": TEXT,
    "paths": [TEXT],
    "options": {},
    "files": [{"name": TEXT}],
    "checkpoints": [
        {
            "path": TEXT,
            "name": TEXT,
            "step": (int, type(None)),
            "weight": NUMBER,
            "files": [{"name": TEXT, "bytes": COUNT, "header_sha256": TEXT}],
        }
    ],
    "crc32": {},
}
_STATE = {"name": TEXT, "bytes": COUNT, "header_sha256": TEXT, "checksum": TEXT}


class Recorded(NamedTuple):
    """An average and its manifest."""

    path: Path
    manifest: Mapping[str, Any]


def read_records(output: Path) -> list[Recorded]:
    """Return the averages at a path.

    Raises `RefusedError` for what is not an output of ckpt-ema, for one file, which has no record
    of how it was made, and for a manifest that is damaged.
    """
    found = [Recorded(path, read_manifest(path)) for path in outputs_at(output)]
    is_file = Local().kind(output) is Kind.FILE
    if not found or (is_file and not found[0].manifest):
        message = f"{output} is not an output of ckpt-ema."
        raise RefusedError(message, code=Code.NO_MANIFEST, path=output)
    for path, manifest in found:
        if manifest and not {"paths", "crc32"} & manifest.keys():
            what = "is one file, whose header has" if is_file else "has"
            message = f"{path} {what} no record of the run and the options that it was made with."
            hint = "Average again into a folder, with this version of ckpt-ema."
            raise RefusedError(message, hint, code=Code.NO_MANIFEST, path=path)
        _check(path / MANIFEST_NAME, manifest)
    return found


def _check(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest that cannot be read, or is not as ckpt-ema writes it."""
    if not manifest:
        Local().read(path)  # says why if it cannot be accessed
    shape = {**_MANIFEST, **({"state": _STATE} if manifest.get("state") else {})}
    if wrong := next((key for key in shape if not fits(manifest.get(key), shape[key])), ""):
        what = f"{wrong!r} is missing or wrong" if manifest else "it is not a JSON object"
    elif not {row["name"] for row in manifest["files"]} <= manifest["crc32"].keys():
        what = "it lacks the checksum of a file"
    elif not (manifest["paths"] and all(manifest["paths"]) and manifest["checkpoints"]):
        what = "it names no run or no checkpoints"
    else:
        return
    message = f"{path} is damaged: {what}."
    hint = "Restore it from a copy, or average again."
    raise RefusedError(message, hint, code=Code.DAMAGED, path=path)
