"""Adds the files that are copied when an average is written back as a checkpoint."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from ckpt_ema.containers import dcp, torch_file
from ckpt_ema.containers.specs import Specs
from ckpt_ema.errors import CkptEmaError, Code, some
from ckpt_ema.find.checkpoint import Checkpoint
from ckpt_ema.find.names import stem_of
from ckpt_ema.notices import Notice
from ckpt_ema.planning.average import Weighted
from ckpt_ema.planning.same_model import Compared
from ckpt_ema.storage import Storage
from ckpt_ema.targets.checkpoint import with_all_files
from ckpt_ema.trainers import conventions
from ckpt_ema.trainers.table import Masters


def with_copied_files(
    compared: Compared, averages: Sequence[Weighted], storage: Storage
) -> Compared:
    """Add the files to copy to each checkpoint that an average is written back into.

    Warns of weights that are copied with the average and that a trainer may prefer to it.
    """
    newest = {average.checkpoints[-1] for average in averages}
    specs_of, warnings = {}, [*compared.warnings]
    for checkpoint, own in compared.specs.items():
        specs = own
        if checkpoint in newest:
            specs = with_all_files(checkpoint, own, storage)
            copied = [file.name for file in specs.files[len(own.files) :]]
            warnings += [*_other_models(checkpoint, own, copied)]
            warnings += [*_masters(checkpoint, specs, storage)]
        specs_of[checkpoint] = specs
    return compared._replace(specs=specs_of, warnings=warnings)


def _other_models(checkpoint: Checkpoint, specs: Specs, copied: Sequence[str]) -> Iterator[Notice]:
    """Warn of further models, such as an average by the trainer, that keep their values."""
    files = [name for name in copied if _holds_average(name)]
    if others := [*specs.other_models, *files]:
        text = f"Other weights in {checkpoint.name} are copied as they are ({some(others)}); make"
        text = f"{text} sure that your loader does not prefer them to the average."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _holds_average(name: str) -> bool:
    words = (stem_of(part) for part in name.split("/"))
    is_named = any(map(conventions.AVERAGED_NAME.search, words))
    return is_named and bool(conventions.WEIGHTS_LIKE.search(name))


def _masters(checkpoint: Checkpoint, specs: Specs, storage: Storage) -> Iterator[Notice]:
    """Warn of weights that an optimizer keeps in higher precision and that a trainer prefers."""
    found: dict[Masters, list[str]] = {}
    for file in specs.files:
        path = os.path.join(checkpoint.model.folder, file.name)
        known = b"\n".join([os.fsencode(file.name), _structure(path, storage)])
        for masters in conventions.MASTERS:
            if re.search(masters.pattern.encode(), known, re.MULTILINE):
                found.setdefault(masters, []).append(file.name)
    for masters, names in found.items():
        text = f"The optimizer's own copy of the weights (fp32 masters, in {some(names, 2)}) is not"
        text = f"{text} averaged, and a trainer that resumes takes it instead of the average; load"
        text = f"{text} the output with {masters.ignored_with}."
        yield Notice(Code.OTHER_WEIGHTS, text)


def _structure(path: str, storage: Storage) -> bytes:
    """Return the pickled structure of a torch file, unparsed; nothing for any other file."""
    with suppress(CkptEmaError):  # of what is only copied, nothing has to be readable
        is_metadata = dcp.claims(os.path.basename(path))
        return (storage.read(path) if is_metadata else torch_file.structure(path, storage)) or b""
    return b""
