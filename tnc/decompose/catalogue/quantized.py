"""Quantized bases: rounding in H and in G ⊗ H, refined or not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from tnc.decompose.dense_target import DenseTarget
from tnc.decompose.recipes import Recipe, RecipeEntry, base_format, register_recipe
from tnc.decompose.stages import QuantizeStage
from tnc.decompose.transforms import Transform

_BASE = ("bits", "group_size", "symmetric", "format")
REFINE_SWEEPS = 3  # of refinement: the next three bring another 1.5 % at int2 and int3


def _rounded(
    method: str, *, refine: int = 0, options: Mapping[str, Any] | None = None, transforms: tuple[Transform, ...] = (),
    block_steps: int = 0, **base: Any,  # noqa: ANN401
) -> Recipe:  # fmt: skip
    stage = QuantizeStage(base_format(**base), method=method, options=options or {}, refine=refine)
    return Recipe("", (stage,), transforms=transforms, block_steps=block_steps)


for _name, _summary, _source, _build in (
    ("yaqa", "two-sided rounding with feedback in G ⊗ H (Fisher G of one backward pass, no power iteration; no "
     "Hadamard)", "arXiv:2505.22988", partial(_rounded, "yaqa")),
    ("gptq_refined", "gptq, then codes by coordinate descent and refitted scales in G ⊗ H (cyclic, not greedy)",
     "arXiv:2210.17323, arXiv:2406.17542", partial(_rounded, "gptq", refine=REFINE_SWEEPS)),
    ("yaqa_refined", "yaqa, then codes by coordinate descent and refitted scales in G ⊗ H",
     "arXiv:2505.22988, arXiv:2406.17542", partial(_rounded, "yaqa", refine=REFINE_SWEEPS)),
    ("gptaq", "GPTQ of the least-squares map from compressed inputs to dense outputs; needs sequential calibration "
     "(closed form instead of the paper's column updates)", "arXiv:2504.02692",
     partial(_rounded, "gptq", transforms=(DenseTarget(),))),
    ("yaqa_dense_target", "yaqa_refined of the least-squares map from compressed inputs to dense outputs; needs "
     "sequential calibration", "arXiv:2505.22988, arXiv:2504.02692",
     partial(_rounded, "yaqa", refine=REFINE_SWEEPS, transforms=(DenseTarget(),))),
    ("autoround", "rounding and scales learnt by signed gradients from GPTQ codes, 200 steps in G ⊗ H (a layer's "
     "loss, not a block's; zero points held)", "arXiv:2309.05516",
     partial(_rounded, "autoround", options={"start": "gptq"})),
    ("autoround_blocks", "GPTQ codes and scales learnt by signed gradients against their block's output, 200 steps, "
     "best kept; needs calibration batches (zero points held, one batch a step)", "arXiv:2309.05516",
     partial(_rounded, "gptq", block_steps=200)),
    ("lwc", "ranges learnt by signed gradients after the clip search, OmniQuant's weight clipping without LET (scales "
     "only, a layer's loss)", "arXiv:2308.13137", partial(_rounded, "learned_clipping")),
    ("hqq", "data-free half-quadratic fit of zero points and scales (the paper's zero points are real numbers, its "
     "scales held)", "Badri and Shaji 2023, mobiusml.github.io/hqq_blog", partial(_rounded, "hqq")),
):  # fmt: skip
    register_recipe(_name, RecipeEntry(_summary, _source, _BASE, _build))
