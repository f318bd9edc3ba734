"""Train a small language model, average its checkpoints, and compare the two on held-out text.

Needs nothing but Python: the text is the source of Python's own standard library.
Everything it makes is in `.demo/`; remove that folder to train again. With a folder as argument, it
prints the held-out loss of the model there, for `ckpt-ema select`.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter()

import json
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import TensorSpec, serialize_file

with warnings.catch_warnings():
    # torch warns at import when NumPy is missing, which nothing here needs.
    warnings.simplefilter("ignore")
    import torch
    from safetensors.torch import load_file
    from torch import Tensor, nn
    from torch.nn import functional

FOLDER = environment.REPOSITORY / ".demo"
RUN = FOLDER / "run"
FINISHED = FOLDER / "finished.json"  # the settings of the run, once it is complete
HELD_OUT_WINDOWS = 1024


@dataclass(frozen=True)
class Settings:
    """All that decides what a training run ends with."""

    width: int = 128
    layers: int = 5
    heads: int = 4
    context: int = 64  # bytes
    checkpoints: int = 20
    save_every: int = 50  # steps
    batch_size: int = 8  # small at a constant rate: noise, which is what averaging removes
    learning_rate: float = 1.5e-3
    warm_up: int = 100  # steps
    seed: int = 0
    versions: str = f"torch {torch.__version__}, python {sys.version}"  # Python decides the text


class Block(nn.Module):
    """One layer: attention over the bytes so far, then a two-layer network on each byte."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.network_norm = nn.LayerNorm(width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states after this layer, (batch, time, width) as they came."""
        batch, length, _ = hidden.shape
        projected: Tensor = self.query_key_value(self.attention_norm(hidden))
        # (3, batch, heads, time, width of a head)
        split = projected.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind()
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended: Tensor = self.attention_output(mixed.transpose(1, 2).reshape(hidden.shape))
        hidden = hidden + attended
        transformed: Tensor = self.network(self.network_norm(hidden))
        return hidden + transformed


class LanguageModel(nn.Module):
    """A decoder-only transformer over bytes."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(256, settings.width)
        self.position_embedding = nn.Embedding(settings.context, settings.width)
        self.blocks = nn.Sequential(*(Block(settings) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, 256, bias=False)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the byte after each of `tokens`, (batch, time, 256)."""
        positions = torch.arange(tokens.shape[1])
        hidden = self.token_embedding(tokens) + self.position_embedding(positions)
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


def read_text(*, held_out: bool) -> Tensor:
    """Return the standard library's source as bytes: every tenth file is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = [file for index, file in enumerate(files) if (index % 10 == 0) == held_out]
    text = b"".join(file.read_bytes() for file in chosen)
    if len(text) < 100_000:
        sys.exit("demo: this Python came without the source of its standard library")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def loss_on(model: nn.Module, text: Tensor, starts: Tensor, context: int) -> Tensor:
    """Return the mean loss, in nats per byte, of the windows of the text that begin at `starts`."""
    windows = text[starts[:, None] + torch.arange(context + 1)]
    logits: Tensor = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def train(settings: Settings) -> None:
    """Train from scratch, leaving `checkpoint-N` folders in RUN and a line for each on stdout."""
    torch.manual_seed(settings.seed)
    text = read_text(held_out=False)
    model = LanguageModel(settings)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), fused=True
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=settings.warm_up)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"training {size:,} parameters on {len(text):,} bytes of Python's own source", flush=True)
    began = time.monotonic()
    for checkpoint in range(1, settings.checkpoints + 1):
        loss_sum = 0.0
        for _ in range(settings.save_every):
            starts = torch.randint(len(text) - settings.context, (settings.batch_size,))
            loss = loss_on(model, text, starts, settings.context)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            loss_sum += loss.item()
        step = checkpoint * settings.save_every
        save(model, optimizer, settings, step)
        seconds = time.monotonic() - began
        mean_loss = loss_sum / settings.save_every
        print(f"  checkpoint-{step:<5} loss {mean_loss:.3f}  {seconds:3.0f} s", flush=True)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, step: int) -> None:
    """Write one checkpoint folder with the files that trainers write."""
    folder = RUN / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    # safetensors.torch.save_file would need NumPy.
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in model.state_dict().items()
    }
    serialize_file(specs, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "ckpt-ema-demo", "vocab_size": 256, **asdict(settings)}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def train_unless_done(settings: Settings) -> None:
    """Train, unless a complete run with the same settings is there."""
    wanted = json.dumps(asdict(settings), indent=2)
    if FINISHED.is_file() and FINISHED.read_text() == wanted:
        print("found a finished run in .demo/run")
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    train(settings)
    FINISHED.write_text(wanted)


def average() -> Path:
    """Run the command line as a user would and return the folder that it names on stdout."""
    run = RUN.relative_to(environment.REPOSITORY)
    arguments = ["-m", "ckpt_ema", "average", str(run), "--decay", "0.999", "--overwrite"]
    print("$ python", *arguments, flush=True)
    command = [sys.executable, *arguments]
    finished = subprocess.run(
        command, cwd=environment.REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    if finished.returncode != 0:
        sys.exit(finished.returncode)
    return environment.REPOSITORY / finished.stdout.strip()


def held_out_loss(folder: Path, settings: Settings) -> float:
    """Load the weights in a folder and return their loss on the held-out files."""
    model = LanguageModel(settings)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    text = read_text(held_out=True)
    starts = torch.linspace(0, len(text) - settings.context - 1, HELD_OUT_WINDOWS).long()
    with torch.inference_mode():
        parts = [loss_on(model, text, part, settings.context) for part in starts.chunk(16)]
    return torch.stack(parts).mean().item()


def main() -> int:
    """Return 0 if the average is better than the last checkpoint, else 1."""
    # So small a model gains little from more, and waits for them wherever the cores are shared.
    torch.set_num_threads(1)
    settings = Settings()
    if sys.argv[1:]:
        print(json.dumps({"loss": round(held_out_loss(Path(sys.argv[1]), settings), 4)}))
        return 0
    train_unless_done(settings)
    averaged_folder = average()
    last_step = settings.checkpoints * settings.save_every
    last = held_out_loss(RUN / f"checkpoint-{last_step}", settings)
    averaged = held_out_loss(averaged_folder, settings)
    print(f"held-out loss, nats per byte over {HELD_OUT_WINDOWS * settings.context:,} bytes:")
    print(f"  last checkpoint  {last:.4f}")
    print(f"  average          {averaged:.4f}")
    better = averaged < last
    print(f"the average is {'better' if better else 'not better'}, by {last - averaged:.4f}")
    return 0 if better else 1


if __name__ == "__main__":
    sys.exit(main())
