"""An average written back is the newest checkpoint, byte for byte, but for the averaged tensors."""

import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.containers.source import read_specs
from ckpt_ema.containers.specs import DTYPE_BITS, Member, ModelFiles, spanned
from ckpt_ema.errors import Code, FailedError, OptionError, RefusedError
from ckpt_ema.report.terminal import plan_text
from ckpt_ema.run import up_to_date
from ckpt_ema.storage.local import Local
from tests.conftest import MakeRun, noise, series
from tests.makers import dcp_folders
from tests.makers.safetensors_files import read_safetensors
from tests.makers.tensors import raw
from tests.makers.torch_files import save

STEPS = (100, 200, 300)
State = dict[str, torch.Tensor]
OPTIONS: dict[str, Any] = {"device": "cpu", "threads": 2}


def state(step: int) -> State:
    """A model with every layout that is written back: transposed, tied, kept, beside each other."""
    generator = torch.Generator().manual_seed(step)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    table, both = random(40, 30), random(24)
    return {
        "table": table,
        "head": table,
        "turned": random(7, 5, 3).bfloat16().permute(2, 0, 1),
        "first": both[:16].view(4, 4),
        "last": both[16:],
        "scalar": random(),
        "half": random(33).half(),
        "complex": torch.complex(random(3), random(3)),
        "steps": torch.tensor(step),
        "codes": torch.arange(9),
        "none": torch.empty(0, 3),
    }


def content(step: int) -> dict[str, Any]:
    """What a trainer keeps beside the model."""
    moments = {0: {"exp_avg": torch.randn(40, 30), "step": torch.tensor(float(step))}}
    optimizer = {"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {
        "state_dict": state(step),
        "optimizer_states": [optimizer],
        "global_step": step,
        "hyper_parameters": {"width": 30},
    }


def files_run(folder: Path, form: str = "zip") -> Path:
    """Files of torch.save, named as Lightning names them."""
    folder.mkdir()
    for step in STEPS:
        save(folder / f"epoch={step // 100}-step={step}.ckpt", content(step), form)
    return folder


def dcp_run(folder: Path) -> Path:
    """Folders of torch.distributed.checkpoint, as torchtitan names them."""
    for step in STEPS:
        model = {name: one for name, one in state(step).items() if name not in ("head", "none")}
        whole = {"model": model, "optimizer": {"exp_avg": torch.randn(9)}, "train_state": {"n": 3}}
        dcp_folders.save(folder / f"step-{step}", whole)
    return folder


def hugging_face_run(make_run: MakeRun) -> Path:
    """Folders in shards with the state of a trainer."""
    states = series(3, a=noise(3, 5, 7), b=noise(3, 40, dtype=torch.bfloat16), n=torch.arange(9))
    run = make_run(states, steps=STEPS, shards=2)
    for step in STEPS:
        folder = run / f"checkpoint-{step}"
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "rng_state.pth").write_bytes(b"random %d" % step)
        (folder / "nested").mkdir()
        (folder / "nested" / ".hidden").write_bytes(b"hidden")
    return run


def newest_of(run: Path) -> Path:
    """The last checkpoint."""
    return max(run.iterdir(), key=lambda path: int(path.stem.rpartition("=")[2].split("-")[-1]))


def files_of(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint, by their names in a copy of it."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    files = (one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path)): one.read_bytes() for one in files}


def places_of(newest: Path) -> dict[str, list[range]]:
    """The bytes of each file that floating-point tensors of the model have."""
    entry = newest.name if newest.is_file() else ".metadata"
    folder = newest.parent if newest.is_file() else newest
    if newest.is_dir() and not (newest / entry).exists():
        entry = "model.safetensors.index.json"
    specs = read_specs(ModelFiles(folder, (Member(entry),)), Local())
    found: dict[str, list[range]] = {}
    for one in specs.tensors.values():
        if one.dtype[0] in "FBC" and one.dtype != "BOOL" and one.size_bytes:
            width = DTYPE_BITS[one.dtype] // 8
            pieces = [(p.file, p.offset, spanned(p.sizes, p.strides)) for p in one.pieces]
            whole = [(one.file, one.offset, one.size_bytes // width)]
            for file, offset, count in pieces or whole:
                place = range(offset, offset + count * width)
                found.setdefault(specs.files[file].name, []).append(place)
    return found


def check_copied(newest: Path, output: Path) -> None:
    """Every file is there and as large, and differs only where averaged tensors are, or in CRCs."""
    before, after = files_of(newest), files_of(output)
    manifest = json.loads(after.pop("ckpt_ema.json"))
    assert before.keys() == after.keys()
    assert {file["name"] for file in manifest["files"]} == after.keys()
    places = places_of(newest)
    for name, old in before.items():
        new = after[name]
        assert len(old) == len(new)
        allowed = {at for place in places.get(name, ()) for at in place}
        changed = {at for at in range(len(old)) if old[at] != new[at]}
        assert bool(changed & allowed) == bool(allowed)
        crcs = crcs_of(output / name)
        for at in sorted(changed - allowed):
            assert any(at - i >= 0 and new[at - i : at - i + 4] in crcs for i in range(4)), (
                name,
                at,
            )


def crcs_of(path: Path) -> set[bytes]:
    """The checksums of all records of the archives that a file consists of, recomputed."""
    data, found, at = path.read_bytes(), set[bytes](), 0
    if not data.startswith(b"PK"):
        return found
    while (end := data.find(b"PK\x05\x06", at)) >= 0:
        one = path.parent.parent / "archive.zip"
        one.write_bytes(data[at : end + 22])
        with zipfile.ZipFile(one) as archive:
            assert archive.testzip() is None
            found |= {info.CRC.to_bytes(4, "little") for info in archive.infolist()}
        one.unlink()
        at = end + 22
    return found


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Both hold the same bytes under the same names."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert raw(tensor) == raw(other[name]), name


def write_back(run: Path, output: Path, **options: Any) -> Path:
    """Average a run into a copy of its newest checkpoint."""
    ckpt_ema.average(run, output=output, save_as="checkpoint", **{**OPTIONS, **options})
    return output


def expected(run: Path, **options: Any) -> State:
    """The same average as safetensors."""
    output = run.parent / "expected"
    ckpt_ema.average(run, output=output, overwrite=True, **{**OPTIONS, **options})
    return {
        k: t for path in output.glob("*.safetensors") for k, t in read_safetensors(path).items()
    }


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_torch_file_loads_in_every_way_and_holds_the_average(tmp_path: Path, form: str) -> None:
    run = files_run(tmp_path / "run", form)
    output = write_back(run, tmp_path / "out")
    newest = newest_of(run)
    check_copied(newest, output)
    written = output / newest.name
    ways: list[dict[str, Any]] = [{"weights_only": True}, {"weights_only": False}]
    if form == "zip":
        ways.append({"mmap": True})
    for how in ways:
        loaded = torch.load(written, **how)
        original = torch.load(newest, weights_only=False)
        same(loaded["state_dict"], expected(run))
        assert loaded["global_step"] == 300
        assert loaded["state_dict"]["head"].data_ptr() == loaded["state_dict"]["table"].data_ptr()
        assert loaded["state_dict"]["turned"].stride() == original["state_dict"]["turned"].stride()
        moments = (one["optimizer_states"][0]["state"][0] for one in (loaded, original))
        same(*moments)


def test_a_step_folder_is_copied_whole_with_the_average_in_its_shards(make_run: MakeRun) -> None:
    run = hugging_face_run(make_run)
    output = write_back(run, run.parent / "out")
    check_copied(newest_of(run), output)
    found = {
        k: t for path in output.glob("*.safetensors") for k, t in read_safetensors(path).items()
    }
    same(found, expected(run))


def test_a_distributed_checkpoint_loads_and_holds_the_average(tmp_path: Path) -> None:
    run = dcp_run(tmp_path / "run")
    output = write_back(run, tmp_path / "out")
    check_copied(newest_of(run), output)
    average = expected(run)
    same(dcp_folders.loaded(output, average), average)


RUNS: dict[str, Callable[[Path, MakeRun], Path]] = {
    "zip": lambda path, _: files_run(path / "run"),
    "legacy": lambda path, _: files_run(path / "run", "legacy"),
    "distributed": lambda path, _: dcp_run(path / "run"),
    "folders": lambda _, make_run: hugging_face_run(make_run),
}


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path: Path, make_run: MakeRun) -> Path:
    """A run in each container."""
    return RUNS[request.param](tmp_path, make_run)


def models(output: Path) -> dict[str, bytes]:
    """The files of an output that are the same each time it is made."""
    return {name: data for name, data in files_of(output).items() if "ckpt_ema" not in name}


@pytest.mark.usefixtures("either_fold")
def test_either_fold_makes_the_same(run: Path) -> None:
    check_copied(newest_of(run), write_back(run, run.parent / "out", tile_size=128))


def test_averages_that_end_at_different_checkpoints_are_made_together(tmp_path: Path) -> None:
    run = files_run(tmp_path / "run")
    for path, loss in zip(sorted(run.iterdir()), (0.1, 0.2, 0.3), strict=True):
        save(path, {**torch.load(path), "loss": loss})
    how: dict[str, Any] = {"metric": "loss", "metric_mode": "min"}
    both = write_back(run, tmp_path / "both", best=[2, 3], **how)
    found = sorted(str(path.relative_to(both)) for path in both.rglob("*.ckpt"))
    assert [name.rpartition("=")[2] for name in found] == ["200.ckpt", "300.ckpt"]
    for name in found:
        assert zipfile.ZipFile(both / name).testzip() is None


def test_averages_of_different_pieces_are_made_one_at_a_time(tmp_path: Path) -> None:
    run = one_tensor_run(
        tmp_path / "run",
        lambda step: (
            {"w": (torch.arange(6.0) + step).view(3, 2).t().contiguous()}
            if step == 200
            else {"w": (torch.arange(6.0) * step).view(3, 2).t()}
        ),
    )
    paths = sorted(run.iterdir())
    for path, loss in zip(paths, (0.1, 0.2, 0.3), strict=True):
        save(path, {**torch.load(path), "loss": loss})
    with pytest.raises(RefusedError, match="one at a time"):
        how: dict[str, Any] = {"metric": "loss", "metric_mode": "min"}
        write_back(run, tmp_path / "both", best=[2, 3], **how)


def test_parts_resume_tiles_and_threads_make_the_same_bytes(run: Path) -> None:
    whole = models(write_back(run, run.parent / "whole"))
    assert models(write_back(run, run.parent / "small", tile_size=64, threads=3)) == whole
    assert models(write_back(run, run.parent / "resumed", resume=True)) == whole
    output = run.parent / "parts"
    for part in ("3/3", "1/3", "2/3"):
        options: dict[str, Any] = {"save_as": "checkpoint", "tile_size": 64, **OPTIONS}
        ckpt_ema.average_part(run, part, output=output, **options)
    ckpt_ema.finish(output)
    assert models(output) == whole


def test_several_averages_are_what_each_is_alone(run: Path) -> None:
    both = write_back(run, run.parent / "both", decay=[0.1, 0.2], last=[2, 3])
    for one in both.iterdir():
        manifest = json.loads((one / "ckpt_ema.json").read_text())
        how = {"decay": manifest["decay"], "last": len(manifest["checkpoints"])}
        assert models(one) == models(write_back(run, run.parent / f"alone-{one.name}", **how))


def test_the_same_again_is_up_to_date_and_anything_else_is_not(run: Path) -> None:
    output = write_back(run, run.parent / "out")
    options: dict[str, Any] = {"output": output, **OPTIONS}
    assert up_to_date(ckpt_ema.plan(run, save_as="checkpoint", **options))
    assert not up_to_date(ckpt_ema.plan(run, **options))
    assert not up_to_date(ckpt_ema.plan(run, save_as="checkpoint", decay=0.3, **options))
    write_back(run, output, decay=0.3, overwrite=True)
    other = output / max(models(output).items(), key=lambda item: len(item[1]))[0]
    other.write_bytes(other.read_bytes()[:-1])
    assert not up_to_date(ckpt_ema.plan(run, save_as="checkpoint", decay=0.3, **options))


def test_the_tracker_of_the_run_leads_to_the_average(tmp_path: Path) -> None:
    run = dcp_run(tmp_path / "run")
    (run / "latest_checkpointed_iteration.txt").write_text("300")
    output = write_back(run, tmp_path / "out")
    assert (output / "latest_checkpointed_iteration.txt").read_text() == "300"
    assert models(output).keys() == {
        "latest_checkpointed_iteration.txt",
        *(f"step-300/{name}" for name in files_of(run / "step-300")),
    }
    write_back(run, output, decay=0.5, overwrite=True)


# --- What is warned of ----------------------------------------------------------------------------


def warned(run: Path, output: Path, **options: Any) -> list[str]:
    """The warnings of a plan that writes back, of other weights."""
    found = ckpt_ema.plan(run, output=output, save_as="checkpoint", **options).warnings
    return [one.message for one in found if one.code is Code.OTHER_WEIGHTS]


def test_an_average_beside_the_model_is_warned_of(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for step in STEPS:
        model = {"w": torch.full((3,), float(step))}
        both = {"state_dict": model, "state_dict_ema": {"w": torch.zeros(3)}}
        save(run / f"checkpoint-{step}.pth.tar", both)
    [warning] = warned(run, tmp_path / "out")
    assert "are copied as they are (state_dict_ema)" in warning
    [warning] = warned(run, tmp_path / "out", which="ema")
    assert "are copied as they are (state_dict)" in warning
    write_back(run, tmp_path / "out", allow_zeros=True, which="ema", allow_duplicates=True)
    loaded = torch.load(tmp_path / "out" / "checkpoint-300.pth.tar")
    assert loaded["state_dict"]["w"].tolist() == [300.0] * 3


def test_an_average_in_a_file_of_its_own_is_warned_of(make_run: MakeRun) -> None:
    run = hugging_face_run(make_run)
    assert warned(run, run.parent / "out") == []
    save(newest_of(run) / "ema_model.pth", {"w": torch.zeros(3)})
    [warning] = warned(run, run.parent / "out")
    assert "ema_model.pth" in warning


def test_masters_of_deepspeed_are_warned_of_with_what_ignores_them(make_run: MakeRun) -> None:
    run = hugging_face_run(make_run)
    for step in STEPS:
        folder = run / f"checkpoint-{step}" / f"global_step{step}"
        folder.mkdir()
        (folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"state")
    [warning] = warned(run, run.parent / "out")
    assert "fp32 masters, in global_step300/bf16_zero_pp_rank_0" in warning
    assert "load_module_only=True" in warning
    output = write_back(run, run.parent / "out")
    check_copied(newest_of(run), output)


def test_the_plan_says_what_is_written_back(tmp_path: Path) -> None:
    plan = ckpt_ema.plan(dcp_run(tmp_path / "run"), save_as="checkpoint", output=tmp_path / "out")
    text = plan_text(plan, None, 9)
    assert "written back into a copy of step-300 (2 files), which is otherwise unchanged" in text
    assert "7 tensors averaged" in text


# --- What is refused ------------------------------------------------------------------------------


def one_tensor_run(folder: Path, make: Callable[[int], Mapping[str, Any]]) -> Path:
    """Files with these models."""
    folder.mkdir()
    for step in STEPS:
        save(folder / f"step={step}.ckpt", {"state_dict": make(step)})
    return folder


def views(step: int) -> State:
    """Two overlapping views."""
    base = torch.full((10,), float(step)) + torch.arange(10)
    return {"one": base[:6], "two": base[4:]}


def gaps(step: int) -> State:
    """A view with gaps."""
    return {"one": (torch.arange(12.0) + step).view(3, 4)[:, :2]}


def shared_late(step: int) -> State:
    """Two tensors that become one."""
    base = torch.arange(5.0) + step
    return {"one": base, "two": base if step == 300 else base + 1}


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (views, "Tensors one and two share bytes in the newest checkpoint"),
        (shared_late, "Tensors one and two share bytes in the newest checkpoint"),
        (gaps, "Tensor one is a view whose elements have gaps between them"),
    ],
)
def test_tensors_without_a_place_of_their_own_are_refused_by_name(
    tmp_path: Path, make: Callable[[int], State], what: str
) -> None:
    run = one_tensor_run(tmp_path / "run", make)
    with pytest.raises(RefusedError, match=what) as caught:
        write_back(run, tmp_path / "out")
    assert caught.value.code is Code.INVALID_OUTPUT
    write_back(run, tmp_path / "out", exclude=["*300*"]) if make is shared_late else None


def test_a_kept_tensor_that_shares_bytes_with_an_averaged_one_is_refused(tmp_path: Path) -> None:
    def make(step: int) -> State:
        base = torch.arange(8.0) + step
        return {"one": base, "two": base[2:4]}

    run = one_tensor_run(tmp_path / "run", make)
    with pytest.raises(RefusedError, match="one and two share bytes"):
        write_back(run, tmp_path / "out", keep=["two"])


def test_a_link_to_a_folder_is_refused_since_it_may_hold_a_part(make_run: MakeRun) -> None:
    run = hugging_face_run(make_run)
    (run.parent / "elsewhere").mkdir()
    (newest_of(run) / "global_step").symlink_to(run.parent / "elsewhere")
    with pytest.raises(RefusedError, match="global_step is a link to a folder"):
        ckpt_ema.plan(run, output=run.parent / "out", save_as="checkpoint")


def test_metadata_of_what_is_only_copied_need_not_be_readable(make_run: MakeRun) -> None:
    run = hugging_face_run(make_run)
    for step in run.iterdir():
        (step / "tool").mkdir()
        (step / "tool/.metadata").write_text("{}")
    assert (write_back(run, run.parent / "out") / "tool/.metadata").read_text() == "{}"


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"config_from": "x"}, {"output": "x.safetensors"}],
    ids=str,
)
def test_options_for_another_form_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    run = files_run(tmp_path / "run")
    with pytest.raises(OptionError) as caught:
        ckpt_ema.plan(run, **{"output": tmp_path / "out", "save_as": "checkpoint", **options})
    assert caught.value.code is Code.CONFLICTING_OPTIONS


def test_checksums_that_are_not_where_they_belong_are_refused(tmp_path: Path) -> None:
    run = files_run(tmp_path / "run")
    newest = newest_of(run)
    data = bytearray(newest.read_bytes())
    with zipfile.ZipFile(newest) as archive:
        info = max(archive.infolist(), key=lambda one: one.file_size)
    at = data.rindex(info.CRC.to_bytes(4, "little"))  # in the directory
    data[at] ^= 1
    newest.write_bytes(data)
    with pytest.raises(RefusedError, match=r"the checksums of record .* differ"):
        write_back(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_copied_file_that_changes_meanwhile_ends_the_run(make_run: MakeRun) -> None:
    run = hugging_face_run(make_run)
    state = newest_of(run) / "optimizer.pt"

    def cut(_plan: object) -> None:
        state.write_bytes(state.read_bytes()[:-1])

    with pytest.raises(FailedError, match=r"optimizer\.pt"):
        write_back(run, run.parent / "out", started=cut)
    assert [path.name for path in run.parent.iterdir()] == [run.name]


def test_a_checksum_in_the_place_of_a_tensor_is_refused(tmp_path: Path) -> None:
    """A record that the directory has inside of a tensor, where bytes look like its header."""
    run = files_run(tmp_path / "run")
    newest, name = newest_of(run), b"a/extra"
    header = b"PK\x03\x04\x14" + bytes(9) + zlib.crc32(b"x").to_bytes(4, "little")
    header += b"\x01\0\0\0" * 2 + len(name).to_bytes(4, "little") + name + b"x"
    with zipfile.ZipFile(newest) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    table = max(records, key=lambda name: len(records[name]))
    records[table] = header + records[table][len(header) :]
    with zipfile.ZipFile(newest, "w") as new:
        for each, content in {**records, name.decode(): b"x"}.items():
            new.writestr(each, content)
    data = bytearray(newest.read_bytes())
    entry = data.rindex(name) - 46
    data[entry + 42 : entry + 46] = data.index(header).to_bytes(4, "little")
    newest.write_bytes(data)
    with pytest.raises(RefusedError, match="checksums of record a/extra"):
        write_back(run, tmp_path / "out")


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    run = files_run(tmp_path / "run")
    newest = newest_of(run)
    packed = tmp_path / "packed"
    with zipfile.ZipFile(newest) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    shutil.move(packed, newest)
    with pytest.raises(RefusedError, match="compressed"):
        write_back(run, tmp_path / "out")


def test_archives_of_other_writers_get_their_checksums_too(tmp_path: Path) -> None:
    run = files_run(tmp_path / "run")
    for path in run.iterdir():
        packed = tmp_path / "packed"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w") as new:
            for info in old.infolist():
                new.writestr(info.filename, old.read(info))
        shutil.move(packed, path)
    output = write_back(run, tmp_path / "out")
    check_copied(newest_of(run), output)
