"""Outputs in the container of the newest checkpoint: a copy of it with the averages in their place.

Every byte that no averaged tensor has is the newest checkpoint's: pickles, optimizer, schedule,
configuration. So whatever resumes from the checkpoint resumes from the average.
"""

import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_ema.containers import dcp
from ckpt_ema.containers.checksums import Checksum, checksums, meet
from ckpt_ema.containers.specs import (
    COPIED,
    DTYPE_BITS,
    FileSpec,
    Piece,
    Role,
    Specs,
    TensorSpec,
    packed_bytes,
    pieces_of,
    region_of,
    spanned,
)
from ckpt_ema.containers.torch_file import Region as Archive
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.storage import Storage
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.targets.target import Copied, Finish, Model, OutputFile, OutputTensor
from ckpt_ema.trainers.conventions import (
    DCP_METADATA,
    DIGESTS,
    MANIFEST_NAME,
    PADDED_MASTERS,
    TRACKERS,
)

_ZIP = b"PK\x03\x04"
_MOST_TRACKER_BYTES = 1024
_INSTEAD = "Write the average with --save-as safetensors."


@dataclass(frozen=True, slots=True)
class CheckpointTarget:
    """A `Target` that copies the newest checkpoint and replaces the tensors that are averaged.

    A folder is copied with all its files, a single file by itself.
    """

    path: Path
    newest: Checkpoint
    storage: Storage

    @property
    def is_single_file(self) -> bool:
        """See `Target.is_single_file`; a copy keeps the name of its file, in a folder."""
        return False

    def lay_out(self, model: Model) -> tuple[OutputFile, ...]:
        """See `Target.lay_out`; raises for tensors that cannot be replaced where they lie."""
        only = self.newest.model.only_as_saved
        instead = only.instead if only else _INSTEAD
        tensors = _placed(model, instead)
        folders = {os.path.dirname(model.specs.files[number].name) for number in tensors}
        archives = self._archives(model.specs, folders)
        root = _root_of(self.newest, self.storage)
        top = root.name if self._tracker() else ""  # a tracker leads to a folder beside it
        files = []
        for number, file in enumerate(model.specs.files):
            name = os.path.relpath(self.newest.model.folder / file.name, root)
            own = _without_tied(tensors.get(number, []), model, instead)
            changed = [(one.offset, one.offset + one.size_bytes) for one in own]
            found = self._checksums(file, archives.get(number), changed) if own else []
            files.append(
                OutputFile(
                    os.path.join(top, name),
                    file.member,
                    (),
                    file.size_bytes,
                    tuple(own),
                    tuple(_between(changed, file.size_bytes, number)),
                    tuple(found),
                )
            )
        return tuple(files)

    def finish(self, _files: Sequence[OutputFile], _members: Sequence[str]) -> tuple[Finish, ...]:
        """See `Target.finish`; the trainer's own file that names the step, where it has one."""
        return self._tracker()

    def _tracker(self) -> tuple[Finish, ...]:
        """Return the file in the run that leads to its last step, as it leads to the newest."""
        path, step = self.newest.path, self.newest.step
        for name in TRACKERS if self.storage.is_folder(path) else ():
            text = (self.storage.read(path.parent / name, _MOST_TRACKER_BYTES) or b"").strip()
            if text.isdigit() and step is not None:
                return ((name, f"{step}".encode()),)
            if text and self.storage.is_folder(path.parent / os.fsdecode(text)):
                return ((name, os.fsencode(path.name)),)
        return ()

    def _archives(
        self, specs: Specs, folders: Container[str]
    ) -> Mapping[int, list[tuple[int, int]]]:
        """Return the archives in the files of some folders, where these are not files."""
        found = {}
        for metadata in specs.files:
            folder, name = os.path.split(metadata.name)
            if name == DCP_METADATA and folder in folders:
                path = os.path.join(self.newest.model.folder, metadata.name)
                inside = dcp.archives(path, self.storage)
                for at, file in enumerate(specs.files):
                    beside, name = os.path.split(file.name)
                    if beside == folder and name in inside:
                        found[at] = inside[name]
        return found

    def _checksums(
        self,
        file: FileSpec,
        archives: list[tuple[int, int]] | None,
        changed: Sequence[tuple[int, int]],
    ) -> list[Checksum]:
        """Return the checksums of a file that will change, if it holds archives."""
        path = os.path.join(self.newest.model.folder, file.name)
        with self.storage.open(path) as opened:
            size_bytes = opened.identity.size_bytes
            if archives is None:
                is_zip = size_bytes >= len(_ZIP) and opened.read(len(_ZIP), 0) == _ZIP
                archives = [(0, size_bytes)] if is_zip else []
            places = sorted({*archives})
            return [
                checksum
                for offset, count in places
                if meet(changed, offset, offset + count)
                for checksum in checksums(path, Archive(opened, offset, count), changed)
            ]


def _root_of(checkpoint: Checkpoint, storage: Storage) -> Path:
    """Return the folder whose files are those of a checkpoint, or that holds its one file."""
    path, folder = checkpoint.path, checkpoint.model.folder
    is_inside = f"{folder}/".startswith(f"{path}/")
    return path if is_inside and storage.is_folder(path) else folder


def files_of(checkpoint: Checkpoint, storage: Storage) -> tuple[Path, list[str]]:
    """Return the folder of a checkpoint and the names of all files that are copied with it.

    Raises `RefusedError` for a link to a folder, in which there may be a part of the checkpoint.
    """
    root = _root_of(checkpoint, storage)
    if not storage.is_folder(checkpoint.path):
        return root, [member.name for member in checkpoint.model.members]
    left = (MANIFEST_NAME, *DIGESTS)  # which are about the files as they were
    names = (name for name in storage.files_below(root) if os.path.basename(name) not in left)
    kinds = {name: storage.kind(root / name) for name in names}
    if link := next((name for name, kind in kinds.items() if kind is Kind.FOLDER), None):
        text = f"{root / link} is a link to a folder, which is not followed."
        hint = "Put the folder itself in its place."
        raise RefusedError(text, hint, code=Code.INVALID_OUTPUT, path=root / link)
    return root, sorted(name for name, kind in kinds.items() if kind is Kind.FILE)


def with_all_files(checkpoint: Checkpoint, specs: Specs, storage: Storage) -> Specs:
    """Add every other file in a checkpoint's folder to its specs; a single file has none."""
    root, names = files_of(checkpoint, storage)
    model = checkpoint.model
    known = {os.path.normpath(model.folder / file.name) for file in specs.files}
    files = [
        FileSpec(
            os.path.relpath(root / name, model.folder), *storage.identity(root / name), "", COPIED
        )
        for name in names
        if os.path.normpath(root / name) not in known
    ]
    metadata = (*specs.metadata, *({} for _ in files))
    return replace(specs, files=(*specs.files, *files), metadata=metadata)


def _placed(model: Model, instead: str) -> dict[int, list[OutputTensor]]:
    """Return the regions of every tensor with elements by file, in the order of their bytes."""
    found: dict[int, list[OutputTensor]] = {}
    for key, tensor in model.specs.tensors.items():
        if 0 in tensor.shape:
            continue
        role = model.roles[key]
        is_copy = PADDED_MASTERS.search(key) is not None  # of weights, whose values are looked at
        for piece in pieces_of(tensor):
            one = _region(key, tensor, piece, role, instead)
            found.setdefault(piece.file, []).append(one._replace(is_copy=is_copy))
        for dtype, piece in tensor.copies:
            one = _region(key, tensor._replace(dtype=dtype), piece, role, instead)
            found.setdefault(piece.file, []).append(one._replace(is_copy=True))
    return {n: sorted(ones, key=lambda one: (one.offset, one.is_copy)) for n, ones in found.items()}


def _region(key: str, tensor: TensorSpec, piece: Piece, role: Role, instead: str) -> OutputTensor:
    """Return the place of one piece of a tensor."""
    region = region_of(piece)
    if region is None and role is Role.AVERAGED:
        message = f"Tensor {key} is a view whose elements have gaps between them or share bytes"
        message = f"{message}, which cannot be replaced in its place."
        raise RefusedError(message, instead, code=Code.INVALID_OUTPUT, tensor=key)
    if region is None:  # its first byte to its last
        count = spanned(piece.sizes, piece.strides) * DTYPE_BITS[tensor.dtype] // 8
        return OutputTensor(key, key, "U8", (count,), piece.offset, role)
    shape = tuple(piece.sizes[axis] for axis in region.axes)
    is_same = shape == tensor.shape and region.axes == tuple(range(len(shape)))
    place = (key, key, tensor.dtype, shape, piece.offset, role)
    return OutputTensor(*place, None if is_same else region, piece.sizes != tensor.shape)


def _without_tied(
    tensors: Sequence[OutputTensor], model: Model, instead: str
) -> list[OutputTensor]:
    """Return the averaged of some tensors that are in order, each storage once.

    Raises `RefusedError` for tensors that share bytes, unless they are one in every checkpoint.
    """
    kept: list[OutputTensor] = []
    last: OutputTensor | None = None
    end = 0
    for one in tensors:
        if last is None or one.offset >= end:
            kept += [one] * one.averaged
        elif (one.averaged or last.averaged) and not _are_tied(last, one, model):
            message = f"Tensors {last.key} and {one.key} share bytes in the newest checkpoint, and"
            message = f"{message} are not one tensor in every checkpoint."
            raise RefusedError(message, instead, code=Code.INVALID_OUTPUT, tensor=one.key)
        stop = one.offset + packed_bytes(one.dtype, one.shape)
        if stop > end:
            last, end = one, stop
    return kept


def _are_tied(one: OutputTensor, other: OutputTensor, model: Model) -> bool:
    place, same = (each._replace(key="", name="", is_copy=False) for each in (one, other))
    return place == same and all(layout[one.key] == layout[other.key] for layout in model.layouts)


def _between(ranges: Sequence[tuple[int, int]], size_bytes: int, file: int) -> Iterator[Copied]:
    """Yield what lies between ranges of a file that are in order."""
    end = 0
    for start, stop in (*ranges, (size_bytes, size_bytes)):
        if start > end:
            yield Copied(end, start - end, file)
        end = stop
