"""Laws of arithmetic with matrix product operators and of their gauges; the oracle is the dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from hypothesis import strategies as st
from torch import Tensor

from tnc.terms import Mpo
from tnc.testing.harness import Law, require, search_laws
from tnc.testing.mpo_laws import Modes, MpoByRank, MpoCase, mode_lists, mpo_cases, mpos

Gauge = Callable[[Mpo, int], Mpo]
Binary = Callable[[Mpo, Mpo], Mpo]
Batched = Callable[[Tensor, Modes, Modes, int], list[Mpo]]

_ROUNDING = 1e-10  # of float64 sums over a few hundred products, relative to the sizes of the operands


@dataclass(frozen=True, eq=False)
class GaugeCase:
    """An operator and the core that is to hold its weight."""

    mpo: Mpo
    center: int

    def __str__(self) -> str:
        return f"{_words(self.mpo)}, center {self.center}"


@dataclass(frozen=True, eq=False)
class PairCase:
    """Two operators."""

    a: Mpo
    b: Mpo

    def __str__(self) -> str:
        return f"{_words(self.a)}\nand {_words(self.b)}"


def check_mpo_gauge(gauge: Gauge, *, max_examples: int = 100, seed: int | None = 0) -> tuple[str, ...]:
    """Check ``gauge(operator, center)``, a canonical form with its weight in one core.

    Raises:
        LawError: at the first broken law.
    """
    return search_laws(_GAUGE_LAWS, gauge, _gauge_cases(), max_examples=max_examples, seed=seed)


def check_mpo_sum(add: Binary, *, max_examples: int = 100, seed: int | None = 0) -> tuple[str, ...]:
    """Check ``add(a, b)`` of operators of one shape over the same modes.

    Raises:
        LawError: at the first broken law.
    """
    return search_laws((the_sum_is_dense, bonds_add_up), add, _alike(), max_examples=max_examples, seed=seed)


def check_mpo_product(compose: Binary, *, max_examples: int = 100, seed: int | None = 0) -> tuple[str, ...]:
    """Check ``compose(a, b)``, the operator of the matrix product, over the same inner modes.

    Raises:
        LawError: at the first broken law.
    """
    return search_laws((the_product_is_dense,), compose, _in_turn(), max_examples=max_examples, seed=seed)


def check_mpo_batch(
    batched: Batched, alone: MpoByRank, *, max_examples: int = 50, seed: int | None = 0
) -> tuple[str, ...]:  # fmt: skip
    """Check that ``batched(weights, out_modes, in_modes, max_rank)`` gives what ``alone`` gives of each weight.

    Raises:
        LawError: at the first broken law.
    """

    def a_batch_is_a_loop(batched: Batched, case: MpoCase) -> None:
        """Bonds and matrices of a batch are those of its weights one by one."""
        batch = torch.stack([case.weight, -case.weight.flip(0), case.weight.flip(1)])
        for weight, found in zip(batch, batched(batch, case.out_modes, case.in_modes, case.rank), strict=True):
            expected = alone(weight, case.out_modes, case.in_modes, case.rank)
            require(found.ranks == expected.ranks, f"expected bonds {expected.ranks}; got {found.ranks}")
            errors = [float((weight.double() - dense(each)).norm()) for each in (found, expected)]
            allowed = 1e-6 * float(weight.double().norm()) + torch.finfo(weight.dtype).eps * float(dense(found).norm())
            require(abs(errors[0] - errors[1]) <= allowed, f"expected an error of {errors[1]:.9g}; got {errors[0]:.9g}")

    return search_laws((a_batch_is_a_loop,), batched, mpo_cases(), max_examples=max_examples, seed=seed)


def dense(mpo: Mpo) -> Tensor:
    """The matrix of an operator in float64: cores multiplied one after another, padding cut off."""

    def grown(left: Tensor, core: Tensor) -> Tensor:
        outs, ins, _ = left.shape
        product = torch.einsum("xya,aoib->xoyib", left, core.double())
        return product.reshape(outs * core.shape[1], ins * core.shape[2], core.shape[3])

    whole = reduce(grown, mpo.cores, torch.ones(1, 1, 1, dtype=torch.float64))
    return whole[: mpo.shape[0], : mpo.shape[1], 0]


def the_matrix_stays(gauge: Gauge, case: GaugeCase) -> None:
    """Cores change, their product does not."""
    _same(dense(gauge(case.mpo, case.center)), dense(case.mpo), float(dense(case.mpo).norm()))


def cores_are_orthonormal(gauge: Gauge, case: GaugeCase) -> None:
    """Cores before the center have orthonormal columns, those behind it orthonormal rows."""
    for k, core in enumerate(gauge(case.mpo, case.center).cores):
        matrix = core.double().flatten(0, 2) if k < case.center else core.double().flatten(1).mT
        if k != case.center:
            _same(matrix.mT @ matrix, torch.eye(matrix.shape[1], dtype=torch.float64), 1.0)


def no_bond_grows(gauge: Gauge, case: GaugeCase) -> None:
    """Bonds are at most those given, and the modes are the same."""
    found = gauge(case.mpo, case.center)
    require(all(r <= s for r, s in zip(found.ranks, case.mpo.ranks, strict=True)), f"got bonds {found.ranks}")
    modes = [(each.out_modes, each.in_modes, each.shape) for each in (found, case.mpo)]
    require(modes[0] == modes[1], f"expected modes and shape {modes[1]}; got {modes[0]}")


def the_sum_is_dense(add: Binary, case: PairCase) -> None:
    """The matrix is the sum of both matrices."""
    a, b = dense(case.a), dense(case.b)
    _same(dense(add(case.a, case.b)), a + b, float(a.norm() + b.norm()))


def bonds_add_up(add: Binary, case: PairCase) -> None:
    """Inner bonds are at most the sums of both; the ends are 1."""
    found, most = add(case.a, case.b).ranks, [r + s for r, s in zip(case.a.ranks, case.b.ranks, strict=True)]
    require(found[0] == found[-1] == 1, f"expected bonds of 1 at the ends; got {found}")
    require(all(r <= s for r, s in zip(found[1:-1], most[1:-1], strict=True)), f"expected at most {most}; got {found}")


def the_product_is_dense(compose: Binary, case: PairCase) -> None:
    """The matrix is the product of both matrices."""
    a, b = dense(case.a), dense(case.b)
    _same(dense(compose(case.a, case.b)), a @ b, float(a.norm() * b.norm()))


def _same(found: Tensor, expected: Tensor, size: float) -> None:
    require(found.shape == expected.shape, f"expected shape {tuple(expected.shape)}; got {tuple(found.shape)}")
    error = float((found - expected).norm())
    require(error <= _ROUNDING * max(size, 1.0), f"expected the same matrix; it is off by {error:.9g} of {size:.3g}")


_GAUGE_LAWS: tuple[Law[Gauge, GaugeCase], ...] = (no_bond_grows, the_matrix_stays, cores_are_orthonormal)


@st.composite
def _gauge_cases(draw: st.DrawFn) -> GaugeCase:
    mpo = draw(mpos())
    return GaugeCase(mpo, draw(st.integers(0, len(mpo.cores) - 1)))


@st.composite
def _alike(draw: st.DrawFn) -> PairCase:
    a = draw(mpos())
    return PairCase(a, draw(mpos(a.shape, (a.out_modes, a.in_modes))))


@st.composite
def _in_turn(draw: st.DrawFn) -> PairCase:
    a = draw(mpos())
    columns = draw(st.sampled_from((1, 2, 5, 12)))
    return PairCase(a, draw(mpos((a.shape[1], columns), (a.in_modes, draw(mode_lists(columns, len(a.cores)))))))


def _words(mpo: Mpo) -> str:
    return f"operator {mpo.shape}, modes {mpo.out_modes} x {mpo.in_modes}, bonds {mpo.ranks}"
