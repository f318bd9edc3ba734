"""Whether two checkpoints hold the same tensors, byte for byte; reading ends at a difference.

Files of one state need not be equal: torch.save writes the name of its file into each.
"""

import os
from collections.abc import Iterator

from ckpt_ema.errors import CkptEmaError
from ckpt_ema.files import open_regular, read_exactly
from ckpt_ema.formats.specs import DTYPE_BITS, Specs, TensorSpec, Weights, spanned

_CHUNK_BYTES = 1 << 20

_Range = tuple[int, int, int]  # file, offset, bytes


def hold_the_same(one: tuple[Weights, Specs], other: tuple[Weights, Specs]) -> bool:
    """Whether all tensors are equal in name, dtype, shape and bytes.

    A tensor that lies in pieces is compared where both have it in the same pieces, and counts as
    different otherwise; so does what cannot be read.
    """
    (weights, specs), (other_weights, other_specs) = one, other
    if specs.tensors.keys() != other_specs.tensors.keys():
        return False
    try:
        for name, tensor in specs.tensors.items():
            twin = other_specs.tensors[name]
            if (tensor.dtype, tensor.shape) != (twin.dtype, twin.shape):
                return False
            ranges, twins = list(_ranges(tensor)), list(_ranges(twin))
            if [part[2] for part in ranges] != [part[2] for part in twins]:
                return False
            for mine, theirs in zip(ranges, twins, strict=True):
                if not _equal(weights, specs, mine, other_weights, other_specs, theirs):
                    return False
    except CkptEmaError:
        return False
    return True


def _ranges(tensor: TensorSpec) -> Iterator[_Range]:
    """Where a tensor's bytes are, gaps included."""
    width = DTYPE_BITS[tensor.dtype] // 8
    if not tensor.pieces:
        yield tensor.file, tensor.offset, tensor.size_bytes
    for piece in tensor.pieces:
        yield piece.file, piece.offset, spanned(piece.sizes, piece.strides) * width


def _equal(
    weights: Weights,
    specs: Specs,
    mine: _Range,
    others: Weights,
    other_specs: Specs,
    theirs: _Range,
) -> bool:
    path = os.path.join(weights.folder, specs.files[mine[0]].name)
    other_path = os.path.join(others.folder, other_specs.files[theirs[0]].name)
    with open_regular(path) as file, open_regular(other_path) as other:
        for start in range(0, mine[2], _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, mine[2] - start)
            here = read_exactly(path, file.fd, count, mine[1] + start)
            if here != read_exactly(other_path, other.fd, count, theirs[1] + start):
                return False
    return True
