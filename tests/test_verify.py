"""Verifying: what is the average that it claims to be passes, and nothing else."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

import ckpt_ema
from ckpt_ema.errors import Code, OptionError, RefusedError
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, series, write_safetensors
from tests.makers.folds import by_torch
from tests.makers.users import AS_ROOT, be_nobody, let_others_in

STATES = series(
    5,
    a=noise(5, 5, 70),
    b=noise(5, 400, dtype=torch.bfloat16),
    c=noise(5, 3, 3, dtype=torch.float16),
    n=[torch.arange(9) + step for step in range(5)],
)


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """Five checkpoints."""
    return make_run(STATES, steps=[100, 200, 300, 400, 500])


WAYS: dict[str, dict[str, Any]] = {
    "the default": {},
    "a schedule by steps": {"half_life": 120, "last": 3},
    "steps": {"steps": "100,300-500", "schedule": "uniform"},
    "every second": {"every": 2, "dtype": "float32"},
    "weights": {"weights": {"checkpoint-100": 0.25, "400": 0.75}},
    "several averages": {"decay": [0.2, 0.3], "last": [2, 4]},
    "a state": {"keep_state": True},
    "written back": {"save_as": "checkpoint"},
    "globs": {"include": ["checkpoint-[1-4]*"], "keep": ["c"]},
}


@pytest.mark.usefixtures("either_fold")
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_an_output_is_the_average_that_it_claims_to_be(run: Path, options: dict[str, Any]) -> None:
    made = ckpt_ema.average(run, tile_size=256, device="cpu", **options)
    later = run / "checkpoint-600"  # the run has gone on since
    later.mkdir()
    write_safetensors(later / "model.safetensors", STATES[2])
    found = ckpt_ema.verify(made.output, device="cpu")
    assert found.is_as_claimed
    assert found.is_recomputed
    assert found.tiles == found.tiles_in_all > 0
    assert (found.damaged, found.gone, found.changed, found.differs) == ((), (), (), None)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["torch", "shards", "dcp"])
@pytest.mark.parametrize("save_as", [None, "checkpoint"])
def test_so_are_those_of_other_containers(
    make_run: MakeRun, tmp_path: Path, form: str, save_as: str | None
) -> None:
    run = tmp_path / "run"
    if form == "dcp":
        for step, state in enumerate(STATES, start=1):
            save(dict(state), checkpoint_id=run / f"checkpoint-{step}", no_dist=True)
    else:
        make_run(STATES, torch_files=form == "torch", shards=2 * (form == "shards"))
    made = ckpt_ema.average(run, save_as=save_as)
    assert ckpt_ema.verify(made.output).is_as_claimed
    assert ckpt_ema.verify(made.output).is_recomputed


def test_an_updated_output_is_the_average_of_all(run: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    (run / "checkpoint-500").rename(later)
    made = ckpt_ema.average(run, keep_state=True)
    later.rename(run / "checkpoint-500")
    ckpt_ema.update(made.output)
    found = ckpt_ema.verify(made.output)
    assert found.is_recomputed
    assert found.is_as_claimed
    assert found.checkpoints == 5


@pytest.mark.usefixtures("either_fold")
@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_infinite_masks_and_nan_are_what_was_averaged(make_run: MakeRun, value: float) -> None:
    """A tile with infinities is folded twice; only what is written at last counts."""
    mask = torch.full((4, 4), value).triu(1) + torch.ones(4, 4)
    run = make_run(series(3, w=noise(3, 40), mask=[mask, mask, mask]))
    made = ckpt_ema.average(run, device="cpu", allow_nonfinite=True)
    found = ckpt_ema.verify(made.output, device="cpu")
    assert found.is_recomputed
    assert found.is_as_claimed


@pytest.mark.usefixtures("either_fold")
@pytest.mark.parametrize("is_known", [True, False], ids=["rot", "another value"])
@pytest.mark.parametrize("name", ["a", "b", "n"])
def test_the_first_tensor_that_differs_is_named(run: Path, name: str, is_known: bool) -> None:
    """With a checksum that fits, only folding again shows it."""
    made = ckpt_ema.average(run, device="cpu")
    path = made.output / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0]
    content[start + 5] ^= 1
    if name < "b":
        content[-1] ^= 1
    path.write_bytes(content)
    if not is_known:
        claim_again(made.output)
    found = ckpt_ema.verify(made.output, device="cpu")
    assert not found.is_as_claimed
    assert found.damaged == (("model.safetensors",) if is_known else ())
    assert found.differs == ("model.safetensors", name, start + 5)


def claim_again(output: Path) -> None:
    """Have the manifest claim the files that are there."""
    manifest = json.loads((output / "ckpt_ema.json").read_text())
    for name in manifest["crc32"]:
        manifest["crc32"][name] = f"{zlib.crc32((output / name).read_bytes()):08x}"
    (output / "ckpt_ema.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(path.read_bytes().replace(b"dynamic", b"dynamit")),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
    ],
)
def test_a_file_that_is_cut_or_gone_is_damaged(run: Path, damage: Callable[[Path], object]) -> None:
    made = ckpt_ema.average(run)
    damage(made.output / "model.safetensors")
    found = ckpt_ema.verify(made.output)
    assert found.damaged == ("model.safetensors",)
    assert found.differs is not None
    assert (found.differs.file, found.differs.tensor) == ("model.safetensors", "")


@pytest.mark.parametrize("name", ["ckpt_ema.state", "config.json"])
def test_rot_anywhere_is_seen_without_the_checkpoints(run: Path, name: str) -> None:
    made = ckpt_ema.average(run, keep_state=True)
    shutil.rmtree(run)
    path = made.output / name
    size = path.stat().st_size
    for place in {0, 8, size // 3, size - 1}:
        content = bytearray(path.read_bytes())
        content[place] ^= 0x10
        path.write_bytes(content)
        found = ckpt_ema.verify(made.output)
        assert found.damaged == (name,), place
        content[place] ^= 0x10
        path.write_bytes(content)
    assert ckpt_ema.verify(made.output).is_as_claimed


def test_checkpoints_that_are_gone_are_named_and_the_files_still_checked(run: Path) -> None:
    made = ckpt_ema.average(run)
    shutil.rmtree(run / "checkpoint-200")
    found = ckpt_ema.verify(made.output)
    assert found.gone == ("checkpoint-200",)
    assert found.is_as_claimed
    assert not found.is_recomputed
    shutil.rmtree(run)
    assert len(ckpt_ema.verify(made.output).gone) == 5


def test_checkpoints_that_are_others_now_are_named(run: Path) -> None:
    made = ckpt_ema.average(run)
    write_safetensors(run / "checkpoint-200" / "model.safetensors", {"w": torch.ones(3)})
    with pytest.raises(RefusedError, match="checkpoint-200"):  # it is another model
        ckpt_ema.verify(made.output)
    other = {key: value.double() if key == "a" else value for key, value in STATES[1].items()}
    write_safetensors(run / "checkpoint-200" / "model.safetensors", other)
    found = ckpt_ema.verify(made.output)
    assert found.changed == ("checkpoint-200",)
    assert found.is_as_claimed
    assert not found.is_recomputed


def test_a_copy_of_the_run_proves_as_much_as_the_run(run: Path, tmp_path: Path) -> None:
    made = ckpt_ema.average(run)
    shutil.copytree(run, tmp_path / "copy" / "run", copy_function=shutil.copyfile)
    shutil.rmtree(run)
    assert not ckpt_ema.verify(made.output).is_recomputed
    found = ckpt_ema.verify(made.output, tmp_path / "copy" / "run")
    assert found.is_recomputed
    assert found.is_as_claimed


def test_weights_that_the_schedule_does_not_give_are_refused(run: Path) -> None:
    made = ckpt_ema.average(run)
    path = made.output / "ckpt_ema.json"
    manifest = json.loads(path.read_text())
    manifest["checkpoints"][2]["decay"] = 0.5
    path.write_text(json.dumps(manifest))
    with pytest.raises(RefusedError, match="weights are not those of dynamic"):
        ckpt_ema.verify(made.output)


def test_a_sample_folds_as_many_tiles(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ckpt_ema.average(run)
    whole = ckpt_ema.verify(made.output, tile_size=64)
    found = ckpt_ema.verify(made.output, tile_size=64, sample=0.25)
    assert found.tiles == round(whole.tiles_in_all * 0.25)
    assert found.is_as_claimed
    content = bytearray((made.output / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (made.output / "model.safetensors").write_bytes(content)
    claim_again(made.output)
    seen = set()
    for seed in range(40):
        random.seed(seed)
        seen.add(ckpt_ema.verify(made.output, tile_size=64, sample=0.25).is_as_claimed)
    assert seen == {True, False}  # a sample may miss it, and does not always


def test_a_sample_may_be_a_text_and_must_be_a_share(run: Path) -> None:
    made = ckpt_ema.average(run)
    assert ckpt_ema.verify(made.output, sample="100%").is_recomputed
    for sample in (0, 2, "none"):
        with pytest.raises(OptionError, match=f"--sample is '{sample}'; it must be a share"):
            ckpt_ema.verify(made.output, sample=sample)


def test_by_whichever_fold_it_is_the_same(run: Path) -> None:
    made = ckpt_ema.average(run)
    with by_torch():
        assert ckpt_ema.verify(made.output, device="cpu", threads=1).is_as_claimed


def test_nothing_is_written(run: Path) -> None:
    made = ckpt_ema.average(run, keep_state=True)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in made.output.iterdir()}
    for path in (made.output, *made.output.iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)
    ckpt_ema.verify(made.output)
    made.output.chmod(0o755)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in made.output.iterdir()} == before
    assert sorted(p.name for p in run.parent.iterdir()) == ["run", "run-ema"]


@pytest.mark.parametrize("options", [{}, {"keep_all": True}, {"greedy": True}])
def test_what_select_publishes_is_verified_too(run: Path, options: dict[str, Any]) -> None:
    """The last checkpoint alone, and a soup of one, have no schedule."""

    def evaluate(folder: Path) -> dict[str, float]:
        *_, newest = json.loads((folder / "ckpt_ema.json").read_text())["checkpoints"]
        return {"acc": newest["weight"]}

    options = {**options, "half_life": [100, 200], "output": run.parent / "best"}
    found = ckpt_ema.select(run, evaluate=evaluate, metric="acc", **options)
    assert found.best in ("last-checkpoint", "greedy-soup")
    verified = ckpt_ema.verify(found.output)
    assert verified.is_recomputed
    assert verified.is_as_claimed


def changed_values(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where the values in a value of JSON are; of a list, only the first two."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2])
    for key, inner in items:
        yield (*keys, key)
        if isinstance(inner, dict | list):
            yield from changed_values(inner, (*keys, key))


def test_a_manifest_with_any_value_wrong_never_ends_in_a_traceback(run: Path) -> None:
    """Whoever edits it by hand, or a disk, may leave anything; it is refused in one sentence."""
    made = ckpt_ema.average(run, keep_state=True)
    path = made.output / "ckpt_ema.json"
    text = path.read_text()
    refused = 0
    for *keys, last in changed_values(json.loads(text)):
        for value in (..., None, 1e400, "x", [], {}, [1], {"a": 1}):
            manifest = json.loads(text)
            inner = manifest
            for key in keys:
                inner = inner[key]
            inner[last] = value
            if value is ...:
                del inner[last]
            path.write_text(json.dumps(manifest))
            try:
                ckpt_ema.verify(made.output)
            except RefusedError as error:
                refused += 1
                assert error.code in (Code.DAMAGED, Code.WRONG_WEIGHTS, Code.NO_MANIFEST)
    assert refused > 100


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"name": ', "not a JSON object"),
        ("[]", "not a JSON object"),
        ('{"paths": ["x"]}', "'name' is missing"),
    ],
)
def test_a_damaged_manifest_is_called_damaged(run: Path, text: str, what: str) -> None:
    made = ckpt_ema.average(run)
    (made.output / "ckpt_ema.json").write_text(text)
    done = command("verify", made.output)
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(rf"error: .*ckpt_ema.json is damaged: .*{what}.*\n", done.stderr)


@AS_ROOT
def test_what_cannot_be_accessed_is_not_called_damaged(run: Path) -> None:
    made = ckpt_ema.average(run)
    let_others_in(made.output)
    for path in (made.output / "ckpt_ema.json", made.output / "model.safetensors"):
        path.chmod(0)
        done = command("verify", made.output, before=be_nobody)
        assert done.returncode == 3
        assert done.stderr.startswith(f"error: cannot access {path}: ")
        path.chmod(0o644)
    made.output.chmod(0)
    done = command("verify", made.output, before=be_nobody)
    made.output.chmod(0o755)
    assert done.returncode == 3
    assert done.stderr == f"error: cannot access {made.output}: Permission denied.\n"


def change_manifest(output: Path, **values: Any) -> None:
    """Put other values into a manifest."""
    path = output / "ckpt_ema.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_options_that_this_version_lacks_are_refused(run: Path) -> None:
    made = ckpt_ema.average(run)
    change_manifest(made.output, options={"from_the_future": 1})
    with pytest.raises(RefusedError, match="from_the_future") as caught:
        ckpt_ema.verify(made.output)
    assert caught.value.code is Code.DAMAGED
    with pytest.raises(OptionError, match="--threads"):  # which is the caller's own
        ckpt_ema.verify(made.output, threads=0)


@pytest.mark.parametrize(
    "values",
    [{"crc32": {}}, {"paths": [""]}, {"checkpoints": []}],
    ids=["a checksum", "a run", "checkpoints"],
)
def test_a_manifest_without_what_is_compared_is_no_proof(run: Path, values: dict[str, Any]) -> None:
    made = ckpt_ema.average(run)
    change_manifest(made.output, **values)
    with pytest.raises(RefusedError, match="is damaged"):
        ckpt_ema.verify(made.output)


def test_a_model_file_that_the_manifest_lacks_is_no_proof(run: Path) -> None:
    made = ckpt_ema.average(run)
    change_manifest(made.output, files=[])
    (made.output / "model.safetensors").rename(run / "away")
    change_manifest(made.output, crc32={})
    assert not ckpt_ema.verify(made.output).is_as_claimed


def test_averages_of_several_runs_may_be_gathered_in_a_folder(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for path in other.glob("*/*.safetensors"):
        write_safetensors(path, {key: 2 * value for key, value in STATES[1].items()})
    gathered = tmp_path / "gathered"
    gathered.mkdir()
    ckpt_ema.average(run, output=gathered / "one")
    ckpt_ema.average(other, output=gathered / "other", allow_duplicates=True)
    ckpt_ema.average(run, output=tmp_path / "two", decay=[0.2, 0.3])
    for number, path in enumerate(sorted((tmp_path / "two").iterdir())):
        path.rename(gathered / f"renamed-{number}")
    found = ckpt_ema.verify(gathered)
    assert found.is_as_claimed
    assert found.is_recomputed
    assert (found.files, found.checkpoints) == (8, 10)
    shutil.rmtree(other / "checkpoint-200")
    content = bytearray((gathered / "renamed-1" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (gathered / "renamed-1" / "model.safetensors").write_bytes(content)
    found = ckpt_ema.verify(gathered)
    assert found.gone == ("checkpoint-200",)
    assert not found.is_recomputed
    assert found.differs is not None
    assert found.differs.file == "renamed-1/model.safetensors"
    assert found.damaged == ("renamed-1/model.safetensors",)


@pytest.mark.parametrize("was_there", [True, False])
def test_files_beside_the_weights_may_come_and_go(
    run: Path, tmp_path: Path, was_there: bool
) -> None:
    """An evaluation puts results into the checkpoint; an archive lacks the run's own file."""
    tracker = run / "latest"
    if was_there:
        tracker.write_text("checkpoint-500")
    made = ckpt_ema.average(run, save_as="checkpoint", output=tmp_path / "out")
    folder = made.output / "checkpoint-500" if was_there else made.output
    assert (folder / "model.safetensors").is_file()
    (run / "checkpoint-500" / "eval_results.json").write_text("{}")
    if was_there:
        tracker.unlink()
    else:
        tracker.write_text("checkpoint-500")
    found = ckpt_ema.verify(made.output)
    assert found.is_as_claimed
    assert found.is_recomputed
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    claim_again(made.output)
    assert not ckpt_ema.verify(made.output).is_as_claimed


@pytest.mark.parametrize("options", [{}, {"from_step": 200}], ids=str)
def test_a_state_may_have_come_from_elsewhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Its header has the paths and times of the checkpoints as they were; values decide."""
    monkeypatch.chdir(run.parent)
    made = ckpt_ema.average(run.name, keep_state=True, **options)
    assert ckpt_ema.verify(made.output).is_as_claimed
    archive = tmp_path / "a" / "longer" / "path"
    shutil.copytree(run, archive, copy_function=shutil.copyfile)
    shutil.rmtree(run)
    found = ckpt_ema.verify(made.output, archive)
    assert found.is_recomputed
    assert found.is_as_claimed
    path = made.output / "ckpt_ema.state"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert ckpt_ema.verify(made.output, archive).differs == (path.name, "c", len(content) - 3)
    header = bytes(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for other in (header.replace(b"[0.", b"[1.", 1), b"{" + header[1:].replace(b"{", b"[", 1)):
        path.write_bytes(content[:8] + other + content[8 + len(header) :])
        differs = ckpt_ema.verify(made.output, archive).differs
        assert differs is not None
        assert (differs.file, differs.tensor) == (path.name, "")


def test_a_run_that_is_named_must_have_checkpoints_of_the_average(
    run: Path, tmp_path: Path
) -> None:
    """Else a typing error would pass for a check."""
    made = ckpt_ema.average(run)
    other = tmp_path / "other"
    shutil.copytree(run / "checkpoint-500", other / "checkpoint-900")
    for path, code in ((tmp_path / "nowhere", Code.NOT_FOUND), (other, Code.NO_CHECKPOINTS)):
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.verify(made.output, path)
        assert caught.value.code is code
    shutil.copytree(run / "checkpoint-100", other / "checkpoint-100")
    assert len(ckpt_ema.verify(made.output, other).gone) == 4


def test_the_folder_of_the_configuration_is_not_needed_again(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    made = ckpt_ema.average(run, config_from=folder)
    shutil.rmtree(folder)
    assert ckpt_ema.verify(made.output).is_recomputed


@pytest.mark.parametrize("what", ["a run", "one file", "nothing"])
def test_what_has_no_record_is_refused(run: Path, what: str) -> None:
    output = run.parent / "one.safetensors"
    ckpt_ema.average(run, output=output)
    path = {"a run": run, "one file": output, "nothing": run.parent / "nothing"}[what]
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.verify(path)
    assert caught.value.code is Code.NO_MANIFEST


def test_the_command_says_what_it_has_found(run: Path) -> None:
    output = run.parent / "run-ema"
    ckpt_ema.average(run)
    done = command("verify", output)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == (
        f"{output}: 2 files as written, equal to the average of its 5 checkpoints\n"
    )
    shutil.rmtree(run / "checkpoint-200")
    gone = command("verify", output)
    assert gone.returncode == 0
    assert "warning: " in gone.stderr
    assert "checkpoint-200" in gone.stderr
    assert command("verify", output, "--strict").returncode == 3
    (output / "model.safetensors").write_bytes(b"")
    bad = command("verify", output, "--json")
    assert bad.returncode == 1
    assert json.loads(bad.stdout)["damaged"] == ["model.safetensors"]
    assert "not the files that were written" in bad.stderr
    assert command("verify", output, "--sample", "0").returncode == 2
