"""Measure what others have for the same average: mergekit, the hand-written loop, torch's own
`AveragedModel`, and the loop of timm's script.
"""

import json
import os
import statistics
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import environment
from contenders import (
    AVERAGE,
    COMMAND,
    DECAY,
    LOOP,
    MERGEKIT,
    MIB,
    OF_PEERS,
    TORCHS,
    UNIFORM,
    UNIFORM_MEAN,
    Job,
    Settings,
    make_run,
    merge_file,
    weights_files,
)
from exactness import Errors, errors, folded, mean
from measuring import (
    Measured,
    Promise,
    contender_table,
    promise_table,
    ratio_table,
    ratios,
    remove,
    table,
    take_off_imports,
    take_turns,
    timing_promise,
)

ENVIRONMENT = environment.Environment(
    environment.REPOSITORY / ".venv-peers",
    (("-c", "constraints.txt", "-r", "scripts/peers.txt", "-e", "."),),
    ("pyproject.toml", "constraints.txt", "scripts/peers.txt"),
)
PROMISED_TIMES_MERGEKIT = 6.0
PROMISED_TIMES_TORCHS = 1.0
NET_PAIRS = ((MERGEKIT, AVERAGE), (LOOP, AVERAGE), (TORCHS, AVERAGE), (UNIFORM_MEAN, UNIFORM))
WALL_PAIRS = ((MERGEKIT, COMMAND), (LOOP, COMMAND), (TORCHS, COMMAND))
NOTES = """\
mergekit-pytorch: the function that its command calls, linear, with the weights that
`ckpt-ema plan` shows, in float32. Its wall seconds are those of the command.
wrong: elements that are not the float64 average, rounded once to the dtype of the output.
error: root mean square of the error, in multiples of that of rounding once.
timm's loop: its avg_checkpoints.py is in no package, so this is its loop and not the script. It
averages uniformly and writes float32, so it is judged by the float64 mean and compared with
ckpt_ema.average(..., schedule="uniform", dtype="float32").
ckpt_ema.average: its net seconds include its own imports (see import ckpt_ema); those of
mergekit-pytorch do not.
"""


def linear_merge(weights: dict[Path, float], dtype: str) -> str:
    """YAML with which mergekit adds up files by these weights and writes this dtype."""
    models = []
    for path, weight in weights.items():
        # Quoted by JSON's rules, which are YAML's; and without a point 1e-06 would be a text.
        models.append(f"  - model: {json.dumps(str(path))}")
        models.append(f"    parameters: {{weight: {weight:.17e}}}")
    return "\n".join(
        [
            "merge_method: linear",
            "parameters: {normalize: false}",
            "dtype: float32",
            f"out_dtype: {dtype}",
            "models:",
            *models,
            "",
        ]
    )


def write_merge(run: Path, dtype: str) -> None:
    """Write the YAML for the average that ckpt-ema makes of this run."""
    import ckpt_ema

    weights = ckpt_ema.plan(run, decay=DECAY).averages[0].weights
    files = dict(zip(weights_files(run), weights, strict=True))
    merge_file(run).write_text(linear_merge(files, dtype))


def measure_peers(settings: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """Seconds, memory and errors of every peer, of the loop and of ckpt-ema, taking turns."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    run = make_run(settings, workdir)
    write_merge(run, settings.dtype)
    job = Job(run, workdir, settings.threads)
    rounds, outputs = take_turns((*OF_PEERS, COMMAND), job, repeat)
    take_off_imports(rounds)
    found = judged(weights_files(run), outputs)
    for output in (*outputs.values(), merge_file(run)):
        remove(output)
    yield (
        f"## Peers: {settings.dtype}, {settings.checkpoints} checkpoints of "
        f"{settings.size_bytes // MIB} MiB, {settings.threads} threads\n"
    )
    yield ", ".join(f"{name} {version(name)}" for name in ("mergekit", "transformers")) + "\n"
    yield from contender_table(rounds)
    yield from error_table(found)
    yield NOTES
    yield from ratio_table(rounds, NET_PAIRS)
    yield from ratio_table(rounds, WALL_PAIRS, "wall_seconds")
    yield from promise_table(peer_promises(rounds))


def judged(checkpoints: list[Path], outputs: dict[str, Path]) -> dict[str, Errors]:
    """Errors of each output: two are uniform means, the rest are what `folded` makes."""
    uniform = {name: outputs[name] for name in (UNIFORM_MEAN, UNIFORM)}
    others = {name: path for name, path in outputs.items() if name not in uniform}
    return errors(checkpoints, others, folded) | errors(checkpoints, uniform, mean)


def error_table(found: dict[str, Errors]) -> Iterator[str]:
    """Errors of each contender."""
    rows = [
        [
            contender,
            f"{error.wrong} of {error.elements}",
            f"{error.wrong / error.elements:.2g}",
            f"{error.times_rounding:.3f}",
        ]
        for contender, error in found.items()
    ]
    return table(["contender", "wrong", "share", "error"], rows)


def peer_promises(rounds: dict[str, list[Measured]]) -> Iterable[Promise]:
    """What was promised about peers, beside what was measured."""
    busy = max(value.others_cores for values in rounds.values() for value in values)
    promised = (
        (MERGEKIT, AVERAGE, "seconds", "net of imports", PROMISED_TIMES_MERGEKIT),
        (MERGEKIT, COMMAND, "wall_seconds", "whole commands", PROMISED_TIMES_MERGEKIT),
        (TORCHS, AVERAGE, "seconds", "net of imports", PROMISED_TIMES_TORCHS),
    )
    for peer, ours, field, what, least in promised:
        times = statistics.median(ratios(rounds, peer, ours, field))
        text = f"{ours} at least {least:g} times as fast as {peer}, {what}"
        yield timing_promise(text, f"{times:.2f}", times >= least, busy)
