"""Verifies an output: its files against their checksums, and its values against a new fold."""

import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.fold import engine
from ckpt_ema.fold.tiles import tiles
from ckpt_ema.options import PathLike
from ckpt_ema.output.content import damaged_files, wrong_checksum
from ckpt_ema.output.destination import outputs_at
from ckpt_ema.output.manifest import read_manifest
from ckpt_ema.planning.output import named
from ckpt_ema.planning.plan import Plan
from ckpt_ema.planning.recorded import plan_recorded
from ckpt_ema.run import on_device
from ckpt_ema.storage.local import Local
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.targets.target import OutputFile
from ckpt_ema.verifying.comparing import Comparing, Difference


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
        return self.tiles > 0

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
    sample: float = 1.0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    **engine_options: Any,
) -> Verification:
    """Check that the averages at `output` are whole, and are what their manifests claim.

    Files are compared with their checksums, then all tiles, or a random `sample` of them (a share
    above 0), are folded again from the checkpoints and compared. `run` is where these are now, if
    they were moved. Where some are gone, or are not the files that were averaged, only the
    checksums are compared. Nothing is written. `device`, `threads`, `tile_size`, `max_memory` are
    those of `ckpt_ema.average`.

    Raises `RefusedError` for what is not an output of ckpt-ema, and for one file, which has no
    record of how it was made; `FailedError` if reading fails.
    """
    path = named(output)
    outputs, manifests = _manifests(path)
    count, damaged = _checked(path, outputs, manifests)
    plan, gone = plan_recorded(path, manifests, run, **engine_options)
    changed = _changed(plan, manifests) if plan else ()
    again = _Again(0, 0, None)
    if plan and not changed:
        again = _fold_again(plan, sample, progress)
    names = {row["path"] for record in manifests for row in record["checkpoints"]}
    return Verification(
        output=path,
        checkpoints=len(names),
        files=count,
        damaged=damaged,
        gone=gone,
        changed=changed,
        tiles=again.tiles,
        tiles_in_all=again.tiles_in_all,
        differs=again.differs,
    )


def _manifests(output: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """Return the averages at a path and their manifests; raises `RefusedError` without them."""
    outputs = outputs_at(output)
    manifests = [read_manifest(one) for one in outputs]
    if not outputs or not all(manifests):
        message = f"{output} is not an output of ckpt-ema."
        raise RefusedError(message, code=Code.NO_MANIFEST, path=output)
    if not all("paths" in record for record in manifests):
        what = "is one file, whose header has" if Local().kind(output) is Kind.FILE else "has"
        message = f"{output} {what} no record of the run and the options that it was made with."
        hint = "Average again into a folder, with this version of ckpt-ema."
        raise RefusedError(message, hint, code=Code.NO_MANIFEST, path=output)
    return outputs, manifests


def _checked(
    path: Path, outputs: Sequence[Path], manifests: Sequence[Mapping[str, Any]]
) -> tuple[int, tuple[str, ...]]:
    """Compare files with their checksums; return how many, and those that differ."""
    found = [damaged_files(*one) for one in zip(outputs, manifests, strict=True)]
    named = zip(outputs, found, strict=True)
    damaged = ((folder / name).relative_to(path) for folder, (_, names) in named for name in names)
    return sum(count for count, _ in found), tuple(map(str, damaged))


def _changed(plan: Plan, manifests: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the checkpoints whose files have another size or header than those recorded.

    Times prove nothing: a copy has others. Equal values do.
    """
    recorded = {
        (row["name"], row["step"]): {_recorded(file) for file in row["files"]}
        for record in manifests
        for row in record["checkpoints"]
    }
    now = {
        (one.name, one.step): {(f.name, f.size_bytes, f.digest) for f in one.specs.files}
        for one in plan.checkpoints
    }
    return tuple(name for (name, step), files in recorded.items() if not files <= now[name, step])


def _recorded(file: Mapping[str, Any]) -> tuple[str, int, str]:
    return file["name"], file["bytes"], file["header_sha256"]


class _Again(NamedTuple):
    """How it went to fold tiles again."""

    tiles: int
    tiles_in_all: int
    differs: Differs | None


def _fold_again(plan: Plan, sample: float, progress: Callable[[int, int], None]) -> _Again:
    """Fold tiles again, and compare them with the files that are there."""
    files = [_File(one.output.path, file) for one in plan.averages for file in one.output.files]
    files += [_File(one.output.path, one.output.state) for one in plan.averages if one.output.state]
    every = list(tiles(plan))
    if differs := next(filter(None, (_fixed_difference(one, plan) for one in files)), None):
        return _Again(0, len(every), differs)
    plan, device = on_device(plan)
    count = min(len(every), max(1, round(sample * len(every))))
    chosen = [every[number] for number in sorted(random.sample(range(len(every)), count))]
    total = sum(tile.span.bytes_read(plan.work.layout_of, tile.length) for tile in chosen)
    with Comparing([(one.path, one.file.checksums) for one in files]) as sink:
        engine.run(plan, chosen, device, sink, lambda _: None, (), lambda n: progress(n, total))
        difference = sink.difference
    return _Again(len(chosen), len(every), difference and _named(difference, files, plan))


class _File(NamedTuple):
    """A file of one of the averages."""

    folder: Path
    file: OutputFile

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder / self.file.name


def _fixed_difference(one: _File, plan: Plan) -> Differs | None:
    """Return where a file has another size than it should, or other bytes between its tensors."""
    name, storage = str(one.path.relative_to(plan.output)), Local()
    if not storage.exists(one.path):
        return Differs(name, "", 0)
    with storage.open(one.path) as opened:
        if opened.identity.size_bytes != one.file.size_bytes:
            return Differs(name, "", min(opened.identity.size_bytes, one.file.size_bytes))
        for offset, content in one.file.chunks:
            pairs = enumerate(zip(opened.read(len(content), offset), content, strict=True))
            first = next((place for place, (here, there) in pairs if here != there), None)
            if first is not None:
                return Differs(name, "", offset + first)
        for checksum in one.file.checksums:
            if place := wrong_checksum(opened, checksum):
                return Differs(name, "", place)
    return None


def _named(difference: Difference, files: Sequence[_File], plan: Plan) -> Differs:
    """Return a difference with the names of its file and tensor."""
    one, offset = files[difference.file], difference.offset
    tensors = sorted(one.file.tensors, key=attrgetter("offset"))
    place = bisect_right(tensors, offset, key=attrgetter("offset")) - 1
    is_inside = place >= 0 and offset < tensors[place].offset + tensors[place].size_bytes
    name = str(one.path.relative_to(plan.output))
    return Differs(name, tensors[place].name if is_inside else "", offset)
