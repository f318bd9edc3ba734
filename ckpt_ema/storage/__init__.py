"""Where checkpoints are kept, by the scheme of a path or URI."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ckpt_ema.storage.local import Local
from ckpt_ema.storage.protocol import Location, Storage
from ckpt_ema.storage.uri import scheme_of

if TYPE_CHECKING:
    from ckpt_ema.storage.remote import Remote

__all__ = ["STORAGES", "Location", "Storage", "storage_for", "storages_anew"]

# By scheme; "" is a path on a local file system. A scheme is added with its first URI.
STORAGES: dict[str, Storage] = {"": Local()}


def storages_anew(locations: Iterable[Location]) -> list[Storage]:
    """Return the storages of a job's inputs; remote ones are listed anew."""
    paths = list(locations)
    for scheme in {scheme_of(path) for path in paths} - {""}:
        if scheme in STORAGES:
            STORAGES[scheme] = _remote(scheme).anew()
    return [storage_for(path) for path in paths]


def storage_for(location: Location) -> Storage:
    """Return the storage that a path or URI names."""
    scheme = scheme_of(location)
    if not scheme:
        return STORAGES[""]
    storage = _remote(scheme)
    storage.add_root(location)
    return storage


def _remote(scheme: str) -> "Remote":
    """Return the storage of all URIs with a scheme."""
    from ckpt_ema.storage.remote import Remote  # few runs need it

    storage = STORAGES.setdefault(scheme, Remote(scheme))
    assert isinstance(storage, Remote)
    return storage
