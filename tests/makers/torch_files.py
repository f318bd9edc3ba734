"""Torch files made by hand: pickles as opcodes, and the containers that torch puts them in."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch


def save(path: Path, value: Any, form: str = "zip") -> str:
    """Save with torch, as "zip" or in the older "legacy" form; return the path."""
    torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    return str(path)


def archive(path: Path, pickled: bytes, **records: bytes) -> str:
    """A zip file as torch.save lays it out, around this pickle."""
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/data.pkl", pickled)
        target.writestr("archive/byteorder", b"little")
        for name, content in records.items():
            target.writestr(f"archive/data/{name.removeprefix('_')}", content)
        target.writestr("archive/version", b"3\n")
    return str(path)


LEGACY_HEAD = (
    pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    + pickle.dumps(1001, 2)
    + pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
)


def legacy(path: Path, pickled: bytes, keys: Any = (), data: bytes = b"") -> str:
    """A stream as torch.save wrote it before 1.6, around this pickle."""
    path.write_bytes(LEGACY_HEAD + pickled + pickle.dumps(list(keys), 2) + data)
    return str(path)


def bare(path: Path, pickled: bytes) -> str:
    """The pickle alone."""
    path.write_bytes(pickled)
    return str(path)


def tensor_pickle(
    shape: bytes = b"(K\x02K\x03t",
    strides: bytes = b"(K\x03K\x01t",
    offset: bytes = b"K\x00",
    count: bytes = b"K\x06",
) -> bytes:
    """A dict with one tensor "w", each number as the opcodes that push it."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    return (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
        + (storage + count + b"tQ" + offset + shape + strides)
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def sharded_pickle(module: str = "torch.distributed._shard.sharded_tensor.api") -> bytes:
    """Return a dict with one ShardedTensor "w" as torch pickles it: a wrapper, its class, shards.

    Its process group is an object of a class within that class, which `getattr` looks up.
    """
    kind = f"c{module}\nShardedTensor\n".encode()
    group = b"c__builtin__\ngetattr\n" + kind + pushed(b"ProcessGroupState") + b"\x86R)\x81}b"
    layout = b"ctorch.serialization\n_get_layout\n" + pushed(b"torch.strided") + b"\x85R"
    device = b"ctorch\ndevice\n" + pushed(b"cpu") + b"\x85R"
    arguments = b"(" + kind + b"ctorch\nfloat32\n(K\x04K\x03t(K\x03K\x01tK\x00"
    arguments += layout + device + b"\x89t"
    rebuild = b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_wrapper_subclass\n"
    return b"\x80\x02}X\x01\x00\x00\x00w" + rebuild + kind + arguments + b"](" + group + b"etRs."


def pushed(text: bytes) -> bytes:
    """The opcodes that push a string."""
    return b"X" + struct.pack("<I", len(text)) + text


def hostile_pickles(mark: Path) -> dict[str, bytes]:
    """Pickles that would leave a mark, were anything in them run."""
    text, line = pushed(bytes(mark)), pushed(b"open(%r, 'w')" % str(mark))
    command = pushed(b"touch " + bytes(mark))
    calls = {
        "os.system": b"cos\nsystem\n(" + command + b"tR",
        "posix.system": b"cposix\nsystem\n(" + command + b"tR",
        "subprocess": b"csubprocess\nrun\n((lp0\n" + text + b"atR",
        "open": b"cbuiltins\nopen\n(" + text + pushed(b"w") + b"tR",
        "io.open": b"c_io\nopen\n(" + text + pushed(b"w") + b"tR",
        "py2 open": b"c__builtin__\nopen\n(" + text + pushed(b"w") + b"tR",
        "exec": b"cbuiltins\nexec\n(" + line + b"tR",
        "eval": b"cbuiltins\neval\n(" + line + b"tR",
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nX\x08\x00\x00\x00__call__tR("
        + command
        + b"tR",
        "import": b"cbuiltins\n__import__\n(X\x02\x00\x00\x00ostR",
        "codecs": b"c_codecs\nencode\n(" + text + b"X\x06\x00\x00\x00latin1tR",
        "bytearray": b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR",
        "inst": b"(" + command + b"ios\nsystem\n",
        "obj": b"(cos\nsystem\n" + command + b"o",
        "newobj": b"cos\nsystem\n(" + command + b"t\x81",
        "newobj_ex": b"cos\nsystem\n(" + command + b"t}\x92",
        "build": b"c__main__\nThing\n)R}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb",
        "stack_global": b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93(" + command + b"tR",
        "dotted": b"X\x02\x00\x00\x00osX\x0b\x00\x00\x00path.os.sys\x93)R",
        "torch.load": b"ctorch\nload\n(" + text + b"tR",
        "load_from_bytes": b"ctorch.storage\n_load_from_bytes\n(" + text + b"tR",
        "from_type": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN(" + command + b"tNtR",
        "extension": b"\x82\x01",
        "persistent": b"(X\x06\x00\x00\x00modulecos\nsystem\nNNtQ(" + command + b"tR",
    }
    good = tensor_pickle()
    return {
        label: good[:-1] + b"X\x01\x00\x00\x00x" + call + b"s." for label, call in calls.items()
    }


def number(value: int) -> bytes:
    """The opcodes that push an integer of any size."""
    return pickle.dumps(value, 2)[2:-1]


def records(path: Path) -> dict[str, bytes]:
    """The records of a zip archive by torch.save, but for the one that is a random number."""
    with zipfile.ZipFile(path) as archive:
        named = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return {name: content for name, content in named.items() if "serialization_id" not in name}
