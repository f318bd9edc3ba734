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
        (folder / file).parent.mkdir(parents=True)
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
    layer = "_orig_mod.layers.0._orig_mod._checkpoint_wrapped_module.w"
    names = ("_orig_mod.norm.w", layer)
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
        ("encoder._checkpoint_wrapper.w", "encoder.w"),
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


# --- Q: the same model, though names or configurations differ -------------------------------------

EMBEDDINGS = [
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("shared.weight", "decoder.proj_out.weight"),
    ("tok_embeddings.weight", "output.weight"),
]


def with_head(embedding: str, head: str, n: int, value: float | None) -> dict[str, torch.Tensor]:
    """A state whose head has this value, or is not there."""
    found = {embedding: full(n, 8, 4), "model.norm.weight": full(n, 4)}
    return found if value is None else {**found, head: full(value, 8, 4)}


@pytest.mark.parametrize(("embedding", "head"), EMBEDDINGS)
def test_a_tied_head_that_the_newest_lacks_is_left_out_with_a_note(
    tmp_path: Path, embedding: str, head: str
) -> None:
    states = [with_head(embedding, head, n, None if n == 3 else n) for n in (1, 2, 3)]
    run = folders(tmp_path / "run", states, config={})
    plan = ckpt_ema.plan(run)
    notes = [str(note) for note in plan.notes if note.code is Code.DECIDED]
    assert any(f"checkpoint-300 lacks {head}" in note for note in notes)
    assert not warned(plan, Code.DIFFERENT_NAMES)
    assert mean(run) == {embedding: 2, "model.norm.weight": 2}


@pytest.mark.parametrize(("embedding", "head"), EMBEDDINGS)
def test_a_tied_head_that_older_checkpoints_lack_is_their_embedding(
    tmp_path: Path, embedding: str, head: str
) -> None:
    states = [with_head(embedding, head, n, 3 if n == 3 else None) for n in (1, 2, 3)]
    run = folders(tmp_path / "run", states, config={})
    assert mean(run) == {embedding: 2, head: 2, "model.norm.weight": 2}


@pytest.mark.parametrize(
    "heads",
    [(1, 7, None), (None, None, 7), (7, 7, None), (None, 2, 7)],
    ids=["one of the older", "the newest", "all older", "the newest, with another older one"],
)
def test_a_head_that_is_not_tied_and_is_not_everywhere_is_refused(
    tmp_path: Path, heads: tuple[float | None, ...]
) -> None:
    names = EMBEDDINGS[0]
    states = [with_head(*names, n, value) for n, value in enumerate(heads, start=1)]
    run = folders(tmp_path / "run", states, config={"tie_word_embeddings": True})
    error = refusal(run)
    assert (error.code, error.tensor) == (Code.DIFFERENT_MODELS, "lm_head.weight")


def test_the_second_bias_of_a_head_is_tied_where_it_is_the_same(tmp_path: Path) -> None:
    """BERT has its bias under cls.predictions and under the decoder there."""
    names = ("cls.predictions.bias", "cls.predictions.decoder.bias")
    states = [dict.fromkeys(names[: 1 if n == 3 else 2], full(n, 5)) for n in (1, 2, 3)]
    assert mean(folders(tmp_path / "run", states, config={})) == {names[0]: 2}


def test_a_tensor_more_that_equals_another_by_chance_is_refused(tmp_path: Path) -> None:
    states = [{f"layers.{k}.bias": full(0, 4) for k in range(4 - n)} for n in (1, 2)]
    states = [{**one, "w": full(n)} for n, one in enumerate(states)]
    assert refusal(folders(tmp_path / "run", states)).code is Code.DIFFERENT_MODELS


DEFAULTS: dict[str, Any] = {
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "layers_to_transform": [],
    "lora_alpha": 8,
}


def adapters(run: Path, older: Mapping[str, Any], newer: Mapping[str, Any]) -> Path:
    """Two adapters with these configurations."""
    states = [{f"q.lora_{side}.weight": full(n) for side in "AB"} for n in (1, 3)]
    folders(run, states, "adapter_model.safetensors")
    for step, fields in ((100, older), (200, newer)):
        config = {"peft_type": "LORA", "r": 8, "target_modules": ["q"], **fields}
        (run / f"checkpoint-{step}" / "adapter_config.json").write_text(json.dumps(config))
    return run


def test_a_field_of_peft_that_is_absent_has_its_default(tmp_path: Path) -> None:
    for name, pair in (("new", ({}, DEFAULTS)), ("old", (DEFAULTS, {}))):
        run = adapters(tmp_path / name, *pair)
        assert set(mean(run).values()) == {2}
        assert not warned(ckpt_ema.plan(run), Code.DIFFERENT_CONFIGS)
    empty: dict[str, Any] = dict.fromkeys(DEFAULTS.keys() - {"lora_alpha", "bias"})
    assert ckpt_ema.plan(adapters(tmp_path / "null", empty, DEFAULTS))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("rank_pattern", {"q": 4}),
        ("alpha_pattern", {"q": 4}),
        ("lora_alpha", 16),
        ("bias", "all"),
        ("modules_to_save", ["head"]),
        ("fan_in_fan_out", True),
    ],
)
def test_a_field_of_peft_that_differs_from_the_default_is_refused(
    tmp_path: Path, field: str, value: Any
) -> None:
    error = refusal(adapters(tmp_path / "run", {}, {**DEFAULTS, field: value}))
    assert error.code is Code.DIFFERENT_CONFIGS
    assert field in error.message


LAYOUTS: dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]] = {
    "experts": (
        {f"mlp.experts.{k}.{p}_proj.weight": full(k, 4, 2) for k in (0, 1) for p in ("gate", "up")},
        {"mlp.experts.gate_up_proj": full(1, 2, 2, 8)},
        ["mlp.experts.*.gate_proj.weight", "mlp.experts.gate_up_proj"],
    ),
    "qkv": (
        {f"attn.{p}_proj.weight": full(1, 4, 4) for p in "qkv"},
        {"attn.qkv_proj.weight": full(1, 12, 4)},
        ["attn.k_proj.weight", "attn.qkv_proj.weight"],
    ),
    "most names": (
        {f"transformer.h.{k}.w": full(k) for k in range(8)},
        {f"model.layers.{k}.w": full(k, 7, 7) for k in range(8)},
        ["transformer.h.*.w", "model.layers.*.w"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_layouts_of_one_model_are_named_with_the_way_out(tmp_path: Path, layout: str) -> None:
    older, newer, names = LAYOUTS[layout]
    shared = {"embed.weight": full(1), "norm.weight": full(1, 3), "head.weight": full(2, 5)}
    error = refusal(folders(tmp_path / "run", [{**shared, **one} for one in (older, newer)]))
    assert error.code is Code.DIFFERENT_MODELS
    for word in ("checkpoint-100", "checkpoint-200", "two layouts", *names):
        assert word in error.message
    assert "save_pretrained" in error.hint


# --- W: what loads the output --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("model.safetensors", "config.json"),
        ("pytorch_model.bin", "config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "unet/config.json"),
        ("adapter_model.safetensors", "adapter_config.json"),
        ("adapter_model.bin", "adapter_config.json"),
    ],
)
def test_a_configuration_that_is_nowhere_is_warned_of(
    tmp_path: Path, file: str, config: str
) -> None:
    run = folders(tmp_path / "run", [{"w": full(n)} for n in (1, 2)], file)
    [warning] = warned(ckpt_ema.plan(run), Code.NO_CONFIG)
    assert warning.startswith(config)
    assert "--config-from" in warning
    base = tmp_path / "base"
    (base / config).parent.mkdir(parents=True)
    (base / config).write_text("{}")
    if "/" in config:
        (base / "model_index.json").write_text('{"unet": ["diffusers", "U"]}')
    assert not warned(ckpt_ema.plan(run, config_from=base), Code.NO_CONFIG)
    if "/" not in config:
        (run / config).write_text("{}")
        assert not warned(ckpt_ema.plan(run), Code.NO_CONFIG)
        (run / config).unlink()
    assert not warned(ckpt_ema.plan(run, output=tmp_path / "o.safetensors"), Code.NO_CONFIG)


def test_a_trainer_that_needs_no_configuration_is_not_warned_of(tmp_path: Path) -> None:
    """That is accelerate, and everybody whose file has no name that from_pretrained looks for."""
    run = folders(tmp_path / "run", [{"w": full(n)} for n in (1, 2)])
    for folder in run.iterdir():
        (folder / "random_states_0.pkl").touch()
    lora = folders(
        tmp_path / "lora", [{"w": full(n)} for n in (1, 2)], "pytorch_lora_weights.safetensors"
    )
    own = folders(tmp_path / "own", [{"w": full(n)} for n in (1, 2)], "model.pt")
    for path in (run, lora, own):
        assert not warned(ckpt_ema.plan(path), Code.NO_CONFIG)


@pytest.mark.parametrize(
    ("file", "output"),
    [
        ("mm_projector.bin", "mm_projector.safetensors"),
        ("value_head.bin", "value_head.safetensors"),
        ("projector.pt", "projector.safetensors"),
        ("lora.pt", "lora.safetensors"),
        ("classifier.bin", "classifier.safetensors"),
        ("controlnet.bin", "controlnet.safetensors"),
        ("t5_encoder.pth", "t5_encoder.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("net.pth", "model.safetensors"),
        ("best.ckpt", "model.safetensors"),
    ],
)
def test_a_part_of_a_model_keeps_its_file_name(tmp_path: Path, file: str, output: str) -> None:
    """Under another name it would stand beside the configuration of the whole model."""
    run = folders(tmp_path / "run", [{"w": full(n)} for n in (1, 3)], file, config={})
    assert mean(run) == {"w": 2}
    assert [path.name for path in (tmp_path / "run-ema").glob("*.safetensors")] == [output]


@pytest.mark.parametrize(
    "name", ["net_g_{}00.pth", "epoch={}-step={}00.ckpt", "{}2epoch.pth", "model0{}.pt", "{}.pt"]
)
def test_a_file_that_is_named_by_its_step_becomes_a_model(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for n in (1, 3):
        torch.save({"w": full(n)}, run / name.format(n, n))
    [file] = ckpt_ema.plan(run).averages[0].output.files
    assert file.name == "model.safetensors"


# --- Y: what stays behind ------------------------------------------------------------------------

LEAVINGS = (
    *("._config.json", "config.json~", ".config.json.swp", "#config.json#", "Thumbs.db"),
    *("desktop.ini", ".DS_Store", ".nfs0000", ".gitattributes", "config.json.bak", "a.pyc"),
    *(".ipynb_checkpoints/a.json", ".tmpXy99Zz/a.json", "__pycache__/m.json", ".git/config"),
    *("tmpab_c12xy", "__MACOSX/a.json", ".hidden/model.safetensors"),
)


@pytest.mark.parametrize("place", ["", "custom/", "unet/"])
def test_hidden_files_and_editors_leavings_stay_behind_at_any_depth(
    tmp_path: Path, place: str
) -> None:
    run = folders(tmp_path / "run", [{"w": full(n)} for n in (1, 3)], config={})
    newest = run / "checkpoint-200"
    for name in (*LEAVINGS, "tokenizer.json", "code.py"):
        path = newest / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    copied = {one.name for one in ckpt_ema.plan(run).averages[0].output.companions}
    assert copied == {"config.json", f"{place}tokenizer.json", f"{place}code.py"}


def test_leavings_in_a_component_of_a_pipeline_stay_behind(tmp_path: Path) -> None:
    file = "unet/diffusion_pytorch_model.safetensors"
    run = folders(tmp_path / "run", [{"w": full(n)} for n in (1, 3)], file)
    pipeline = tmp_path / "pipeline"
    for name in ("scheduler/config.json", *(f"scheduler/{name}" for name in LEAVINGS)):
        path = pipeline / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (pipeline / "model_index.json").write_text('{"scheduler": ["diffusers", "S"]}')
    plan = ckpt_ema.plan(run, config_from=pipeline)
    copied = {one.name for one in plan.averages[0].output.companions}
    assert copied == {"model_index.json", "scheduler/config.json"}
