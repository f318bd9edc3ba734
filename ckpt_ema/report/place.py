"""Where files for people may be written: anywhere but inside the output and the inputs."""

from collections.abc import Sequence
from pathlib import Path

from ckpt_ema.errors import Code, OptionError
from ckpt_ema.storage import STORAGES


def check_place(
    option: str, path: Path, kinds: Sequence[str], folders: Sequence[Path], hint: str = ""
) -> None:
    """Refuse a path of `option` that could not or must not be written, before any work is done.

    It must end in one of `kinds`, its folder must exist, and it may not be inside of `folders`; the
    `hint` says what to do then. Raises `OptionError`.
    """

    def invalid(why: str, hint: str = "") -> OptionError:
        return OptionError(f"{option} {path} {why}", hint, code=Code.INVALID_OPTION, path=path)

    if path.suffix.lower() not in kinds:
        raise invalid(f"must end in {' or '.join(kinds)}.")
    local = STORAGES[""]  # wherever the checkpoints are
    if not local.is_folder(path.parent):
        raise invalid("is in a folder that does not exist.")
    real, *insides = local.real_paths([path, *folders])
    for folder, inside in zip(folders, insides, strict=True):
        if f"{real}/".startswith(f"{inside}/"):
            raise invalid(f"is inside {folder}.", hint)
