"""Leading directions of a large matrix from a block Krylov space: matrix products only.

Source: Musco and Musco 2015, arXiv:1504.05477.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnc.networks.gram import count, descending

_BLOCK = 48  # columns of a Krylov block
_SETTLED = 1e-5  # a space is large enough when another block lowers the squared error by less, relatively


def krylov(matrix: Tensor, rank: int, tail: float | None, energy: float, seed: int) -> tuple[Tensor, Tensor] | None:
    """Basis (p, r) and rest (r, q) from a Krylov space of ``M Mᵀ``; ``None`` where it would grow too large.

    The squared error is exact for the space at hand, ``energy - ||rest||²``; blocks are added until another one
    would not lower it.

    Args:
        matrix: (p, q).
        rank: largest number of directions.
        tail: squared error at which fewer are kept.
        energy: ``||M||²``.
        seed: of the Gaussian start.
    """
    width = _BLOCK if tail is not None else max(_BLOCK, rank // 2)
    generator = torch.Generator().manual_seed(seed)
    block = matrix @ torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    bases: list[Tensor] = []
    rests: list[Tensor] = []
    gram = torch.zeros(0, 0, dtype=torch.float64, device=matrix.device)
    before, kept = float("inf"), 0
    while 2 * (len(gram) + width) <= min(matrix.shape):
        bases.append(_against(block, bases))
        rests.append(bases[-1].mT @ matrix)
        gram = _grown(gram, rests)
        values, vectors = descending(gram)
        left = torch.cat([values.new_full((1,), energy), energy - values.cumsum(-1)]).clamp_min(0)
        keep = count(left, rank, tail)
        error = float(left[keep])
        reached = keep == rank or (tail is not None and error <= tail)
        settled = keep == kept and before - error <= _SETTLED * error
        if (reached and settled) or float(left[-1]) <= torch.finfo(matrix.dtype).eps * energy:
            chosen = vectors[:, :keep].to(matrix.dtype)
            return torch.cat(bases, dim=1) @ chosen, chosen.mT @ torch.cat(rests)
        before, kept = error, keep
        block = matrix @ rests[-1].mT
    return None


def _grown(gram: Tensor, rests: list[Tensor]) -> Tensor:
    """``C Cᵀ`` in float64 of the stacked ``rests``, from that of all but the last."""
    last = rests[-1].double()
    edge = (
        torch.cat([rest.double() @ last.mT for rest in rests[:-1]]) if len(rests) > 1 else gram.new_zeros(0, len(last))
    )
    return torch.cat([torch.cat([gram, edge], dim=1), torch.cat([edge.mT, last @ last.mT], dim=1)])


def _against(block: Tensor, bases: list[Tensor]) -> Tensor:
    """Orthonormal basis of the part of ``block`` outside the earlier bases; twice is enough (Kahan)."""
    for _ in range(2):
        for basis in bases:
            block = block - basis @ (basis.mT @ block)
        block = torch.linalg.qr(block).Q
    return block
