"""What a manifest says of the content of its files, so that damage shows without the checkpoints.

Model files and what is copied beside them have a CRC-32; a state has the checksum of its values.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from ckpt_ema.containers.checksums import Checksum
from ckpt_ema.containers.safetensors import MAX_HEADER_BYTES
from ckpt_ema.fold.checksum import checksum
from ckpt_ema.fold.crc32 import Piece, joined
from ckpt_ema.fold.monitors.checksums import Checksums
from ckpt_ema.fold.monitors.digests import Digests
from ckpt_ema.fold.monitors.protocol import Monitor
from ckpt_ema.output.ledger import Outline
from ckpt_ema.output.publish import StagedOutput
from ckpt_ema.storage.local import Local
from ckpt_ema.storage.protocol import OpenFile
from ckpt_ema.trainers.conventions import OWN_FILES, STATE_FILE

_CHUNK_BYTES = 1 << 20


def describe_content(
    outline: Outline, monitors: Sequence[Monitor], staged: StagedOutput, *, is_seen: bool
) -> dict[str, dict[str, Any]]:
    """Return the checksums of each folder of an output, for its manifest.

    Where not everything `is_seen` by the monitors, since a run was resumed, files are read again.
    """
    seen = {one.name: one.state() for one in monitors if is_seen}
    numbers = {name: number for number, name in enumerate(outline.files)}
    found: dict[str, dict[str, Any]] = {}
    for folder, record in outline.manifests.items():
        crcs = {}
        for name in sorted(_names(staged.output / folder)):
            number = numbers.get(os.path.join(folder, name))
            is_patched = number is not None and outline.checksums[number]
            if number is None or is_patched or not is_seen:
                crcs[name] = crc32_of(staged.output / folder / name)
            else:
                fixed, size_bytes = outline.fixed[number]
                pieces = (*fixed, *seen[Digests.name].get(str(number), ()))
                crcs[name] = joined((Piece(*one) for one in pieces), size_bytes)
        found[folder] = {"crc32": {name: f"{crc:08x}" for name, crc in crcs.items()}}
        number = numbers.get(os.path.join(folder, STATE_FILE))
        if number is not None:
            path = staged.output / folder / STATE_FILE
            sums = seen.get(Checksums.name)
            # States are the last foldings, in the order of the manifests.
            place = len(found) - 1 - len(outline.manifests)
            total = sums[place] if sums else checksum_of_state(path)
            found[folder]["state"] = {**record["state"], "checksum": f"{total:016x}"}
    return found


def damaged_files(output: Path, manifest: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Return the number of files with a checksum, and the names of those that do not match it."""
    crcs, state = manifest.get("crc32", {}), manifest.get("state", {})
    damaged = [
        name
        for name, crc in crcs.items()
        if not Local().exists(output / name) or f"{crc32_of(output / name):08x}" != crc
    ]
    if state and not _is_state(output / state["name"], state):
        damaged.append(state["name"])
    return len(crcs) + bool(state), damaged


def _is_state(path: Path, recorded: Mapping[str, Any]) -> bool:
    """Return whether a state has the header and the values that were recorded."""
    header = header_of_state(path)
    if not header or Local().identity(path).size_bytes != recorded["bytes"]:
        return False
    is_header = hashlib.sha256(header[8:]).hexdigest() == recorded["header_sha256"]
    return bool(is_header and f"{checksum_of_state(path):016x}" == recorded["checksum"])


def header_of_state(path: Path) -> bytes:
    """Return the header of a state, after its length; empty if there is no file with a header."""
    if not Local().exists(path):
        return b""
    with Local().open(path) as file:
        size_bytes = file.identity.size_bytes
        if size_bytes < 8:
            return b""
        count = 8 + int.from_bytes(file.read(8, 0), "little")
        return file.read(count, 0) if count <= min(size_bytes, 8 + MAX_HEADER_BYTES) else b""


def wrong_checksum(file: OpenFile, checksum: Checksum) -> int | None:
    """Return the first place of a checksum in a file that does not have it; None if all do."""
    crc = 0
    for offset in range(checksum.start, checksum.start + checksum.size_bytes, _CHUNK_BYTES):
        count = min(_CHUNK_BYTES, checksum.start + checksum.size_bytes - offset)
        crc = zlib.crc32(file.read(count, offset), crc)
    right = crc.to_bytes(4, "little")
    return next((place for place in checksum.places if file.read(4, place) != right), None)


def _names(folder: Path) -> Iterator[str]:
    """Yield the files of an output but for those that people may change, and states."""
    for path in folder.rglob("*"):
        name = os.path.relpath(path, folder)
        if name not in OWN_FILES and path.is_file():
            yield name


def crc32_of(path: Path) -> int:
    """Return the CRC-32 of a file."""
    return reduce(lambda crc, chunk: zlib.crc32(chunk, crc), _chunks(path, 0), 0)


def checksum_of_state(path: Path) -> int:
    """Return the checksum of the values in a state."""
    with Local().open(path) as file:
        start = 8 + int.from_bytes(file.read(8, 0), "little")
    return sum(checksum(bytearray(chunk)) for chunk in _chunks(path, start)) % (1 << 64)


def _chunks(path: Path, start: int) -> Iterator[bytes]:
    with Local().open(path) as file:
        size_bytes = file.identity.size_bytes
        for offset in range(start, size_bytes, _CHUNK_BYTES):
            yield file.read(min(_CHUNK_BYTES, size_bytes - offset), offset)
