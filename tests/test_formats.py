"""Every format tells the same of the same tensors; an index of shards is never followed outside."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_ema.containers import read
from ckpt_ema.containers.specs import DTYPE_BITS, Member, ModelFiles, Specs
from ckpt_ema.errors import RefusedError
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


def read_specs(path: Path) -> Specs:
    """The specs of a checkpoint of one part."""
    return read.read_specs(ModelFiles(path.parent, (Member(path.name),)), Local())


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

    def test_every_file_is_told_as_it_is(
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
        with pytest.raises(RefusedError, match=name):
            read_specs(weights)

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
        with pytest.raises(RefusedError, match=name):
            read_specs(weights)

    @pytest.mark.parametrize("replace", [os.mkfifo, os.mkdir], ids=["FIFO", "folder"])
    def test_what_is_no_regular_file_is_refused(
        self, make: Callable[[Path], Path], tmp_path: Path, replace: Callable[[Path], None]
    ) -> None:
        weights = make(tmp_path)
        name = read_specs(weights).files[0].name
        (tmp_path / name).unlink()
        replace(tmp_path / name)
        with pytest.raises(RefusedError, match=f"{name} is not a regular file"):
            read_specs(weights)


INDEX = "model.safetensors.index.json"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """The index of a good sharded checkpoint, to be broken."""
    return write_shards(tmp_path, write_safetensors, ".safetensors", "model")


def weight_map(index: Path) -> dict[str, Any]:
    """What the index maps now."""
    mapped: dict[str, Any] = json.loads(index.read_text())["weight_map"]
    return mapped


def refusal(index: Path) -> str:
    """The message with which an index is refused."""
    with pytest.raises(RefusedError) as caught:
        read_specs(index)
    assert index.name in caught.value.message
    assert str(caught.value).isprintable()
    return str(caught.value).replace(str(index.parent) + "/", "").replace(str(index.parent), "HERE")


class TestIndex:
    @pytest.mark.parametrize(
        "shard",
        [
            *("../other.safetensors", "..", ".", "", "/etc/passwd", "sub/model.safetensors"),
            *("a\0b.safetensors", "./model-00001-of-00003.safetensors", "a/", "\x1b[2J/b"),
        ],
    )
    def test_a_shard_outside_the_folder_is_refused(self, index: Path, shard: str) -> None:
        write_index(index, weight_map(index) | {"steps": shard})
        assert "which is not a plain file name" in refusal(index)

    def test_even_where_it_exists(self, index: Path) -> None:
        inside = index.parent / "sub"
        inside.mkdir()
        moved = write_index(inside / INDEX, {"mask": "../model-00002-of-00003.safetensors"})
        assert "a checkpoint may not reach outside its folder" in refusal(moved)

    @pytest.mark.parametrize("shard", ["gone", "\ud800", "x" * 5000, "\x1b[2J", "%s\n"])
    def test_a_missing_shard_is_refused(self, index: Path, shard: str) -> None:
        write_index(index, weight_map(index) | {"steps": shard})
        message = refusal(index)
        assert message.startswith(f"HERE is incomplete: {INDEX} names ")
        assert message.endswith(
            ", and that file is missing."
            " An interrupted save? Restore it or leave the checkpoint out."
        )

    @pytest.mark.parametrize("value", [1, None, ["model.safetensors"], {"file": "a"}, True])
    def test_a_shard_that_is_no_string_is_refused(self, index: Path, value: Any) -> None:
        write_index(index, weight_map(index) | {"steps": value})
        assert refusal(index) == f"{INDEX} maps a tensor to something that is no file name."

    @pytest.mark.parametrize("value", [{}, [], None, "model.safetensors", [["steps", "a"]]])
    def test_a_weight_map_that_is_none_is_refused(self, index: Path, value: Any) -> None:
        write_index(index, value)
        assert refusal(index) == f"{INDEX} has no weight_map."

    @pytest.mark.parametrize("content", ["{}", "[]", "1", '"weight_map"', "null"])
    def test_without_a_weight_map_it_is_refused(self, index: Path, content: str) -> None:
        index.write_text(content)
        assert refusal(index) == f"{INDEX} has no weight_map."

    @pytest.mark.parametrize(
        "content",
        [
            *(
                b"",
                b'{"weight_map": {"a"',
                b"<html>",
                b'{"weight_map": {"\xff": "a"}}',
                b"\x00" * 9,
            ),
            *(b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"weight_map":' * 50_000, b"1" * 10_000),
        ],
        ids=["empty", "cut", "HTML", "no UTF-8", "NUL", "BOM", "deep list", "deep", "digits"],
    )
    def test_what_is_not_json_is_refused(self, index: Path, content: bytes) -> None:
        index.write_bytes(content)
        assert refusal(index) == f"{INDEX} is not JSON. An interrupted save?"

    def test_a_name_that_the_shards_lack_is_refused(self, index: Path) -> None:
        first = weight_map(index)["mask"]
        write_index(index, weight_map(index) | {"more": first, "again": first})
        assert refusal(index) == f"{INDEX} names 2 tensors that its shards lack: again, more."

    def test_a_tensor_that_the_index_lacks_is_refused(self, index: Path) -> None:
        mapped = weight_map(index)
        shard = mapped.pop("steps")
        write_index(index, mapped)
        assert refusal(index) == (
            f"{INDEX} and {shard} disagree: the shard holds steps, which the index has in no shard."
        )

    def test_a_name_in_two_shards_is_refused(self, index: Path) -> None:
        first, *_, last = sorted(set(weight_map(index).values()))
        part = {name: STATE[name] for name, shard in weight_map(index).items() if shard == last}
        write_safetensors(index.parent / last, part | {"embedding.weight": torch.ones(4, 3)})
        assert refusal(index) == (
            f"{INDEX} and {last} disagree: the shard holds embedding.weight, which the index has"
            f" in {first}."
        )

    def test_names_swapped_between_shards_are_refused(self, index: Path) -> None:
        mapped = weight_map(index)
        mapped["steps"], mapped["mask"] = mapped["mask"], mapped["steps"]
        write_index(index, mapped)
        assert "disagree" in refusal(index)

    def test_a_fifo_in_its_place_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / INDEX)
        assert refusal(tmp_path / INDEX) == f"{INDEX} is not a regular file."

    def test_a_terabyte_of_index_is_not_read(self, tmp_path: Path) -> None:
        (tmp_path / INDEX).touch()
        os.truncate(tmp_path / INDEX, 2**40)
        assert refusal(tmp_path / INDEX) == f"{INDEX} is too large to be an index of shards."

    def test_a_shard_that_nobody_names_is_left_alone(self, index: Path) -> None:
        write_safetensors(index.parent / "extra.safetensors", {"extra": torch.ones(2)})
        assert set(read_specs(index).tensors) == set(STATE)

    def test_each_shard_keeps_its_own_metadata(self, index: Path) -> None:
        assert read_specs(index).metadata == ({"format": "pt"},) * 3

    def test_a_name_has_its_bits(self) -> None:
        """Every dtype that a test uses is one that a file can hold."""
        assert set(DTYPES.values()) <= set(DTYPE_BITS)
