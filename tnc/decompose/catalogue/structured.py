"""Structured forms as recipes: one term a layer, fitted in ``G ⊗ H``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tnc.decompose.forms import FormStage, blast, block_low_rank, monarch
from tnc.decompose.recipes import Recipe, RecipeEntry, register_recipe
from tnc.decompose.sizes import Size
from tnc.terms import Expression


def _blocks(form: Callable[..., Expression], *, rank: Size, blocks: int = 8) -> Recipe:
    return Recipe("", (FormStage(partial(form, blocks=(blocks, blocks)), rank),))


for _name, _summary, _source, _form in (
    ("block_low_rank", "a grid of blocks, each of low rank, by descent over blocks in G ⊗ H", "MATH.md section 4",
     block_low_rank),
    ("monarch", "block-diagonal × permutation × block-diagonal of any rank, in G ⊗ H", "arXiv:2204.00595", monarch),
    ("blast", "blocks with shared bases and their own couplings, by alternating least squares in G ⊗ H",
     "arXiv:2410.21262 (they: gradient descent in the Frobenius norm)", blast),
):  # fmt: skip
    register_recipe(_name, RecipeEntry(_summary, _source, ("rank", "blocks"), partial(_blocks, _form)))
