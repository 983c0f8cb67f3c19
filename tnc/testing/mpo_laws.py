"""Laws of functions that turn a weight into a matrix product operator, by bond dimension or by tolerance.

The oracles are brute force: the matrix is unfolded at every bond and its singular values taken by a dense SVD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from tnc.networks import balanced_modes
from tnc.terms import Mpo, dense64
from tnc.testing.harness import Law, require, search_laws
from tnc.testing.oracle import storage_rounding
from tnc.testing.strategies import SIZES, shapes, weights

Modes = tuple[int, ...]
MpoByRank = Callable[[Tensor, Modes, Modes, int], Mpo]
MpoByTolerance = Callable[[Tensor, Modes, Modes, float], Mpo]

# Solvers through a float64 Gram matrix lose directions below sqrt(eps), 1.5e-8 of the largest.
_SOLVER = 1e-6


@dataclass(frozen=True, eq=False)
class MpoCase:
    """A weight, modes of both sides, and a limit: the largest bond dimension, or a relative tolerance."""

    weight: Tensor
    out_modes: Modes
    in_modes: Modes
    rank: int
    eps: float

    def __str__(self) -> str:
        return (
            f"Smallest failing case: weight {tuple(self.weight.shape)} {self.weight.dtype}, modes {self.out_modes} x "
            f"{self.in_modes}, rank {self.rank}, eps {self.eps}\nweight = torch.tensor({self.weight.tolist()!r})"
        )


def mode_lists(n: int, d: int) -> st.SearchStrategy[Modes]:
    """Modes of ``n``: exact or padded, with ones among them, in any order."""
    padded = st.lists(st.integers(1, 5), min_size=d, max_size=d).filter(lambda modes: prod(modes) >= n)
    balanced = st.permutations(balanced_modes(n, d))
    alone = st.permutations([n, *[1] * (d - 1)])
    choices = balanced | alone | padded if 5**d >= 2 * n else balanced | alone
    return choices.map(tuple)


@st.composite
def mpo_cases(draw: st.DrawFn, weight: st.SearchStrategy[Tensor] | None = None) -> MpoCase:
    """Weights of at most 24 x 24 over one to three sites: primes, 1 x n, padding, modes of size 1.

    Args:
        draw: supplied by Hypothesis.
        weight: strategy of the weights; ``None`` is all of `weights`.
    """
    drawn = draw(weights() if weight is None else weight)
    d = draw(st.integers(1, 3))
    return MpoCase(
        drawn, draw(mode_lists(drawn.shape[0], d)), draw(mode_lists(drawn.shape[1], d)), draw(st.integers(1, 8)),
        draw(st.sampled_from((0.5, 0.1, 0.01, 0.9))),
    )  # fmt: skip


@st.composite
def mpos(
    draw: st.DrawFn, shape: tuple[int, int] | None = None, modes: tuple[Modes, Modes] | None = None, *,
    dtype: torch.dtype = torch.float64, most: int = 4,
) -> Mpo:  # fmt: skip
    """Random operators of at most 24 x 24 with bond dimensions of at most ``most``, padded or not."""
    shape = draw(shapes(SIZES)) if shape is None else shape
    if modes is None:
        d = draw(st.integers(1, 3))
        modes = draw(mode_lists(shape[0], d)), draw(mode_lists(shape[1], d))
    ranks = [1, *(draw(st.integers(1, most)) for _ in range(len(modes[0]) - 1)), 1]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 255)))
    sizes = zip(ranks, *modes, ranks[1:], strict=False)
    return Mpo(tuple(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes), shape)


def check_mpo_approximation(
    decomposer: MpoByRank, *, cases: st.SearchStrategy[MpoCase] | None = None, max_examples: int = 100,
    seed: int | None = 0,
) -> tuple[str, ...]:  # fmt: skip
    """The laws of `check_mpo_decomposer` that hold for any approximation by bond dimension, near the best or not.

    Raises:
        LawError: at the first broken law.
    """
    drawn = mpo_cases() if cases is None else cases
    return search_laws(_LAWS_OF_ALL, decomposer, drawn, max_examples=max_examples, seed=seed)


def check_mpo_decomposer(
    decomposer: MpoByRank, *, cases: st.SearchStrategy[MpoCase] | None = None, max_examples: int = 100,
    seed: int | None = 0,
) -> tuple[str, ...]:  # fmt: skip
    """Check a decomposer by bond dimension, in the Frobenius norm, on many small weights.

    Args:
        decomposer: ``decomposer(weight, out_modes, in_modes, max_rank)`` returns an `Mpo` over these modes with no
            bond above ``max_rank``, stored in the dtype of ``weight``.
        cases: domain to search; ``None`` is all of `mpo_cases`.
        max_examples: cases tried a law.
        seed: of the search; ``None`` searches elsewhere every time.

    Returns:
        The names of the laws that hold.

    Raises:
        LawError: at the first broken law.
    """
    drawn = mpo_cases() if cases is None else cases
    return search_laws(_LAWS_BY_RANK, decomposer, drawn, max_examples=max_examples, seed=seed)


def check_mpo_tolerance(
    decomposer: MpoByTolerance, *, cases: st.SearchStrategy[MpoCase] | None = None, max_examples: int = 100,
    seed: int | None = 0,
) -> tuple[str, ...]:  # fmt: skip
    """Check a decomposer ``(weight, out_modes, in_modes, eps)`` by relative Frobenius tolerance, as stored.

    Raises:
        LawError: at the first broken law.
    """
    drawn = mpo_cases(weights(dtypes=(torch.float64, torch.float32))) if cases is None else cases
    return search_laws(_LAWS_BY_TOLERANCE, decomposer, drawn, max_examples=max_examples, seed=seed)


def form_is_kept(decomposer: MpoByRank, case: MpoCase) -> None:
    """An `Mpo` of the weight's shape, modes and dtype, padding sliced away."""
    found = _run(decomposer, case)
    require(isinstance(found, Mpo), f"expected an Mpo; got {type(found).__name__}")
    shape, modes = tuple(case.weight.shape), (case.out_modes, case.in_modes)
    require(
        (found.out_modes, found.in_modes) == modes, f"expected modes {modes}; got {found.out_modes, found.in_modes}"
    )
    require(found.shape == shape == tuple(found.to_dense().shape), f"expected shape {shape}; got {found.shape}")
    dtypes = {core.dtype for core in found.cores}
    require(dtypes == {case.weight.dtype}, f"expected cores in {case.weight.dtype}; got {dtypes}")


def ranks_are_bounded(decomposer: MpoByRank, case: MpoCase) -> None:
    """Bonds are Python ints, at most the limit and the smaller side of their unfolding."""
    found = _run(decomposer, case).ranks
    require(all(type(rank) is int for rank in found), f"expected Python ints; got {found}")
    most = [min(case.rank, *side.shape) for side in _unfoldings(case)]
    require(all(r <= m for r, m in zip(found[1:-1], most, strict=True)), f"expected bonds at most {most}; got {found}")


def weight_is_left_alone(decomposer: MpoByRank, case: MpoCase) -> None:
    """The weight is unchanged and no core shares its memory."""
    before = case.weight.clone()
    cores = _run(decomposer, case).cores
    require(torch.equal(before, case.weight), "expected the weight unchanged")
    home = case.weight.untyped_storage().data_ptr()
    require(all(core.untyped_storage().data_ptr() != home for core in cores), "expected cores of their own memory")


def zero_stays_zero(decomposer: MpoByRank, case: MpoCase) -> None:
    """The zero weight is reproduced exactly."""
    found = decomposer(torch.zeros_like(case.weight), case.out_modes, case.in_modes, case.rank)
    require(not bool(dense64(found).any()), "expected exact zeros for the case's weight times 0")


def no_unfolding_is_beaten(decomposer: MpoByRank, case: MpoCase) -> None:
    """The error is at least the Eckart-Young tail of every unfolding at its bond dimension."""
    error, found, allowance = _judge(decomposer, case)
    tails = [
        float(torch.linalg.svdvals(side)[r:].norm())
        for side, r in zip(_unfoldings(case), found.ranks[1:-1], strict=True)
    ]
    if found.padded:  # an operator may do as it likes in the padding, which the unfolding counts
        return
    worst = max(tails, default=0.0)
    require(error >= worst - allowance, f"expected an error of at least {worst:.9g}; got {error:.9g}")


def quasi_optimal(decomposer: MpoByRank, case: MpoCase) -> None:
    """The squared error is at most the sum of the tails of all unfoldings: d - 1 times the best possible."""
    error, _, allowance = _judge(decomposer, case)
    tails = [float(torch.linalg.svdvals(side)[case.rank :].norm()) for side in _unfoldings(case)]
    bound = sum(tail**2 for tail in tails) ** 0.5
    require(error <= bound + allowance, f"expected an error of at most {bound:.9g}; got {error:.9g}")


def full_rank_reconstructs(decomposer: MpoByRank, case: MpoCase) -> None:
    """With room for every direction nothing is lost but rounding."""
    room = max((min(side.shape) for side in _unfoldings(case)), default=1)
    full = MpoCase(case.weight, case.out_modes, case.in_modes, room, case.eps)
    found = _run(decomposer, full)
    error = float((case.weight.double() - dense64(found)).norm())
    allowance = 1e-13 * float(case.weight.double().norm()) + 2 * storage_rounding(found)
    require(error <= allowance, f"expected an error within rounding, {allowance:.3g}; got {error:.9g}")


def rank_never_hurts(decomposer: MpoByRank, case: MpoCase) -> None:
    """One more for every bond never increases the error (up to three sites, where that is a theorem)."""
    error, found, allowance = _judge(decomposer, case)
    more, _, other = _judge(decomposer, MpoCase(case.weight, case.out_modes, case.in_modes, case.rank + 1, case.eps))
    if found.padded:
        return
    require(more <= error + allowance + other, f"expected at most {error:.9g} at one rank more; got {more:.9g}")


def tolerance_is_met(decomposer: MpoByTolerance, case: MpoCase) -> None:
    """``||W - Ŵ|| <= eps ||W||`` as stored."""
    found = decomposer(case.weight, case.out_modes, case.in_modes, case.eps)
    error, size = float((case.weight.double() - dense64(found)).norm()), float(case.weight.double().norm())
    require(
        error <= case.eps * size * (1 + 1e-9), f"expected an error of at most {case.eps * size:.9g}; got {error:.9g}"
    )


def tolerance_is_used(decomposer: MpoByTolerance, case: MpoCase) -> None:
    """With two sites no smaller bond would do: the bond is the fewest directions that leave the tolerance."""
    if len(case.out_modes) != 2:
        return
    (side,) = _unfoldings(case)
    values = torch.linalg.svdvals(side)
    size = float(values.norm())
    fewest = next(r for r in range(1, len(values) + 1) if float(values[r:].norm()) <= (case.eps - 1e-5) * size + 1e-300)
    rank = decomposer(case.weight, case.out_modes, case.in_modes, case.eps).ranks[1]
    require(rank <= fewest, f"expected bond dimension {fewest}; got {rank}")


_LAWS_OF_ALL: tuple[Law[MpoByRank, MpoCase], ...] = (
    form_is_kept, ranks_are_bounded, weight_is_left_alone, zero_stays_zero, no_unfolding_is_beaten,
    full_rank_reconstructs,
)  # fmt: skip
_LAWS_BY_RANK = (*_LAWS_OF_ALL, quasi_optimal, rank_never_hurts)
_LAWS_BY_TOLERANCE: tuple[Law[MpoByTolerance, MpoCase], ...] = (tolerance_is_met, tolerance_is_used)


def _run(decomposer: MpoByRank, case: MpoCase) -> Mpo:
    return decomposer(case.weight, case.out_modes, case.in_modes, case.rank)


def _judge(decomposer: MpoByRank, case: MpoCase) -> tuple[float, Mpo, float]:
    """Error as stored, the operator, allowance."""
    found = _run(decomposer, case)
    allowance = _SOLVER * float(case.weight.double().norm()) + 2 * storage_rounding(found)
    return float((case.weight.double() - dense64(found)).norm()), found, allowance


def _unfoldings(case: MpoCase) -> list[Tensor]:
    """The weight, padded with zeros, as a matrix (sites before, sites after) for each bond, float64."""
    rows, columns = case.weight.shape
    full = torch.zeros(prod(case.out_modes), prod(case.in_modes), dtype=torch.float64)
    full[:rows, :columns] = case.weight
    d = len(case.out_modes)
    legs = full.reshape(*case.out_modes, *case.in_modes)
    sites = torch.movedim(legs, tuple(range(2 * d)), (*range(0, 2 * d, 2), *range(1, 2 * d, 2)))
    sizes = [o * i for o, i in zip(case.out_modes, case.in_modes, strict=True)]
    return [sites.reshape(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, d)]
