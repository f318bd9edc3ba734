"""Checkpoints in every kind of container, made of numbers without torch, and read likewise."""

import io
import json
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from safetensors import deserialize

_FORMATS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q"}  # of struct
_STORAGES = {
    "F64": b"DoubleStorage",
    "F32": b"FloatStorage",
    "F16": b"HalfStorage",
    "BF16": b"BFloat16Storage",
    "I64": b"LongStorage",
}
_TORCH_NAMES = {
    "F64": b"float64",
    "F32": b"float32",
    "F16": b"float16",
    "BF16": b"bfloat16",
    "I64": b"int64",
}


class Values(NamedTuple):
    """A tensor."""

    dtype: str  # as in safetensors
    shape: tuple[int, ...]
    numbers: Sequence[float]

    @property
    def packed(self) -> bytes:
        """Its bytes, each number rounded to nearest, ties to even."""
        if self.dtype != "BF16":
            return struct.pack(f"<{len(self.numbers)}{_FORMATS[self.dtype]}", *self.numbers)
        words = struct.unpack(
            f"<{len(self.numbers)}I", struct.pack(f"<{len(self.numbers)}f", *self.numbers)
        )
        halves = [(word + 0x7FFF + (word >> 16 & 1)) >> 16 for word in words]
        return struct.pack(f"<{len(halves)}H", *halves)


State = Mapping[str, Values]


def read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtype, shape and bytes of each tensor of a safetensors file, read by the library."""
    found = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    return {name: (one["dtype"], one["shape"], bytes(one["data"])) for name, one in found}


# --- safetensors ---------------------------------------------------------------------------------


def write_safetensors(path: Path, state: State) -> None:
    """Write one safetensors file."""
    header, data = {}, b""
    for name, values in state.items():
        offsets = [len(data), len(data) + len(values.packed)]
        header[name] = {"dtype": values.dtype, "shape": values.shape, "data_offsets": offsets}
        data += values.packed
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_model(folder: Path, state: State) -> None:
    """Write a checkpoint of one safetensors file."""
    write_safetensors(folder / "model.safetensors", state)


def write_shards(folder: Path, state: State) -> None:
    """Write a checkpoint with a file for each tensor, and their index."""
    names = [f"model-{n:05}-of-{len(state):05}.safetensors" for n in range(1, len(state) + 1)]
    for file, (name, values) in zip(names, state.items(), strict=True):
        write_safetensors(folder / file, {name: values})
    index = {"weight_map": dict(zip(state, names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# --- torch.save: the opcodes of its pickle -------------------------------------------------------


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _tuple(items: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _dict(items: Mapping[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in items.items()) + b"u"


def _tensor(values: Values, key: str) -> bytes:
    """Return a call that rebuilds a tensor on a storage of its own."""
    kind = b"ctorch\n" + _STORAGES[values.dtype] + b"\n"
    storage = [_text("storage"), kind, _text(key), _text("cpu"), _number(len(values.numbers))]
    strides = [math.prod(values.shape[axis + 1 :]) for axis in range(len(values.shape))]
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = [_tuple(storage) + b"Q", _number(0)]
    arguments += [_tuple(map(_number, sizes)) for sizes in (values.shape, strides)]
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple([*arguments, b"\x89", hooks]) + b"R"


def _pickled(state: State) -> bytes:
    tensors = {
        _text(name): _tensor(values, str(key)) for key, (name, values) in enumerate(state.items())
    }
    return b"\x80\x02" + _dict(tensors) + b"."


def _archive(pickled: bytes, storages: Iterable[bytes]) -> bytes:
    """Return the zip archive in which torch.save puts a pickle and its storages."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as target:
        target.writestr("archive/data.pkl", pickled)
        target.writestr("archive/byteorder", b"little")
        for key, data in enumerate(storages):
            target.writestr(f"archive/data/{key}", data)
        target.writestr("archive/version", b"3\n")
    return content.getvalue()


def write_torch(folder: Path, state: State) -> None:
    """Write a checkpoint of one file as torch.save writes it."""
    content = _archive(_pickled(state), [values.packed for values in state.values()])
    (folder / "pytorch_model.bin").write_bytes(content)


# --- torch.distributed.checkpoint ----------------------------------------------------------------

_METADATA = b"torch.distributed.checkpoint.metadata"
_FILESYSTEM = b"torch.distributed.checkpoint.filesystem"


def _object(module: bytes, name: bytes, state: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n)\x81" + state + b"b"


def _record(module: bytes, name: bytes, **fields: bytes) -> bytes:
    return _object(module, name, _dict({_text(key): value for key, value in fields.items()}))


def _size(sizes: Iterable[int]) -> bytes:
    return b"ctorch\nSize\n" + _tuple([_tuple(map(_number, sizes))]) + b"R"


def _properties(dtype: str) -> bytes:
    layout = b"ctorch.serialization\n_get_layout\n" + _tuple([_text("torch.strided")]) + b"R"
    encoding = b"c" + _METADATA + b"\n_MEM_FORMAT_ENCODING\n" + _tuple([_number(0)]) + b"R"
    kind = b"ctorch\n" + _TORCH_NAMES[dtype] + b"\n"
    state = _tuple([kind, layout, b"\x89", encoding, b"\x89"])
    return _object(_METADATA, b"TensorProperties", state)


def _by_rows(values: Values, ranks: int) -> list[tuple[int, Values]]:
    """Return a row for each rank, and all others for the last, with the number of the first."""
    count, *rest = values.shape
    row = math.prod(rest)
    return [
        (first, values._replace(shape=(last - first, *rest), numbers=numbers))
        for first, last in pairwise([*range(min(ranks, count)), count])
        for numbers in [values.numbers[first * row : last * row]]
    ]


def write_dcp(folder: Path, state: State, ranks: int = 2) -> None:
    """Write a checkpoint as ranks save it: each has a row, the last one all that follow."""
    tensors, paths, places = {}, {}, {}
    data = [b""] * ranks
    for name, values in state.items():
        fqn = _text(f"model.{name}")
        chunks = []
        for rank, (first, part) in enumerate(_by_rows(values, ranks)):
            saved = _archive(b"\x80\x02" + _tensor(part, "0") + b".", [part.packed])
            offsets = _size((first, *(0 for _ in part.shape[1:])))
            box = {"offsets": offsets, "sizes": _size(part.shape)}
            chunks.append(_record(_METADATA, b"ChunkStorageMetadata", **box))
            where = {"fqn": fqn, "offset": offsets, "index": _number(rank)}
            places[_record(_METADATA, b"MetadataIndex", **where)] = _record(
                *(_FILESYSTEM, b"_StorageInfo"),
                relative_path=_text(f"__{rank}_0.distcp"),
                offset=_number(len(data[rank])),
                length=_number(len(saved)),
            )
            data[rank] += saved
        tensors[fqn] = _record(
            *(_METADATA, b"TensorStorageMetadata"),
            properties=_properties(values.dtype),
            size=_size(values.shape),
            chunks=b"](" + b"".join(chunks) + b"e",
        )
        paths[fqn] = _tuple([_text("model"), _text(name)])
    metadata = _record(
        *(_METADATA, b"Metadata"),
        state_dict_metadata=_dict(tensors),
        planner_data=_dict(paths),
        storage_data=_dict(places),
    )
    (folder / ".metadata").write_bytes(b"\x80\x02" + metadata + b".")
    for rank, content in enumerate(data):
        (folder / f"__{rank}_0.distcp").write_bytes(content)
