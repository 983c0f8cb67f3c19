"""Laws of every expression: what `to_dense`, `linear`, `tensors`, `spec`, `storage_bits` owe each other."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from tnc.terms import Expression, dense64, from_spec
from tnc.testing.harness import Law, check_laws, require
from tnc.testing.oracle import magnitude

_BATCHES: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (3, 4), (0,), (2, 0, 3))
_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Inputs:
    """An input batch ``x`` (*batch, in_features), standard normal."""

    batch: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    about: str

    def draw(self, features: int, *, offset: int = 0) -> Tensor:
        """The input, another one for each ``offset``."""
        generator = torch.Generator().manual_seed(self.seed + offset)
        return torch.randn(*self.batch, features, generator=generator, dtype=torch.float64).to(self.dtype)

    def __str__(self) -> str:
        return (
            f"Smallest failing case: {self.about}, x of shape (*{self.batch}, in_features) {self.dtype}\n"
            f"Rebuild x: torch.randn(*{self.batch}, in_features, dtype=torch.float64, "
            f"generator=torch.Generator().manual_seed({self.seed})).to({self.dtype})"
        )


def check_term(term: Expression, *, seed: int = 0) -> tuple[str, ...]:
    """Check one expression against the laws of the operator algebra; may be called inside a Hypothesis test.

    Args:
        term: of a registered kind, with finite tensors.
        seed: of the inputs: batches of no, one and two axes and empty ones, each in three dtypes.

    Returns:
        The names of the laws that hold.

    Raises:
        LawError: at the first broken law: its name, what was expected, the smallest failing input.

    Cost: about 200 products with the term and a gradient check of ``4 in_features`` more.
    """
    about = _describe(term)
    inputs = [Inputs(batch, dtype, seed, about) for batch in _BATCHES for dtype in _DTYPES]
    still = check_laws(_LAWS_OF_DATA, term, [Inputs((2,), torch.float64, seed, about)])
    return still + check_laws(_LAWS_OF_USE, term, inputs)


def dense_has_the_shape(term: Expression, case: Inputs) -> None:
    """`to_dense` has the term's shape and a float dtype of at least 32 bits."""
    dense = term.to_dense()
    found = tuple(dense.shape)
    require(found == tuple(term.shape), f"expected to_dense() of shape {term.shape}; got {found}")
    require(
        dense.dtype in (torch.float32, torch.float64),
        f"expected to_dense() in float32 or float64; got {dense.dtype}",
    )


def spec_is_json(term: Expression, case: Inputs) -> None:
    """`spec` survives JSON and names the kind."""
    spec = term.spec()
    require(json.loads(json.dumps(spec)) == spec, f"expected a spec equal to itself after JSON; got {spec}")
    found = spec.get("kind")
    require(found == term.kind, f"expected the kind {term.kind!r} in the spec; got {found!r}")


def round_trip_is_exact(term: Expression, case: Inputs) -> None:
    """(`spec` through JSON, copies of `tensors`) rebuild the same matrix bit for bit."""
    copies = {name: tensor.clone() for name, tensor in term.tensors().items()}
    again = from_spec(json.loads(json.dumps(term.spec())), copies)
    require(type(again) is type(term), f"expected {type(term).__name__} again; got {type(again).__name__}")
    require(again.spec() == term.spec(), f"expected the spec {term.spec()} again; got {again.spec()}")
    names = sorted(again.tensors())
    require(names == sorted(copies), f"expected tensors {sorted(copies)} again; got {names}")
    same = torch.equal(again.to_dense(), term.to_dense())
    require(same, "expected the rebuilt term to stand for the same matrix bit for bit")


def storage_counts_the_tensors(term: Expression, case: Inputs) -> None:
    """`storage_bits` is the size of the stored tensors."""
    expected = 8 * sum(t.numel() * t.element_size() for t in term.tensors().values())
    require(term.storage_bits == expected, f"expected storage_bits = {expected}; got {term.storage_bits}")


def gradient_reaches_x(term: Expression, case: Inputs) -> None:
    """`linear` has the right derivative in x (finite differences in float64)."""
    x = case.draw(term.shape[1]).requires_grad_()
    agrees = torch.autograd.gradcheck(term.linear, (x,), eps=1e-3, atol=1e-4, rtol=1e-4, raise_exception=False)
    require(agrees, "expected the gradient of linear(x) in x to agree with finite differences")


def linear_matches_dense(term: Expression, case: Inputs) -> None:
    """``linear(x)`` is ``x @ to_dense().T`` in the dtype of x."""
    x = case.draw(term.shape[1])
    given = term.linear(x)
    expected = x.double() @ dense64(term).T
    require(
        given.shape == expected.shape and given.dtype == case.dtype,
        f"expected linear(x) of shape {tuple(expected.shape)} in {case.dtype}; "
        f"got {tuple(given.shape)} in {given.dtype}",
    )
    for name, value in (("linear(x)", given), ("x @ to_dense().T", x.double() @ term.to_dense().double().T)):
        excess = (value.double() - expected).abs() - _rounding(term, case, x.abs())
        require(not bool((excess > 0).any()), f"expected {name} to equal x @ dense64(term).T within rounding")


def linear_is_linear(term: Expression, case: Inputs) -> None:
    """``linear(2 x - y)`` is ``2 linear(x) - linear(y)``, and 0 goes to 0."""
    x, y = case.draw(term.shape[1]), case.draw(term.shape[1], offset=1)
    both = (2 * x.double() - y.double()).to(case.dtype)
    excess = (term.linear(both).double() - 2 * term.linear(x).double() + term.linear(y).double()).abs()
    excess = excess - 2 * _rounding(term, case, 2 * x.abs() + y.abs())
    require(not bool((excess > 0).any()), "expected linear(2 x - y) = 2 linear(x) - linear(y)")
    zero = term.linear(torch.zeros_like(x))
    require(not bool(zero.any()), "expected linear(0) = 0")


def use_changes_nothing(term: Expression, case: Inputs) -> None:
    """Neither the stored tensors nor x change by use."""
    stored = {name: tensor.clone() for name, tensor in term.tensors().items()}
    x = case.draw(term.shape[1])
    before = x.clone()
    term.to_dense()
    term.linear(x)
    changed = [name for name, tensor in term.tensors().items() if not torch.equal(tensor, stored[name])]
    require(not changed, f"expected stored tensors unchanged by use; {', '.join(changed)} changed")
    require(torch.equal(x, before), "expected x unchanged by linear(x)")


_LAWS_OF_DATA: tuple[Law[Expression, Inputs], ...] = (
    dense_has_the_shape, spec_is_json, round_trip_is_exact, storage_counts_the_tensors, gradient_reaches_x,
)  # fmt: skip
_LAWS_OF_USE: tuple[Law[Expression, Inputs], ...] = (
    use_changes_nothing, linear_matches_dense, linear_is_linear,
)  # fmt: skip


def _rounding(term: Expression, case: Inputs, size: Tensor) -> Tensor:
    """Bound on rounding in ``linear``: sixteen roundings to a dtype and one a term of every inner sum."""
    floats = [t.dtype for t in term.tensors().values() if t.is_floating_point()]
    computed = torch.float64 if set(floats) == {torch.float64} else torch.float32
    coarse = max(torch.finfo(case.dtype).eps, torch.finfo(computed).eps)
    fine = torch.finfo(torch.float32).eps if coarse > 1e-12 else coarse
    longest = max((max(t.shape, default=1) for t in term.tensors().values()), default=1)
    bound: Tensor = (16 * coarse + longest * fine) * (size.double() @ magnitude(term).T)
    return bound


def _describe(term: Expression) -> str:
    stored = ", ".join(f"{k}: {tuple(t.shape)} {t.dtype}" for k, t in term.tensors().items())
    return f"{type(term).__name__} {tuple(term.shape)} with tensors {{{stored}}}"
