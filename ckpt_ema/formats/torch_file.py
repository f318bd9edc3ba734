"""Files written by `torch.save`, zip archives and the older stream form: where each tensor lies.

The pickled structure is read by `unpickle`, which runs nothing; the tensors stay where they are,
stored uncompressed, and are read by position like those of any other format. Torch is not needed.
"""

import hashlib
import io
import math
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any

from ckpt_ema.errors import RefusedError, printable, some
from ckpt_ema.files import OpenFile, open_regular, read_exactly
from ckpt_ema.formats.specs import (
    DTYPE_BITS,
    FileSpec,
    Piece,
    Specs,
    TensorSpec,
    is_packed,
    spanned,
)
from ckpt_ema.formats.unpickle import (
    BROKEN_PICKLE,
    Inert,
    PickledTensor,
    Storage,
    TensorUnpickler,
    UnfitTensorError,
    check_claims,
)

# Where training scripts put the model in what they save, in the order in which it is looked for.
MODEL_KEYS = ("state_dict", "model", "model_state_dict", "module")

_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
_START_BYTES = 32  # by which the form of a file is told
_MAX_PICKLE_BYTES = 1 << 30
_MAX_EXPANDED_BYTES = 1 << 20  # of a view with stride 0, where that is more than the whole file


def read_specs(path: str) -> Specs:
    """The tensors of the model in one torch file, in the order of its state dict.

    The model is looked for under `MODEL_KEYS` and at the top. Raises `RefusedError` for a file
    that is no torch file, is cut or inconsistent, or holds no dict of tensors.
    """
    with open_regular(path) as file:
        start = read_exactly(path, file.fd, min(file.size_bytes, _START_BYTES), 0)
        if start.startswith(b"PK\x03\x04"):
            root, ignored, digest, locate = _read_zip(path, file)
        elif start.startswith(b"\x80") and _LEGACY_MAGIC in start:
            root, ignored, digest, locate = _read_legacy(path, file)
        else:
            raise _no_torch_file(path, start)
        model = _find_model(path, root)
        tensors = {
            name: _place(path, name, tensor, locate, file.size_bytes)
            for name, tensor in model.items()
            if _is_tensor(path, name, tensor)
        }
        spec = FileSpec(path, file.size_bytes, file.mtime_ns, digest)
    others = [str(name) for name, value in model.items() if not isinstance(value, PickledTensor)]
    notes = [f"left out of the model, being no tensors: {some(others)}"] if others else []
    if ignored:
        notes.append(f"skipped objects in the files that are no tensors: {some(ignored)}")
    return Specs(tensors, (spec,), ({},), tuple(notes))


def _is_tensor(path: str, name: str, value: object) -> bool:
    """Whether it is a tensor that can be read; raises for one that can not."""
    if isinstance(value, Inert) and value.name.startswith("torch._utils._rebuild_"):
        raise RefusedError(
            f"{printable(path)}: tensor {printable(name)} is of a kind that safetensors cannot hold"
            f" ({printable(value.name)}: sparse, quantised, distributed or without data).",
            "Save it dense, or leave it out of the state dict.",
        )
    return isinstance(value, PickledTensor)


_Locate = Callable[[Storage], int]  # the position in the file of a storage's first byte
_Structure = tuple[Any, list[str], str, _Locate]


def _no_torch_file(path: str, start: bytes) -> RefusedError:
    if not start:
        return RefusedError(f"{printable(path)} is empty.", "An interrupted save? Leave it out.")
    if start.startswith(b"version https"):
        return RefusedError(f"{printable(path)} is a Git LFS pointer.", "Run `git lfs pull`.")
    return RefusedError(
        f"{printable(path)} is not a file written by torch.save.", "Fetch or save it again."
    )


def _read_zip(path: str, file: OpenFile) -> _Structure:
    records = _zip_records(path, file)
    roots = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise RefusedError(
            f"{printable(path)} is a zip file without one data.pkl, not written by torch.save."
        )
    prefix = roots[0].removesuffix("data.pkl")

    def record(name: str) -> bytes:
        info = records[prefix + name]
        if info.file_size > _MAX_PICKLE_BYTES:
            raise RefusedError(f"{printable(path)}: its {name} is too large to be a structure.")
        return read_exactly(path, file.fd, info.file_size, _data_start(path, file, info))

    if prefix + "byteorder" in records and record("byteorder") != b"little":
        raise RefusedError(f"{printable(path)} was saved on a big-endian machine.")
    pickled = record("data.pkl")
    root, unpickler = _unpickle(path, io.BytesIO(pickled))

    def locate(storage: Storage) -> int:
        info = records.get(f"{prefix}data/{storage.key}")
        if info is None or info.file_size < _storage_bytes(storage):
            raise RefusedError(
                f"{printable(path)} is damaged: storage {printable(storage.key)} is missing or"
                " shorter than declared."
            )
        return _data_start(path, file, info)

    return root, unpickler.ignored, hashlib.sha256(pickled).hexdigest(), locate


def _zip_records(path: str, file: OpenFile) -> dict[str, zipfile.ZipInfo]:
    try:
        with open(file.fd, "rb", closefd=False) as stream, zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, OSError) as error:
        raise RefusedError(
            f"{printable(path)} is cut short or damaged: its zip directory cannot be read.",
            "An interrupted save? Leave it out.",
        ) from error
    records = {info.filename: info for info in infos}
    if any(name.endswith("/constants.pkl") for name in records):
        raise RefusedError(
            f"{printable(path)} is a TorchScript archive, a program and not a checkpoint.",
            "Save the model's state_dict() instead.",
        )
    stored = all(
        info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        for info in infos
    )
    if len(records) != len(infos) or not stored:
        raise RefusedError(
            f"{printable(path)} has compressed or repeated records, which torch.save never writes."
        )
    return records


def _data_start(path: str, file: OpenFile, info: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin, after a local header whose own lengths count."""
    inside = 0 <= info.header_offset <= file.size_bytes - 30
    header = read_exactly(path, file.fd, 30, info.header_offset) if inside else b""
    name_bytes = int.from_bytes(header[26:28], "little")
    extra_bytes = int.from_bytes(header[28:30], "little")
    start = info.header_offset + 30 + name_bytes + extra_bytes
    if not header.startswith(b"PK\x03\x04") or start + info.file_size > file.size_bytes:
        raise RefusedError(
            f"{printable(path)} is damaged: record {printable(info.filename)} is not where its"
            " directory says."
        )
    return start


def _read_legacy(path: str, file: OpenFile) -> _Structure:
    """The form before torch 1.6: pickles one after the other, then every storage's bytes."""
    with open(file.fd, "rb", closefd=False) as stream:
        _unpickle(path, stream)  # the magic number
        _unpickle(path, stream)  # the protocol's version
        system, _ = _unpickle(path, stream)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise RefusedError(f"{printable(path)} was saved on a big-endian machine.")
        root_start = stream.tell()
        root, unpickler = _unpickle(path, stream)
        keys, _ = _unpickle(path, stream)
        position = stream.tell()
    digest = hashlib.sha256(read_exactly(path, file.fd, position - root_start, root_start))
    starts: dict[str, int] = {}
    for key in keys if isinstance(keys, list) else []:
        storage = unpickler.storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise RefusedError(
                f"{printable(path)} is damaged: it lists a storage that its structure lacks."
            )
        starts[storage.key] = position + 8  # a count of elements comes first
        position += 8 + _storage_bytes(storage)

    def locate(storage: Storage) -> int:
        if starts.get(storage.key, file.size_bytes) + _storage_bytes(storage) > file.size_bytes:
            raise RefusedError(
                f"{printable(path)} is cut short: storage {printable(storage.key)} is not whole.",
                "An interrupted save? Leave it out.",
            )
        return starts[storage.key]

    return root, unpickler.ignored, digest.hexdigest(), locate


def _unpickle(path: str, stream: IO[bytes]) -> tuple[Any, TensorUnpickler]:
    unpickler = TensorUnpickler(stream)
    try:
        check_claims(stream)
        return unpickler.load(), unpickler
    except UnfitTensorError as error:
        raise RefusedError(
            f"{printable(path)} holds a tensor of a kind that safetensors cannot hold"
            f" ({printable(error)}).",
            "Leave it out of what is saved.",
        ) from error
    except BROKEN_PICKLE as error:
        raise RefusedError(
            f"{printable(path)} is cut short or damaged: its structure cannot be read"
            f" ({printable(error)})."
        ) from error


def _find_model(path: str, root: Any) -> Mapping[str, Any]:
    """The dict of tensors that is the model."""
    if isinstance(root, dict):
        found = [key for key in MODEL_KEYS if _is_model(root.get(key))]
        if len(found) > 1:
            raise RefusedError(
                f"{printable(path)} holds {len(found)} dicts of tensors: {some(found)}; which one"
                " is the model cannot be told."
            )
        pickled = [key for key in MODEL_KEYS if isinstance(root.get(key), Inert)]
        if not found and pickled:
            raise RefusedError(
                f"{printable(path)} stores the model as a pickled"
                f" {printable(root[pickled[0]].name)}, not as tensors; reading it would run code"
                " from the file.",
                "Save its state_dict() instead.",
            )
        model = root[found[0]] if found else root
        if _is_model(model):
            return model
    if isinstance(root, Inert):
        raise RefusedError(
            f"{printable(path)} is a pickled {printable(root.name)}, not tensors; reading it would"
            " run code from the file.",
            "Save its state_dict() instead.",
        )
    raise RefusedError(
        f"{printable(path)} holds no dict of tensors, at the top or under {', '.join(MODEL_KEYS)}."
    )


def _is_model(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and any(isinstance(item, PickledTensor) for item in value.values())
        and all(isinstance(name, str) and _is_text(name) for name in value)
    )


def _is_text(name: str) -> bool:
    """Whether a name can be written: pickles can hold half a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place(
    path: str, name: str, tensor: PickledTensor, locate: _Locate, file_bytes: int
) -> TensorSpec:
    """Where a tensor's elements are, checked to lie inside its storage."""
    dtype, shape, strides = tensor.dtype, tensor.shape, tensor.strides
    item_bytes = DTYPE_BITS[dtype] // 8
    start = tensor.offset * item_bytes
    size_bytes = math.prod(shape) * item_bytes
    end = start + spanned(shape, strides) * item_bytes
    if end > _storage_bytes(tensor.storage) or size_bytes > max(file_bytes, _MAX_EXPANDED_BYTES):
        raise RefusedError(
            f"{printable(path)}: tensor {printable(name)} reaches beyond its storage; the file is"
            " damaged or not what it seems."
        )
    if not size_bytes:
        return TensorSpec(dtype, shape, 0, 0)
    offset = locate(tensor.storage) + start
    if is_packed(shape, strides):
        return TensorSpec(dtype, shape, 0, offset)
    piece = Piece(0, offset, (0,) * len(shape), shape, strides)
    return TensorSpec(dtype, shape, 0, offset, (piece,))


def _storage_bytes(storage: Storage) -> int:
    return storage.length * (DTYPE_BITS[storage.dtype] // 8 if storage.dtype else 1)
