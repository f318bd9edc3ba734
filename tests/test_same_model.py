"""Whether checkpoints are states of one model, and what becomes of each of its tensors."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import ckpt_ema
from ckpt_ema.containers.specs import Role, Specs, TensorSpec
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.planning.roles import RULES, Reason, TensorRole, judge
from tests.conftest import MakeRun, noise, series, write_safetensors

FLOAT = TensorSpec("F32", (2,), 0, 0)


def specs(**tensors: TensorSpec) -> Specs:
    """Specs of tensors by name; `__` stands for a dot."""
    return Specs({name.replace("__", "."): spec for name, spec in tensors.items()}, (), ())


class Known(NamedTuple):
    """Contents of which a test decides."""

    changing: Collection[str] = ()
    binary: Collection[str] = ()

    def changes(self, key: str) -> bool:
        """See `Contents.changes`."""
        return key in self.changing

    def is_binary(self, key: str) -> bool:
        """See `Contents.is_binary`."""
        return key in self.binary

    def is_whole_number(self, _key: str) -> bool:
        """See `Contents.is_whole_number`."""
        return True


NOTHING = Known()


def roles(newest: Specs, *others: Specs, contents: Known = NOTHING) -> dict[str, Role]:
    """The role of each tensor."""
    layouts = [one.tensors for one in (*others, newest)]
    rulings = judge(newest, layouts, "newest", contents)
    return {name: one.rule.role for name, one in rulings.items()}


@pytest.mark.parametrize(
    ("dtype", "role"),
    [
        *[(dtype, Role.AVERAGED) for dtype in ("F64", "F32", "F16", "BF16", "C64", "C128", "C32")],
        *[(dtype, Role.KEPT) for dtype in ("I64", "U8", "BOOL", "F8_E4M3")],
    ],
)
def test_floats_are_averaged_and_other_tensors_keep_their_newest_value(
    dtype: str, role: Role
) -> None:
    assert roles(specs(w=FLOAT, x=TensorSpec(dtype, (2,), 0, 8)))["x"] is role


def test_a_second_name_of_the_same_bytes_is_tied_if_it_is_so_in_every_checkpoint() -> None:
    tied, untied = specs(emb=FLOAT, head=FLOAT), specs(emb=FLOAT, head=FLOAT._replace(offset=8))
    assert roles(tied, tied) == {"emb": Role.AVERAGED, "head": Role.TIED}
    assert roles(tied, untied) == {"emb": Role.AVERAGED, "head": Role.AVERAGED}
    kept = specs(w=FLOAT, n=FLOAT._replace(dtype="I64"), m=FLOAT._replace(dtype="I64"))
    assert judge(kept, [kept.tensors], "newest", Known())["m"].made is Role.KEPT


@pytest.mark.parametrize(
    ("newest", "contents", "code", "tensor"),
    [
        (
            specs(w=FLOAT, q__qweight=TensorSpec("I32", (2, 2), 0, 8)),
            Known(changing=["q.qweight"]),
            Code.NOT_AVERAGEABLE,
            "q.qweight",
        ),
        (
            specs(w=TensorSpec("U8", (2, 1), 0, 8), w__absmax=FLOAT),
            Known(changing=["w.absmax"]),
            Code.NOT_AVERAGEABLE,
            "w",
        ),
        (
            specs(v=FLOAT, w=FLOAT._replace(offset=8), x=FLOAT._replace(shape=(0,))),
            Known(),
            Code.EMPTIED,
            "x",
        ),
        (specs(n=FLOAT._replace(dtype="I64")), Known(), Code.NOT_AVERAGEABLE, None),
    ],
    ids=["codes", "scales of codes", "placeholders", "integers"],
)
def test_tensors_that_rule_the_average_out(
    newest: Specs, contents: Known, code: Code, tensor: str | None
) -> None:
    with pytest.raises(RefusedError) as caught:
        judge(newest, [newest.tensors], "newest", contents)
    assert (caught.value.code, caught.value.tensor) == (code, tensor)


def test_roles_are_told_by_pattern(make_run: MakeRun) -> None:
    layers = {f"layers.{n}.w": noise(2, 3) for n in range(12)}
    run = make_run(series(2, **layers, step=[torch.tensor(n) for n in range(2)]))
    assert ckpt_ema.plan(run).tensor_roles == (
        TensorRole("layers.*.w", Role.AVERAGED, "float", Reason.FLOAT, 12),
        TensorRole("step", Role.KEPT, "not-float", Reason.NOT_FLOAT, 1),
    )


def test_a_name_that_the_newest_lacks_is_dropped(tmp_path: Path) -> None:
    for step, names in ((1, ("emb", "head")), (2, ("emb",))):
        shared = torch.full((3,), float(step))
        torch.save(dict.fromkeys(names, shared), tmp_path / f"step_{step}.pt")
    found = ckpt_ema.plan(tmp_path, output=tmp_path.parent / "out").tensor_roles
    assert {one.pattern: one.role for one in found} == {
        "emb": Role.AVERAGED,
        "head": Role.DROPPED,
    }


def test_rules_have_names_and_the_last_takes_every_tensor() -> None:
    assert len({rule.name for rule, _ in RULES}) == len(RULES)
    assert RULES[-1][0].role is Role.AVERAGED


@pytest.mark.parametrize(
    ("change", "code", "tensor"),
    [
        ({"w": torch.zeros(4), "extra": torch.zeros(1)}, Code.DIFFERENT_MODELS, "extra"),
        ({}, Code.DIFFERENT_MODELS, "w"),
        ({"w": torch.zeros(1)}, Code.DIFFERENT_MODELS, "w"),
        ({"w": torch.zeros(4).long()}, Code.DIFFERENT_DTYPES, "w"),
    ],
    ids=["added", "missing", "shape", "kind"],
)
def test_checkpoints_that_differ_are_refused_before_anything_is_read(
    make_run: MakeRun, change: dict[str, torch.Tensor], code: Code, tensor: str
) -> None:
    states: list[Any] = series(3, w=noise(3, 4), v=noise(3, 2))
    states[1] = {"v": states[1]["v"], **change}
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(make_run(states))
    assert (caught.value.code, caught.value.tensor) == (code, tensor)


def test_another_dtype_is_a_warning(make_run: MakeRun) -> None:
    states: list[Any] = series(2, w=noise(2, 4))
    states[0] = {"w": states[0]["w"].half()}
    plan = ckpt_ema.plan(make_run(states))
    assert [notice.code for notice in plan.warnings] == [Code.DIFFERENT_DTYPES]


@pytest.mark.parametrize(
    ("file", "change", "code"),
    [
        ("config.json", {"architectures": ["Other"]}, Code.DIFFERENT_CONFIGS),
        ("config.json", {"transformers_version": "5"}, None),
        ("adapter_config.json", {"base_model_name_or_path": "b"}, Code.DIFFERENT_CONFIGS),
        ("adapter_config.json", {"target_modules": ["v", "q"]}, None),
    ],
)
def test_configurations_that_differ_are_a_warning(
    make_run: MakeRun, file: str, change: dict[str, Any], code: Code | None
) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    fields = {"architectures": ["Tiny"], "r": 8, "target_modules": ["q", "v"]}
    for step, changed in ((1, change), (2, {})):
        (run / f"checkpoint-{step}" / file).write_text(json.dumps({**fields, **changed}))
    plan = ckpt_ema.plan(run)
    assert [notice.code for notice in plan.warnings] == [code] * (code is not None)


def test_adapters_of_different_ranks_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(2, w=noise(2, 4)))
    kohya = tmp_path / "kohya"
    kohya.mkdir()
    for step, rank in ((1, 16), (2, 8)):
        (run / f"checkpoint-{step}/adapter_config.json").write_text(json.dumps({"r": rank}))
        write_safetensors(
            kohya / f"lora-{step:06}.safetensors",
            {"w": torch.ones(2) * step},
            {"ss_network_dim": str(rank)},
        )
    for path in (run, kohya):
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.plan(path)
        assert caught.value.code is Code.DIFFERENT_CONFIGS
        assert "16 → 8" in caught.value.message
