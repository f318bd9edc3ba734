"""Where checkpoints are kept, by the scheme of a path or URI."""

from ckpt_ema.storage.local import Local
from ckpt_ema.storage.protocol import Location, Storage
from ckpt_ema.storage.uri import scheme_of

__all__ = ["STORAGES", "Location", "Storage", "storage_for"]

# By scheme; "" is a path on a local file system. Others are added with the first URI.
STORAGES: dict[str, Storage] = {"": Local()}


def storage_for(location: Location) -> Storage:
    """Return the storage that a path or URI names."""
    scheme = scheme_of(location)
    if not scheme:
        return STORAGES[""]
    from ckpt_ema.storage.remote import Remote  # which few runs need

    storage = STORAGES.get(scheme) or Remote(scheme)
    assert isinstance(storage, Remote)
    STORAGES[scheme] = storage
    storage.give(location)
    return storage
