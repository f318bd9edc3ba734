"""Every container gives the same specs of the same tensors; no index leads out of its folder."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_ema.containers import source
from ckpt_ema.containers.checks import AS_IT_IS
from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import FileSpec, Member, ModelFiles, Specs, TensorSpec
from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.options import Reading
from ckpt_ema.storage import Storage
from ckpt_ema.storage.local import Local
from tests.makers.safetensors_files import write_safetensors
from tests.makers.tensors import DTYPES, raw

STATE = {
    "embedding.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "layer.0.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3) / 7,
    "layer.0.bias": torch.tensor([1.5, -2.5], dtype=torch.float64),
    "steps": torch.tensor(2**60 + 1),
    "mask": torch.tensor([[True, False]]),
    "half": torch.full((1, 2, 1), 0.1, dtype=torch.float16),
    "nothing": torch.empty(0, 5),
    "naïve ★": torch.tensor([7], dtype=torch.uint8),
}


def write_torch(path: Path, state: dict[str, torch.Tensor]) -> None:
    """As torch.save writes today."""
    torch.save(state, path)


def write_legacy(path: Path, state: dict[str, torch.Tensor]) -> None:
    """As torch.save wrote before 1.6."""
    torch.save(state, path, _use_new_zipfile_serialization=False)


Write = Callable[[Path, dict[str, torch.Tensor]], None]


def write_shards(folder: Path, write: Write, suffix: str, stem: str) -> Path:
    """Three shards and their index, in the way of transformers; the index is returned."""
    weight_map = {}
    for number in range(3):
        shard = f"{stem}-{number + 1:05}-of-00003{suffix}"
        part = {name: STATE[name] for name in list(STATE)[number::3]}
        write(folder / shard, part)
        weight_map.update(dict.fromkeys(part, shard))
    return write_index(folder / f"{stem}{suffix}.index.json", weight_map)


def write_index(path: Path, weight_map: Any) -> Path:
    """An index with this `weight_map`, whatever it is."""
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def one(name: str, write: Write) -> Callable[[Path], Path]:
    """A maker of a checkpoint of one file."""

    def make(folder: Path) -> Path:
        write(folder / name, STATE)
        return folder / name

    return make


FORMATS: dict[str, Callable[[Path], Path]] = {
    "safetensors": one("model.safetensors", write_safetensors),
    "torch": one("pytorch_model.bin", write_torch),
    "legacy torch": one("model.pt", write_legacy),
    "sharded safetensors": lambda f: write_shards(f, write_safetensors, ".safetensors", "model"),
    "sharded torch": lambda f: write_shards(f, write_torch, ".bin", "pytorch_model"),
    "sharded legacy": lambda f: write_shards(f, write_legacy, ".bin", "pytorch_model"),
}


def read_specs(path: Path, key: str | None = None) -> Specs:
    """The specs of a checkpoint with one member."""
    return source.read_specs(
        ModelFiles(path.parent, (Member(path.name),)), Local(), Reading(key=key)
    )


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
class TestEveryFormat:
    """The contract of a reader, checked on the bytes of the files and not with another reader."""

    def read(self, make: Callable[[Path], Path], folder: Path) -> Specs:
        return read_specs(make(folder))

    def test_names_dtypes_and_shapes(self, make: Callable[[Path], Path], tmp_path: Path) -> None:
        specs = self.read(make, tmp_path)
        assert {name: (t.dtype, t.shape) for name, t in specs.tensors.items()} == {
            name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in STATE.items()
        }

    def test_the_bytes_are_where_it_says(
        self, make: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        specs = self.read(make, tmp_path)
        for name, spec in specs.tensors.items():
            content = (tmp_path / specs.files[spec.file].name).read_bytes()
            assert not spec.pieces
            assert spec.size_bytes == len(raw(STATE[name]))
            assert content[spec.offset : spec.offset + spec.size_bytes] == raw(STATE[name])

    def test_every_file_has_its_identity_and_digest(
        self, make: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        specs = self.read(make, tmp_path)
        assert len(specs.metadata) == len(specs.files)
        for file in specs.files:
            status = (tmp_path / file.name).stat()
            assert (file.size_bytes, file.mtime_ns) == (status.st_size, status.st_mtime_ns)
            assert len(bytes.fromhex(file.digest)) == 32

    def test_the_digest_follows_the_structure(
        self, make: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        before = self.read(make, tmp_path).files
        after = self.read(make, tmp_path).files
        assert [file.digest for file in before] == [file.digest for file in after]

    def test_nothing_is_noted_about_plain_tensors(
        self, make: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        assert self.read(make, tmp_path).notes == ()

    def test_a_cut_is_refused(self, make: Callable[[Path], Path], tmp_path: Path) -> None:
        weights = make(tmp_path)
        name = read_specs(weights).files[-1].name
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-30])
        with pytest.raises(RefusedError) as caught:
            read_specs(weights)
        assert (caught.value.code, caught.value.path) == (Code.CUT_SHORT, str(tmp_path / name))

    def test_a_link_is_followed(self, make: Callable[[Path], Path], tmp_path: Path) -> None:
        """The Hub cache is a farm of links to files named by their digest."""
        weights = make(tmp_path)
        before = read_specs(weights)
        (tmp_path / "blobs").mkdir()
        for file in before.files:
            (tmp_path / file.name).rename(tmp_path / "blobs" / file.digest)
            (tmp_path / file.name).symlink_to(tmp_path / "blobs" / file.digest)
        assert read_specs(weights) == before

    def test_a_dangling_link_is_refused(self, make: Callable[[Path], Path], tmp_path: Path) -> None:
        weights = make(tmp_path)
        name = read_specs(weights).files[0].name
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(tmp_path / "gone")
        with pytest.raises(IncompleteError) as caught:
            read_specs(weights)
        assert caught.value.path == str(tmp_path / name)

    @pytest.mark.parametrize("replace", [os.mkfifo, os.mkdir], ids=["FIFO", "folder"])
    def test_what_is_no_regular_file_is_refused(
        self, make: Callable[[Path], Path], tmp_path: Path, replace: Callable[[Path], None]
    ) -> None:
        weights = make(tmp_path)
        name = read_specs(weights).files[0].name
        (tmp_path / name).unlink()
        replace(tmp_path / name)
        with pytest.raises(RefusedError) as caught:
            read_specs(weights)
        assert (caught.value.code, caught.value.path) == (Code.NOT_A_FILE, str(tmp_path / name))


INDEX = "model.safetensors.index.json"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """The index of a good sharded checkpoint, to be broken."""
    return write_shards(tmp_path, write_safetensors, ".safetensors", "model")


def weight_map(index: Path) -> dict[str, Any]:
    """What the index maps now."""
    mapped: dict[str, Any] = json.loads(index.read_text())["weight_map"]
    return mapped


def refusal(index: Path) -> RefusedError:
    """The error with which an index is refused."""
    with pytest.raises(RefusedError) as caught:
        read_specs(index)
    assert str(caught.value).isprintable()
    return caught.value


class TestIndex:
    """What the command says of a broken index is in tests/corpus/index_files.py."""

    @pytest.mark.parametrize(
        "shard",
        [
            *("../other.safetensors", "..", ".", "", "/etc/passwd", "sub/model.safetensors"),
            *("a\0b.safetensors", "./model-00001-of-00003.safetensors", "a/", "\x1b[2J/b"),
        ],
    )
    def test_a_shard_outside_the_folder_is_refused(self, index: Path, shard: str) -> None:
        write_index(index, weight_map(index) | {"steps": shard})
        error = refusal(index)
        assert (error.code, error.path) == (Code.UNSAFE, str(index))

    @pytest.mark.parametrize("shard", ["gone", "\ud800", "x" * 5000, "\x1b[2J", "%s\n"])
    def test_a_missing_shard_is_refused(self, index: Path, shard: str) -> None:
        write_index(index, weight_map(index) | {"steps": shard})
        error = refusal(index)
        assert isinstance(error, IncompleteError)
        assert (error.code, error.path) == (Code.INCOMPLETE, str(index.with_name(shard)))

    @pytest.mark.parametrize(
        "content",
        [
            *(b"{}", b"[]", b"1", b'"weight_map"', b"null", b'{"weight_map": {}}'),
            *(b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": null}}'),
            *(b"", b'{"weight_map": {"a"', b"<html>", b'{"weight_map": {"\xff": "a"}}', b"\0" * 9),
            *(b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"weight_map":' * 50_000, b"1" * 10_000),
        ],
        ids=lambda content: content[:16].hex(),
    )
    def test_content_that_is_not_an_index_is_refused(self, index: Path, content: bytes) -> None:
        index.write_bytes(content)
        error = refusal(index)
        assert (error.code, error.path) == (Code.DAMAGED, str(index))

    def test_names_that_the_shards_lack_are_refused(self, index: Path) -> None:
        write_index(index, weight_map(index) | {"more": weight_map(index)["mask"]})
        assert refusal(index).code is Code.DAMAGED

    def test_a_tensor_that_the_index_lacks_is_refused(self, index: Path) -> None:
        mapped = weight_map(index)
        del mapped["steps"]
        write_index(index, mapped)
        assert refusal(index).tensor == "steps"

    def test_a_name_in_two_shards_is_refused(self, index: Path) -> None:
        last = max(weight_map(index).values())
        part = {name: STATE[name] for name, shard in weight_map(index).items() if shard == last}
        write_safetensors(index.parent / last, part | {"embedding.weight": torch.ones(4, 3)})
        assert refusal(index).tensor == "embedding.weight"

    def test_a_terabyte_of_index_is_not_read(self, tmp_path: Path) -> None:
        (tmp_path / INDEX).touch()
        os.truncate(tmp_path / INDEX, 2**40)
        assert refusal(tmp_path / INDEX).code is Code.DAMAGED

    def test_a_shard_that_the_index_does_not_name_is_warned_of(self, index: Path) -> None:
        stray = index.with_name("model-00004-of-00004.safetensors")
        write_safetensors(stray, {"extra": torch.ones(2)})
        write_safetensors(index.with_name("extra.safetensors"), {"extra": torch.ones(2)})
        specs = read_specs(index)
        assert set(specs.tensors) == set(STATE)
        [warning] = specs.warnings
        assert warning.code is Code.LEFT_OUT
        assert stray.name in warning.message

    def test_each_shard_keeps_its_own_metadata(self, index: Path) -> None:
        assert read_specs(index).metadata == ({"format": "pt"},) * 3


def test_members_keep_their_tensors_apart_by_a_prefix(tmp_path: Path) -> None:
    for name in ("unet", "vae"):
        write_safetensors(
            tmp_path / f"{name}.safetensors", {"w": torch.ones(2), "b": torch.ones(1)}
        )
    members = (Member("unet.safetensors", "unet/"), Member("vae.safetensors", "vae/"))
    specs = source.read_specs(ModelFiles(tmp_path, members), Local())
    assert list(specs.tensors) == ["unet/w", "unet/b", "vae/w", "vae/b"]
    assert [(file.name, file.member) for file in specs.files] == [
        ("unet.safetensors", 0),
        ("vae.safetensors", 1),
    ]
    assert {specs.tensors[name].file for name in ("vae/w", "vae/b")} == {1}
    with pytest.raises(RefusedError) as caught:
        source.read_specs(ModelFiles(tmp_path, (members[0], members[0])), Local())
    assert caught.value.tensor == "unet/w"


def test_a_key_names_a_dict_of_a_torch_file_alone(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", STATE)
    with pytest.raises(RefusedError) as caught:
        read_specs(tmp_path / "model.safetensors", "model")
    assert caught.value.code is Code.CONFLICTING_OPTIONS


def test_a_container_is_one_more_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are read like all others once the table has it."""

    class Raw:
        """One tensor of bytes, and nothing else."""

        def claims(self, name: str) -> bool:
            return name.endswith(".raw")

        def read_specs(self, path: str, storage: Storage, reading: Reading = AS_IT_IS) -> Specs:
            assert reading.key is None
            identity = storage.identity(path)
            tensor = TensorSpec("U8", (identity.size_bytes,), 0, 0)
            return Specs({"all": tensor}, (FileSpec(path, *identity, ""),), ({},))

    monkeypatch.setattr(source, "CONTAINERS", (Raw(), *source.CONTAINERS))
    (tmp_path / "model.raw").write_bytes(b"abcdef")
    specs = read_specs(tmp_path / "model.raw")
    buffer = bytearray(4)
    with Reader(Local(), [(tmp_path, specs)]) as reader:
        reader.read_into(0, specs.tensors["all"], 2, memoryview(buffer))
    assert bytes(buffer) == b"cdef"


@pytest.mark.parametrize("module", ["reader", "source"])
def test_reading_headers_and_comparing_import_no_torch(module: str) -> None:
    code = f"import sys, ckpt_ema.containers.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
