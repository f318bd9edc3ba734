"""The files of averages that were made before, where they are now."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_ema.output.content import header_of_state
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan
from ckpt_ema.planning.state import says_same
from ckpt_ema.targets.target import Chunk, OutputFile
from ckpt_ema.verifying.records import Recorded


class File(NamedTuple):
    """A file of one of the averages."""

    name: str  # relative to the output
    path: Path
    file: OutputFile
    is_own: bool = True  # else the checkpoint has it only by now, and nothing in it is averaged
    shift: int = 0  # how much longer the header of a state is than planned


def files_of(plan: Plan, output: Path, records: Sequence[Recorded]) -> list[File]:
    """Return the files of the averages, by their numbers, where the manifests have them."""
    found, states = list[File](), list[File]()
    for average, (folder, manifest) in zip(plan.averages, records, strict=True):
        home, names = folder.relative_to(output), _recorded_names(plan, average, manifest)
        for file in average.output.files:
            name = names.get(file.name, file.name)
            is_own = file.name in names or bool(file.tensors)
            found.append(File(str(home / name), folder / name, file, is_own))
        if state := average.output.state:
            states.append(_as_there(File(str(home / state.name), folder / state.name, state)))
    return [*found, *states]


def _as_there(state: File) -> File:
    """Return a state with its own header, which has other paths and times, if it fits."""
    header, planned = header_of_state(state.path), state.file.chunks[0].content
    if not says_same(header[8:], planned[8:]):
        return state
    shift = len(header) - len(planned)
    file = replace(
        state.file,
        chunks=(Chunk(0, header),),
        size_bytes=state.file.size_bytes + shift,
        tensors=tuple(one._replace(offset=one.offset + shift) for one in state.file.tensors),
    )
    return state._replace(file=file, shift=shift)


def _recorded_names(plan: Plan, average: Average, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the recorded names of an average's files by those that the plan has.

    What is written back has more files if the checkpoint does by now, and is in a folder of the
    checkpoint's name only if the run has a file that leads there.
    """
    top = f"{plan.checkpoints[average.members[-1]].path.name}/"
    recorded = {row["name"].removeprefix(top): row["name"] for row in manifest["files"]}
    planned = (file.name for file in average.output.files)
    pairs = ((name, recorded.get(name.removeprefix(top))) for name in planned)
    return {name: found for name, found in pairs if found is not None}
