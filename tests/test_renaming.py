"""Names that differ by a wrapper or an alias only are brought together; nothing else is."""

import pytest

from ckpt_ema.containers.specs import Specs, TensorSpec
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.planning.renaming import unified, without_prefix


def specs(**places: int) -> Specs:
    """Tensors by name (`__` for a dot) and where each lies."""
    tensors = {n.replace("__", "."): TensorSpec("F32", (2,), 0, at) for n, at in places.items()}
    return Specs(tensors, (), ())


def names(found: Specs) -> dict[str, int]:
    return {name: tensor.offset for name, tensor in found.tensors.items()}


def test_a_wrapper_around_some_checkpoints_is_removed_with_a_warning() -> None:
    runs = [specs(_orig_mod__module__w=0, _orig_mod__module__b=8), specs(w=0, b=8)]
    found, _, [warning] = unified(["a", "b"], runs)
    assert [names(one) for one in found] == [{"w": 0, "b": 8}] * 2
    assert warning.code is Code.DIFFERENT_NAMES
    assert "_orig_mod.module." in warning.message


def test_the_newest_names_are_kept_when_it_is_the_newest_that_is_wrapped() -> None:
    found, _, warnings = unified(["a", "b"], [specs(w=0), specs(module__w=0)])
    assert [names(one) for one in found] == [{"module.w": 0}] * 2
    assert len(warnings) == 1


def test_a_wrapper_around_some_tensors_is_removed_too() -> None:
    """FSDP wraps the blocks of a model, each by itself."""
    older = specs(w=0, layers__0___fsdp_wrapped_module___checkpoint_wrapped_module__w=8)
    found, _, [warning] = unified(["a", "b"], [older, specs(w=0, layers__0__w=8)])
    assert [names(one) for one in found] == [{"w": 0, "layers.0.w": 8}] * 2
    assert "_fsdp_wrapped_module._checkpoint_wrapped_module." in warning.message


def test_a_word_of_the_models_own_stays() -> None:
    """A conformer has feed_forward_module; a list of experts may be called module."""
    own = {"encoder__feed_forward_module__w": 0, "moe__module__w": 8}
    found, _, [warning] = unified(
        ["a", "b"], [specs(**{f"module__{n}": at for n, at in own.items()}), specs(**own)]
    )
    assert [names(one) for one in found] == [names(specs(**own))] * 2
    assert "module.," in warning.message


def test_a_prefix_that_all_have_stays() -> None:
    found, _, warnings = unified(["a", "b"], [specs(module__w=0), specs(module__w=4)])
    assert [names(one) for one in found] == [{"module.w": 0}, {"module.w": 4}]
    assert not warnings


def test_the_second_name_of_a_tied_tensor_is_dropped_or_added() -> None:
    tied, single = specs(emb=0, head=0, w=8), specs(emb=0, w=8)
    [one, _], [match, _], _ = unified(["a", "b"], [tied, single])
    assert (names(one), match.dropped) == ({"emb": 0, "w": 8}, {"head": "emb"})
    [one, _], [match, _], _ = unified(["a", "b"], [single, tied])
    assert (names(one), match.added) == ({"emb": 0, "head": 0, "w": 8}, {"head": "emb"})


@pytest.mark.parametrize(
    "older",
    [specs(emb=0, head=16, w=8), specs(w=8), specs(emb=0, v=8), specs(emb=0, w=8, module__w=16)],
    ids=["not tied", "missing", "renamed", "with and without a wrapper"],
)
def test_other_differences_are_left_for_the_comparison(older: Specs) -> None:
    [found, _], [match, _], warnings = unified(["a", "b"], [older, specs(emb=0, w=8)])
    assert found.tensors is older.tensors
    assert not (warnings or match.dropped or match.added)


def test_a_prefix_is_stripped_where_it_is() -> None:
    """A run that was resumed without torch.compile has it in some checkpoints only."""
    stripped = without_prefix([specs(w=0, loss__w=8), specs(model__w=0, loss__w=8)], "model.")
    assert [names(one) for one in stripped] == [{"w": 0, "loss.w": 8}] * 2
    for checkpoints in ([specs(w=0), specs(w=4)], [specs(model__w=0, w=8)], [specs(model__=0)]):
        with pytest.raises(RefusedError) as caught:
            without_prefix(checkpoints, "model.")
        assert caught.value.code is Code.DIFFERENT_NAMES


@pytest.mark.parametrize(
    ("prefix", "names_before", "names_after"),
    [
        ("model.", ["model.encoder.model.w", "loss.model.w"], ["encoder.model.w", "loss.model.w"]),
        ("_orig_mod.", ["_orig_mod.a", "b._orig_mod.c"], ["a", "b.c"]),
        ("_orig_mod", ["b._orig_mod.c"], ["b.c"]),
        ("default.", ["lora_A.default.weight"], ["lora_A.weight"]),
        ("_orig_mod.,module.", ["module._orig_mod.module.w"], ["module.w"]),
        ("lora_unet_", ["lora_unet_a.lora_unet_b"], ["a.lora_unet_b"]),
        ("ad.", ["head.ad.w"], ["head.w"]),
    ],
)
def test_a_prefix_is_stripped_inside_names_unless_it_begins_some(
    prefix: str, names_before: list[str], names_after: list[str]
) -> None:
    """A wrapper's word is never the model's own, so it goes wherever it is."""
    before = specs(**{name.replace(".", "__"): at for at, name in enumerate(names_before)})
    [after] = without_prefix([before], prefix)
    assert [*names(after)] == names_after
