"""What is known before averages are written back into copies of the newest checkpoints."""

from collections.abc import Sequence

from ckpt_ema.planning.average import Weighted
from ckpt_ema.planning.same_model import Compared
from ckpt_ema.storage import Storage
from ckpt_ema.targets.checkpoint import with_all_files


def with_copied_files(
    compared: Compared, averages: Sequence[Weighted], storage: Storage
) -> Compared:
    """Add to each checkpoint at which an average ends the files that only are copied."""
    newest = {average.checkpoints[-1] for average in averages}
    specs = {
        one: with_all_files(one, specs, storage) if one in newest else specs
        for one, specs in compared.specs.items()
    }
    return compared._replace(specs=specs)
