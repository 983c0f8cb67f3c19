"""`Monarch`: block-diagonal times permutation times block-diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tnc.terms.base import register
from tnc.terms.block_low_rank import BlockLowRank


@register
@dataclass(frozen=True, eq=False)
class Monarch(BlockLowRank):
    """`BlockLowRank` with interleaved output blocks: block j holds the rows j, j + out_blocks, j + 2 out_blocks, ...

    With ``blocks = (sqrt(n), sqrt(n))`` and rank 1 this is the Monarch matrix ``P L Pᵀ R`` of Dao et al. 2022
    (arXiv:2204.00595, definition 3.1): ``right`` is the block-diagonal R, ``left`` the block-diagonal L.
    """

    kind: ClassVar[str] = "monarch"
    _order: ClassVar[str] = "lj"
