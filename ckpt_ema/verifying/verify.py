"""Verifies an output: its files against their checksums, and its values against a new fold."""

import json
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.fold import engine
from ckpt_ema.fold.tiles import tiles
from ckpt_ema.options import PathLike
from ckpt_ema.output.content import damaged_files, wrong_checksum
from ckpt_ema.planning.decide import paths_of
from ckpt_ema.planning.plan import Plan
from ckpt_ema.planning.recorded import plan_recorded
from ckpt_ema.run import on_device
from ckpt_ema.storage.local import Local
from ckpt_ema.values import SHARE
from ckpt_ema.verifying.comparing import Comparing, Difference, There
from ckpt_ema.verifying.files import File, files_of
from ckpt_ema.verifying.records import Recorded, read_records


class Differs(NamedTuple):
    """Where a file of an output is not what its checkpoints give."""

    file: str  # relative to the output
    tensor: str  # "" for bytes that no tensor has, such as a header
    offset: int  # of the first byte that differs, in the file


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found of an output, or of several in one folder."""

    output: Path
    checkpoints: int  # that the averages were made of
    files: int  # whose checksums were compared
    damaged: tuple[str, ...]  # files that are not what was written
    gone: tuple[str, ...]  # checkpoints that are not there, so nothing was folded again
    changed: tuple[str, ...]  # checkpoints whose files are not those that were averaged
    tiles: int  # that were folded again
    tiles_in_all: int
    differs: Differs | None  # the first difference to what the checkpoints give

    @property
    def is_as_claimed(self) -> bool:
        """Whether nothing contradicts the manifest."""
        return not (self.damaged or self.differs)

    @property
    def is_recomputed(self) -> bool:
        """Whether the values, or the sample that was asked for, were folded again."""
        return self.tiles > 0 and not (self.gone or self.changed)

    def described(self) -> dict[str, Any]:
        """Return it as plain values, ready for JSON; see docs/schema/verification.schema.json."""
        return {
            "version": 1,
            **asdict(self),
            "output": str(self.output),
            "differs": self.differs and self.differs._asdict(),
            "is_as_claimed": self.is_as_claimed,
            "is_recomputed": self.is_recomputed,
        }


def verify(
    output: PathLike,
    run: PathLike | Sequence[PathLike] | None = None,
    *,
    sample: float | str = 1.0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    **engine_options: Any,
) -> Verification:
    """Check that the averages at `output` are whole, and are what their manifests claim.

    Files are compared with their checksums, then all tiles, or a random `sample` of them (a share,
    such as 0.01 or "1%"), are folded again from the checkpoints and compared. `run` is where these
    are now, if they were moved. Where some are gone, or are not the files that were averaged, only
    the checksums are compared. Nothing is written. `device`, `threads`, `tile_size` and
    `max_memory` are those of `ckpt_ema.average`.

    Raises `RefusedError` for what is not an output of ckpt-ema, for a damaged manifest, and for one
    file, which has no record of how it was made; `FailedError` if reading fails.
    """
    share: float = SHARE.parsed("sample", sample)
    [path] = paths_of(output)
    records = read_records(path)
    checked = [damaged_files(*one) for one in records]
    pairs = zip(records, checked, strict=True)
    damaged = [str((one.path / name).relative_to(path)) for one, (_, bad) in pairs for name in bad]
    again = [
        _again(path, together, run, share, progress, engine_options)
        for together in _made_together(records)
    ]
    return Verification(
        output=path,
        checkpoints=len({row["path"] for one in records for row in one.manifest["checkpoints"]}),
        files=sum(count for count, _ in checked),
        damaged=tuple(damaged),
        gone=tuple(name for one in again for name in one.gone),
        changed=tuple(name for one in again for name in one.changed),
        tiles=sum(one.tiles for one in again),
        tiles_in_all=sum(one.tiles_in_all for one in again),
        differs=next((one.differs for one in again if one.differs), None),
    )


def _made_together(records: Sequence[Recorded]) -> list[list[Recorded]]:
    """Return the averages that one command has made; people gather others in the same folder."""
    groups: dict[str, list[Recorded]] = {}
    for one in records:
        key = json.dumps([one.manifest["paths"], one.manifest["options"]], sort_keys=True)
        groups.setdefault(key, []).append(one)
    return [*groups.values()]


class _Again(NamedTuple):
    """What folding again has shown, or why it was not done."""

    gone: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    tiles: int = 0
    tiles_in_all: int = 0
    differs: Differs | None = None


def _again(
    output: Path,
    records: Sequence[Recorded],
    run: PathLike | Sequence[PathLike] | None,
    sample: float,
    progress: Callable[[int, int], None],
    engine_options: Mapping[str, Any],
) -> _Again:
    """Fold the averages of one command again, if the checkpoints are there."""
    manifests = [one.manifest for one in records]
    plan, gone = plan_recorded(output, manifests, run, **engine_options)
    if plan is None:
        return _Again(gone)
    if changed := _changed(plan, records):
        return _Again(changed=changed)
    return _fold_again(plan, files_of(plan, output, records), sample, progress)


def _changed(plan: Plan, records: Sequence[Recorded]) -> tuple[str, ...]:
    """Return the checkpoints whose files have another size or header than those recorded.

    Times prove nothing: a copy has others. Equal values do.
    """
    recorded = {
        (row["name"], row["step"]): {_recorded(file) for file in row["files"]}
        for one in records
        for row in one.manifest["checkpoints"]
    }
    now = {
        (one.name, one.step): {(f.name, f.size_bytes, f.digest) for f in one.specs.files}
        for one in plan.checkpoints
    }
    return tuple(name for (name, step), files in recorded.items() if not files <= now[name, step])


def _recorded(file: Mapping[str, Any]) -> tuple[str, int, str]:
    return file["name"], file["bytes"], file["header_sha256"]


def _fold_again(
    plan: Plan, files: Sequence[File], sample: float, progress: Callable[[int, int], None]
) -> _Again:
    """Fold tiles again, and compare them with the files that are there."""
    own = [one for one in files if one.is_own]
    every = [
        tile for tile in tiles(plan) if all(files[place.file].is_own for place in tile.span.places)
    ]
    total = len(every)
    if differs := next(filter(None, map(_fixed_difference, own)), None):
        return _Again(tiles_in_all=total, differs=differs)
    plan, device = on_device(plan)
    count = min(total, max(1, round(sample * total)))
    chosen = [every[number] for number in sorted(random.sample(range(total), count))]
    read_bytes = sum(t.span.bytes_read(plan.work.layout_of, t.length) for t in chosen)
    with Comparing([There(one.path, one.file.checksums, one.shift) for one in files]) as sink:
        engine.run(
            plan, chosen, device, sink, lambda _: None, (), lambda n: progress(n, read_bytes)
        )
        difference = sink.difference
    differs = _named(difference, files) if difference else None
    return _Again(tiles=count, tiles_in_all=total, differs=differs)


def _fixed_difference(one: File) -> Differs | None:
    """Return where a file has another size than it should, or other bytes between its tensors."""
    storage = Local()
    if not storage.exists(one.path):
        return Differs(one.name, "", 0)
    with storage.open(one.path) as opened:
        if opened.identity.size_bytes != one.file.size_bytes:
            return Differs(one.name, "", min(opened.identity.size_bytes, one.file.size_bytes))
        for offset, content in one.file.chunks:
            pairs = enumerate(zip(opened.read(len(content), offset), content, strict=True))
            first = next((place for place, (here, there) in pairs if here != there), None)
            if first is not None:
                return Differs(one.name, "", offset + first)
        for checksum in one.file.checksums:
            if place := wrong_checksum(opened, checksum):
                return Differs(one.name, "", place)
    return None


def _named(difference: Difference, files: Sequence[File]) -> Differs:
    """Return a difference with the names of its file and tensor."""
    one, offset = files[difference.file], difference.offset
    tensors = sorted(one.file.tensors, key=attrgetter("offset"))
    place = bisect_right(tensors, offset, key=attrgetter("offset")) - 1
    is_inside = place >= 0 and offset < tensors[place].offset + tensors[place].size_bytes
    return Differs(one.name, tensors[place].name if is_inside else "", offset)
