"""What becomes of each tensor, and why: one role for each, from one ordered table of rules."""

from dataclasses import dataclass
from enum import Enum

from ckpt_ema.containers.specs import Role


class Reason(Enum):
    """Why a tensor has its role; the values are stable and shown to people."""

    FLOAT = "floating point"
    NOT_FLOAT = "not floating point"
    SHARED_BYTES = "another name of the same bytes"
    QUANTISED = "codes or scales of a quantised weight"
    EMPTY = "an emptied placeholder of ZeRO-3"
    NOT_IN_NEWEST = "not a name of the newest checkpoint"


@dataclass(frozen=True, slots=True)
class TensorRole:
    """The role that all tensors of one pattern share; for `plan --explain`."""

    pattern: str  # names with their numbers left open: model.layers.*.weight
    role: Role
    rule: str  # the name of the rule that decided
    reason: Reason
    count: int  # of tensors
