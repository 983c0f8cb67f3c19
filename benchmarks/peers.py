"""tnc beside public implementations in one process: same weights, same inputs, same format.

    python -m benchmarks.peers MODEL --calib TEXT --out results/peers.json

Needs the tools beside tnc (each is left out, and says so, where it is not installed): gptqmodel (GPTQ, and EoRA's
function), hqq. A row is a layer: the relative output error on the calibration tokens, ``‖E‖_H / ‖W‖_H``, of the matrix
that each side stores, and the seconds of the whole call from inputs (GPTQ) or moments (EoRA) to matrix. Ratios are tnc
over peer; medians over layers.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import write
from benchmarks.run import machine
from tnc import IntFormat, LayerStats, Metric, compensate, gptq, rtn
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.layers import select_layers
from tnc.models.text import calibration_batches, read_text
from tnc.quant import quantizer
from tnc.stats import MomentsAccumulator

_RANK = 16


def inputs_of(model: nn.Module, names: list[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """(tokens, in_features) of each named layer."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: kept[name].append(a[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in kept.items()}


def stats_of(x: Tensor) -> LayerStats:
    """H of the rows of ``x``."""
    sums = MomentsAccumulator(x.shape[1])
    sums.add(x)
    return LayerStats(sums.moments())


def _timed(way: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    return way(), time.perf_counter() - start


def tnc_gptq(layer: nn.Linear, x: Tensor, bits: int, group: int) -> Tensor:
    """GPTQ from activations to the dequantized matrix."""
    return gptq(layer.weight.detach(), stats_of(x), IntFormat(bits, group)).to_dense()


def gptqmodel_gptq(layer: nn.Linear, x: Tensor, bits: int, group: int) -> Tensor:
    """The same by GPTQModel, its defaults but the format: asymmetric, this group size."""
    module = importlib.import_module("gptqmodel.quantization.gptq")
    config = importlib.import_module("gptqmodel.quantization.config").QuantizeConfig(
        bits=bits, group_size=group, sym=False
    )
    task = module.GPTQ(copy.deepcopy(layer), config)
    task.quantizer.configure(perchannel=True)
    for rows in x.split(512):
        task.add_batch(rows.unsqueeze(0), torch.zeros(1, len(rows), layer.out_features))
    found: Tensor = task.quantize()[0]
    return found.reshape(layer.weight.shape).float()


def tnc_hqq(layer: nn.Linear, x: Tensor, bits: int, group: int) -> Tensor:
    """Half-quadratic quantization, data-free."""
    return quantizer("hqq").run(layer.weight.detach(), None, IntFormat(bits, group)).term.to_dense()


def hqq_hqq(layer: nn.Linear, x: Tensor, bits: int, group: int) -> Tensor:
    """The same by hqq (its zero points are real numbers of 16 bits, not integers)."""
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    codes, meta = quantizer.quantize(
        layer.weight.detach().clone(), nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
    )
    found: Tensor = quantizer.dequantize(codes, meta)
    return found.reshape(layer.weight.shape).float()


def tnc_eora(layer: nn.Linear, x: Tensor, bits: int, group: int) -> Tensor:
    """Compensation of one RTN base in H."""
    base, stats = _shared_base(layer, x, bits, group)
    return base.to_dense() + compensate(layer.weight.detach(), base, _RANK, metric=Metric.full(stats)).to_dense()


def gptqmodel_eora(layer: nn.Linear, x: Tensor, bits: int, group: int) -> Tensor:
    """The same by GPTQModel's EoRA function."""
    function = importlib.import_module("gptqmodel.eora.eora").eora_compute_lora
    base, stats = _shared_base(layer, x, bits, group)
    delta = (layer.weight.detach() - base.to_dense()).float()
    A, B = function(delta, "layer", stats.hessian.float(), _RANK, torch.float32, torch.device("cpu"))
    return base.to_dense() + B.float() @ A.float()


_BASES: dict[tuple[int, int, int], Any] = {}


def _shared_base(layer: nn.Linear, x: Tensor, bits: int, group: int) -> Any:  # noqa: ANN401
    """Base and moments, made once for both sides and not timed (see `warm`)."""
    key = (id(layer), bits, group)
    if key not in _BASES:
        _BASES[key] = (rtn(layer.weight.detach(), IntFormat(bits, group)), stats_of(x))
    return _BASES[key]


Side = Callable[[nn.Linear, Tensor, int, int], Tensor]
PAIRS: dict[str, tuple[str, Side, Side]] = {
    "gptq": ("gptqmodel", tnc_gptq, gptqmodel_gptq),
    "eora": ("gptqmodel", tnc_eora, gptqmodel_eora),
    "hqq": ("hqq", tnc_hqq, hqq_hqq),
}


def compare(pair: str, layer: nn.Linear, x: Tensor, bits: int, group: int) -> dict[str, Any]:
    """Errors and seconds of both sides on one layer; the peer first, then tnc, once each."""
    _, ours, theirs = PAIRS[pair]
    metric, weight = Metric.full(stats_of(x)), layer.weight.detach().double()
    if pair == "eora":
        _shared_base(layer, x, bits, group)
    found = {}
    for name, side in (("peer", theirs), ("tnc", ours)):
        matrix, seconds = _timed(lambda side=side: side(layer, x, bits, group))  # type: ignore[misc]
        found[name] = {"error": metric.relative(weight - matrix.double(), weight), "seconds": seconds}
    return {
        "pair": pair, "bits": bits, **found, "error_ratio": found["tnc"]["error"] / found["peer"]["error"],
        "time_ratio": found["tnc"]["seconds"] / found["peer"]["seconds"],
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every pair on every chosen layer and width."""
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    names = [n for n in select_layers(model) if any(f".{i}." in n for i in arguments.blocks)]
    batches = calibration_batches(
        tokenizer, read_text(arguments.calib), context=arguments.context, sequences=arguments.sequences, seed=0
    )
    inputs = inputs_of(model, names, batches)
    rows = []
    for pair, (tool, _, _) in PAIRS.items():
        if importlib.util.find_spec(tool) is None:
            print(f"{pair}: {tool} is not installed; left out")
            continue
        for bits in arguments.bits:
            for name in names:
                layer = model.get_submodule(name)
                assert isinstance(layer, nn.Linear)
                rows.append({"layer": name, **compare(pair, layer, inputs[name], bits, arguments.group_size)})
            _print([row for row in rows if row["pair"] == pair and row["bits"] == bits])
    return {"machine": machine(), "rows": rows}


def _print(rows: list[dict[str, Any]]) -> None:
    errors, times = ([row[key] for row in rows] for key in ("error_ratio", "time_ratio"))
    print(
        f"{rows[0]['pair']:<6} int{rows[0]['bits']}  {len(rows)} layers  error tnc/peer: median "
        f"{statistics.median(errors):.4f}, {min(errors):.4f}..{max(errors):.4f}   time tnc/peer: median "
        f"{statistics.median(times):.3f}, {min(times):.3f}..{max(times):.3f}",
        flush=True,
    )


def main() -> None:
    """Parse the arguments, run, print, and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("results/peers.json"))
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    result = run(arguments)
    write(arguments.out, result)


if __name__ == "__main__":
    main()
