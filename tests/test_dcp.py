"""Distributed checkpoints: whatever ranks wrote them, each element is found and nothing ever runs.

Checkpoints are torch's own, saved by one process or by several; what is broken in them is broken by
unpickling, editing and pickling the metadata with torch's own classes.
"""

import fcntl
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import ckpt_ema
from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.source import read_specs
from ckpt_ema.containers.specs import (
    DTYPE_BITS,
    Member,
    ModelFiles,
    Piece,
    Specs,
    TensorSpec,
    spanned,
)
from ckpt_ema.errors import CkptEmaError, Code, IncompleteError, RefusedError
from ckpt_ema.options import Reading
from ckpt_ema.storage.local import Local
from tests.command import run_together
from tests.conftest import MakeRun
from tests.makers.dcp_folders import (
    Change,
    chunked,
    edit,
    loaded,
    metadata_of,
    place,
    save,
    splice,
    w,
)
from tests.makers.limits import cheap
from tests.makers.safetensors_files import read_safetensors
from tests.makers.tensors import DTYPES, filled, raw
from tests.makers.torch_files import hostile_pickles, number, pushed, tensor_pickle


def read(folder: Path, key: str | None = None) -> Specs:
    """What our reader says of the model."""
    return read_specs(ModelFiles(folder, (Member(".metadata"),)), Local(), Reading(key=key))


def unchanged(_metadata: Metadata) -> None:
    """Leave it as it is, and only pickle it anew."""


def boxes(spec: TensorSpec) -> tuple[Piece, ...]:
    """The pieces of a tensor; one that is whole in one place is a piece of its own."""
    strides: list[int] = []
    step = 1
    for size in reversed(spec.shape):
        strides.insert(0, step)
        step *= size
    start = (0,) * len(spec.shape)
    whole = Piece(spec.file, spec.offset, start, spec.shape, tuple(strides))
    return spec.pieces or (whole,)


def located(folder: Path, specs: Specs, name: str) -> bytes:
    """The elements where the specs say that they are, row-major; each is in one piece only."""
    spec = specs.tensors[name]
    width = DTYPE_BITS[spec.dtype] // 8
    found: dict[tuple[int, ...], bytes] = {}
    for piece in boxes(spec):
        content = (folder / specs.files[piece.file].name).read_bytes()
        for index in product(*map(range, piece.sizes)):
            steps = sum(i * stride for i, stride in zip(index, piece.strides, strict=True))
            at = piece.offset + width * steps
            place = tuple(a + i for a, i in zip(piece.starts, index, strict=True))
            assert place not in found
            assert at + width <= len(content)
            found[place] = content[at : at + width]
    return b"".join(found[place] for place in product(*map(range, spec.shape)))


def gathered(folder: Path, specs: Specs, name: str, start: int = 0) -> bytes:
    """The elements from `start` on as a `Reader` brings them together."""
    spec = specs.tensors[name]._replace(pieces=boxes(specs.tensors[name]))
    start_byte = start * DTYPE_BITS[spec.dtype] // 8
    values = bytearray(spec.size_bytes - start_byte)
    with Reader(Local(), [(folder, specs)]) as reader:
        if values:
            reader.read_into(0, spec, start_byte, memoryview(values))
    return bytes(values)


def check(folder: Path, state: Mapping[str, torch.Tensor], specs: Specs | None = None) -> Specs:
    """Every tensor of `state`, and nothing else, is found with its dtype, shape and bytes."""
    specs = read(folder) if specs is None else specs
    assert set(specs.tensors) == set(state)
    for name, tensor in state.items():
        spec = specs.tensors[name]
        assert (spec.dtype, spec.shape) == (DTYPES[tensor.dtype], tuple(tensor.shape)), name
        assert located(folder, specs, name) == raw(tensor), name
    return specs


def refusal(folder: Path) -> RefusedError:
    """The error with which it is refused, quickly and with little memory."""
    metadata = folder / ".metadata"
    size_bytes = metadata.stat().st_size if metadata.is_file() else 0
    with cheap(8_000_000 + 40 * size_bytes), pytest.raises(RefusedError) as caught:
        read(folder)
    assert caught.value.path is not None
    assert Path(caught.value.path).is_relative_to(folder)
    assert str(caught.value).isprintable()
    return caught.value


def refused_or_sound(folder: Path) -> None:
    """Either one of our errors, or tensors that lie in their files, each element once."""
    try:
        specs = read(folder)
    except CkptEmaError as error:
        assert str(error).isprintable()
        return
    for spec in specs.tensors.values():
        total = torch.Size(spec.shape).numel()
        assert sum(torch.Size(piece.sizes).numel() for piece in boxes(spec)) == total
        for piece in boxes(spec):
            assert all(
                a + n <= size
                for a, n, size in zip(piece.starts, piece.sizes, spec.shape, strict=True)
            )
            end = piece.offset + spanned(piece.sizes, piece.strides) * DTYPE_BITS[spec.dtype] // 8
            assert end <= (folder / specs.files[piece.file].name).stat().st_size


BASE = filled(torch.float32, 4, 6, 5)
STATE = {
    **{f"of {dtype}": filled(dtype, 3, 5) for dtype in DTYPES},
    "scalar": filled(torch.float32),
    "scalar bool": torch.tensor(True),
    "empty": torch.empty(0, 3),
    "empty inside": torch.empty(2, 0, 3, dtype=torch.bfloat16),
    "one": filled(torch.int64, 1, 1, 1),
    "transposed": filled(torch.float32, 4, 6).t(),
    "sliced": BASE[1:3, ::2, 1:],
    "permuted": BASE.permute(2, 0, 1),
    "expanded": filled(torch.float16, 3, 1).expand(3, 4),
    "channels last": filled(torch.bfloat16, 2, 3, 2, 2).contiguous(
        memory_format=torch.channels_last
    ),
    "one row of many": filled(torch.bfloat16, 100, 4)[41],
    "empty slice": BASE[4:],
    "naïve ★": torch.tensor([7], dtype=torch.uint8),
}


class TestContract:
    """The contract of a reader, checked on the bytes of the files and not with another reader."""

    def test_the_bytes_are_where_it_says(self, tmp_path: Path) -> None:
        assert check(save(tmp_path / "a", STATE), STATE).notes == ()

    def test_gather_brings_the_same(self, tmp_path: Path) -> None:
        specs = read(save(tmp_path / "a", STATE))
        for name, tensor in STATE.items():
            assert gathered(tmp_path / "a", specs, name) == raw(tensor)
            for start in range(tensor.numel()):
                expected = raw(tensor)[start * tensor.element_size() :]
                assert gathered(tmp_path / "a", specs, name, start) == expected

    def test_what_torch_wrote_packed_is_not_said_to_be_in_pieces(self, tmp_path: Path) -> None:
        specs = read(save(tmp_path / "a", {"w": torch.ones(3, 2), "s": torch.ones(())}))
        assert not any(spec.pieces for spec in specs.tensors.values())

    def test_every_file_has_its_identity(self, tmp_path: Path) -> None:
        specs = read(save(tmp_path / "a", STATE))
        assert [file.name for file in specs.files] == [".metadata", "__0_0.distcp"]
        assert len(specs.metadata) == len(specs.files)
        for file in specs.files:
            status = (tmp_path / "a" / file.name).stat()
            assert (file.size_bytes, file.mtime_ns) == (status.st_size, status.st_mtime_ns)
        assert len(bytes.fromhex(specs.files[0].digest)) == 32

    def test_links_are_followed(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "a", STATE)
        before = read(folder)
        (tmp_path / "blobs").mkdir()
        for name in (".metadata", "__0_0.distcp"):
            (folder / name).rename(tmp_path / "blobs" / name)
            (folder / name).symlink_to(tmp_path / "blobs" / name)
        assert read(folder) == before

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_every_protocol(self, tmp_path: Path, protocol: int) -> None:
        folder = save(tmp_path / "a", STATE)
        edit(folder, unchanged, protocol)
        check(folder, STATE)

    def test_without_what_the_planner_knew(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "a", STATE)
        edit(folder, lambda metadata: setattr(metadata, "planner_data", None))
        check(folder, STATE)

    def test_the_place_of_a_whole_tensor_may_go_without_an_offset(self, tmp_path: Path) -> None:
        """As old versions of torch noted those of plain tensors."""
        folder = save(tmp_path / "a", STATE)

        def change(metadata: Metadata) -> None:
            metadata.storage_data = {
                MetadataIndex(index.fqn): info for index, info in metadata.storage_data.items()
            }

        edit(folder, change)
        check(folder, STATE)

    def test_saved_under_python_3_13(self, tmp_path: Path) -> None:
        """There, and only there, the folder's own path is pickled as a pathlib._local.PosixPath."""
        folder = save(tmp_path / "a", STATE)
        edit(folder, unchanged)
        splice(folder, b"cpathlib\nPosixPath\n", b"cpathlib._local\nPosixPath\n")
        check(folder, STATE)

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_saved_under_python_3_11_0(self, tmp_path: Path, protocol: int) -> None:
        """Until 3.11.4, members of an Enum were pickled by name: as a call of getattr."""
        folder = save(tmp_path / "a", STATE)
        member = Made(getattr, (_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"))

        def change(metadata: Metadata) -> None:
            for entry in metadata.state_dict_metadata.values():
                assert isinstance(entry, TensorStorageMetadata)
                state = (entry.properties.dtype, torch.strided, False, member, False)
                vars(entry)["properties"] = Made(TensorProperties, (), state)

        edit(folder, change, protocol)
        metadata_of(folder)
        check(folder, STATE)

    def test_saved_by_torch_2_2(self, tmp_path: Path) -> None:
        """TensorProperties was a class of ShardedTensor then, and there was no storage_meta."""
        folder = save(tmp_path / "a", STATE)

        def change(metadata: Metadata) -> None:
            del metadata.storage_meta, metadata.version

        edit(folder, change)
        here = b"ctorch.distributed.checkpoint.metadata\n"
        before = b"ctorch.distributed._shard.sharded_tensor.metadata\n"
        splice(folder, here + b"TensorProperties\n", before + b"TensorProperties\n")
        splice(folder, here + b"_MEM_FORMAT_ENCODING\n", before + b"MEM_FORMAT_ENCODING\n")
        check(folder, STATE)


RANKS = (2, 3, 4)
STEPS = (100, 200, 300)
SHAPES = {
    "even": (12, 8),
    "seven rows": (7, 5),
    "seven columns": (3, 7),
    "fewer than ranks": (1, 2),
    "deep": (5, 3, 7),
    "large": (50, 30),
}
SHARDED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def full_state(step: int) -> dict[str, torch.Tensor]:
    """What all ranks have together, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    state = {"scalar": torch.tensor(step / 7), "plain": torch.full((3,), float(step))}
    for count, (name, shape) in enumerate(SHAPES.items()):
        for layout in ("rows", "columns", "both", "crossed", "twice", "replicated"):
            dtype = SHARDED_DTYPES[count % len(SHARDED_DTYPES)]
            values = torch.randn(shape, generator=generator) * 100
            state[f"{name}.{layout}"] = values.to(dtype)
    return state


def _to_object(tensor: torch.Tensor, size: int, _group: Any = None) -> Any:
    """As torch does it, but without numpy."""
    return pickle.loads(bytes(tensor.clone().untyped_storage())[: int(size)])


def _save_as_rank(run: Path, rank: int, ranks: int) -> None:
    """What one rank does: save its shards of every step."""
    import torch.distributed as dist
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    vars(dist.distributed_c10d)["_tensor_to_object"] = _to_object
    store = f"file://{run.parent}/store-{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    grid = (2, 2) if ranks == 4 else (ranks,)
    mesh = init_device_mesh("cpu", grid)
    one, flat = Replicate(), len(grid) == 1
    layouts: dict[str, list[Any]] = {
        "rows": [Shard(0)] if flat else [one, Shard(0)],
        "columns": [Shard(1)] if flat else [Shard(1), one],
        "both": [Shard(0)] if flat else [Shard(0), Shard(1)],
        "crossed": [Shard(1)] if flat else [Shard(1), Shard(0)],
        "twice": [Shard(0)] if flat else [Shard(0), Shard(0)],
        "replicated": [one] * len(grid),
    }
    for step in STEPS:
        content = {
            name: distribute_tensor(tensor, mesh, layouts[name.rpartition(".")[2]])
            if "." in name
            else tensor
            for name, tensor in full_state(step).items()
        }
        extra = {"step": step, "moment": torch.ones(3)}
        state_dict_saver.save(
            {"model": content, "optimizer": extra}, checkpoint_id=run / f"step-{step}"
        )
    dist.destroy_process_group()


def _save_sharded(folder: Path) -> None:
    folder.mkdir()
    ranks_of = [(ranks, rank) for ranks in RANKS for rank in range(ranks)]
    run_together(_save_as_rank, [(folder / f"of-{ranks}", rank, ranks) for ranks, rank in ranks_of])


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of-2, of-3 and of-4, each saved by so many ranks at STEPS."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # which all workers have
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when it is closed
        if not (shared / "sharded").exists():
            _save_sharded(shared / "unfinished")
            (shared / "unfinished").rename(shared / "sharded")
    return shared / "sharded"


def test_metadata_of_megatron_core_is_read(tmp_path: Path) -> None:
    """Up to release 0.15 it has a class of its own."""
    folder = save(tmp_path / "a", {"decoder.w": torch.ones(2, 3)})
    edit(folder, unchanged)
    ours = b"cmegatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata\n"
    splice(folder, b"ctorch.distributed.checkpoint.metadata\nMetadata\n", ours)
    check(folder, {"decoder.w": torch.ones(2, 3)})


@pytest.mark.parametrize("ranks", RANKS)
class TestSharded:
    def test_every_rank_has_a_file(self, sharded: Path, ranks: int) -> None:
        folder = sharded / f"of-{ranks}" / "step-100"
        specs = read(folder)
        assert len(list(folder.glob("*.distcp"))) == ranks
        assert len(specs.files) == 1 + ranks
        assert len(specs.tensors["large.rows"].pieces) == {2: 2, 3: 3, 4: 2}[ranks]

    def test_every_element_is_found(self, sharded: Path, ranks: int) -> None:
        for step in STEPS:
            check(sharded / f"of-{ranks}" / f"step-{step}", full_state(step))

    def test_gather_brings_any_range(self, sharded: Path, ranks: int) -> None:
        folder = sharded / f"of-{ranks}" / "step-200"
        specs = read(folder)
        for name, tensor in full_state(200).items():
            for start in {0, 1, 4, tensor.numel() // 2, tensor.numel() - 1}:
                if start < tensor.numel():
                    expected = raw(tensor)[start * tensor.element_size() :]
                    assert gathered(folder, specs, name, start) == expected, name

    def test_it_is_written_back_whatever_ranks_saved_the_others(
        self, sharded: Path, ranks: int, tmp_path: Path
    ) -> None:
        teams = [*RANKS[RANKS.index(ranks) + 1 :], *RANKS[: RANKS.index(ranks) + 1]]
        run = [sharded / f"of-{of}" / f"step-{step}" for of, step in zip(teams, STEPS, strict=True)]
        options: dict[str, Any] = {"decay": 0.9, "device": "cpu", "tile_size": 96}
        average = read_safetensors(average_of(run, output=tmp_path / "average", **options))
        output = tmp_path / "out"
        ckpt_ema.average(run, output=output, save_as="checkpoint", **options)
        assert {p.name for p in run[-1].iterdir()} < {p.name for p in output.iterdir()}
        for name, tensor in loaded(output, average).items():
            assert raw(tensor) == raw(average[name]), name

    def test_the_average_is_that_of_the_full_tensors(
        self, sharded: Path, ranks: int, tmp_path: Path, make_run: MakeRun
    ) -> None:
        """By the weights of the plan, and bit for bit as of the same run in one file a step."""
        run, states = sharded / f"of-{ranks}", [full_state(step) for step in STEPS]
        options: dict[str, Any] = {"decay": 0.9, "device": "cpu", "output": tmp_path / "out"}
        weights = ckpt_ema.plan(run, **options).averages[0].weights
        averaged = read_safetensors(average_of(run, **options))
        assert set(averaged) == set(states[0])
        for name, tensor in averaged.items():
            if tensor.is_floating_point():
                values = [weight * s[name].double() for weight, s in zip(weights, states)]  # noqa: B905
                expected = torch.stack(values).sum(0).to(tensor.dtype)
                one_step = torch.finfo(tensor.dtype).eps
                torch.testing.assert_close(tensor, expected, rtol=one_step, atol=1e-12)
            else:
                assert torch.equal(tensor, states[-1][name])
        options["output"] = tmp_path / "same"
        whole = read_safetensors(average_of(make_run(states, steps=STEPS), **options))
        assert {n: raw(t) for n, t in whole.items()} == {n: raw(t) for n, t in averaged.items()}

    def test_the_bytes_do_not_depend_on_tiles_or_threads(
        self, sharded: Path, ranks: int, tmp_path: Path
    ) -> None:
        outputs = set()
        for tile, threads in product((28, 1 << 20), (1, 3)):
            output = tmp_path / f"{tile}-{threads}"
            file = average_of(
                sharded / f"of-{ranks}",
                output=output,
                device="cpu",
                tile_size=tile,
                threads=threads,
            )
            outputs.add(file.read_bytes())
        assert len(outputs) == 1


def average_of(run: Path | list[Path], **options: Any) -> Path:
    """The one weights file of an average."""
    [file] = ckpt_ema.average(run, **options).output.glob("*.safetensors")
    return file


@pytest.mark.parametrize("threads", [1, 3])
def test_tiles_of_one_element(sharded: Path, tmp_path: Path, threads: int) -> None:
    """Of tensors in pieces and in place, the same bytes as in one tile."""
    run = tmp_path / "run"
    for step in (1, 2):
        pieces = {f"w{i}": torch.randn(5, 3, generator=seeded(step + i)).t() for i in range(3)}
        save(run / f"step-{step}", {"model": {**pieces, "v": torch.full((4,), float(step))}})
    one = {"device": "cpu", "tile_size": 4, "threads": threads}
    first = average_of(run, output=tmp_path / "one", **one).read_bytes()
    assert first == average_of(run, output=tmp_path / "all", device="cpu").read_bytes()


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


MODEL = {"layers.0.weight": filled(torch.float32, 3, 2), "norm.weight": filled(torch.bfloat16, 3)}
TRAINING = {
    "optimizer": {
        **{f"state.{name}.exp_avg": tensor for name, tensor in MODEL.items()},
        "param_groups": [{"lr": 1e-3}],
    },
    "lr_scheduler": {"last_epoch": 3, "rates": torch.ones(2)},
    "train_state": {"step": torch.tensor(3), "ntokens_seen": torch.tensor(24)},
    "dataloader": {"dp_rank_0": b"state"},
}


class TestTheModel:
    @pytest.mark.parametrize(
        "content",
        [
            MODEL,
            {**MODEL, **TRAINING},
            {"model": MODEL, **TRAINING},
            {"model": MODEL, "optim": TRAINING["optimizer"]},
            {"app": {"model": MODEL, "optim": TRAINING["optimizer"]}},
            {"state_dict": MODEL, "optimizer_states": TRAINING["optimizer"]},
            {"state": {"model": MODEL, "optimizers": TRAINING["optimizer"]}},
        ],
        ids=["alone", "torchtitan", "model", "optim", "app", "state_dict", "state"],
    )
    def test_is_found_and_the_optimizer_is_not_counted(
        self, tmp_path: Path, content: dict[str, Any]
    ) -> None:
        check(save(tmp_path / "a", content), MODEL)

    def test_names_at_the_top_that_begin_with_model_are_kept(self, tmp_path: Path) -> None:
        state = {f"model.{name}": tensor for name, tensor in MODEL.items()}
        check(save(tmp_path / "a", state), state)
        check(save(tmp_path / "b", {**state, **TRAINING}), state)

    def test_a_key_chooses(self, tmp_path: Path) -> None:
        other = {"w": torch.ones(2)}
        folder = save(tmp_path / "a", {"model": MODEL, "net": other, "deep": {"er": other}})
        assert refusal(folder).code is Code.SEVERAL_MODELS
        check(folder, MODEL, read(folder, "model"))
        check(folder, other, read(folder, "net"))
        check(folder, other, read(folder, "deep.er"))
        with pytest.raises(RefusedError) as caught:
            read(folder, "gone")
        assert caught.value.code is Code.NO_MODEL

    def test_without_any_it_is_refused(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "a", {"optimizer": TRAINING["optimizer"]})
        assert refusal(folder).code is Code.NO_MODEL
        assert refusal(save(tmp_path / "b", {"step": 3})).code is Code.NO_MODEL

    @pytest.mark.parametrize(
        ("dtype", "name"), [(torch.complex128, "C128"), (torch.complex32, "C32")], ids=str
    )
    def test_complex_dtypes_that_safetensors_lacks_are_read(
        self, tmp_path: Path, dtype: torch.dtype, name: str
    ) -> None:
        values = torch.zeros(16, dtype=torch.uint8).view(dtype)
        folder = save(tmp_path / "b", {"model": {**MODEL, "x": values}})
        assert read(folder).tensors["x"][:2] == (name, tuple(values.shape))

    def test_what_is_no_tensor_is_left_out(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "a", {"model": {**MODEL, "version": 3, "x._extra_state": b"x"}})
        [note] = check(folder, MODEL).notes
        assert note.code is Code.LEFT_OUT
        assert "version, x._extra_state" in note.message

    def test_dicts_of_tensors_inside_it_are_not_lost_without_a_word(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "a", {"model": {**MODEL, "head": {"weight": torch.ones(2)}}})
        assert "model.head" in refusal(folder).message
        assert "head.weight" in read(folder, "model").tensors

    def test_two_tensors_of_one_place_in_the_tree_are_refused(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "a", {"model": MODEL})

        def change(metadata: Metadata) -> None:
            metadata.planner_data = dict.fromkeys(metadata.planner_data, ("model", "w"))

        edit(folder, change)
        refusal(folder)


TWO_BY_THREE = filled(torch.float32, 2, 3)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A good checkpoint of a model with the tensors w and v, to be broken."""
    state = {"w": TWO_BY_THREE, "v": filled(torch.bfloat16, 5)}
    return save(tmp_path / "good", {"model": state, "optimizer": {"w": torch.ones(3)}, "n": 3})


class TestDamage:
    def test_a_data_file_cut_at_any_place(self, good: Path) -> None:
        path = good / "__0_0.distcp"
        content, info = path.read_bytes(), metadata_of(good).storage_data
        needed = max(i.offset + i.length for index, i in info.items() if "model" in index.fqn)
        for length in (*range(0, needed, 53), needed - 1):
            path.write_bytes(content[:length])
            error = refusal(good)
            assert (error.code, error.path) == (Code.CUT_SHORT, str(path))
            assert error.tensor in ("model.w", "model.v")
        path.write_bytes(content[:needed])
        read(good)

    def test_metadata_cut_at_any_place(self, good: Path) -> None:
        content = (good / ".metadata").read_bytes()
        for length in range(len(content)):
            (good / ".metadata").write_bytes(content[:length])
            with pytest.raises(IncompleteError) as caught:
                read(good)
            assert caught.value.code is Code.CUT_SHORT

    @pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
    def test_any_byte_wrong(self, good: Path, name: str) -> None:
        content, noise = (good / name).read_bytes(), random.Random(3)
        for _ in range(300):
            damaged = bytearray(content)
            for _ in range(noise.randint(1, 3)):
                damaged[noise.randrange(len(damaged))] = noise.randrange(256)
            (good / name).write_bytes(damaged)
            refused_or_sound(good)

    @pytest.mark.parametrize(
        "content",
        [
            *(b"", b"loss 0.3\n" * 9, b"{}", b"\x00" * 99, pickle.dumps({"w": 1})),
            *(pickle.dumps(None), pickle.dumps([1]), pickle.dumps(BytesStorageMetadata())),
            *(pickle.dumps(Metadata({})), tensor_pickle(), b"\x80\x02cpathlib\nMetadata\n."),
            *(b"PK\x03\x04" * 9, pickle.dumps(Metadata({}, {}, {})), b"\x80\x04."),
        ],
    )
    def test_what_is_no_metadata(self, good: Path, content: bytes) -> None:
        (good / ".metadata").write_bytes(content)
        refusal(good)

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            (lambda m: setattr(place(m), "offset", 10**6), Code.CUT_SHORT),
            (lambda m: setattr(place(m), "length", 10**6), Code.CUT_SHORT),
            (lambda m: setattr(place(m), "offset", 2**63 - 1), Code.CUT_SHORT),
            (lambda m: setattr(place(m), "offset", 2**63), Code.DAMAGED),
            (lambda m: setattr(place(m), "offset", -1), Code.DAMAGED),
            (lambda m: setattr(place(m), "length", -1), Code.DAMAGED),
            (lambda m: setattr(place(m), "length", 1.5), Code.DAMAGED),
            (lambda m: setattr(place(m), "length", 0), Code.CUT_SHORT),
            (lambda m: setattr(place(m), "offset", 7), Code.DAMAGED),
            (
                lambda m: setattr(place(m), "transform_descriptors", ["zstd"]),
                Code.UNREADABLE_TENSOR,
            ),
            (lambda m: m.storage_data.clear(), Code.DAMAGED),
            (lambda m: m.state_dict_metadata.clear(), Code.NO_MODEL),
            (lambda m: setattr(m, "storage_data", None), Code.DAMAGED),
            (lambda m: setattr(m, "state_dict_metadata", [1]), Code.DAMAGED),
            (lambda m: w(m).chunks.clear(), Code.DAMAGED),
            (lambda m: setattr(w(m), "chunks", None), Code.DAMAGED),
            (lambda m: setattr(w(m), "size", None), Code.DAMAGED),
            (lambda m: setattr(w(m), "properties", None), Code.UNREADABLE_TENSOR),
        ],
    )
    def test_what_cannot_be(self, good: Path, change: Change, code: Code) -> None:
        edit(good, change)
        assert refusal(good).code is code

    @pytest.mark.parametrize(
        ("shape", "chunks"),
        [
            ((2, 3), [((0, 0), (2, 3)), ((0, 0), (2, 3))]),
            ((4, 3), [((0, 0), (2, 3)), ((1, 0), (2, 3))]),
            ((4, 3), [((0, 0), (2, 3)), ((0, 0), (2, 3))]),
            ((5, 3), [((0, 0), (2, 3)), ((3, 0), (2, 3))]),
            ((2, 4), [((0, 0), (2, 3))]),
            ((2, 2), [((0, 0), (2, 3))]),
            ((2, 3), [((0, 1), (2, 3))]),
            ((6,), [((0, 0), (2, 3))]),
            ((2, 3, 1), [((0, 0), (2, 3))]),
            ((3, 2), [((0, 0), (3, 2))]),
            ((6,), [((0,), (6,))]),
            ((2**62, 3), [((0, 0), (2**62, 3))]),
            ((2**62,) * 9, [((0,) * 9, (2**62,) * 9)]),
            ((2**62, 3), [((0, 0), (2, 3))]),
            (
                (4, 4),  # the sum is right
                [((0, 0), (2, 3)), ((1, 1), (2, 3)), ((3, 0), (1, 4))],
            ),
            ((0, 3), [((0, 0), (2, 3))]),
            ((2, 3), [((0, 0), (0, 3))]),
        ],
    )
    def test_chunks_that_are_not_the_tensor(self, good: Path, shape: Any, chunks: Any) -> None:
        edit(good, lambda metadata: chunked(metadata, shape, *chunks))
        error = refusal(good)
        assert (error.code, error.tensor) == (Code.DAMAGED, "model.w")

    def test_a_stored_dtype_that_is_another(self, good: Path) -> None:
        edit(good, lambda metadata: setattr(w(metadata).properties, "dtype", torch.int32))
        error = refusal(good)
        assert (error.code, error.tensor) == (Code.DAMAGED, "model.w")

    @pytest.mark.parametrize(
        "file",
        [
            *("../good/__0_0.distcp", "/etc/passwd", "..", ".", "", "sub/x", "a\0b", "/", "./x"),
            *("x/../__0_0.distcp", 3, None, ["__0_0.distcp"], 1.5, True),
        ],
    )
    def test_a_file_outside_the_folder(self, good: Path, file: Any) -> None:
        edit(good, lambda metadata: setattr(place(metadata), "relative_path", file))
        error = refusal(good)
        assert (error.code, error.tensor) == (Code.UNSAFE, "model.w")

    @pytest.mark.parametrize("file", ["gone", "\ud800", "x" * 5000, "\x1b[2J", "%s\n", "..."])
    def test_a_file_that_is_not_there(self, good: Path, file: str) -> None:
        edit(good, lambda metadata: setattr(place(metadata), "relative_path", file))
        error = refusal(good)
        assert isinstance(error, IncompleteError)
        assert (error.code, error.path) == (Code.INCOMPLETE, str(good / file))

    def test_the_metadata_as_a_data_file(self, good: Path) -> None:
        edit(good, lambda metadata: setattr(place(metadata), "relative_path", ".metadata"))
        refusal(good)

    @pytest.mark.parametrize("fqn", ["model.w", "model.v"])
    def test_a_place_noted_twice(self, good: Path, fqn: str) -> None:
        """Another place for the same chunk: read as torch would, or refused, but never both."""

        def change(metadata: Metadata) -> None:
            offset = [0, 0] if fqn == "model.w" else [0]
            info = metadata.storage_data[MetadataIndex(fqn, offset)]
            metadata.storage_data[MetadataIndex(fqn)] = info
            metadata.storage_data[MetadataIndex(fqn, [9] * len(offset))] = info

        edit(good, change)
        check(good, {"w": TWO_BY_THREE, "v": filled(torch.bfloat16, 5)})

    def test_a_chunk_that_is_no_tensor(self, good: Path) -> None:
        info = place(metadata_of(good))
        with open(good / "__0_0.distcp", "r+b") as file:
            for content in (b"x", torch.ones(1), [torch.ones(2, 3)]):
                file.seek(0, 2)
                start = file.tell()
                torch.save(content, file)
                changed = _StorageInfo(info.relative_path, start, file.tell() - start)
                edit(good, lambda m, to=changed: vars(place(m)).update(vars(to)))  # type: ignore[misc]
                assert refusal(good).path == str(good / "__0_0.distcp")


class Made:
    """Pickles as a call of `function`, with any arguments and any state."""

    def __init__(self, function: Any, arguments: tuple[Any, ...] = (), state: Any = None) -> None:
        self.reduced = (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        """What was given."""
        return self.reduced


RECORDS = (Metadata, MetadataIndex, TensorProperties, ChunkStorageMetadata, _StorageInfo)
ODD: dict[str, Any] = {
    **{repr(value): value for value in (None, True, -1, 2**70, 1.5, float("nan"), "x", b"x")},
    **{
        repr(value): value
        for value in list[Any](([], {}, (), [[]], {1: {}}, {"x"}, ("x",), (1.5,), (-1,)))
    },
    "digits": 10**5000,
    "digits in a tuple": (10**5000,),
    "digits in a list": [10**5000],
    "dtype": torch.float32,
    "unfit dtype": torch.bits8,
    "size": torch.Size((2, 3)),
    "class": TensorStorageMetadata,
    "size class": torch.Size,
    "layout": torch.strided,
    "path": Path("/"),
    "surrogate": "\ud800",
    "control": "\x1b[2J",
    **{f"{kind.__name__} of nothing": Made(kind) for kind in RECORDS},
    **{f"{kind.__name__} of much": Made(kind, (1, [2], {}), (1, 2)) for kind in RECORDS},
    **{
        f"{kind.__name__} with methods": Made(kind, (), {"get": 1, "state": 2, "__class__": 3})
        for kind in RECORDS
    },
    "size of text": Made(torch.Size, ("xyz",)),
    "state of a size": Made(torch.Size, ((1, 2),), {"x": 1}),
    "slots": Made(TensorStorageMetadata, (), (None, {"size": torch.Size((2, 3))})),
}


def _rekeyed(metadata: Metadata, index: Any) -> None:
    info = metadata.storage_data.pop(MetadataIndex("model.w", [0, 0]))
    metadata.storage_data[index] = info


def _renamed(metadata: Metadata, name: Any) -> None:
    metadata.state_dict_metadata[name] = metadata.state_dict_metadata.pop("model.w")
    metadata.planner_data[name] = metadata.planner_data.pop("model.w")


PLACES: dict[str, Callable[[Metadata, Any], object]] = {
    "entries": lambda m, x: setattr(m, "state_dict_metadata", x),
    "storage": lambda m, x: setattr(m, "storage_data", x),
    "paths": lambda m, x: setattr(m, "planner_data", x),
    "path": lambda m, x: m.planner_data.update({"model.w": x}),
    "step": lambda m, x: m.planner_data.update({"model.w": (x, "w")}),
    "last step": lambda m, x: m.planner_data.update({"model.w": ("model", x)}),
    "name": _renamed,
    "entry": lambda m, x: m.state_dict_metadata.update({"model.w": x}),
    "properties": lambda m, x: setattr(w(m), "properties", x),
    "dtype": lambda m, x: setattr(w(m), "properties", Made(TensorProperties, (), (x, 1))),
    "shape": lambda m, x: setattr(w(m), "size", x),
    "chunks": lambda m, x: setattr(w(m), "chunks", x),
    "chunk": lambda m, x: setattr(w(m), "chunks", [x]),
    "offsets": lambda m, x: setattr(w(m).chunks[0], "offsets", x),
    "sizes": lambda m, x: setattr(w(m).chunks[0], "sizes", x),
    "index": _rekeyed,
    "place": lambda m, x: m.storage_data.update({MetadataIndex("model.w", [0, 0]): x}),
    "file": lambda m, x: setattr(place(m), "relative_path", x),
    "offset": lambda m, x: setattr(place(m), "offset", x),
    "length": lambda m, x: setattr(place(m), "length", x),
    "transforms": lambda m, x: setattr(place(m), "transform_descriptors", x),
    "version": lambda m, x: setattr(m, "version", x),
}
UNHASHABLE = (list, dict, set, Made)


class TestOddObjects:
    @pytest.mark.parametrize("where", PLACES)
    def test_anything_anywhere(self, good: Path, where: str) -> None:
        """Nothing but our errors, or what is sound."""
        content = (good / ".metadata").read_bytes()
        for label, value in ODD.items():
            if where in ("name", "index") and isinstance(value, UNHASHABLE):
                continue
            (good / ".metadata").write_bytes(content)
            edit(good, lambda metadata, odd=value: PLACES[where](metadata, odd))  # type: ignore[misc]
            try:
                refused_or_sound(good)
            except BaseException as error:
                raise AssertionError(f"{where} is {label}") from error

    @pytest.mark.parametrize("where", PLACES)
    @pytest.mark.parametrize(
        "opcodes",
        [
            b"]" * 5_000 + b"a" * 4_999,
            b")" + b"\x85" * 5_000,
            b"]" + b"2\x86" * 20,
            b"}X\x01\x00\x00\x00x" * 2_000 + b"N" + b"s" * 2_000,
            b"ctorch\nSize\n" * 2_000 + b")" + b"R\x85" * 2_000,
        ],
        ids=["deep lists", "deep tuples", "doubled", "deep dicts", "deep sizes"],
    )
    def test_what_is_deep_or_large_when_written_out(
        self, good: Path, where: str, opcodes: bytes
    ) -> None:
        """Each is a few kB in the file, and does not become more in a message or a recursion."""
        if where in ("name", "index"):
            edit(good, lambda metadata: vars(metadata)["state_dict_metadata"].update(PLACEHOLDER=1))
        else:
            edit(good, lambda metadata: PLACES[where](metadata, "PLACEHOLDER"))
        splice(good, pushed(b"PLACEHOLDER"), opcodes)
        with cheap(8_000_000 + 200 * (good / ".metadata").stat().st_size):
            refused_or_sound(good)


class TestBombs:
    """Small metadata that would take long or grow large is refused in time and memory."""

    @pytest.mark.parametrize("dimensions", [1_500, 100_000])
    def test_of_dimensions(self, good: Path, dimensions: int) -> None:
        def change(metadata: Metadata) -> None:
            chunks = [((0,), (1,)), ((0,), (1,))]
            chunked(metadata, (2,), *chunks)
            vars(w(metadata))["size"] = Made(torch.Size, ((2, "SHAPE"),))
            for chunk in w(metadata).chunks:
                vars(chunk)["offsets"] = Made(torch.Size, ((0, "STARTS"),))
                vars(chunk)["sizes"] = Made(torch.Size, ((1, "SIZES"),))
            info = place(metadata)
            metadata.storage_data[MetadataIndex("model.w")] = info

        edit(good, change)
        for name, value in ((b"SHAPE", 1), (b"STARTS", 0), (b"SIZES", 1)):
            widened = b"0(K" + bytes([2 * (name == b"SHAPE") or value])
            ones = widened + b"K" + bytes([value]) + b"2" * dimensions + b"t"
            content = (good / ".metadata").read_bytes()
            start = content.index(pushed(name))
            # Up to the end of the tuple: the string, its memo number and TUPLE2.
            end = content.index(b"\x86", start) + 1
            changed = content[:start] + ones + content[end:]
            (good / ".metadata").write_bytes(changed)
        refusal(good)

    def test_of_dimensions_that_are_huge(self, good: Path) -> None:
        edit(good, lambda m: chunked(m, (2**62,), ((0,), (2**62,))))
        content = (good / ".metadata").read_bytes()
        zero = b"K\x00\x85"
        assert content.count(number(2**62) + b"\x85") >= 1
        many = b"(" + number(2**62) + b"2" * 30_000 + b"t"
        none = b"(K\x00" + b"2" * 30_000 + b"t"
        changed = content.replace(number(2**62) + b"\x85", many).replace(zero, none)
        (good / ".metadata").write_bytes(changed)
        refusal(good)

    @pytest.mark.parametrize(
        "copy",
        [b"ctorch\nSize\n", b"ccollections\nOrderedDict\n", b"cpathlib\nPosixPath\n"],
        ids=["size", "dict", "record"],
    )
    def test_of_copies(self, good: Path, copy: bytes) -> None:
        """One long list or tuple, from which hundreds of others are made."""
        long = b"(" + b"N" * 20_000 + b"t" if b"Path" in copy else b"]((NNt" + b"2" * 20_000 + b"e"
        call = b"h\x01h\x00R" if b"Path" in copy else b"h\x01h\x00\x85R"
        pickled = long + b"q\x000" + copy + b"q\x010](" + call * 300 + b"e0"
        content = (good / ".metadata").read_bytes()
        (good / ".metadata").write_bytes(b"\x80\x04" + pickled + content[2:-1] + b"0N.")
        refusal(good)

    def test_of_classes(self, good: Path) -> None:
        """The same name over and over makes one class."""
        names = pushed(b"pathlib") + b"q\x000" + pushed(b"PosixPath") + b"q\x010"
        pickled = names + b"](" + b"h\x00h\x01\x93" * 40_000 + b"e."
        (good / ".metadata").write_bytes(b"\x80\x04" + pickled)
        refusal(good)

    def test_of_thousands_of_names(self, good: Path) -> None:
        names = b"".join(b"cpathlib\nClass%d\n0" % count for count in range(20_000))
        (good / ".metadata").write_bytes(b"\x80\x02" + names + b"N.")
        refusal(good)

    def test_of_paths(self, good: Path) -> None:
        """Many entries that all lie deep in one tree."""

        def change(metadata: Metadata) -> None:
            names = [f"x{count}" for count in range(2_000)]
            metadata.state_dict_metadata.update(dict.fromkeys(names, BytesStorageMetadata()))
            metadata.planner_data.update(dict.fromkeys(names, ("a",) * 5_000))
            metadata.state_dict_metadata.pop("model.w")

        edit(good, change)
        with cheap(1 << 30):
            refused_or_sound(good)

    def test_of_chunks(self, good: Path) -> None:
        """Boxes of which no axis alone tells any two apart."""
        count = 1_800
        columns = ((0, 2), (2, 2))
        chunks = [((i, columns[i % 2][0]), (2, 2)) for i in range(count)]
        chunks += [((count, 3), (3, 1)), ((count + 2, 1), (2, 2)), ((count + 2, 1), (2, 2))]
        shape = (count + 4, 4)
        missing = shape[0] * shape[1] - sum(a * b for _, (a, b) in chunks)
        chunks += [((count + 3, 0), (1, 1))] * missing
        edit(good, lambda metadata: chunked(metadata, shape, *chunks))
        refusal(good)

    @pytest.mark.parametrize(
        "opcodes",
        [
            b"Nr\xff\xff\xff\x7f",
            b"Np2147483647\n",
            b"\x8e" + struct.pack("<Q", 2**40),
            b"\x8d" + struct.pack("<Q", 2**63),
            b"\x96" + struct.pack("<Q", 2**40),
            b"\x95" + struct.pack("<Q", 2**40) + b"N",
            b"B" + struct.pack("<I", 2**32 - 1),
            b"\x8b" + struct.pack("<I", 2**31 - 1),
            b"}" + b")" + b"\x85" * 100_000 + b"Ns",
            b"}" + b")" + b"2\x86" * 60 + b"Ns",
        ],
    )
    def test_of_an_opcode(self, good: Path, opcodes: bytes) -> None:
        (good / ".metadata").write_bytes(b"\x80\x04" + opcodes + b".")
        assert refusal(good).code is Code.CUT_SHORT


def calls(mark: Path) -> dict[str, bytes]:
    """Opcodes that would leave a mark, were anything in them run; each pushes one object."""
    start = len(tensor_pickle()[:-1] + pushed(b"x"))
    shared = {label: made[start:-2] for label, made in hostile_pickles(mark).items()}
    return {**shared, **inert_calls(mark)}


def inert_calls(mark: Path) -> dict[str, bytes]:
    """Calls of what is in, or can be reached through, the modules whose names are allowed."""
    text, command = pushed(bytes(mark)), pushed(b"touch " + bytes(mark))
    evil = pushed(bytes(mark.with_name("evil.pt")))
    filesystem = b"ctorch.distributed.checkpoint.filesystem\n"
    return {
        "serialization.os": b"ctorch.serialization\nos.system\n(" + command + b"tR",
        "filesystem.os": filesystem + b"os.system\n(" + command + b"tR",
        "pathlib.os": b"cpathlib\nos.system\n(" + command + b"tR",
        "Path.touch": b"cpathlib\nPath.touch\n(cpathlib\nPath\n(" + text + b"tRtR",
        "Path.mkdir": b"cpathlib\nPath.mkdir\n(cpathlib\nPath\n(" + text + b"tRtR",
        "serialization.save": b"ctorch.serialization\nsave\n(N" + text + b"tR",
        "serialization.load": (
            b"ctorch.serialization\nload\n(" + evil + b"Nctorch.serialization\npickle\ntR"
        ),
        "metadata.os": b"ctorch.distributed.checkpoint.metadata\nos.mkdir\n(" + text + b"tR",
        "planner.os": b"ctorch.distributed.checkpoint.planner\ntorch.os.mkdir\n(" + text + b"tR",
        "pathlib obj": b"(cpathlib\nos.mkdir\n" + text + b"o",
        "pathlib inst": b"(" + text + b"ipathlib\nos.mkdir\n",
    }


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        """Make a folder, on loading."""
        return os.mkdir, (str(self.mark),)


LABELS = sorted(calls(Path("mark")))


class TestNothingRuns:
    @pytest.mark.parametrize("label", sorted(inert_calls(Path("mark"))))
    def test_these_are_no_duds(self, tmp_path: Path, label: str) -> None:
        """Python's own unpickler runs each."""
        mark = tmp_path / "mark"
        torch.save(Evil(mark), tmp_path / "evil.pt")
        try:
            pickle.loads(b"\x80\x04" + inert_calls(mark)[label] + b".")
        except Exception as error:
            assert mark.exists(), error
        assert mark.exists()

    @pytest.mark.parametrize("label", LABELS)
    def test_hostile_calls(self, good: Path, label: str) -> None:
        """Before, in and in place of the metadata; none of them leaves a mark."""
        mark = good.parent / "mark"
        torch.save(Evil(mark), good.parent / "evil.pt")
        call = calls(mark)[label]
        metadata = (good / ".metadata").read_bytes()
        edit(good, lambda metadata: setattr(metadata, "version", "PLACEHOLDER"))
        inside = (good / ".metadata").read_bytes().replace(pushed(b"PLACEHOLDER"), call)
        for content in (
            b"\x80\x04" + call + b"0" + metadata[2:],
            b"\x80\x04" + call + b".",
            metadata[:-1] + b"0" + call + b".",
            b"\x80\x04" + inside[2:],
        ):
            (good / ".metadata").write_bytes(content)
            refused_or_sound(good)
            assert not mark.exists()

    @pytest.mark.parametrize(
        "label", ["os.system", "eval", "exec", "subprocess", "torch.load", "import", "getattr"]
    )
    def test_what_no_metadata_needs_is_refused_by_name(self, good: Path, label: str) -> None:
        content = (good / ".metadata").read_bytes()
        call = calls(good.parent / "mark")[label]
        (good / ".metadata").write_bytes(b"\x80\x04" + call + b"0" + content[2:])
        assert refusal(good).code is Code.UNSAFE
        assert not (good.parent / "mark").exists()

    def test_what_is_no_tensor_is_never_unpickled(self, tmp_path: Path) -> None:
        """Non-tensor entries are pickles in the data files, which torch.load runs."""
        mark = tmp_path / "mark"
        folder = save(
            tmp_path / "a", {"model": MODEL, "evil": Evil(mark), "train_state": {"x": Evil(mark)}}
        )
        check(folder, MODEL)
        assert not mark.exists()
        assert bytes(mark) in (folder / "__0_0.distcp").read_bytes()

    @pytest.mark.parametrize("label", LABELS)
    def test_a_chunk_is_not_run(self, good: Path, label: str) -> None:
        mark = good.parent / "mark"
        torch.save(Evil(mark), good.parent / "evil.pt")
        archive = good.parent / "chunk.pt"
        with zipfile.ZipFile(archive, "w") as target:
            target.writestr("archive/data.pkl", b"\x80\x04" + calls(mark)[label] + b".")
        path = good / "__0_0.distcp"
        start = path.stat().st_size
        with open(path, "ab") as file:
            file.write(archive.read_bytes())
        info = {"offset": start, "length": archive.stat().st_size}
        edit(good, lambda metadata: vars(place(metadata)).update(info))
        assert refusal(good).path == str(good / "__0_0.distcp")
        assert not mark.exists()

    def test_records_do_not_change_the_reader(self, good: Path) -> None:
        """State set on an allowed class or object reaches neither the class nor the next file."""
        metadata = (good / ".metadata").read_bytes()
        state = b"}(" + pushed(b"get") + b"K\x01" + pushed(b"name") + b"K\x02ub"
        for target in (b"cpathlib\nPath\n", b"cpathlib\nPath\n)R", b"cpathlib\nPath\n)\x81"):
            (good / ".metadata").write_bytes(b"\x80\x02" + target + state + b".")
            refusal(good)
        (good / ".metadata").write_bytes(metadata)
        check(good, {"w": TWO_BY_THREE, "v": filled(torch.bfloat16, 5)})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three steps."""
    for step in (10, 20, 30):
        model = {**MODEL, "steps": torch.tensor(step)}
        save(tmp_path / "run" / f"step-{step}", {"model": model, **TRAINING})
    return tmp_path / "run"


def test_a_plan_does_not_import_torch(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ckpt_ema", "plan", run],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        check=True,
    )
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "ckpt_ema.containers.dcp" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torch", "numpy")}


def test_a_plan_opens_every_file_once(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, opened = os.open, list[str]()

    def counted(path: Any, *arguments: Any, **options: Any) -> int:
        opened.append(os.fspath(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    planned = ckpt_ema.plan(sharded / "of-3")
    ours = [path for path in opened if path.endswith((".distcp", ".metadata"))]
    # Once for its header, and once more where integers might be codes of a quantised weight.
    assert max(Counter(ours).values()) <= 2
    assert len(set(ours)) == 3 * (3 + 1)
    assert planned.bytes_read == sum(
        tensor.nbytes * (3 if tensor.is_floating_point() else 1)
        for tensor in full_state(100).values()
    )


def test_a_tiny_file_with_a_huge_tensor_is_quick(good: Path) -> None:
    """A terabyte in the metadata costs nothing until it turns out not to be there."""
    count = 1 << 20
    edit(good, lambda m: chunked(m, (count, 3), *[((i, 0), (2, 3)) for i in range(0, 2_000, 2)]))
    assert refusal(good).tensor == "model.w"
