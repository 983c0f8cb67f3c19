"""Times of the fused kernels on this GPU, cold weights, CUDA graphs; every answer is checked before its clock starts.

`benchmarks.gpu_rows` says how a row is timed.

python -m benchmarks.gpu [--out results/gpu.json] [--only dense qlr]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_clock import gpu
from benchmarks.gpu_decoder import decoders
from benchmarks.gpu_linear import dense_rows, low_rank_rows, qlr_rows, table_rows, unfused_rows
from benchmarks.gpu_networks import chain_rows, mpo3_rows, mpo_rows, trellis_rows
from benchmarks.gpu_rows import Row, keep, reported


def decoder_rows() -> Iterator[dict[str, Any]]:
    """Whole decoders, printed."""
    for row in decoders():
        shown = (
            "no time: wrong" if row["ms"] is None else f"{row['ms']:7.3f} ms {row['tokens_per_second']:7.1f} tokens/s"
        )
        print(f"{row['decoder']:<40}{row['glue']:<34}{shown}  error {row['error']}", flush=True)
        yield row


def timed(make: Callable[[], Iterable[Row]]) -> Iterator[dict[str, Any]]:
    """The rows of a group, and their memory freed."""
    yield from reported(make())
    torch.cuda.empty_cache()


_TIMED: dict[str, Callable[[], Iterable[Row]]] = {
    "dense": dense_rows, "qlr": qlr_rows, "tables": table_rows, "unfused": unfused_rows, "low_rank": low_rank_rows,
    "mpo": mpo_rows, "mpo3": mpo3_rows, "chain": chain_rows, "trellis": trellis_rows,
}  # fmt: skip
GROUPS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "decoder": decoder_rows, **{name: partial(timed, make) for name, make in _TIMED.items()}
}  # fmt: skip


def main() -> None:
    """Run, print and store every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu.json"))
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    arguments = parser.parse_args()
    machine = gpu()
    print(json.dumps(machine))
    torch.manual_seed(0)
    keep(arguments.out, machine, chain.from_iterable(rows() for name, rows in GROUPS.items() if name in arguments.only))


if __name__ == "__main__":
    main()
