"""The containers that can be read; one more is one more module and one more entry here.

A container is a module with the two functions of the protocol `Container`.
"""

from typing import Protocol

from ckpt_ema.containers import dcp, safetensors, shards, torch_file
from ckpt_ema.containers.specs import Specs
from ckpt_ema.storage.protocol import Storage


class Container(Protocol):
    """A way of storing tensors in files, entered by one of them."""

    def claims(self, name: str) -> bool:
        """Return whether a file of this name is read here."""

    def read_specs(self, path: str, storage: Storage, key: str | None = None) -> Specs:
        """Return the tensors of the model that is entered by the file at `path`, from headers.

        `key` is where the model is in a file of several dicts. Names of files in the result are
        paths. Raises `IncompleteError` for what is missing or cut short, `RefusedError` for what
        breaks its format; and touches files only through `storage`.
        """


# The first to claim a name reads it; torch_file claims all that are left.
CONTAINERS: tuple[Container, ...] = (dcp, shards, safetensors, torch_file)


def container_of(name: str) -> Container:
    """Return the container that reads a file of this name."""
    return next(container for container in CONTAINERS if container.claims(name))
