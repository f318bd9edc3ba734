"""Whether two checkpoints hold the same tensors, byte for byte; reading ends at a difference.

Files of one state need not be equal: torch.save writes the name of its file into each.
"""

import os
from collections.abc import Iterator

from ckpt_ema.containers.specs import DTYPE_BITS, ModelFiles, Specs, TensorSpec, spanned
from ckpt_ema.errors import CkptEmaError, RefusedError, printable
from ckpt_ema.storage.protocol import FilePool, Identity, Storage

_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 12

_Range = tuple[int, int, int]  # file, offset, bytes


def hold_the_same(
    one: tuple[ModelFiles, Specs], other: tuple[ModelFiles, Specs], storage: Storage
) -> bool:
    """Whether all tensors are equal in name, dtype, shape and bytes.

    The first bytes of every tensor are compared before the rest of any, so that two states of one
    run differ soon, frozen tensors or not. A tensor that lies in pieces is compared where both have
    it in the same pieces, and counts as different otherwise; so does what cannot be read.
    """
    (model, specs), (other_model, other_specs) = one, other
    if specs.tensors.keys() != other_specs.tensors.keys():
        return False
    pairs: list[tuple[_Range, _Range]] = []
    for name, tensor in specs.tensors.items():
        twin = other_specs.tensors[name]
        ranges, twins = list(_ranges(tensor)), list(_ranges(twin))
        if (tensor.dtype, tensor.shape) != (twin.dtype, twin.shape):
            return False
        if [part[2] for part in ranges] != [part[2] for part in twins]:
            return False
        pairs += zip(ranges, twins, strict=True)
    paths, other_paths = _paths(model, specs), _paths(other_model, other_specs)
    pool = storage.pool({**paths, **other_paths})
    mine_at, theirs_at = list(paths), list(other_paths)
    try:
        return all(
            _equal(pool, mine_at[mine[0]], mine, theirs_at[theirs[0]], theirs, most)
            for most in (_HEAD_BYTES, None)
            for mine, theirs in pairs
        )
    except CkptEmaError:
        return False
    finally:
        pool.close()


def same_values(earlier: str, later: str) -> RefusedError:
    """The refusal of two steps that hold one state."""
    return RefusedError(
        f"{printable(earlier)} and {printable(later)} hold the same weights; one of them is"
        " mislabelled, and averaging would count it twice.",
        "Leave one out, or pass --allow-duplicates to go on.",
    )


def _paths(model: ModelFiles, specs: Specs) -> dict[str, Identity]:
    """The files of a checkpoint, in their order, and what each was when its header was read."""
    return {
        os.path.join(model.folder, file.name): Identity(file.size_bytes, file.mtime_ns)
        for file in specs.files
    }


def _ranges(tensor: TensorSpec) -> Iterator[_Range]:
    """Where a tensor's bytes are, gaps included."""
    width = DTYPE_BITS[tensor.dtype] // 8
    if not tensor.pieces:
        yield tensor.file, tensor.offset, tensor.size_bytes
    for piece in tensor.pieces:
        yield piece.file, piece.offset, spanned(piece.sizes, piece.strides) * width


def _equal(
    pool: FilePool, path: str, mine: _Range, other_path: str, theirs: _Range, most: int | None
) -> bool:
    """Whether two ranges hold the same bytes, or the first `most` of them."""
    total = mine[2] if most is None else min(most, mine[2])
    here, there = (memoryview(bytearray(min(_CHUNK_BYTES, total))) for _ in range(2))
    for start in range(0, total, _CHUNK_BYTES):
        count = min(_CHUNK_BYTES, total - start)
        pool.read_into(path, here[:count], mine[1] + start)
        pool.read_into(other_path, there[:count], theirs[1] + start)
        if here[:count] != there[:count]:
            return False
    return True
