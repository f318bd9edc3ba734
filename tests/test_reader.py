"""A Reader gives any range of any tensor without a plan; comparing checkpoints is done with it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckpt_ema.containers.reader import Reader, hold_the_same
from ckpt_ema.containers.source import read_specs
from ckpt_ema.containers.specs import Member, ModelFiles, Specs
from ckpt_ema.errors import Code, FailedError
from ckpt_ema.storage.local import Local
from tests.makers import dcp_folders, torch_files
from tests.makers.faulty_storage import FewFiles, WatchedStorage
from tests.makers.safetensors_files import write_safetensors, write_shards
from tests.makers.tensors import StateDict, filled, raw

STATE = {
    "w": filled(torch.float32, 40, 30),
    "transposed": filled(torch.bfloat16, 30, 20).t(),
    "n": filled(torch.int64, 7),
    "scalar": filled(torch.float64),
    "empty": torch.empty(0, 3),
}
Opened = tuple[ModelFiles, Specs]


def opened(path: Path) -> Opened:
    """The model with its only member at `path`, and what its headers hold."""
    model = ModelFiles(path.parent, (Member(path.name),))
    return model, read_specs(model, Local())


def as_safetensors(folder: Path, state: StateDict) -> Opened:
    """One safetensors file."""
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", state)
    return opened(folder / "model.safetensors")


def as_shards(folder: Path, state: StateDict) -> Opened:
    """Two shards and an index."""
    folder.mkdir()
    write_shards(folder, state, 2)
    return opened(folder / "model.safetensors.index.json")


def as_torch_file(folder: Path, state: StateDict) -> Opened:
    """A torch file, with views as they are."""
    folder.mkdir()
    torch_files.save(folder / "model.bin", dict(state))
    return opened(folder / "model.bin")


def as_dcp(folder: Path, state: StateDict) -> Opened:
    """A folder of torch.distributed.checkpoint."""
    return opened(dcp_folders.save(folder, state) / ".metadata")


MAKERS = [as_safetensors, as_shards, as_torch_file, as_dcp]


@pytest.mark.parametrize("make", MAKERS)
def test_any_range_of_a_tensor(make: Callable[[Path, StateDict], Opened], tmp_path: Path) -> None:
    model, specs = make(tmp_path / "a", STATE)
    with Reader(Local(), [(model.folder, specs)]) as reader:
        for name, tensor in STATE.items():
            width = tensor.element_size()
            for start in range(0, tensor.nbytes, 41 * width):
                buffer = bytearray(min(50 * width, tensor.nbytes - start))
                reader.read_into(0, specs.tensors[name], start, memoryview(buffer))
                assert buffer == raw(tensor)[start : start + len(buffer)]
        reader.verify()


def test_checkpoints_are_told_apart_by_their_number(tmp_path: Path) -> None:
    made = [as_safetensors(tmp_path / str(n), {"w": torch.full((3,), float(n))}) for n in range(3)]
    with Reader(Local(), [(model.folder, specs) for model, specs in made]) as reader:
        for number, (_, specs) in enumerate(made):
            buffer = bytearray(12)
            reader.read_into(number, specs.tensors["w"], 0, memoryview(buffer))
            assert buffer == raw(torch.full((3,), float(number)))


def rewritten(path: Path) -> None:
    """The same bytes, later."""
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [Path.unlink, rewritten, lambda path: os.truncate(path, 100)])
def test_a_file_that_changed_since_its_header_was_read(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    model, specs = as_safetensors(tmp_path / "a", STATE)
    change(model.path)
    with Reader(Local(), [(model.folder, specs)]) as reader:
        with pytest.raises(FailedError) as reading:
            reader.read_into(0, specs.tensors["w"], 0, memoryview(bytearray(8)))
        with pytest.raises(FailedError) as verifying:
            reader.verify()
    for error in (reading.value, verifying.value):
        assert (error.code, error.path) == (Code.CHANGED, str(model.path))


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    made = [as_safetensors(tmp_path / str(n), {"w": torch.ones(2) * n}) for n in range(40)]
    with Reader(FewFiles(), [(model.folder, specs) for model, specs in made]) as reader:
        before = len(os.listdir("/proc/self/fd"))
        for number in [*range(40), *range(40)]:
            buffer = bytearray(8)
            reader.read_into(number, made[number][1].tensors["w"], 0, memoryview(buffer))
            assert buffer == raw(torch.ones(2) * number)
            assert len(os.listdir("/proc/self/fd")) <= before + 8
        with reader.descriptors((number, 0) for number in range(8)) as descriptors:
            for fd, (model, _) in zip(descriptors, made, strict=False):
                assert os.path.samestat(os.fstat(fd), model.path.stat())
            assert len(os.listdir("/proc/self/fd")) <= before + 8
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_tensors_in_any_two_containers(
    make: Callable[[Path, StateDict], Opened], tmp_path: Path
) -> None:
    one, other = as_torch_file(tmp_path / "a", STATE), make(tmp_path / "b", STATE)
    assert hold_the_same(one, other, Local())


def changed_at_the_end() -> dict[str, torch.Tensor]:
    """The last value of the largest tensor is another."""
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    state["w"][-1, -1] += 1
    return state


@pytest.mark.parametrize(
    "state",
    [
        changed_at_the_end(),
        {**STATE, "more": torch.ones(1)},
        {**STATE, "n": STATE["n"].double()},
        {**STATE, "w": STATE["w"].reshape(30, 40)},
    ],
    ids=["a value", "a name", "a dtype", "a shape"],
)
def test_a_difference(state: StateDict, tmp_path: Path) -> None:
    one, other = as_safetensors(tmp_path / "a", STATE), as_safetensors(tmp_path / "b", state)
    assert not hold_the_same(one, other, Local())


def test_what_cannot_be_read_counts_as_different(tmp_path: Path) -> None:
    one, other = as_safetensors(tmp_path / "a", STATE), as_safetensors(tmp_path / "b", STATE)
    other[0].path.unlink()
    assert not hold_the_same(one, other, Local())


def test_the_heads_of_all_tensors_are_compared_before_the_rest_of_any(tmp_path: Path) -> None:
    """A large frozen tensor that comes first costs no more than a small one."""
    frozen = torch.zeros(1 << 20)
    one = as_safetensors(tmp_path / "a", {"frozen": frozen, "w": torch.ones(2)})
    other = as_safetensors(tmp_path / "b", {"frozen": frozen, "w": torch.zeros(2)})
    sizes: list[int] = []
    storage = WatchedStorage(lambda _path, _offset, size: sizes.append(size))
    assert not hold_the_same(one, other, storage)
    assert 0 < sum(sizes) < 100_000
