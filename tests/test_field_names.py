"""People's own checkpoints: names that wrappers changed, tied heads, configurations, companions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.planning.plan import Plan
from tests.conftest import read_safetensors, write_safetensors

State = Mapping[str, torch.Tensor]


def full(value: float, *shape: int) -> torch.Tensor:
    """A tensor of one value."""
    return torch.full(shape or (2, 3), float(value))


def folders(
    run: Path, states: Sequence[State], file: str = "model.safetensors", **texts: Any
) -> Path:
    """Write folders checkpoint-100, ...; `texts` are JSON files, by stem, for all of them."""
    for number, state in enumerate(states, start=1):
        folder = run / f"checkpoint-{number}00"
        folder.mkdir(parents=True)
        if file.endswith(".safetensors"):
            write_safetensors(folder / file, state)
        else:
            torch.save(dict(state), folder / file)
        for stem, content in texts.items():
            (folder / f"{stem}.json").write_text(json.dumps(content))
    return run


def mean(run: Path, **options: Any) -> dict[str, float]:
    """The first element of every tensor of the uniform average."""
    result = ckpt_ema.average(run, schedule="uniform", device="cpu", **options)
    files = sorted(result.output.rglob("*.safetensors"))
    return {
        name: t.flatten()[0].item() for file in files for name, t in read_safetensors(file).items()
    }


def warned(plan: Plan, code: Code) -> list[str]:
    """The warnings of one code."""
    return [str(warning) for warning in plan.warnings if warning.code is code]


def refusal(run: Path, **options: Any) -> RefusedError:
    """The error of a run that is refused before anything is read."""
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.plan(run, **options)
    return caught.value


# --- F: words of wrappers inside names -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "word", "plain"),
    [
        ("base_model.model._orig_mod.model.q.lora_A.weight", "_orig_mod.", None),
        ("model._fsdp_wrapped_module.layers.0.w", "_fsdp_wrapped_module.", None),
        ("layers.0._checkpoint_wrapped_module.mlp.w", "_checkpoint_wrapped_module.", None),
        ("_forward_module.layers.0.w", "_forward_module.", None),
        ("lora_unet__orig_mod_down.lora_up.weight", "_orig_mod_", "lora_unet_down.lora_up.weight"),
    ],
)
def test_a_wrappers_word_in_the_output_is_warned_of_and_taken_out_on_request(
    tmp_path: Path, name: str, word: str, plain: str | None
) -> None:
    run = folders(tmp_path / "run", [{name: full(n)} for n in (1, 2, 3)], config={})
    [warning] = warned(ckpt_ema.plan(run), Code.DIFFERENT_NAMES)
    assert f"--strip-prefix {word} removes" in warning
    assert mean(run, output=tmp_path / "as-it-is") == {name: 2}
    assert mean(run, output=tmp_path / "out", strip_prefix=word) == {
        plain or name.replace(word, ""): 2
    }


def test_several_words_are_named_and_removed_together(tmp_path: Path) -> None:
    names = ("_orig_mod.norm.w", "_orig_mod.layers.0._checkpoint_wrapped_module.w")
    run = folders(tmp_path / "run", [dict.fromkeys(names, full(n)) for n in (1, 3)], config={})
    [warning] = warned(ckpt_ema.plan(run), Code.DIFFERENT_NAMES)
    words = "_orig_mod.,_checkpoint_wrapped_module."
    assert f"--strip-prefix {words}" in warning
    assert mean(run, strip_prefix=words) == {"norm.w": 2, "layers.0.w": 2}


@pytest.mark.parametrize(
    ("older", "newest"),
    [
        ("model._orig_mod.layers.0.w", "model.layers.0.w"),
        ("model.layers.0.w", "model._fsdp_wrapped_module.layers.0._orig_mod.w"),
        ("encoder.module.w", "encoder.w"),
        ("module._orig_mod.w", "_orig_mod.module.w"),
    ],
)
def test_a_run_that_was_resumed_in_another_wrapper_is_one_model(
    tmp_path: Path, older: str, newest: str
) -> None:
    names = (older, older, newest)
    states = [{name: full(n), "head": full(n)} for n, name in enumerate(names, start=1)]
    run = folders(tmp_path / "run", states, "pytorch_model.bin", config={})
    assert any("checkpoint-100" in w for w in warned(ckpt_ema.plan(run), Code.DIFFERENT_NAMES))
    assert mean(run) == {newest: 2, "head": 2}


def test_names_of_the_models_own_and_of_ordinary_runs_are_not_warned_of(tmp_path: Path) -> None:
    """That of DistributedDataParallel, a conformer's, and what nanoGPT removes itself."""
    own = folders(
        tmp_path / "own",
        [
            {"module.feed_forward_module.w": full(n), "module.original_module.w": full(n)}
            for n in (1, 2)
        ],
        "pytorch_model.bin",
        config={},
    )
    gpt = tmp_path / "gpt"
    gpt.mkdir()
    for n in (1000, 2000):
        torch.save({"model": {"_orig_mod.w": full(n)}, "iter_num": n}, gpt / f"ckpt_{n}.pt")
    for run in (own, gpt):
        assert not warned(ckpt_ema.plan(run), Code.DIFFERENT_NAMES)
