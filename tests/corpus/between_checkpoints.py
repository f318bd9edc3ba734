"""Checkpoints that are good alone and do not go together."""

import shutil
from pathlib import Path

import torch

from tests.corpus.case import MIDDLE, Case, cut, in_all, rewrite, several

NEWEST = "checkpoint-3"


def only_one(run: Path) -> None:
    """The others are gone."""
    for step in (1, 2):
        shutil.rmtree(run / f"checkpoint-{step}")


def mixed(run: Path) -> None:
    """The middle one is a torch file."""
    (run / MIDDLE / "model.safetensors").unlink()
    state = {"w": torch.ones(5, 7), "b": torch.ones(40).bfloat16(), "n": torch.arange(9)}
    torch.save(state, run / MIDDLE / "pytorch_model.bin")


def same_step(run: Path) -> None:
    """Two folders of one step, with other weights."""
    rewrite(run / "more", [{"w": torch.ones(5, 7)}])
    (run / "more/checkpoint-1").rename(run / "checkpoint-002")
    (run / "more").rmdir()


CASES = [
    Case("another shape", in_all(lambda s: s.update(w=torch.ones(5, 8)), 2)),
    Case("a shape that would broadcast", in_all(lambda s: s.update(w=torch.ones(1, 7)), 2)),
    Case("a name that is missing", in_all(lambda s: s.pop("w"), 2)),
    Case("a name that is added", in_all(lambda s: s.update(x=torch.ones(1)), 2)),
    Case("a name that is another", in_all(lambda s: s.update(x=s.pop("w")), 2)),
    Case("a wider dtype", in_all(lambda s: s.update(b=s["b"].float()), 2), code=0),
    Case("a float that is an integer", in_all(lambda s: s.update(w=s["w"].long()), 2)),
    Case("the same step twice", same_step, names="checkpoint-002"),
    Case(
        "identical files under two steps",
        lambda run: shutil.copy(
            run / "checkpoint-1/model.safetensors", run / "checkpoint-2/model.safetensors"
        ),
        names="checkpoint-1",
    ),
    Case("the newest is cut", cut(-5, f"{NEWEST}/model.safetensors"), code=0),
    Case("the newest is empty", cut(0, f"{NEWEST}/model.safetensors"), code=0),
    Case("the middle one is cut", cut(-5)),
    Case("the middle one is skipped", cut(-5), code=0, words=["--skip-incomplete"]),
    Case("mixed formats", mixed, code=0),
    Case("one checkpoint only", only_one, code=0),
    Case(
        "none that is whole",
        several(*(cut(-5, f"checkpoint-{i}/model.safetensors") for i in (1, 2, 3))),
        names="checkpoint-",
    ),
]
