"""Broken indexes of sharded checkpoints."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.conftest import write_safetensors
from tests.corpus.case import (
    MIDDLE,
    Case,
    Make,
    becomes,
    fifo,
    holds,
    is_gone,
    json_is,
    links_to,
    several,
)

INDEX = f"{MIDDLE}/model.safetensors.index.json"
FIRST, SECOND = (f"{MIDDLE}/model-0000{i}-of-00002.safetensors" for i in (1, 2))
Shards = partial(Case, form="shards")


def index(value: Any) -> Make:
    """The index is this."""
    return json_is(INDEX, value)


def mapped(change: Callable[[dict[str, Any]], object]) -> Make:
    """The map from names to shards is changed."""

    def make(run: Path) -> None:
        content = json.loads((run / INDEX).read_text())
        change(content["weight_map"])
        (run / INDEX).write_text(json.dumps(content))

    return make


def to(shard: Any) -> Make:
    """Tensor w is said to be in this shard."""
    return mapped(lambda names: names.update(w=shard))


def outside(run: Path) -> None:
    """The shard beside the checkpoint's folder is a good one."""
    os.rename(run / FIRST, run / "outside.safetensors")
    to("../outside.safetensors")(run)


def linked_farm(run: Path) -> None:
    """Files are links into a store, as in the Hub's cache."""
    store = run.parent / f"{run.name}-blobs"
    store.mkdir()
    for path in sorted(run.glob("*/*")):
        blob = store / path.relative_to(run).as_posix().replace("/", "-")
        path.rename(blob)
        path.symlink_to(blob)


def in_folders(name: str) -> Make:
    """The model of each checkpoint is in a folder of it."""

    def make(run: Path) -> None:
        for folder in sorted(run.iterdir()):
            files = list(folder.iterdir())
            (folder / name).mkdir()
            for path in files:
                path.rename(folder / name / path.name)

    return make


def extra_shard(run: Path) -> None:
    """A third one lies there that the index does not name."""
    write_safetensors(run / f"{MIDDLE}/model-00003-of-00003.safetensors", {"extra": torch.ones(3)})


def in_both(run: Path) -> None:
    """The second shard has the tensor of the first, too."""
    write_safetensors(
        run / SECOND, {"b": torch.ones(40, dtype=torch.bfloat16), "w": torch.ones(5, 7)}
    )


OUTSIDE = "is not a plain file name: a checkpoint may not reach outside its folder"

CASES = [
    Shards("a shard that is missing", is_gone(SECOND)),
    Shards("a shard that no index names", extra_shard, code=0),
    Shards("a shard beside the folder", outside),
    Shards("an absolute shard", to("/etc/passwd")),
    Shards("a shard with NUL in its name", to("a\0b")),
    Shards("a shard called .", to(".")),
    Shards("a shard called ..", to("..")),
    Shards("a shard without a name", to("")),
    Shards("a shard of a folder below", to("sub/model.safetensors")),
    Shards("a shard that is a number", to(7)),
    Shards("a shard that is null", to(None)),
    Shards("a shard whose name has escape codes", to("\x1b[31mred")),
    Shards("a shard with a name of 10 kB", to("x" * 10_000)),
    Shards("no weight_map", index({"metadata": {}})),
    Shards("an empty weight_map", index({"weight_map": {}})),
    Shards("a weight_map that is a list", index({"weight_map": ["w"]})),
    Shards("an index that is a list", index([])),
    Shards("an index that is not JSON", holds(b"{", INDEX)),
    Shards("an index that is not UTF-8", holds(b'{"\xff": 1}', INDEX)),
    Shards("an index that is empty", holds(b"", INDEX)),
    Shards("an index nested thousands deep", holds(b"[" * 100_000, INDEX)),
    Shards("an index that is a FIFO", becomes(fifo, INDEX)),
    Shards("an index that is a terabyte", lambda run: os.truncate(run / INDEX, 1 << 40)),
    Shards("a name that its shard lacks", mapped(lambda n: n.update(x=n["w"]))),
    Shards("a name in two shards", in_both),
    Shards("a name that the index lacks", mapped(lambda n: n.pop("w"))),
    Shards("shards without an index", is_gone(INDEX), code=0),
    Shards("a shard too few without an index", several(is_gone(INDEX), is_gone(SECOND))),
    Shards(
        "shards without an index in a folder of the checkpoint",
        several(is_gone(INDEX), in_folders("huggingface")),
        code=0,
    ),
    Shards("a shard that is a FIFO", becomes(fifo, FIRST)),
    Shards("a shard that is a device", becomes(links_to("/dev/zero"), FIRST)),
    Shards("links into a store of blobs", linked_farm, code=0),
]
