"""Every trainer as data; longer than other modules, since it is a table.

A new trainer is one entry here and one file in `tests/data/trainers`. `conventions` gathers what
the entries hold and applies it to every run: a run need not name its trainer. Tiers: 1 and 2 are
read (1 by most people), R is recognised and refused with the way out, N is named.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from re import Pattern
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Refusal:
    """A format that is not read: how its files are called, what it is, and what to do instead."""

    name: Pattern[str]  # searched in a path relative to the checkpoint or the run
    what: str
    instead: str
    is_certain: bool = True  # False: such files also lie beside models that are read
    # The files, below the checkpoint, that can be averaged one by one and written back.
    parts: Pattern[str] | None = None


class Record(NamedTuple):
    """A small file in which a trainer records the step."""

    file: str  # in the checkpoint's folder or, with {stem}, beside the checkpoint's file
    keys: Mapping[str, str]  # "step", "epoch" or "time" -> key of the JSON or YAML


class Masters(NamedTuple):
    """Where a checkpoint has further copies of its weights: masters, or rounded weights."""

    sign: str  # searched in the names of files and in their pickled structure
    # Searched in "FILE:PATH.OF.A.TENSOR"; a group "weight" is the name of the master's weight.
    place: str
    ignored_with: str = ""  # how a trainer that prefers them loads the model's weights instead
    with_gaps: str = ""  # the part of "place" in buffers with memory that was never written


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """How one trainer saves a model. Patterns are regular expressions that ignore case."""

    name: str
    tier: str = "1"  # or "2", "R", "N"
    entry: str  # one checkpoint as it appears in a run
    weights: str  # where the model is in it
    # Names that need a pattern of their own, with groups "step" and "epoch".
    names: tuple[str, ...] = ()
    # Where the model is.
    containers: tuple[str, ...] = ()  # globs of folders in a run that hold its checkpoints
    files: tuple[str, ...] = ()  # names of a model file that no other trainer uses
    rank_files: tuple[str, ...] = ()  # patterns of the first rank's file where each has a part
    models: tuple[str, ...] = ()  # folders in a checkpoint that are a model with its files
    sharded: tuple[str, ...] = ()  # folders in a checkpoint that torch.distributed.checkpoint wrote
    model_keys: tuple[str, ...] = ()  # in a torch file or DCP; dots lead into dicts
    loads_compiled: tuple[str, ...] = ()  # names of files whose loader removes torch.compile's word
    # Whether a checkpoint is complete.
    done: tuple[str, ...] = ()  # files that exist once it is
    undone: tuple[str, ...] = ()  # files that exist until it is
    trackers: tuple[str, ...] = ()  # files of the run with the last step that was saved
    # Where the step is recorded.
    records: tuple[Record, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)  # of safetensors: unit -> dotted key
    step_keys: tuple[str, ...] = ()  # in a torch file; dots lead into dicts
    epoch_keys: tuple[str, ...] = ()
    # What is not the model's.
    state: tuple[str, ...] = ()  # files of training state, without number and extension
    digests: tuple[str, ...] = ()  # files with digests of a checkpoint's other files
    stays: tuple[str, ...] = ()  # patterns of other names in a checkpoint that stay behind
    folders: tuple[str, ...] = ()  # patterns of folders that hold no checkpoints
    # Patterns of files beside a model that is loaded without config.json.
    needs_no_config: tuple[str, ...] = ()
    # Patterns of files that are kept once per run and go with the average.
    travels: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    stacked: Refusal | None = None  # of what is read, and loaded only as it was saved
    # What --save-as checkpoint makes, where it is more than the name of an entry says.
    copy: str = ""
    masters: tuple[Masters, ...] = ()

    @property
    def written_back(self) -> str:
        """What an average looks like that is written back as a checkpoint; empty if it cannot be.

        >>> Trainer(name="a", entry="step_1/, 1.pt", weights="").written_back
        'the folder or the file'
        """
        if self.copy or self.tier in ("R", "N"):
            return self.copy
        kinds = ("folder" if one.endswith("/") else "file" for one in self.entry.split(", "))
        return " or ".join(dict.fromkeys(f"the {kind}" for kind in kinds))


def _refused(
    name: str, what: str, instead: str, is_certain: bool = True, parts: str | None = None
) -> tuple[Refusal, ...]:
    found = re.compile(parts, re.IGNORECASE) if parts else None
    return (Refusal(re.compile(name, re.IGNORECASE), what, instead, is_certain, found),)


_CONVERT_MEGATRON = (
    "Megatron-Bridge `export_ckpt`; NeMo 2 `nemo llm export`; NeMo-RL"
    " examples/converters/convert_megatron_to_hf.py; slime tools/convert_torch_dist_to_hf.py;"
    " gpt-neox tools/ckpts/convert_neox_to_hf.py"
)
# Where Megatron's distributed optimizer has the masters of a bucket, padded between them.
_FLAT_BUFFERS = r":.*optimizer\.distributed\..*\.param$"
_OUT_OF_SCOPE = "Export it to safetensors or a state dict of PyTorch first."

_PARTS_OF_DEEPSPEED = r"(^|/)layer_\d+-model_states\.pt$|(^|_|/)mp_rank_\d+_model_states\.pt$"
_BY_ITS_TOOLS = "Convert each step to one state dict with the tools of its trainer first."

TRAINERS = (
    Trainer(
        name="transformers Trainer, Unsloth, LLaMA-Factory, ms-swift, axolotl",
        entry="checkpoint-500/",
        weights="model.safetensors or pytorch_model.bin, single or sharded with an index",
        containers=("v[0-9]*-*",),
        sharded=("pytorch_model_fsdp_0",),
        done=("trainer_state.json", "CHECKPOINT_COMPLETE"),
        undone=("checkpoint-is-incomplete.txt",),
        records=(Record("trainer_state.json", {"step": "global_step"}),),
        state=("trainer_state", "training_args", "rng_state", "optimizer", "scheduler", "scaler"),
        travels=(r"(config|generation_config|preprocessor_config|processor_config)\.(json|ya?ml)",),
    ),
    Trainer(
        name="PEFT",
        entry="checkpoint-500/",
        weights="adapter_model.safetensors or .bin; adapter_config.json must agree",
        travels=(r"adapter_config\.(json|ya?ml)",),
    ),
    Trainer(
        name="TRL",
        entry="checkpoint-500/",
        weights="as transformers or PEFT; merged/ and bema/ are left out",
        stays=("merged", "bema"),
        folders=("merged", "bema"),
    ),
    Trainer(
        name="sentence-transformers",
        entry="checkpoint-500/",
        weights="model.safetensors, and that of each module in modules.json (2_Dense/ ...)",
    ),
    Trainer(
        name="diffusers",
        entry="checkpoint-500/",
        weights="unet/, transformer/ ...: diffusion_pytorch_model.safetensors;"
        " or pytorch_lora_weights.safetensors",
    ),
    Trainer(
        name="accelerate",
        entry="checkpoints/checkpoint_3/",
        weights="model.safetensors, model_1.safetensors ..., pytorch_model.bin, or FSDP's parts:"
        " pytorch_model_fsdp_0/, pytorch_model_fsdp_0_rank0.bin ...",
        containers=("checkpoints",),
        files=("pytorch_model_fsdp.bin",),
        rank_files=(r"pytorch_model_fsdp(_\d+)?_rank_?0\.bin",),
        sharded=("pytorch_model_fsdp_0",),
        state=("random_states", "custom_checkpoint", "sampler", "dl_state_dict"),
        needs_no_config=(r"random_states_\d+\.pkl", r"(optimizer|scheduler|sampler)(_\d+)?\.bin"),
        folders=("optimizer.*",),
    ),
    Trainer(
        name="Lightning",
        entry="epoch=1-step=100.ckpt",
        weights="state_dict; with an averaging callback current_model_state",
        containers=("checkpoints", "lightning_logs/version_*/checkpoints", "version_*/checkpoints"),
        step_keys=("global_step",),
        travels=(r"hparams\.(json|ya?ml)",),
    ),
    Trainer(
        name="Lightning and Fabric, sharded",
        tier="2",
        entry="epoch=1-step=100.ckpt/",
        weights=".metadata, .distcp and meta.pt: model (FSDP), state_dict (ModelParallel), or the"
        " one dict of tensors (Fabric)",
        done=("meta.pt",),
    ),
    Trainer(
        name="kohya sd-scripts, musubi-tuner",
        entry="name-000010.safetensors, name-step00001000.safetensors, name.safetensors",
        weights="the file; ss_steps in its header gives the order",
        metadata={"step": "ss_steps", "epoch": "ss_epoch"},
    ),
    Trainer(
        name="ai-toolkit",
        entry="name_000000250.safetensors",
        weights="the file; training_info in its header gives the step",
        metadata={"step": "training_info.step", "epoch": "training_info.epoch"},
    ),
    Trainer(
        name="timm",
        entry="checkpoint-12.pth.tar, last.pth.tar",
        weights="state_dict (not state_dict_ema)",
    ),
    Trainer(
        name="ultralytics",
        tier="R",
        entry="weights/epoch10.pt",
        weights="a pickled module, already averaged",
        containers=("weights",),
    ),
    Trainer(
        name="verl",
        entry="global_step_100/actor/",
        weights="model_world_size_8_rank_0.pt ... (FSDP); or huggingface/, as transformers",
        rank_files=(r"model_world_size_\d+_rank_0\.pt",),
        models=("actor/huggingface", "actor"),
        trackers=("latest_checkpointed_iteration.txt",),
        state=("extra_state",),
        stays=(r"fsdp_config\.json",),
    ),
    Trainer(
        name="OpenRLHF",
        entry="global_step50_hf/",
        weights="as transformers; global_step50/ beside it is DeepSpeed's",
        containers=("_actor",),
    ),
    Trainer(
        name="NeMo-RL",
        tier="2",
        entry="step_10/policy/weights/",
        weights="as transformers, or .metadata and .distcp; Megatron's iter_0000000 is refused",
        models=("policy/weights/model", "policy/weights"),
        sharded=("policy/weights/model", "policy/weights"),
    ),
    Trainer(
        name="Megatron-LM, Megatron-Bridge, slime, gpt-neox",
        tier="2",
        entry="iter_0000100/, global_step100/",
        weights="mp_rank_*/model_optim_rng.pt, layer_*-model_*-model_states.pt, or torch_dist"
        " (metadata.json); written back only",
        trackers=("latest_checkpointed_iteration.txt",),
        state=("distrib_optim",),
        digests=("integrity.json",),
        masters=(
            Masters(
                r"distrib_optim\.pt$|optimizer\.(state\.(fp32_)?param|distributed)\."
                r"|fp32_from_fp16|master_param",
                r"distrib_optim\.pt:.*\.param(\.\d+)?$|fp32_from_fp16(_params)?\."
                r"|\.master_params?(\.\d+)*$"
                r"|optimizer\.state\.(fp32_)?param\.(?P<weight>.+)"
                rf"|{_FLAT_BUFFERS}",
                "--no-load-optim or --finetune",
                with_gaps=_FLAT_BUFFERS,
            ),
        ),
        folders=("energon",),
        refusals=_refused(
            r"(^|/)(model_optim_rng\.pt|common\.pt|layer_\d+-model_\d+[^/]*\.pt)$"
            r"|(^|/)iter_\d{7}/[^/]*\.distcp$",
            "a Megatron checkpoint, with the weights in ranks and Megatron's names",
            f"Convert each step first: {_CONVERT_MEGATRON}.",
            parts=r"(^|/)(model_(optim_)?rng|layer_\d+-model_\d+[^/]*)\.pt$",
        ),
        stacked=Refusal(
            re.compile(""),
            "a Megatron checkpoint, with stacked layers under names that no loader of safetensors"
            " knows",
            f"Convert each step first: {_CONVERT_MEGATRON}.",
        ),
    ),
    Trainer(
        name="DeepSpeed",
        entry="global_step100/, checkpoint-500/global_step500/",
        weights="ZeRO-1, 2, 3: float32 of all zero_pp_rank_*_optim_states.pt;"
        " without ZeRO mp_rank_00_model_states.pt: module",
        trackers=("latest",),
        stays=(r"zero_to_(fp32|torch)\.py", r"global_step\d+"),
        masters=(
            Masters(
                r"_optim_states\.pt$|(single_partition_of_)?fp32_(flat_)?groups",
                r"(single_partition_of_)?fp32_(flat_)?groups(_flat)?(\.\d+)+$",
                "load_checkpoint(..., load_module_only=True)",
            ),
            Masters(r"_model_states\.pt$", r"_model_states\.pt:module\.(?P<weight>.+)"),
        ),
    ),
    Trainer(
        name="DeepSpeed, model parallel",
        tier="2",
        entry="global_step100/",
        weights="layer_01-model_states.pt, mp_rank_01_*, *expert_0_*; written back only (zero/ of a"
        " universal one is refused)",
        refusals=(
            *_refused(
                r"(^|/)layer_\d+-model_states\.pt$",
                "a checkpoint of DeepSpeed's pipelines, with each layer in a file of its own",
                _BY_ITS_TOOLS,
                parts=_PARTS_OF_DEEPSPEED,
            ),
            *_refused(
                r"(^|/)(layer_\d+_)?expert_\d+_mp_rank_|(^|/)expp_rank_\d+",
                "of DeepSpeed, a mixture of experts, with each expert in a file of its own",
                _BY_ITS_TOOLS,
                parts=_PARTS_OF_DEEPSPEED,
            ),
            *_refused(
                r"(^|_|/)mp_rank_(?!00_)\d+_(model|optim)_states\.pt$",
                "a DeepSpeed checkpoint of several model-parallel ranks, of which each file holds a"
                " part",
                _BY_ITS_TOOLS,
                parts=_PARTS_OF_DEEPSPEED,
            ),
            *_refused(
                r"^zero/$|(^|/)zero/optimizer_state\.pt$",
                "a universal checkpoint of DeepSpeed, with each weight in a folder of its own",
                "Average the checkpoints from which ds_to_universal.py made them.",
            ),
            *_refused(
                r"^(\w+_)?mp_rank_00_(model|optim)_states\.pt$",
                "one file of a DeepSpeed checkpoint",
                "Pass the folder that holds it.",
            ),
        ),
    ),
    Trainer(
        name="torchtitan, torch.distributed.checkpoint",
        tier="2",
        entry="step-100/",
        weights=".metadata and .distcp: the model at the top, under model, app.model or state_dict",
        containers=("checkpoint",),
        model_keys=("app.model",),
        state=("train_state",),
    ),
    Trainer(
        name="NeMo 1",
        entry="name--val_loss=1.23-epoch=3-step=1000.ckpt",
        weights="state_dict; -last and -EMA are left out",
    ),
    Trainer(
        name="NeMo 2",
        tier="2",
        entry="name-epoch=3-step=1000/",
        weights="weights/, written back only; or hf_weights/, where it was exported",
        models=("hf_weights",),
        sharded=("weights",),
        refusals=_refused(
            r"(^|/)context/",
            "a NeMo checkpoint",
            "Export it first: `nemo llm export`, or NeMo-RL"
            " examples/converters/convert_dcp_to_hf.py.",
        )
        + _refused(
            r"\.nemo$",
            "an archive of NeMo",
            "Unpack each with `tar -xf`, and average the model_weights.ckpt inside them.",
        ),
    ),
    Trainer(
        name="NeMo Automodel",
        tier="2",
        entry="epoch_0_step_100/",
        weights="model/consolidated/, or .metadata and .distcp in model/",
        models=("model/consolidated",),
        sharded=("model",),
        undone=(".incomplete",),
        refusals=_refused(
            r"(^|/)shard-\d+-[^/]*\.safetensors$",
            "sharded over ranks (slices in safetensors files)",
            "Save with save_consolidated, or consolidate each step first with"
            " torch.distributed.checkpoint.",
        ),
    ),
    Trainer(
        name="torchtune",
        entry="epoch_0/, step_100/",
        weights="as transformers; with adapter_model.* beside it, --form says which",
        folders=("recipe_state",),
    ),
    Trainer(
        name="open-instruct, prime-rl",
        entry="step_100/, weights/step_100/",
        weights="as transformers",
        containers=("weights",),
        sharded=("trainer",),
        done=("COMPLETED", "STABLE"),
        folders=("rollouts", "broadcasts"),
    ),
    Trainer(
        name="LeRobot",
        entry="checkpoints/005000/",
        weights="pretrained_model/, as transformers or .metadata and .distcp",
        containers=("checkpoints",),
        models=("pretrained_model",),
        sharded=("pretrained_model",),
        done=("training_state/training_step.json",),
        records=(Record("training_state/training_step.json", {"step": "step"}),),
        folders=("training_state",),
    ),
    Trainer(name="OLMo, unsharded", entry="step1000-unsharded/", weights="model.pt"),
    Trainer(
        name="OLMo-core",
        tier="2",
        entry="step1000/",
        weights="model_and_optim/.metadata and .distcp",
        sharded=("model_and_optim",),
        done=(".metadata.json",),
    ),
    Trainer(
        name="OLMo, sharded",
        tier="R",
        entry="step1000/",
        weights="rank files",
        refusals=_refused(
            r"(^|/)(model|optim)/rank\d+\.(pt|bin)$|(^|/)train/rank\d+\.pt$",
            "sharded over ranks",
            "Unshard each step first: OLMo scripts/unshard.py; OLMo-core"
            " src/examples/huggingface/convert_checkpoint_to_hf.py.",
        ),
    ),
    Trainer(
        name="nanotron",
        tier="2",
        entry="1000/",
        weights="model/ with each tensor in files of its own; written back only",
        trackers=("latest.txt",),
        masters=(
            Masters(
                r"gradient_accumulator",
                r"gradient_accumulator\.",
                "checkpoints.load_optimizer: false in its configuration",
            ),
        ),
        refusals=_refused(
            r"pp-rank-\d+-of-",
            "of nanotron, with each tensor sharded over ranks",
            "Convert each step first with nanotron's examples/llama/convert_nanotron_to_hf.py.",
            parts=r"^model/.*\.safetensors$",
        ),
    ),
    Trainer(
        name="Hugging Face Hub cache",
        entry="models--org--name/refs/step1000",
        weights="the snapshot of each revision, as transformers",
        copy="the snapshot",
    ),
    Trainer(
        name="LitGPT",
        entry="step-00000100/",
        weights="lit_model.pth or lit_model.pth.lora",
        files=("lit_model.pth", "lit_model.pth.lora"),
        travels=(r"(model_config|hyperparameters)\.(json|ya?ml)",),
    ),
    Trainer(
        name="nanoGPT, nanochat",
        entry="ckpt_1000.pt, model_000100.pt",
        weights="model, or the top",
        loads_compiled=(r"ckpt(_\d+)?\.pt", r"model_\d{6}\.pt"),
        step_keys=("iter_num",),
    ),
    Trainer(
        name="Composer, LLM Foundry",
        entry="ep1-ba100-rank0.pt, huggingface/ba100/",
        weights="state.model; or as transformers",
        containers=("huggingface", "hf_format"),
        model_keys=("state.model",),
    ),
    Trainer(
        name="mmengine",
        entry="epoch_12.pth, iter_1000.pth",
        weights="state_dict; with EMAHook the raw ones, in ema_state_dict",
        step_keys=("meta.iter",),
        epoch_keys=("meta.epoch",),
    ),
    Trainer(
        name="detectron2, fvcore",
        entry="model_0004999.pth",
        weights="model",
        step_keys=("iteration",),
        stays=("last_checkpoint",),
    ),
    Trainer(
        name="fairseq",
        entry="checkpoint12.pt, checkpoint_1_1000.pt",
        weights="model",
        names=(r"^checkpoint_(?P<epoch>\d+)_(?P<step>\d+)$",),
        step_keys=("num_updates",),
        travels=(r"dict\..*\.txt",),
    ),
    Trainer(
        name="ESPnet, WeNet, icefall",
        entry="12epoch.pth, epoch_12.pt, checkpoint-4000.pt",
        weights="the top, or model",
        names=(r"^(?P<epoch>\d+)epoch$", r"^checkpoint-(?P<step>\d+)-"),
        records=(Record("{stem}.yaml", {"step": "step", "epoch": "epoch"}),),
        step_keys=("batch_idx_train",),
        epoch_keys=("cur_epoch", "reporter.epoch"),
        travels=(r"train\.(json|ya?ml)", r"(tokens|units)\.txt"),
    ),
    Trainer(
        name="SpeechBrain",
        tier="2",
        entry="CKPT+2024-01-02+10-11-12+00/",
        weights="model.ckpt; CKPT.yaml gives the order",
        done=("CKPT.yaml",),
        records=(Record("CKPT.yaml", {"time": "unixtime"}),),
    ),
    Trainer(
        name="OpenNMT-py",
        tier="2",
        entry="base_step_5000.pt, base_step_5000.safetensors",
        weights="model and generator",
    ),
    Trainer(
        name="DiT, guided-diffusion, k-diffusion",
        entry="0050000.pt, model010000.pt, name_00010000.pth",
        weights="model or the top (not ema, model_ema, ema_0.9999_*.pt)",
    ),
    Trainer(
        name="EDM",
        tier="R",
        entry="network-snapshot-000200.pkl",
        weights="a pickled module",
        refusals=_refused(
            r"\.pkl$",
            "a pickle that torch.save did not write, which cannot be read without running its code",
            "Save the state_dict() of its module with torch.save instead; EDM2's"
            " training-state-*.pt hold one, and are read.",
            is_certain=False,
        ),
    ),
    Trainer(
        name="EDM2",
        tier="2",
        entry="training-state-0000100.pt",
        weights="net (not ema; network-snapshot-*.pkl are averages in pickled modules)",
    ),
    Trainer(name="MLX-LM", entry="0000100_adapters.safetensors", weights="the file"),
    Trainer(
        name="diffusion-pipe, SimpleTuner, Ray Train, InstructLab",
        entry="epoch10/, checkpoint-500/, checkpoint_000003/, samples_1234/",
        weights="as transformers or PEFT; checkpoint/ inside",
        models=("checkpoint",),
    ),
    Trainer(
        name="orbax, levanter, Keras, TensorFlow, marian, GGUF",
        tier="N",
        entry="1000/, weights.05-0.23.weights.h5, ckpt-12.index, model.iter1000.npz",
        weights="formats of JAX, TensorFlow and others",
        refusals=(
            *_refused(
                r"(^|/)(_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt|checkpoint\.msgpack)$"
                r"|orbax-checkpoint|(^|/)(\.zarray|zarr\.json)$",
                "a JAX checkpoint (orbax, levanter), not one of PyTorch",
                _OUT_OF_SCOPE,
            ),
            *_refused(
                r"\.(h5|keras)$|(^|/)[^/]*\.data-\d{5}-of-\d{5}$|ckpt-\d+\.index$",
                "a TensorFlow or Keras checkpoint, not one of PyTorch",
                _OUT_OF_SCOPE,
                is_certain=False,
            ),
            *_refused(
                r"\.gguf$",
                "a GGUF file, not a checkpoint of PyTorch",
                _OUT_OF_SCOPE,
                is_certain=False,
            ),
            *_refused(
                r"\.(npz|msgpack)$",
                "an array file of marian, JAX or numpy",
                _OUT_OF_SCOPE,
                is_certain=False,
            ),
        ),
    ),
)
