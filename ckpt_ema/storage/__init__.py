"""Where checkpoints are kept, by the scheme of a path or URI."""

from ckpt_ema.storage.local import Local
from ckpt_ema.storage.protocol import Location, Storage

__all__ = ["STORAGES", "Location", "Storage", "storage_for"]

# By scheme; "" is a path on a local file system.
STORAGES: dict[str, Storage] = {"": Local()}


def storage_for(_location: Location) -> Storage:
    """Return the storage that a path or URI names."""
    return STORAGES[""]
