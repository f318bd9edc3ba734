"""Where checkpoints are read from, and how: their storage and the options of reading."""

from dataclasses import dataclass, field

from ckpt_ema.containers.read import read_specs
from ckpt_ema.containers.specs import ModelFiles, Specs
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.options import Reading
from ckpt_ema.storage import Storage


@dataclass(slots=True)
class Source:
    """The headers of checkpoints in one storage, each read once."""

    storage: Storage
    reading: Reading
    _specs: dict[ModelFiles, Specs] = field(default_factory=dict)

    def read(self, model: ModelFiles) -> Specs:
        """Return what the headers of a checkpoint say; raises what `read_specs` raises."""
        if model not in self._specs:
            specs = read_specs(model, self.storage, self.reading.key)
            if not specs.tensors:
                raise RefusedError(
                    f"{model.path} holds no tensors.", code=Code.NO_MODEL, path=model.path
                )
            self._specs[model] = specs
        return self._specs[model]
