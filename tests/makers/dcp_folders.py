"""Folders of torch.distributed.checkpoint: saved by torch, and changed through its own classes."""

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

Change = Callable[[Metadata], object]


def save(folder: Path, content: Mapping[str, Any]) -> Path:
    """Save with torch, from this one process."""
    from torch.distributed.checkpoint import state_dict_saver

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is what is wanted
        state_dict_saver.save(dict(content), checkpoint_id=folder, no_dist=True)
    return folder


def loaded(folder: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model as torch loads it, into tensors like these."""
    from torch.distributed.checkpoint import state_dict_loader

    into = {"model": {name: torch.zeros_like(one) for name, one in like.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_loader.load(into, checkpoint_id=folder, no_dist=True)
    return into["model"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, by its full name, as torch loads it."""
    from torch.distributed.checkpoint import state_dict_loader

    found = metadata_of(folder).state_dict_metadata
    into = {
        name: torch.zeros(one.size, dtype=one.properties.dtype)
        for name, one in found.items()
        if isinstance(one, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_loader.load(into, checkpoint_id=folder, no_dist=True)
    return into


def metadata_of(folder: Path) -> Metadata:
    """The metadata as torch reads it; of our own checkpoints only."""
    content = pickle.loads((folder / ".metadata").read_bytes())
    assert isinstance(content, Metadata)
    return content


def edit(folder: Path, change: Change, protocol: int = 2) -> None:
    """Change the metadata and write it back."""
    metadata = metadata_of(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))


def splice(folder: Path, old: bytes, new: bytes) -> None:
    """Put other bytes in place of some of the metadata, which protocol 2 has no frames around."""
    content = (folder / ".metadata").read_bytes()
    assert old in content
    (folder / ".metadata").write_bytes(content.replace(old, new))


def w(metadata: Metadata) -> TensorStorageMetadata:
    """The entry of w."""
    entry = metadata.state_dict_metadata["model.w"]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def place(metadata: Metadata) -> Any:
    """Where w was saved."""
    return metadata.storage_data[MetadataIndex("model.w", [0, 0])]


def chunked(metadata: Metadata, shape: tuple[int, ...], *chunks: Any) -> None:
    """Announce w with this shape and these chunks, all of them where the real one is."""
    entry, info = w(metadata), place(metadata)
    entry.size = torch.Size(shape)
    entry.chunks = [ChunkStorageMetadata(torch.Size(a), torch.Size(n)) for a, n in chunks]
    for chunk in entry.chunks:
        metadata.storage_data[MetadataIndex("model.w", chunk.offsets)] = info
