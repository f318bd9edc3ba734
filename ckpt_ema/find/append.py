"""--append: checkpoints that the user puts after the last step."""

from collections.abc import Sequence
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.errors import Code, OptionError, RefusedError
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.globs import matches
from ckpt_ema.find.model_files import Unsupported, locate
from ckpt_ema.find.names import stem_of, template_of
from ckpt_ema.find.series import Series
from ckpt_ema.notices import Notice
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind


def append(
    folders: tuple[Path, Path], found: Sequence[Checkpoint], selection: Selection, source: Source
) -> list[Checkpoint]:
    """Return the checkpoints of --append, by names in these folders or by paths."""
    appended: list[Checkpoint] = []
    for name in selection.append:
        places = [*(folder / name for folder in folders), Path(name)]
        kinds = (source.storage.kind(place) for place in places)
        there = [p for p, kind in zip(places, kinds, strict=True) if kind is not Kind.ABSENT]
        path = (there or places)[0]
        _check(path, bool(there), [*found, *appended], selection, source)
        model = locate(path, source)
        if isinstance(model, Unsupported):
            raise model.refusal(path)
        if model is None:
            raise _refused(path, "it holds no model weights", Code.NO_MODEL)
        appended.append(Checkpoint(path, None, model, found[-1].unit, is_given=True))
    return appended


def _check(
    path: Path, exists: bool, found: Sequence[Checkpoint], selection: Selection, source: Source
) -> None:
    """Refuse to append what is excluded, what does not exist, and what is there already."""
    if any(matches(path.name, glob) for glob in selection.exclude):
        raise OptionError(
            f"--append {path.name} is also left out by --exclude.", code=Code.CONFLICTING_OPTIONS
        )
    if not exists:
        raise _refused(path, f"{path} does not exist", Code.NOT_FOUND)
    file_id = source.storage.file_id
    for checkpoint in found:
        if file_id(path) == file_id(checkpoint.path):
            raise _refused(path, f"{checkpoint.name} is there already", Code.GIVEN_TWICE)


def _refused(path: Path, why: str, code: Code) -> RefusedError:
    return RefusedError(f"--append {path.name}: {why}.", code=code, path=path)


def despite_number(
    appended: Sequence[Checkpoint], newest: Checkpoint, series: Series
) -> list[Notice]:
    """Return warnings of appended checkpoints that have a number in the series."""
    return [
        Notice(
            Code.OUT_OF_ORDER,
            f"--append {one.name} puts it after {newest.name}, although its name has a number.",
        )
        for one in appended
        if template_of(stem_of(one.name)) in series.templates
    ]
