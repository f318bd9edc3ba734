"""Folders that are no runs, and runs with strange things in them."""

import importlib
import os
import pkgutil
import resource
import shutil
import socket
from functools import partial
from pathlib import Path

import torch

import ckpt_ema
from tests.conftest import write_safetensors, write_shards
from tests.corpus.case import Case, fifo, links_to, nothing, rewrite, several
from tests.makers.users import be_nobody, let_others_in


def emptied(run: Path) -> None:
    """Nothing is in it."""
    shutil.rmtree(run)
    run.mkdir()


def logs_only(run: Path) -> None:
    """A trainer's logs without checkpoints."""
    emptied(run)
    (run / "logs").mkdir()
    (run / "logs/events.out.tfevents.17").write_bytes(b"\0\1")
    (run / "trainer_state.json").write_text("{}")


def nobody() -> None:
    """Be a user who may not read the code, if it lies in a folder that others may not enter."""
    for module in pkgutil.walk_packages(ckpt_ema.__path__, "ckpt_ema."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    be_nobody()


def locked(name: str, run: Path) -> None:
    """Others may not read it."""
    let_others_in(run)
    (run / name).chmod(0)


def leftovers(run: Path) -> None:
    """What interrupted saves leave."""
    for name in ("tmp-checkpoint-4", "checkpoint-4.tmp", ".checkpoint-5", "checkpoint-6_tmp"):
        (run / name).mkdir()
        write_safetensors(run / name / "model.safetensors", {"w": torch.ones(5, 7)})


def loops(run: Path) -> None:
    """Links that lead nowhere, to themselves, and up."""
    (run / "checkpoint-4").symlink_to("checkpoint-4")
    (run / "checkpoint-5").symlink_to("nowhere")
    (run / "up").symlink_to("..")


def strange_files(run: Path) -> None:
    """A FIFO, a socket, a device and a file of /proc, all called as checkpoints are."""
    os.mkfifo(run / "checkpoint-4")
    here = os.open(run, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{here}/checkpoint-5")  # whose own path may be too long
    os.close(here)
    (run / "checkpoint-6").symlink_to("/dev/zero")
    (run / "checkpoint-7").symlink_to("/proc/kmsg")


def many(count: int, run: Path) -> None:
    """So many checkpoints, each of its own content."""
    emptied(run)
    rewrite(run, [{"w": torch.tensor([float(step)])} for step in range(count)])


def many_tensors(run: Path) -> None:
    """100 000 tensors in each of three checkpoints."""
    values = torch.arange(300_000.0).view(3, -1)
    rewrite(run, [{f"layer.{i}.weight": v for i, v in enumerate(row)} for row in values])


def many_shards(run: Path) -> None:
    """300 in each checkpoint."""
    emptied(run)
    for step in (1, 2, 3):
        (run / f"checkpoint-{step}").mkdir()
        state = {f"layer.{i}.weight": torch.tensor([float(step + i)]) for i in range(300)}
        write_shards(run / f"checkpoint-{step}", state, 300)


def not_utf8(run: Path) -> None:
    """A checkpoint among the others, and a file beside the weights."""
    os.mkdir(os.fsencode(run) + b"/\xff\xfe")
    Path(os.fsdecode(os.fsencode(run) + b"/checkpoint-3/notes-\xff.txt")).write_text("?")


AS_ROOT = os.geteuid() == 0

CASES = [
    Case("does not exist", shutil.rmtree, names="RUN"),
    Case("empty", emptied, names="RUN"),
    Case("logs only", logs_only, names="RUN"),
    *(
        Case(f"{name} may not be read", partial(locked, name), before=nobody, names=f"RUN/{name}")
        for name in ("checkpoint-2", "checkpoint-2/model.safetensors")
        if AS_ROOT
    ),
    *(
        Case(
            f"{name} may not be entered", partial(locked, ""), before=nobody, names=given, run=path
        )
        for name, path, given in (
            ("the run", "RUN", "RUN"),
            ("the folder above the run", "RUN/checkpoint-2", "RUN/checkpoint-2"),
        )
        if AS_ROOT
    ),
    Case("leftovers of interrupted saves", leftovers, code=0),
    Case("loops and dangling links", loops, code=0),
    Case("a FIFO, a socket, a device, a file of /proc", strange_files, code=0),
    Case(
        "a folder called as a file is",
        lambda run: (run / "checkpoint-3/config.json").mkdir(),
        code=0,
    ),
    Case("a FIFO beside the weights", lambda run: fifo(run / "checkpoint-3/config.json"), code=0),
    Case(
        "a link to a device beside the weights",
        lambda run: links_to("/dev/zero")(run / "checkpoint-3/config.json"),
        code=0,
    ),
    Case("names that are not UTF-8", not_utf8, code=0),
    Case(
        "a file is the run",
        several(shutil.rmtree, lambda run: run.write_text("notes")),
        names="RUN",
    ),
    Case("a FIFO is the run", several(shutil.rmtree, fifo), names="RUN"),
    Case(
        "/proc is the run",
        nothing,
        says="No checkpoints found|cannot be",
        run="/proc",
        names="/proc",
    ),
    Case("a device is the run", nothing, run="/dev/zero", names="/dev/zero"),
    Case("300 checkpoints", partial(many, 300), code=0),
    Case(
        "10 000 checkpoints with 256 descriptors",
        partial(many, 10_000),
        code=0,
        before=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (256, 256)),
        is_slow=True,
    ),
    Case("300 shards", many_shards, code=0),
    Case("100 000 tensors", many_tensors, code=0, is_slow=True),
]
