"""Train the demonstration model of ``tnc.models.demo`` on the source of the Python standard library.

    python examples/train_demo_model.py --out demo-out

The model is a byte-level Llama. Training takes minutes on one GPU; ``--minutes 0.5 --batch-size 4`` tries the
script on a CPU. The folder written loads with ``AutoModelForCausalLM`` and ``AutoTokenizer``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tnc.models.demo import HELD_OUT, SPLITS, demo_text

CONTEXT = 512  # bytes
END_OF_TEXT = 256  # tokens 0 to 255 are the bytes; the vocabulary is padded to a multiple of 64


@dataclass(frozen=True)
class Settings:
    """What a run depends on, besides the text and the machine's speed."""

    minutes: float
    batch_size: int  # windows of CONTEXT bytes
    learning_rate: float  # at the end of the warm-up; falls linearly to 0
    warmup_steps: int
    weight_decay: float  # of the matrices
    seed: int


def demo_config() -> LlamaConfig:
    """Shape of the demonstration model: 1.4 M parameters, every size a multiple of 64."""
    return LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer whose token ids are the UTF-8 bytes of the text, and ``<|endoftext|>``."""
    # ByteLevel writes printable Latin-1 as itself and the other bytes, in order, as the letters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + place): byte for place, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=dict(sorted(letters.items(), key=lambda item: item[1])), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def byte_tensor(text: str, device: torch.device) -> Tensor:
    """UTF-8 bytes of ``text``, (bytes,) uint8."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)


def random_windows(data: Tensor, *, batch_size: int, generator: torch.Generator) -> Tensor:
    """Windows of ``data`` from random places, (batch_size, CONTEXT) int64.

    One in eight begins with END_OF_TEXT, so that the token may stand before any text.
    """
    starts = torch.randint(len(data) - CONTEXT, (batch_size, 1), generator=generator, device=data.device)
    windows = data[starts + torch.arange(CONTEXT, device=data.device)].long()
    windows[::8, 0] = END_OF_TEXT
    return windows


def loss_in_nats(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean cross entropy of the bytes of ``windows``, the first of each unscored."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, data: Tensor) -> float:
    """Mean bits per byte over consecutive windows of CONTEXT bytes, the first byte of each unscored."""
    windows = data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT).long()
    with torch.compiler.set_stance("force_eager"):  # few batches of other shapes are not worth a compilation
        nats = sum(loss_in_nats(model, batch).item() * len(batch) for batch in windows.split(64))
    return nats / len(windows) / math.log(2)


def optimizer_of(model: LlamaForCausalLM, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, with weight decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def training_steps(model: LlamaForCausalLM, data: Tensor, settings: Settings) -> Iterator[tuple[int, float]]:
    """Train ``model`` in place until the time is up; yield the count of steps and the seconds after each."""
    optimizer = optimizer_of(model, settings)
    generator = torch.Generator(data.device).manual_seed(settings.seed)
    start, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        rate = settings.learning_rate * min(1, (step + 1) / settings.warmup_steps) * (1 - progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        windows = random_windows(data, batch_size=settings.batch_size, generator=generator)
        with torch.autocast(data.device.type, dtype=torch.bfloat16):
            loss = loss_in_nats(model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 16 == 0:
            loss.item()  # wait for the device, so that the clock below is its clock
        seconds = time.monotonic() - start
        progress = seconds / (60 * settings.minutes)
        yield step, seconds


def train(
    model: LlamaForCausalLM, data: Tensor, settings: Settings, evaluate: Callable[[], float]
) -> dict[str, object]:
    """Train ``model`` in place, evaluating every minute; return the steps, tokens and curve for the log."""
    curve: list[dict[str, float]] = []
    step = 0
    for step, seconds in training_steps(model, data, settings):
        if seconds >= 60 * (len(curve) + 1):
            tokens = step * settings.batch_size * CONTEXT
            bits = round(evaluate(), 4)
            curve.append({"step": step, "tokens": tokens, "bits_per_byte": bits})
            print(f"{seconds:.0f} s, {step} steps, {tokens:.3g} tokens: {bits} bits per byte")
    return {"steps": step, "tokens": step * settings.batch_size * CONTEXT, "curve": curve}


def save(model: LlamaForCausalLM, out: Path) -> LlamaForCausalLM:
    """Write ``model`` in bfloat16 and its tokenizer as a Hugging Face folder; return it read back."""
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    byte_tokenizer().save_pretrained(out)
    tokenizer_config = out / "tokenizer_config.json"
    fields = json.loads(tokenizer_config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer_config.write_text(json.dumps(fields, indent=2) + "\n")  # the class name that every transformers knows
    return LlamaForCausalLM.from_pretrained(out).float()


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    library: Annotated[Path | None, typer.Option(help="Folder of a Python standard library; default: its own.")] = None,
    minutes: Annotated[float, typer.Option(help="Time to train, compilation included.")] = 2.4,
    batch_size: Annotated[int, typer.Option(help="Windows of 512 bytes in a step.")] = 256,
    learning_rate: float = 8e-3,
    warmup_steps: int = 300,
    weight_decay: float = 0.1,
    seed: int = 0,
) -> None:
    """Train the demonstration model and write it to a folder, with a log of its held-out bits per byte."""
    settings = Settings(minutes, batch_size, learning_rate, warmup_steps, weight_decay, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = {split: byte_tensor(demo_text(split, library=library), device) for split in SPLITS}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(demo_config()).to(device)
    for layer in model.model.layers:
        layer.compile()  # one by one: in a whole graph transformers builds a mask, so no flash kernel
    log = train(model, data["train"], settings, lambda: bits_per_byte(model, data["evaluation"]))
    saved = save(model, out).to(device)
    log |= {
        "bits_per_byte": {split: round(bits_per_byte(saved, data[split]), 4) for split in HELD_OUT},
        "bytes": {split: len(data[split]) for split in SPLITS},
        "parameters": saved.num_parameters(),
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (out / "train_log.json").write_text(json.dumps(log, indent=2) + "\n")
    print(f"bits per byte of the saved weights: {log['bits_per_byte']}")


if __name__ == "__main__":
    typer.run(main)
