"""The forms that are compared, each as stages that spend a given number of bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from tnc.decompose import BitsPerWeight, LowRankStage, MpoStage, QuantizeStage, Stage
from tnc.decompose.forms import (
    Form,
    FormStage,
    blast,
    block_low_rank,
    block_term,
    cp,
    monarch,
    tensor_ring,
    tucker,
)
from tnc.decompose.stages import MetricOf
from tnc.formats import IntFormat
from tnc.metric import Metric


@dataclass(frozen=True)
class Contender:
    """One row of a comparison.

    Attributes:
        name: as printed.
        stages: that spend the bits.
        fixed_bits: whether the form has its own size and takes part only where that is within the budget.
    """

    name: str
    stages: tuple[Stage, ...]
    fixed_bits: bool = False


def contenders(
    shape: tuple[int, int], bits: float, *, metric: MetricOf = Metric.auto, dtype: torch.dtype = torch.float16,
    group_size: int | None = 64, quantizer: str = "gptq",
) -> tuple[Contender, ...]:  # fmt: skip
    """Every form for a weight (out_features, in_features) at ``bits`` stored bits per weight, truncated SVD first.

    Args:
        shape: of the weight.
        bits: stored bits per weight, everything counted.
        metric: in which the forms are fitted.
        dtype: of stored factors.
        group_size: of the quantized bases, halved until it divides in_features, and of quantized factors and cores,
            which are padded to it; ``None`` is one group a row.
        quantizer: method of the quantized bases.
    """
    size = BitsPerWeight(bits)
    blocks = _blocks(shape, 8)
    forms: dict[str, Form] = {
        f"blast {blocks[0]}×{blocks[1]}": partial(blast, blocks=blocks),
        f"block low rank {blocks[0]}×{blocks[1]}": partial(block_low_rank, blocks=blocks),
        f"monarch {blocks[0]}×{blocks[1]}": partial(monarch, blocks=blocks),
        "tensor ring, 3 cores": tensor_ring,
        "tucker": tucker,
        "4 Tucker terms": block_term,
        "cp": cp,
    }
    grouped = _group(shape[1], group_size)
    bases = {b: QuantizeStage(IntFormat(b, grouped), method=quantizer) for b in (2, 3, 4)}
    low_rank = LowRankStage(size, metric=metric, dtype=dtype)
    rounded = {b: IntFormat(b, group_size, pad=True) for b in (8, 4)}
    return (
        Contender("truncated SVD", (low_rank,)),
        Contender("Kronecker sum (2 cores)", (MpoStage(size, cores=2, metric=metric, dtype=dtype),)),
        Contender("MPO, 3 cores", (MpoStage(size, cores=3, metric=metric, dtype=dtype),)),
        *(Contender(f"truncated SVD, int{b}", (replace(low_rank, factor_format=f),)) for b, f in rounded.items()),
        *(Contender(f"2 cores, int{b}", (MpoStage(size, metric=metric, core_format=f),)) for b, f in rounded.items()),
        *(Contender(name, (FormStage(form, size, metric=metric, dtype=dtype),)) for name, form in forms.items()),
        *(Contender(f"int{b}", (base,), fixed_bits=True) for b, base in bases.items()),
        *(Contender(f"int{b} + low rank", (base, low_rank)) for b, base in bases.items()),
    )


def _blocks(shape: tuple[int, int], most: int) -> tuple[int, int]:
    """The largest divisors of both sides that are at most ``most``."""
    rows, columns = (max(d for d in range(1, most + 1) if size % d == 0) for size in shape)
    return rows, columns


def _group(columns: int, group_size: int | None) -> int | None:
    while group_size is not None and (columns % group_size or group_size > columns):
        group_size = None if group_size % 2 else group_size // 2
    return group_size
