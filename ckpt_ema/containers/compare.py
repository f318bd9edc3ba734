"""Whether two checkpoints hold the same tensors; their files need not be equal for that."""

from contextlib import suppress

from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import ModelFiles, Specs, TensorSpec
from ckpt_ema.errors import CkptEmaError, Code, RefusedError
from ckpt_ema.storage.protocol import Storage

_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 12


def hold_the_same(
    one: tuple[ModelFiles, Specs], other: tuple[ModelFiles, Specs], storage: Storage
) -> bool:
    """Return whether all tensors are equal in name, dtype, shape and bytes.

    The heads of all tensors are compared before the rest of any, since frozen tensors may come
    first. Checkpoints that cannot be read count as different.
    """
    (model, specs), (other_model, other_specs) = one, other
    if specs.tensors.keys() != other_specs.tensors.keys():
        return False
    pairs = [(tensor, other_specs.tensors[name]) for name, tensor in specs.tensors.items()]
    if any((a.dtype, a.shape) != (b.dtype, b.shape) for a, b in pairs):
        return False
    opened = [(model.folder, specs), (other_model.folder, other_specs)]
    with suppress(CkptEmaError), Reader(storage, opened) as reader:
        heads = [(*pair, min(_HEAD_BYTES, pair[0].size_bytes)) for pair in pairs]
        wholes = [(*pair, pair[0].size_bytes) for pair in pairs]
        return all(_equal(reader, *each) for each in (*heads, *wholes))
    return False


def same_values(earlier: str, later: str) -> RefusedError:
    """Return the refusal of two steps that hold the same model."""
    return RefusedError(
        f"{earlier} and {later} hold the same model weights; one of them is mislabelled, and an"
        " average would count it twice.",
        "Leave one out, or pass --allow-duplicates.",
        code=Code.DUPLICATES,
    )


def _equal(reader: Reader, mine: TensorSpec, theirs: TensorSpec, size_bytes: int) -> bool:
    """Return whether two tensors start with the same `size_bytes` bytes."""
    here, there = (memoryview(bytearray(min(_CHUNK_BYTES, size_bytes))) for _ in range(2))
    for start in range(0, size_bytes, _CHUNK_BYTES):
        count = min(_CHUNK_BYTES, size_bytes - start)
        reader.read_into(0, mine, start, here[:count])
        reader.read_into(1, theirs, start, there[:count])
        if here[:count] != there[:count]:
            return False
    return True
