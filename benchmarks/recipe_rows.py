"""Which recipes are compared, with which options: all at about the same bits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tnc import RECIPES, BitsPerWeight, Recipe, recipe
from tnc.decompose.dense_target import DenseTarget

_PLAIN = {"group_size": 64}
_COARSE = {"group_size": 128, "factor_bits": 4}
_SIGNS = 0.01  # bits a weight that signs of rotations and padding of small layers may take
_STRICT = ("best_at_bits",)  # stays within the bits of plain integers

_GROUPS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("best_at_bits",), {}),  # takes the bits alone
    (("qtip", "yaqa_trellis"), {}),
    (("yaqa_trellis_lr",), {"factor_bits": 4}),
    (("gptq", "rtn", "gptq_rotated", "quip"), _PLAIN),
    (("yaqa_rotated_refined", "yaqa_refined", "yaqa_rotated", "yaqa", "gptq_refined", "awq_gptq"), _PLAIN),
    (("eora", "qera", "lqer", "lorc", "serq", "qlr_fisher", "qlr_shared", "loftq"), _COARSE),
    (("caldera", "svdquant", "qlr_alternating", "qlr_gated"), _COARSE),
    (("odlri", "srr"), {**_COARSE, "rank": 6}),  # take an integer rank
    (("yaqa_lr", "quip_lr", "svdquant_smooth"), {"group_size": 128}),  # factors in 16 bits
    (("awq", "hqq", "lwc", "omniquant", "autoround"), _PLAIN),
    (("gptaq", "yaqa_dense_target", "autoround_blocks"), _PLAIN),
)


@dataclass(frozen=True)
class Row:
    """What one row of the table is made by.

    Attributes:
        bits: of the base; rows of one width store about ``bits + (16 + bits) / 64`` a weight.
        recipe: with its options.
    """

    bits: int
    recipe: Recipe

    @property
    def sequential(self) -> bool:
        """Whether it aims at the dense outputs from compressed inputs, and so is calibrated block by block."""
        return any(isinstance(each, DenseTarget) for each in self.recipe.transforms)

    @property
    def needs_text(self) -> bool:
        """Whether statistics alone do not make it."""
        return self.recipe.block_steps > 0 or self.sequential


def rows(widths: list[int], only: str = "") -> Iterator[Row]:
    """Recipes whose name has the pattern, at all widths: those that decide a comparison first, the slowest last.

    Bases take groups of 64 columns; with factors groups of 128, and factors in what is left of the same bits. Trellises
    have a scale a row.
    """
    for name, options in ((name, options) for names, options in _GROUPS for name in names):
        for bits in widths if re.search(only, name) else ():
            takes = RECIPES[name].options
            found: dict[str, Any] = {"bits": bits} if "bits" in takes else {}
            if "rank" in takes:
                plain = bits + (16 + bits) / 64
                found["rank"] = BitsPerWeight(round(plain, 2) if name in _STRICT else plain + _SIGNS)
            yield Row(bits, recipe(name, **{**found, **options}))
