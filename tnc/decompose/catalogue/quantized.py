"""Quantized bases: rounding in H and in G ⊗ H, refined or not."""

from __future__ import annotations

from functools import partial
from typing import Any

from tnc.decompose.recipes import Recipe, RecipeEntry, base_format, register_recipe
from tnc.decompose.stages import QuantizeStage

_BASE = ("bits", "group_size", "symmetric", "format")
_SWEEPS = 3  # of refinement: the next three bring another 1.5 % at int2 and int3


def _rounded(method: str, *, refine: int = 0, **base: Any) -> Recipe:  # noqa: ANN401
    return Recipe("", (QuantizeStage(base_format(**base), method=method, refine=refine),))


for _name, _summary, _source, _build in (
    ("yaqa", "two-sided rounding with feedback in G ⊗ H (Fisher G of one backward pass, no power iteration; no "
     "Hadamard)", "arXiv:2505.22988", partial(_rounded, "yaqa")),
    ("gptq_refined", "gptq, then codes by coordinate descent and refitted scales in G ⊗ H (cyclic, not greedy)",
     "arXiv:2210.17323, arXiv:2406.17542", partial(_rounded, "gptq", refine=_SWEEPS)),
    ("yaqa_refined", "yaqa, then codes by coordinate descent and refitted scales in G ⊗ H",
     "arXiv:2505.22988, arXiv:2406.17542", partial(_rounded, "yaqa", refine=_SWEEPS)),
):  # fmt: skip
    register_recipe(_name, RecipeEntry(_summary, _source, _BASE, _build))
