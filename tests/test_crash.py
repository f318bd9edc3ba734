"""The output is whole or absent, whatever fails and whenever: faults injected, processes killed."""

import errno
import itertools
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

import ckpt_ema
from ckpt_ema import CkptEmaError
from ckpt_ema.output import sync
from ckpt_ema.run import up_to_date
from tests.command import processes
from tests.conftest import MakeRun, noise, series
from tests.makers.faulty_os import KINDS, faulty

Job = Callable[[Path, Path], None]  # run, output


def one(run: Path, output: Path) -> None:
    """One average into a folder."""
    ckpt_ema.average(run, output=output, device="cpu", threads=1, tile_size=64)


def replacing(run: Path, output: Path) -> None:
    """The same in the place of what is there."""
    ckpt_ema.average(
        run, output=output, device="cpu", threads=1, tile_size=64, decay=0.1, overwrite=True
    )


def several(run: Path, output: Path) -> None:
    """Two averages in one pass."""
    ckpt_ema.average(run, output=output, device="cpu", threads=1, tile_size=64, decay=[0.1, 0.2])


def single(run: Path, output: Path) -> None:
    """One file."""
    ckpt_ema.average(
        run, output=output.with_suffix(".safetensors"), device="cpu", threads=1, tile_size=64
    )


def resumed(run: Path, output: Path) -> None:
    """With a ledger of what is done."""
    ckpt_ema.average(run, output=output, device="cpu", threads=1, tile_size=64, resume=True)


def written_back(run: Path, output: Path) -> None:
    """The newest checkpoint with the average in its place; checksums are written last."""
    ckpt_ema.average(
        run, output=output, device="cpu", threads=1, tile_size=64, save_as="checkpoint", resume=True
    )


def in_parts(run: Path, output: Path) -> None:
    """Two parts and their publication."""
    for part in ("1/2", "2/2"):
        ckpt_ema.average_part(run, part, output=output, device="cpu", threads=1, tile_size=64)
    ckpt_ema.finish(output)


def replacing_in_parts(run: Path, output: Path) -> None:
    """Two parts, and their publication in the place of what is there, resumed where it stopped."""
    options: dict[str, Any] = {"decay": 0.1, "overwrite": True, "resume": True, "tile_size": 64}
    for part in ("1/2", "2/2"):
        ckpt_ema.average_part(run, part, output=output, device="cpu", threads=1, **options)
    if not up_to_date(ckpt_ema.plan(run, output=output, decay=0.1, tile_size=64)):
        ckpt_ema.finish(output, overwrite=True)


def first_two(run: Path, output: Path) -> None:
    """The average of the first two of three checkpoints, with its state."""
    aside = output.parent / ".third"
    (run / "checkpoint-3").rename(aside)
    try:
        ckpt_ema.average(run, output=output, device="cpu", threads=1, keep_state=True)
    finally:
        aside.rename(run / "checkpoint-3")


def updating(run: Path, output: Path) -> None:
    """The third, folded into it."""
    ckpt_ema.update(output, run, device="cpu", threads=1, tile_size=64)


@pytest.fixture(autouse=True)
def small_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few bytes are synced while they are written, as large ones are."""
    monkeypatch.setattr(sync, "SYNCED_BYTES", 64)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, or a file alone."""
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def models(output: Path) -> dict[str, bytes]:
    """The files of an output that are the same each time it is made; not the manifest, the card."""
    told = ("ckpt_ema.json", "README.md")
    return {name: data for name, data in contents(output).items() if not name.endswith(told)}


# What makes the output that a job replaces.
BEFORE: dict[Job, Job] = {replacing: one, replacing_in_parts: one, updating: first_two}


class Scene:
    """A run, an output beside it, and what has to come of them."""

    def __init__(self, run: Path, job: Job) -> None:
        self.run, self.job = run, job
        name = "out.safetensors" if job is single else "out"
        self.output = run.parent / name
        self.inputs = contents(run)
        (run.parent / "expected").mkdir()
        if job in BEFORE:
            BEFORE[job](run, run.parent / "expected" / "out")
        job(run, run.parent / "expected" / "out")
        self.expected = models(run.parent / "expected" / name)
        self.before: dict[str, bytes] = {}
        if job in BEFORE:
            self.restore()

    def restore(self) -> None:
        """Bring back what was at the output path before."""
        for path in self.leftovers():
            ckpt_ema.output.workspace.remove(path)
        ckpt_ema.output.workspace.remove(self.output)
        if self.job in BEFORE:
            BEFORE[self.job](self.run, self.output)
            self.before = models(self.output)

    def leftovers(self) -> list[Path]:
        """What lies beside the run and the outputs."""
        names = {self.run.name, self.output.name, "expected"}
        return [path for path in self.run.parent.iterdir() if path.name not in names]

    def check(self, *, has_failed: bool) -> bool:
        """Check what is at the output path; whether anything is left beside it."""
        assert contents(self.run) == self.inputs
        found = models(self.output)
        if found != self.expected:
            assert has_failed
            assert found == self.before
        left = self.leftovers()
        assert all(path.name.startswith(f".{self.output.name}.ckpt-ema-") for path in left)
        return bool(left)

    def repeat(self) -> None:
        """Do it again without a fault: all is well, and the next that is made removes leftovers."""
        self.job(self.run, self.output.parent / "out")
        assert models(self.output) == self.expected
        ckpt_ema.average(self.run, output=self.output, device="cpu", decay=0.3, overwrite=True)
        assert self.leftovers() == []


def small_run(make_run: MakeRun, name: str = "run") -> Path:
    """Three checkpoints in two shards, with integers, and the steps that the trainer wrote."""
    states = series(3, a=noise(3, 5, 7), b=noise(3, 40, dtype=torch.bfloat16), n=torch.arange(9))
    run = make_run(states, name=name, shards=2)
    for folder in run.iterdir():
        state = {"global_step": int(folder.name.removeprefix("checkpoint-"))}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    return run


JOBS: list[Job] = [one, replacing, several, single, resumed, in_parts, updating]


@pytest.fixture(params=JOBS, ids=lambda job: job.__name__)
def scene(request: pytest.FixtureRequest, make_run: MakeRun) -> Scene:
    """Each way to make an output."""
    return Scene(small_run(make_run), request.param)


def torch_run(make_run: MakeRun) -> Path:
    """Three checkpoints in zip archives, whose records have checksums."""
    return make_run(series(3, a=noise(3, 5, 7), n=torch.arange(9)), torch_files=True)


def sweep(scene: Scene, kind: str, error: int, *, ever_after: bool) -> int:
    """Fail the first call of a kind, the second ..., until the run passes; how many there were."""
    for k in itertools.count(1):
        failure: BaseException | None = None
        with faulty(kind, k, error, ever_after=ever_after) as faults:
            try:
                scene.job(scene.run, scene.output.parent / "out")
            except (CkptEmaError, OSError) as caught:
                failure = caught
        scene.check(has_failed=failure is not None)
        assert failure is None or str(failure).count("\n") == 0
        if scene.leftovers():  # if not, all is as it was before, or as it shall be
            scene.repeat()
        scene.restore()
        if not faults.injected:
            assert failure is None
            return k - 1
    raise AssertionError


@pytest.mark.parametrize("kind", KINDS)
def test_whichever_call_fails_the_output_is_whole_or_absent(make_run: MakeRun, kind: str) -> None:
    sweep(Scene(small_run(make_run), one), kind, errno.EIO, ever_after=False)


@pytest.mark.parametrize("kind", KINDS)
def test_so_is_a_checkpoint_that_is_written_back(make_run: MakeRun, kind: str) -> None:
    sweep(Scene(torch_run(make_run), written_back), kind, errno.EIO, ever_after=False)


@pytest.mark.parametrize("kind", ["pread", "preadv", "pwrite"])
def test_a_short_transfer_is_gone_on_with(scene: Scene, kind: str) -> None:
    for k in itertools.count(1):
        with faulty(kind, k, 0) as faults:
            scene.job(scene.run, scene.output.parent / "out")
        assert scene.check(has_failed=False) is False
        scene.restore()
        if not faults.injected:
            break
    assert k > 5


@pytest.mark.parametrize("kind", ["preadv", "pwrite"])
def test_transfers_that_are_all_short_are_gone_on_with(scene: Scene, kind: str) -> None:
    with faulty(kind, 1, 0, ever_after=True) as faults:
        scene.job(scene.run, scene.output.parent / "out")
    assert faults.injected == faults.calls[kind] > 5
    assert scene.check(has_failed=False) is False


def test_signals_that_somebody_else_handles_interrupt_nothing(scene: Scene) -> None:
    """Real ones, a thousand a second: system calls end with EINTR and are made again."""
    came = []
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        scene.job(scene.run, scene.output.parent / "out")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came
    assert scene.check(has_failed=False) is False


@pytest.mark.sweep
@pytest.mark.parametrize("ever_after", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_every_call_in_every_way_to_make_an_output(
    scene: Scene, kind: str, ever_after: bool
) -> None:
    sweep(scene, kind, errno.ENOSPC if ever_after else errno.EIO, ever_after=ever_after)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_while_parts_replace_an_output(make_run: MakeRun, kind: str) -> None:
    scene = Scene(small_run(make_run), replacing_in_parts)
    sweep(scene, kind, errno.EIO, ever_after=False)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["zip", "legacy", "dcp"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_while_other_formats_are_read(tmp_path: Path, form: str, kind: str) -> None:
    run = tmp_path / "run"
    for step, state in enumerate(series(3, a=noise(3, 5, 7), n=torch.arange(9)), start=1):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if form == "dcp":
            save(dict(state), checkpoint_id=folder, no_dist=True)
        else:
            as_zip = form == "zip"
            path = folder / "pytorch_model.bin"
            torch.save(state, path, _use_new_zipfile_serialization=as_zip)
    sweep(Scene(run, one), kind, errno.EIO, ever_after=False)


@pytest.mark.sweep
@pytest.mark.parametrize("job", [one, replacing, single, updating])
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_at_any_call_leaves_nothing(make_run: MakeRun, job: Job, kind: str) -> None:
    scene = Scene(small_run(make_run), job)
    for k in itertools.count(1):
        interrupted = False
        with faulty(kind, k, KeyboardInterrupt) as faults:
            try:
                scene.job(scene.run, scene.output.parent / "out")
            except KeyboardInterrupt:
                interrupted = True
        left = scene.check(has_failed=interrupted)
        if left and job is updating:  # an empty folder, which is not always its own to remove
            scene.repeat()
        else:
            assert not left, k
        scene.restore()
        if not faults.injected:
            break


def test_no_kind_of_call_is_never_made(make_run: MakeRun) -> None:
    """A sweep over such a one would prove nothing."""
    made: set[str] = set()
    for job in JOBS:
        run = small_run(make_run, f"{job.__name__}/run")
        scene = Scene(run, job)
        with faulty() as faults:
            job(run, run.parent / "out")
        scene.check(has_failed=False)
        made |= faults.calls.keys()
    assert made == set(KINDS)


@pytest.mark.parametrize("kind", ["preadv", "pwrite"])
def test_calls_of_the_compiled_fold_count(
    make_run: MakeRun, compiled_module: ModuleType, kind: str
) -> None:
    """Otherwise the sweeps would prove nothing about it; without a kind it is left alone."""
    run, calls = small_run(make_run), []
    for name in ("", kind):
        with faulty(name, 1 << 40) as faults:
            one(run, run.parent / f"out-{name}")
        calls.append(faults.calls[kind])
    assert calls[1] >= calls[0] + 3


def killed_after(seconds: float, job: Job, run: Path, output: Path) -> float:
    """Do a job in a process of its own that is killed after a while, and tell how long it lived."""
    process = processes().Process(target=job, args=(run, output))
    start = time.monotonic()
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return time.monotonic() - start


def kill_at_random(make_run: MakeRun, job: Job, times: int) -> None:
    """Kill it at random moments: the output is whole or absent, and what is left does no harm."""
    scene = Scene(small_run(make_run, f"{job.__name__}/run"), job)
    whole_seconds = 0.0
    for _ in range(2):  # the first one waits for what all processes are forked from
        whole_seconds = killed_after(60.0, job, scene.run, scene.output.parent / "out")
        scene.check(has_failed=False)
        scene.restore()
    random_seconds, left = random.Random(job.__name__), 0
    for number in range(10 * times):
        if number >= times and left:
            break
        seconds = random_seconds.uniform(0, 1.1 * whole_seconds)
        killed_after(seconds, job, scene.run, scene.output.parent / "out")
        if scene.check(has_failed=True):
            left += 1
            scene.repeat()
        scene.restore()
    assert left > 0  # or none was killed while it worked


@pytest.mark.parametrize("job", [one, resumed, updating])
def test_a_run_that_is_killed_leaves_a_whole_output_or_none(make_run: MakeRun, job: Job) -> None:
    kill_at_random(make_run, job, 10)


@pytest.mark.sweep
@pytest.mark.parametrize("job", [*JOBS, replacing_in_parts])
def test_killed_whatever_it_makes(make_run: MakeRun, job: Job) -> None:
    kill_at_random(make_run, job, 50)
