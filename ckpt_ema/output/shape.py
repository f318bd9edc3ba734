"""Whether JSON that anybody may have changed has the values that are used of it."""

from collections.abc import Mapping
from typing import Any

TEXT, NUMBER, COUNT = (str,), (int, float), (int,)


def fits(value: Any, shape: Any) -> bool:
    """Return whether a value is of some types, or has what a list or a mapping asks for.

    A list has one shape, that of every item. A mapping has the shapes of the keys that must be
    there, or that of every value under `...`.

    >>> shape = {"name": (str,), "sizes": [(int,)], "losses": {...: (int, float)}}
    >>> fits({"name": "a", "sizes": [1, 2], "losses": {"x": 0.5}, "more": None}, shape)
    True
    >>> fits({"name": "a", "sizes": [1, "2"], "losses": {}}, shape)
    False
    """
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(one, shape[0]) for one in value)
    if not isinstance(shape, Mapping):
        return isinstance(value, shape)
    if not isinstance(value, Mapping):
        return False
    if ... in shape:
        return all(fits(one, shape[...]) for one in value.values())
    return shape.keys() <= value.keys() and all(fits(value[key], shape[key]) for key in shape)
