"""What a person names: a list of checkpoints, taken in the order given, --append, and globs."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles
from ckpt_ema.errors import Code, OptionError, RefusedError, flag, some
from ckpt_ema.find.checkpoint import Checkpoint, Found
from ckpt_ema.find.entries import Entry
from ckpt_ema.find.model_files import locate, unsupported
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.order import as_checkpoint, deciding_unit, named_keys, step_in_name
from ckpt_ema.find.verdict import Outcome, Reason, Verdict, skipped
from ckpt_ema.notices import Notice
from ckpt_ema.options import Selection
from ckpt_ema.storage.protocol import Kind
from ckpt_ema.storage.uri import absolute, common_folder, path_of
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.table import Refusal


def listed(given: Sequence[Path], selection: Selection, source: Source) -> Found:
    """Return the checkpoints at these paths, in this order; raises for one given twice."""
    for option in ("pattern", "append", "order", "aliases"):
        if getattr(selection, option) != getattr(Selection(), option):
            text = f"{flag(option)} needs a run's folder, not a list of checkpoints."
            raise OptionError(text, code=Code.CONFLICTING_OPTIONS)
    paths = [_checkpoint_path(path, source) for path in given]
    pairs = zip(paths, _names(paths), strict=True)
    entries = [Entry(path, source, name, is_given=True) for path, name in pairs]
    for entry in entries:
        if not entry.model:
            raise _not_a_checkpoint(entry)
    step = Verdict(Outcome.STEP, Reason.GIVEN, "listed")
    judged = [one.judged(unselected(one.name, selection) or step) for one in entries]
    selected = [e for e, one in zip(entries, judged, strict=True) if one.verdict is step]
    names = [entry.name for entry in entries]
    warnings = unmatched(names, selection)
    if not selected:
        raise none_selected(names, selection)
    real_paths = source.storage.real_paths(entry.path for entry in selected)
    first: dict[str, Entry] = {}
    for entry, real in zip(selected, real_paths, strict=True):
        if first.setdefault(real, entry) is not entry:
            text = f"{entry.path} is given twice."
            raise RefusedError(text, code=Code.GIVEN_TWICE, path=entry.path)
    named = named_keys(selected)  # of one unit, if possible
    places = [(named[0], key) for key in named[1]] if named else map(step_in_name, selected)
    rows = zip(selected, places, strict=True)
    checkpoints = tuple(as_checkpoint(entry, *place, is_given=True) for entry, place in rows)
    warnings = (*warnings, *_order_given(selected, checkpoints))
    return Found(common_root(checkpoints), checkpoints, tuple(judged), warnings)


def _checkpoint_path(path: Path, source: Source) -> Path:
    """Return the path of a checkpoint, which is its folder if a model file of it was given."""
    if path.name in conventions.FOLDER_WEIGHTS:
        whole = locate(path.parent, source)
        if isinstance(whole, ModelFiles) and whole.path == path:
            return path.parent
    elif conventions.SHARD_NUMBER.search(path.name):
        text, hint = f"{path} is one shard of a model.", "Pass its folder, or the index of shards."
        raise RefusedError(text, hint, code=Code.NOT_A_CHECKPOINT, path=path)
    return path


def _not_a_checkpoint(entry: Entry) -> RefusedError:
    """Return the error for a path that holds no model that can be read."""
    if isinstance(entry.located, Refusal):
        return unsupported(entry.path, entry.located)
    component = entry.source.reading.component
    hint = "Pass a run's folder alone, or its checkpoints one by one."
    if component:
        why = f"holds no model weights for --component {component}"
        hint = "Inside one torch file, --key chooses."
    elif entry.is_folder:
        why = f"is not a checkpoint: it holds none of {some(conventions.FOLDER_WEIGHTS)}"
    else:
        why = "is not a checkpoint: neither a safetensors file nor one written by torch.save"
    return RefusedError(f"{entry.path} {why}.", hint, code=Code.NOT_A_CHECKPOINT, path=entry.path)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return what to call each path: its name, or the first of its folders that differs."""
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    columns = zip(*(path_of(absolute(path)).parts for path in paths), strict=False)
    differing = next((column for column in columns if len(set(column)) == len(paths)), None)
    return list(differing) if differing else [str(path) for path in paths]


def _order_given(entries: Sequence[Entry], checkpoints: Sequence[Checkpoint]) -> list[Notice]:
    """Return a warning for an order that names or records contradict: a shell sorts as text."""
    named = [{} if one.step is None else {one.unit: one.step} for one in checkpoints]
    kept = "The list is kept in the order given"
    for facts, why in (
        (named, "a shell sorts names as text; pass the run's folder to order it by number"),
        ([entry.recorded_anywhere for entry in entries], "list the checkpoints oldest first"),
    ):
        for (earlier, first), (later, second) in pairwise(zip(checkpoints, facts, strict=True)):
            unit = deciding_unit(first, second) or next(iter(first.keys() & second.keys()), None)
            if unit and first[unit] > second[unit]:
                places = (
                    f"{earlier.name} ({unit} {first[unit]})",
                    f"{later.name} ({second[unit]})",
                )
                text = f"{kept}, with {' before '.join(places)}: {why}."
                return [Notice(Code.OUT_OF_ORDER, text)]
    return []


def common_root(checkpoints: Sequence[Checkpoint]) -> Path:
    """Return the folder that the checkpoints share; one without a number is its own root."""
    if len(checkpoints) == 1 and checkpoints[0].step is None:
        return checkpoints[0].path
    parents = {path_of(absolute(checkpoint.path)).parent for checkpoint in checkpoints}
    return checkpoints[0].path.parent if len(parents) == 1 else common_folder([*parents])


def append(
    folders: tuple[Path, Path], found: Sequence[Checkpoint], selection: Selection, source: Source
) -> list[Checkpoint]:
    """Return the checkpoints of --append: names in these folders, or paths."""
    appended: list[Checkpoint] = []
    for name in selection.append:
        places = [*(folder / name for folder in folders), path_of(name)]
        there = [one for one in places if source.storage.kind(one) is not Kind.ABSENT]
        path = (there or places)[0]
        if any(matches(path.name, glob) for glob in selection.exclude):
            text = f"--append {path.name} is also left out by --exclude."
            raise OptionError(text, code=Code.CONFLICTING_OPTIONS)
        if not there:
            raise _append_error(path, f"{path} does not exist", Code.NOT_FOUND)
        known = same_path(path, (*found, *appended), source)
        if known:
            raise _append_error(path, f"{known} is there already", Code.GIVEN_TWICE)
        model = locate(path, source, is_given=True)
        if isinstance(model, Refusal):
            raise unsupported(path, model)
        if model is None:
            raise _append_error(path, "it holds no model weights", Code.NO_MODEL)
        appended.append(Checkpoint(path, None, model, found[-1].unit, is_given=True))
    return appended


def same_path(path: Path, checkpoints: Iterable[Checkpoint], source: Source) -> str | None:
    """Return the name of the first checkpoint that is the same file or folder; None without one."""
    own = source.storage.file_id(path)
    same = (one.name for one in checkpoints if source.storage.file_id(one.path) == own)
    return next(same, None)


def _append_error(path: Path, why: str, code: Code) -> RefusedError:
    return RefusedError(f"--append {path.name}: {why}.", code=code, path=path)


def unselected(name: str, selection: Selection) -> Verdict | None:
    """Return the verdict if --include or --exclude leaves a name out; None if they do not."""
    if any(matches(name, glob) for glob in selection.exclude):
        return skipped(Reason.EXCLUDED)
    if selection.include and not any(matches(name, glob) for glob in selection.include):
        return skipped(Reason.NOT_INCLUDED)
    return None


def matches(name: str, glob: str) -> bool:
    """Return whether a glob matches a whole name, with or without its extension.

    >>> matches("step_100.pt", "step_100"), matches("step_1000.pt", "step_100")
    (True, False)
    """
    glob = glob.rstrip("/")  # shells complete folders with it
    return fnmatchcase(name, glob) or fnmatchcase(stem_of(name), glob)


def unmatched(names: Iterable[str], selection: Selection) -> tuple[Notice, ...]:
    """Return warnings of globs that exclude nothing; raises for one that includes nothing."""
    known = sorted(names)
    for glob in selection.include:
        if not any(matches(name, glob) for name in known):
            text = f"--include {glob} matches nothing; the names are {some(known)}."
            hint = "A glob must match the whole name: 'checkpoint-1*', not 'checkpoint-1'."
            raise RefusedError(text, hint, code=Code.NO_MATCH)
    return tuple(
        Notice(Code.NO_MATCH, f"--exclude {glob} matches nothing.")
        for glob in selection.exclude
        if not any(matches(name, glob) for name in known)
    )


def none_selected(names: Iterable[str], selection: Selection) -> RefusedError:
    """Return the error for globs that leave nothing."""
    given = [name for name in ("include", "exclude") if getattr(selection, name)]
    options = " and ".join(map(flag, given))
    verb = "leave" if len(given) > 1 else "leaves"
    text = f"{options} {verb} none of {some(sorted(names))}."
    return RefusedError(text, code=Code.NOTHING_SELECTED)
