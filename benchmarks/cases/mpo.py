"""Matrix product operators: TT-SVD beside TensorLy's, and forward passes beside einsum and dense."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tensorly.decomposition import tensor_train_matrix
from tensorly.tt_matrix import TTMatrix
from torch import Tensor

from benchmarks.cases.layers import ERROR, LIMIT, dense_layer, off, run
from benchmarks.registry import Problem, case
from tnc import FactoredLinear, Mpo, tt_svd
from tnc.kernels.kept import KEPT
from tnc.networks import balanced_modes, from_tensorly, site_modes
from tnc.networks.modes import Modes
from tnc.terms import dense64


def _theirs(weight: Tensor, outs: Modes, ins: Modes, ranks: list[int]) -> Mpo:
    found: TTMatrix = tensor_train_matrix(weight.numpy().reshape(*outs, *ins), ranks)
    return from_tensorly(found)


def gaussian(rows: int, columns: int) -> Tensor:
    """Independent entries: no structure at all, the slowest spectrum to resolve."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * columns**-0.5


def decaying(size: int, modes: Modes, rank: int = 80) -> Tensor:
    """A matrix of two-site rank ``rank`` with singular values ``0.95**k``, plus 2 % of noise."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q
    o, i = modes
    sites = (left * 0.95 ** torch.arange(rank)) @ right.T
    dense = sites.reshape(o, o, i, i).permute(0, 2, 1, 3).reshape(size, size)
    noise = torch.randn(size, size, generator=generator)
    return dense + noise * (0.02 * float(dense.norm()) / float(noise.norm()))


def _decompose(
    weight: Tensor, outs: Modes, ins: Modes, *, rank: int | None = None, eps: float | None = None
) -> Problem:
    """Both ways at the same bond dimensions; an error above 1.0001 times the other's gets no time."""
    size = float(weight.double().norm())
    found = tt_svd(weight, outs, ins, max_rank=rank, eps=eps)
    reference = _theirs(weight, outs, ins, list(found.ranks))
    limit = 1.0001 * float((weight.double() - dense64(reference)).norm()) / size
    ways: dict[str, Any] = {
        "tensorly tensor_train_matrix": partial(_theirs, weight, outs, ins, list(found.ranks)),
        "tnc tt_svd": partial(tt_svd, weight, outs, ins, max_rank=rank, eps=eps),
    }
    return Problem(
        ways=ways,
        errors=lambda mpo: {"relative error": float((weight.double() - dense64(mpo)).norm()) / size},
        limit={"relative error": limit},
        repeats=3,
        once=frozenset({"tensorly tensor_train_matrix"}),
    )


def _square(cores: int) -> Problem:
    modes = balanced_modes(4096, cores)
    return _decompose(gaussian(4096, 4096), modes, modes, rank=64)


for _cores in (2, 3, 4):
    case(f"tt-svd-4096-{_cores}", f"4096×4096 Gaussian, {_cores} cores, rank 64")(partial(_square, _cores))


@case("tt-svd-4096-eps", "4096×4096 with decaying two-site spectrum, 2 cores, eps = 0.1")
def tt_svd_eps() -> Problem:
    """By tolerance; TensorLy is given the rank that came out."""
    modes = balanced_modes(4096, 2)
    return _decompose(decaying(4096, modes), modes, modes, eps=0.1)


@case("tt-svd-11008", "4096×11008 Gaussian, 3 cores, rank 64")
def tt_svd_wide() -> Problem:
    """The down projection of a 7B Llama."""
    outs, ins = site_modes((4096, 11008), 3)
    return _decompose(gaussian(4096, 11008), outs, ins, rank=64)


LETTERS = {2: "tij,aoib,bpjc->top", 3: "tijk,aoib,bpjc,cqkd->topq"}


def _forward(tokens: int, cores: int, rank: int, columns: int = 4096, rows: int = 4096) -> Problem:
    generator = torch.Generator().manual_seed(0)
    operator = random_mpo(rows, columns, cores, rank)
    x = torch.randn(tokens, columns, generator=generator)
    expected = x.double() @ dense64(operator).T
    dense = dense_layer(operator)
    KEPT.release()  # that of the case before
    planned = FactoredLinear(operator)

    def einsum() -> Tensor:
        result: Tensor = torch.einsum(LETTERS[cores], x.reshape(tokens, *operator.in_modes), *operator.cores)
        return result.reshape(tokens, rows)

    ways = {"dense nn.Linear": partial(run, dense, x), "torch.einsum": einsum, "tnc mpo": partial(run, planned, x)}
    return Problem(
        ways=ways,
        errors=lambda y: {ERROR: off(y, expected)},
        limit=LIMIT,
        repeats=9 if tokens <= 16 else 5,
    )


def random_mpo(rows: int, columns: int, cores: int, rank: int) -> Mpo:
    """Normal cores, all bonds alike."""
    generator = torch.Generator().manual_seed(0)
    outs, ins = site_modes((rows, columns), cores)
    ranks = [1, *[rank] * (cores - 1), 1]
    shapes = [(ranks[k], outs[k], ins[k], ranks[k + 1]) for k in range(cores)]
    return Mpo(tuple(torch.randn(s, generator=generator) / (s[0] * s[2]) ** 0.5 for s in shapes))


for _d, _rank in ((2, 16), (2, 64), (3, 16), (3, 64)):
    for _tokens in (1, 16, 256):
        _words = f"{_d} cores of bond {_rank}, {_tokens} tokens, float32"
        case(f"mpo-{_d}-{_rank}-{_tokens}", f"4096×4096, {_words}")(partial(_forward, _tokens, _d, _rank))
        case(f"mpo-{_d}-{_rank}-{_tokens}-wide", f"4096×11008, {_words}")(
            partial(_forward, _tokens, _d, _rank, columns=11008)
        )
