"""`ckpt-ema verify`: is this the average that its manifest claims?"""

import json as json_format
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_ema.cli import exits
from ckpt_ema.cli.exits import say, show
from ckpt_ema.cli.options import takes_options
from ckpt_ema.errors import Code, RefusedError, counted, printable, some

if TYPE_CHECKING:
    from ckpt_ema.verifying.verify import Verification

EXAMPLES = """
ckpt-ema verify averaged
ckpt-ema verify averaged --sample 1%     # of a large model
ckpt-ema verify averaged /moved/runs
"""


@takes_options
def verify(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", readable=False)],
    run: Annotated[list[str] | None, typer.Argument(metavar="RUN", readable=False)] = None,
    *,
    sample: str | None,
    device: str,
    threads: str | None,
    tile_size: str | None,
    max_memory: str | None,
    strict: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Check that an output is the average that it claims to be.

    Its files are compared with their checksums, and the checkpoints are averaged again, without
    writing anything. RUN is where they are now, if they were moved. Exit code 1: it is not the
    average that it claims to be.
    """
    with exits.errors_reported(lambda: "nothing was found out"):
        from ckpt_ema.report.progress import ByteProgress
        from ckpt_ema.verifying.verify import verify as verify_output

        with ByteProgress(quiet) as progress:
            found = verify_output(
                output,
                run or None,
                sample=sample or 1.0,
                progress=exits.ticking(progress),
                device=device,
                threads=threads,
                tile_size=tile_size,
                max_memory=max_memory,
            )
        _report(found, strict=strict, as_json=json, quiet=quiet)


def _report(found: "Verification", *, strict: bool, as_json: bool, quiet: bool) -> None:
    """Print what was found; ends the command with its exit code."""
    if as_json:
        show(json_format.dumps(found.described(), indent=2))
    path = printable(found.output)
    if found.damaged:
        say(f"error: {path}: not the files that were written: {some(found.damaged)}")
    if found.differs:
        where = f"in tensor {printable(found.differs.tensor)}" if found.differs.tensor else ""
        where = f"{where or 'outside of tensors'}, at byte {found.differs.offset}"
        text = f"differs from the average of its checkpoints, first {where}"
        say(f"error: {path}: {printable(found.differs.file)} {text}")
    if not found.is_as_claimed:
        raise typer.Exit(1)
    missing = found.gone or found.changed
    if missing:
        how = "are gone" if found.gone else "are other files now"
        what = f"{path}: its checkpoints {how} ({some(missing, 3)}), so it was not averaged again"
        if strict:
            hint = "Without --strict this is a warning."
            raise RefusedError(f"{what}.", hint, code=Code.SOURCES_GONE, path=found.output)
        say(f"warning: {what}")
    if not quiet:
        say(f"{path}: {_summary(found)}")


def _summary(found: "Verification") -> str:
    files = f"{counted(found.files, 'file')} as written"
    if not found.is_recomputed:
        return files
    is_sample = found.tiles < found.tiles_in_all
    share = f" ({found.tiles} of {found.tiles_in_all} tiles)" if is_sample else ""
    return f"{files}, equal to the average of its {counted(found.checkpoints, 'checkpoint')}{share}"
