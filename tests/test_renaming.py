"""Names that differ by a wrapper or an alias only are brought together; nothing else is."""

import pytest

from ckpt_ema.containers.specs import Specs, TensorSpec
from ckpt_ema.errors import RefusedError
from ckpt_ema.planning.renaming import unified, without_prefix


def specs(**places: int) -> Specs:
    """Tensors by name (`__` for a dot) and where each lies."""
    tensors = {n.replace("__", "."): TensorSpec("F32", (2,), 0, at) for n, at in places.items()}
    return Specs(tensors, (), ())


def names(found: Specs) -> dict[str, int]:
    return {name: tensor.offset for name, tensor in found.tensors.items()}


def test_a_wrapper_around_some_checkpoints_is_taken_off_and_said() -> None:
    runs = [specs(_orig_mod__module__w=0, _orig_mod__module__b=8), specs(w=0, b=8)]
    found, [warning] = unified(["a", "b"], runs)
    assert [names(one) for one in found] == [{"w": 0, "b": 8}] * 2
    assert "but for _orig_mod.module., which a wrapper adds" in warning


def test_the_newest_names_are_kept_when_it_is_the_newest_that_is_wrapped() -> None:
    found, warnings = unified(["a", "b"], [specs(w=0), specs(module__w=0)])
    assert [names(one) for one in found] == [{"module.w": 0}] * 2
    assert len(warnings) == 1


def test_a_prefix_that_all_have_stays() -> None:
    found, warnings = unified(["a", "b"], [specs(module__w=0), specs(module__w=4)])
    assert [names(one) for one in found] == [{"module.w": 0}, {"module.w": 4}]
    assert not warnings


def test_the_second_name_of_a_tied_tensor_is_dropped_or_added() -> None:
    tied, single = specs(emb=0, head=0, w=8), specs(emb=0, w=8)
    assert names(unified(["a", "b"], [tied, single])[0][0]) == {"emb": 0, "w": 8}
    assert names(unified(["a", "b"], [single, tied])[0][0]) == {"emb": 0, "head": 0, "w": 8}


@pytest.mark.parametrize(
    "older",
    [specs(emb=0, head=16, w=8), specs(w=8), specs(emb=0, v=8), specs(module__emb=0, w=8)],
    ids=["not tied", "missing", "renamed", "partly wrapped"],
)
def test_other_differences_are_left_for_the_comparison(older: Specs) -> None:
    found, warnings = unified(["a", "b"], [older, specs(emb=0, w=8)])
    assert found[0].tensors is older.tensors
    assert not warnings


def test_a_prefix_is_stripped_where_it_is() -> None:
    """A run that was resumed without torch.compile has it in some checkpoints only."""
    stripped = without_prefix([specs(w=0, loss__w=8), specs(model__w=0, loss__w=8)], "model.")
    assert [names(one) for one in stripped] == [{"w": 0, "loss.w": 8}] * 2
    with pytest.raises(RefusedError, match=r"no tensor begins with it; they are called w\."):
        without_prefix([specs(w=0), specs(w=4)], "model.")
    with pytest.raises(RefusedError, match="two tensors would come out with one name"):
        without_prefix([specs(model__w=0, w=8)], "model.")
