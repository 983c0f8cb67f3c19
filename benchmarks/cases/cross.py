"""Cross approximation of a 4096 x 4096 kernel matrix from its entries, beside TT-SVD of all of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.registry import Problem, case
from tnc import Mpo, tt_svd
from tnc.networks import Entries, balanced_modes, mpo_cross
from tnc.terms import dense64

_SIZE = 4096


def kernel(rows: Tensor, columns: Tensor) -> Tensor:
    """``1 / (1 + |x - y|)`` on the grid of [0, 10]: a kink on the diagonal, singular values that fall slowly."""
    return 1 / (1 + 10 * (rows - columns).double().abs() / _SIZE)


def _everything() -> Tensor:
    index = torch.arange(_SIZE)
    return kernel(index.unsqueeze(1), index).float()


def _errors(weight: Tensor, result: tuple[Mpo, int]) -> dict[str, float]:
    mpo, reads = result
    difference = weight - dense64(mpo)
    return {
        "relative error": float(difference.norm() / weight.double().norm()),
        "share of entries read": reads / weight.numel(),
        "numbers stored": float(mpo.params),
    }


def _beside(cores: int, rank: int | None, eps: float | None) -> Problem:
    """Both from the function: TT-SVD has to evaluate it everywhere first."""
    modes, weight = balanced_modes(_SIZE, cores), _everything()

    def by_svd() -> tuple[Mpo, int]:
        return tt_svd(_everything(), modes, modes, max_rank=rank, eps=eps), weight.numel()

    def by_cross() -> tuple[Mpo, int]:
        found = mpo_cross(Entries(kernel, (_SIZE, _SIZE)), modes, modes, max_rank=rank, eps=eps)
        return found.mpo, found.reads

    best = _errors(weight, by_svd())["relative error"]
    return Problem(
        ways={"tnc tt_svd of all entries": by_svd, "tnc mpo_cross": by_cross},
        errors=partial(_errors, weight),
        limit={"relative error": 1.5 * best if eps is None else eps},
        repeats=5,
    )


for _cores in (2, 3, 4):
    case(f"cross-4096-{_cores}", f"4096×4096 kernel matrix, {_cores} cores, rank 4")(partial(_beside, _cores, 4, None))
    case(f"cross-4096-{_cores}-eps", f"4096×4096 kernel matrix, {_cores} cores, eps = 1e-4")(
        partial(_beside, _cores, None, 1e-4)
    )
