"""Errors of matrix product operators on the linear layers of a model: TT-SVD, whitened, refined, and the SVD rival.

    python -m benchmarks.networks MODEL STATS --share 0.5 --cores 2

All forms of a layer have the same modes and bond dimension, the largest that stores ``--share`` of its parameters; the
last column is the truncated SVD in the same metric that stores as much. Errors are relative in H and in G ⊗ H.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.run import machine
from tnc import BitsPerWeight, LayerStats, Metric, MpoStage, load_stats
from tnc.decompose.rival import rival
from tnc.models.hf import load_model
from tnc.models.layers import select_layers, weight_of
from tnc.networks import als, tt_svd
from tnc.terms import Expression, dense64


def layer_row(weight: Tensor, stats: LayerStats, share: float, cores: int, sweeps: int) -> dict[str, Any]:
    """Errors of one layer by form."""
    bits = weight.element_size() * 8
    full, price = Metric.full(stats), Metric.auto(stats)
    stage = MpoStage(BitsPerWeight(share * bits), cores=cores)
    outs, ins = stage.modes((weight.shape[0], weight.shape[1]))
    rank = stage.bond((weight.shape[0], weight.shape[1]), weight.dtype)
    plain = tt_svd(weight, outs, ins, max_rank=rank)
    whitened = tt_svd(weight, outs, ins, max_rank=rank, metric=price)
    starts = sorted((plain, whitened), key=lambda mpo: price.norm(weight.double() - dense64(mpo)))
    start = time.perf_counter()
    refined = als(weight, starts[0], metric=price, sweeps=sweeps).mpo
    seconds = time.perf_counter() - start
    in_h = als(weight, plain, metric=full, sweeps=sweeps).mpo
    other = rival(weight, refined, stats)
    assert other is not None
    forms: dict[str, Expression] = {
        "plain": plain, "whitened": whitened, "als": refined, "als in H": in_h, "svd": other,
    }  # fmt: skip
    errors = {
        name: [metric.relative(weight.double() - dense64(form), weight.double()) for metric in (full, price)]
        for name, form in forms.items()
    }
    return {"shape": list(weight.shape), "rank": rank, "errors": errors, "als_seconds": seconds}


def main() -> None:
    """Measure the layers of a model and print means over them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("stats", type=Path)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--sweeps", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="take every so many-th block only")
    parser.add_argument("--out", type=Path, default=Path("results/networks.json"))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    stats, layers = load_stats(arguments.stats), select_layers(load_model(arguments.model))
    rows: dict[str, Any] = {}
    for name, layer in layers.items():
        block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        if block % arguments.every:
            continue
        weight = weight_of(layer).detach()
        rows[name] = layer_row(weight, stats[name], arguments.share, arguments.cores, arguments.sweeps)
        line = "  ".join(f"{form} {h:.3f}/{gh:.3f}" for form, (h, gh) in rows[name]["errors"].items())
        print(f"{name:<36} rank {rows[name]['rank']:<4} {line}", flush=True)
    means = {
        form: [sum(row["errors"][form][k] for row in rows.values()) / len(rows) for k in (0, 1)]
        for form in next(iter(rows.values()))["errors"]
    }
    print(f"mean over {len(rows)} layers: " + "  ".join(f"{k} {a:.4f}/{b:.4f}" for k, (a, b) in means.items()))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "means": means, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
