"""Peak memory of `tnc.compress`, each measurement in a process of its own.

    python -m benchmarks.memory                 # random two-block Llamas of growing width
    python -m benchmarks.memory MODEL           # a model folder

"before" is the peak with the model loaded and batches made, "peak" that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.results import write

WIDTHS = (256, 512, 1024, 2048)


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def random_llama(width: int, blocks: int = 2) -> nn.Module:
    """A Llama of ``blocks`` blocks with random weights; feed-forward width 2.75 times ``width``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=blocks, vocab_size=1024,
        num_attention_heads=width // 64, num_key_value_heads=max(width // 256, 1), tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def measure(name: str, sequences: int, context: int, fisher: bool) -> dict[str, Any]:
    """Compress one model in this process: GPTQ int4 group 64 + rank 16."""
    from tnc import compress, recipe
    from tnc.models.hf import load_model

    model = random_llama(int(name)) if name.isdigit() else load_model(name)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (sequences, context), generator=generator)
    before = peak_mb()
    start = time.perf_counter()
    chosen = recipe("eora", bits=4, group_size=64, rank=16)
    compress(model, chosen, list(tokens.split(8)), fisher=fisher, inplace=True)
    parameters = sum(p.numel() for p in model.parameters())
    return {"model": name, "fisher": fisher, "parameters_left": parameters, "before_mb": before, "peak_mb": peak_mb(),
            "seconds": time.perf_counter() - start}  # fmt: skip


def main() -> None:
    """Measure each model in a fresh process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[str(width) for width in WIDTHS])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--no-fisher", action="store_true")
    parser.add_argument("--here", action="store_true", help="measure the one model in this process, print JSON")
    parser.add_argument("--out", type=Path, default=Path("results/memory.json"))
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.models[0], arguments.sequences, arguments.context, not arguments.no_fisher)))
        return
    rows = [_elsewhere(name, arguments) for name in arguments.models]
    write(arguments.out, rows)


def _elsewhere(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "benchmarks.memory", name, "--here", "--sequences", str(arguments.sequences),
        "--context", str(arguments.context), *(["--no-fisher"] if arguments.no_fisher else []),
    ]  # fmt: skip
    row: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print("{model:>24}  before {before_mb:8.0f} MB  peak {peak_mb:8.0f} MB  {seconds:7.1f} s".format(**row), flush=True)
    return row


if __name__ == "__main__":
    main()
