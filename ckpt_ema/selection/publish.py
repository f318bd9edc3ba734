"""Publishing the best candidate, or all of them, with what was measured; finding it again."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_ema.output.candidates import Candidates
from ckpt_ema.output.destination import outputs_at
from ckpt_ema.output.manifest import read_manifest
from ckpt_ema.output.selected import Selection, selection_from
from ckpt_ema.report.card import card
from ckpt_ema.report.selection import markdown
from ckpt_ema.selection.competing import placed
from ckpt_ema.selection.staging import Entrant
from ckpt_ema.trainers.conventions import CARD_NAME, MANIFEST_NAME


def publish(
    stage: Candidates,
    entrants: Sequence[Entrant],
    selection: Selection,
    key: str,
    command: str | None,
) -> None:
    """Publish the best of `entrants`, or all where the best is in the folder of all.

    `key` is what `published_before` asks for; `command` is the one that made the output.
    """
    record = {**selection.described(), "key": key}
    is_one = selection.path == selection.output
    files: dict[str, bytes] = {}
    for one in entrants:
        if is_one and one.average.name != selection.best:
            continue
        home = "" if is_one else one.average.name
        path = selection.output / home
        manifest = {**stage.manifest(one.folder), "output": str(path), "command": command}
        files[os.path.join(home, MANIFEST_NAME)] = _json({**manifest, "evaluation": record})
        if one.plan.card:
            text = card(one.plan, placed(one.average, path), command, None, markdown(selection))
            files[os.path.join(home, CARD_NAME)] = text.encode()
    if not is_one:
        stage.keep_only([one.average.name for one in entrants])
    best = next(one for one in entrants if one.average.name == selection.best)
    stage.publish_folder(best.folder if is_one else stage.folder, files)


def published_before(final: Path, key: str) -> Selection | None:
    """Return the selection that was published at `final` for a `key`, by its manifests."""
    outputs = outputs_at(final)
    records: list[Any] = [read_manifest(path).get("evaluation") for path in outputs]
    if not records or not all(
        isinstance(one, Mapping) and one.get("key") == key for one in records
    ):
        return None
    found = selection_from(records[0], final, final)
    if found is not None and outputs != [final]:
        found = replace(found, path=final / found.best)
    return found if found is not None and found.path in outputs else None


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
