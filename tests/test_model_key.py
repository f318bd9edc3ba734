"""Which dict of tensors is the model: raw before averaged, a refusal before a guess."""

from collections.abc import Mapping
from typing import Any

import pytest

from ckpt_ema.containers.model_key import Model, find_model, recorded
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.options import Reading
from ckpt_ema.trainers.conventions import MODEL_KEYS


class Tensor:
    """Stands for a tensor: only its kind is looked at."""


def state(*names: str) -> dict[str, Tensor]:
    return {name: Tensor() for name in names or ("w", "b")}


def find(root: Any, key: str | None = None) -> Model:
    return find_model("FILE", root, Reading(key=key), Tensor)


def nested(key: str, value: Any) -> dict[str, Any]:
    """`value` under a dotted path."""
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize("key", MODEL_KEYS)
def test_the_model_is_found_under_each_known_key(key: str) -> None:
    model = state()
    root = {**nested(key, model), "optimizer": {"state": state()}, "epoch": 3}
    assert find(root) == Model(model)


def test_the_model_may_be_at_the_top_beside_plain_values() -> None:
    root = {**state(), "version": 2}
    assert find(root).values == root


@pytest.mark.parametrize(
    ("raw", "average"),
    [
        ("state_dict", "state_dict_ema"),
        ("model", "model_avg"),
        ("model", "ema"),
        ("model", "model_ema"),
    ],
)
def test_the_raw_model_is_taken_where_both_are_there_and_it_is_noted(
    raw: str, average: str
) -> None:
    model = state()
    found = find({raw: model, average: state()})
    assert found.values is model
    [note] = found.notes
    assert note.code is Code.DECIDED
    assert f"{average} holds an average" in note.message
    assert not found.warnings


def test_lightning_puts_the_raw_weights_elsewhere() -> None:
    raw = state()
    found = find({"state_dict": state(), "current_model_state": raw, "averaging_state": {}})
    assert found.values is raw
    assert "current_model_state" in found.notes[0].message


def test_mmengine_swaps_them_and_names_the_raw_ones_by_a_wrapper() -> None:
    raw = state("module.w", "module.b", "steps")
    found = find({"state_dict": state(), "ema_state_dict": raw, "message_hub": {}})
    assert found.values == {"w": raw["module.w"], "b": raw["module.b"]}
    with pytest.raises(RefusedError) as caught:
        find({"state_dict": state(), "ema_state_dict": raw})
    assert caught.value.code is Code.SEVERAL_MODELS
    assert "--key state_dict or --key ema_state_dict" in caught.value.hint


@pytest.mark.parametrize(
    ("root", "key"),
    [
        ({"ema": state()}, None),
        ({"model": state(), "ema": state()}, "ema"),
        ({"state_dict": state(), "current_model_state": state()}, "state_dict"),
        ({**state("module.w", "module.b"), "n_averaged": Tensor()}, None),
    ],
)
def test_an_average_is_averaged_with_a_warning(root: Mapping[str, Any], key: str | None) -> None:
    [warning] = find(root, key).warnings
    assert warning.code is Code.ALREADY_AVERAGED


class Namespace:
    """Stands for the options of OpenNMT-py, as a pickle that is not run leaves them."""

    name = "argparse.Namespace"


def test_opennmt_has_its_output_layer_beside_the_model() -> None:
    root = {"model": state("encoder.w"), "generator": state("w"), "opt": Namespace(), "vocab": {}}
    assert set(find(root).values) == {"encoder.w", "generator.w"}


@pytest.mark.parametrize(
    "more", [{"opt": None}, {"opt": {"param_groups": []}}, {"opt": Namespace()}, {"vocab": {}}]
)
def test_a_generator_of_any_other_trainer_is_not_merged(more: Mapping[str, Any]) -> None:
    with pytest.raises(RefusedError) as caught:
        find({"model": state(), "generator": state(), **more})
    assert caught.value.code is Code.SEVERAL_MODELS
    assert "--key model,generator" in caught.value.hint


def test_a_single_dict_of_tensors_under_any_key_is_the_model_and_noted() -> None:
    found = find({"weights": state(), "optim": state(), "step": 3})
    assert set(found.values) == {"w", "b"}
    assert [note.code for note in found.notes] == [Code.DECIDED]


@pytest.mark.parametrize(
    ("root", "code"),
    [
        ({"generator": state(), "critic": state("w")}, Code.SEVERAL_MODELS),
        ({"model": state(), "state_dict": state()}, Code.SEVERAL_MODELS),
        *(({"epoch": 3}, Code.NO_MODEL), ([Tensor()], Code.NO_MODEL), ({}, Code.NO_MODEL)),
        *(({"optimizer": state()}, Code.NO_MODEL), ({"\ud800": Tensor()}, Code.NO_MODEL)),
        *(({1: Tensor()}, Code.NO_MODEL), (Tensor(), Code.NO_MODEL)),
    ],
)
def test_nothing_and_several_are_refused(root: Any, code: Code) -> None:
    with pytest.raises(RefusedError) as caught:
        find(root)
    assert (caught.value.code, caught.value.path) == (code, "FILE")


def test_a_key_is_a_path_and_may_have_dots_of_its_own() -> None:
    model = state()
    assert find({"a": {"b": model}, "c": state()}, "a.b").values is model
    assert find({"a.b": model, "c": state()}, "a.b").values is model
    with pytest.raises(RefusedError, match=r"it has c \(2 entries\)") as caught:
        find({"a": {"y": 1}, "c": state()}, "a.x")
    assert caught.value.code is Code.NO_MODEL


def test_the_step_and_epoch_that_a_file_records() -> None:
    assert recorded({"global_step": 7, "epoch": 2}) == {"step": 7, "epoch": 2}
    assert recorded({"meta": {"iter": 90, "epoch": 3}}) == {"step": 90, "epoch": 3}
    assert recorded({"optimizer_history": [{"num_updates": 5}, {"num_updates": 40}]}) == {
        "step": 40
    }
    assert recorded({"iteration": 4999}) == {"step": 4999}
    assert recorded({"global_step": True, "epoch": 2.0}) == {}
    assert recorded([1]) == {}
