"""`check_term`: every registered kind obeys the laws, and each broken term is caught by the law that names it."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from tnc.errors import LawError
from tnc.terms import Dense, Diagonal, LowRank, Product, Sum, base, from_spec, kinds
from tnc.testing import check_term, expressions
from tnc.testing.expressions import _LEAVES

COMBINATORS = {"sum", "product"}


def test_there_is_a_strategy_for_every_registered_kind():
    assert set(kinds()) - COMBINATORS == set(_LEAVES)


@pytest.mark.parametrize("kind", sorted(_LEAVES))
def test_leaves_obey_the_laws(kind):
    @settings(max_examples=8, deadline=None)
    @given(term=expressions(kinds=[kind], depth=0))
    def run(term):
        assert type(from_spec(term.spec(), term.tensors())) is type(term)
        check_term(term)

    run()


@settings(max_examples=12, deadline=None)
@given(term=expressions(depth=2))
def test_nested_expressions_obey_the_laws(term):
    check_term(term)


def test_the_names_of_the_laws_are_returned():
    assert check_term(Dense(torch.ones(2, 3))) == (
        "dense_has_the_shape",
        "spec_is_json",
        "round_trip_is_exact",
        "storage_counts_the_tensors",
        "gradient_reaches_x",
        "use_changes_nothing",
        "linear_matches_dense",
        "linear_is_linear",
    )


def test_rank_zero_and_wide_terms_pass():
    check_term(LowRank(torch.zeros(3, 0), torch.zeros(0, 5)))
    check_term(Sum((Dense(torch.randn(1, 40)), Product((Dense(torch.randn(1, 2)), Dense(torch.randn(2, 40)))))))
    check_term(Diagonal(torch.randn(6, dtype=torch.float16)))


class Broken(Dense):
    kind = "broken"


class TransposedDense(Broken):
    def to_dense(self):
        return super().to_dense().T


class NarrowDense(Broken):
    def to_dense(self):
        return super().to_dense().bfloat16()


class SpecWithDtype(Broken):
    def spec(self):
        return {**super().spec(), "dtype": torch.float32}


class SpecWithTuple(Broken):
    def spec(self):
        return {**super().spec(), "shape": self.shape}


class SpecOfAnotherKind(Broken):
    def spec(self):
        return {**super().spec(), "kind": "dense"}


@dataclasses.dataclass(frozen=True, eq=False)
class LosesAField(Broken):
    factor: float = 1.0

    def to_dense(self):
        return self.factor * super().to_dense()

    def linear(self, x):
        return self.factor * super().linear(x)


class RoundsOnTheWay(Broken):
    @classmethod
    def from_parts(cls, spec, tensors):
        return cls(tensors["matrix"].bfloat16().float())


class LosesATensor(Broken):
    def tensors(self):
        return {"matrix": self.matrix, "bias": torch.zeros(3)} if self.matrix.any() else {}

    @classmethod
    def from_parts(cls, spec, tensors):
        return Dense(tensors["matrix"])


class CountsHalf(Broken):
    @property
    def storage_bits(self):
        return super().storage_bits // 2


class CountsBytes(Broken):
    @property
    def storage_bits(self):
        return super().storage_bits // 8


class Detached(Broken):
    def linear(self, x):
        return super().linear(x.detach()) + 0 * x.sum()


class ChangesX(Broken):
    def linear(self, x):
        result = super().linear(x)
        if not x.requires_grad:
            x.mul_(2)
        return result


class ChangesItself(Broken):
    def to_dense(self):
        result = super().to_dense().clone()
        self.matrix.add_(1)
        return result


class Negated(Broken):
    def linear(self, x):
        return -super().linear(x)


class SwappedAxis(Broken):
    def linear(self, x):
        return x @ self.matrix.to(x.dtype)


class OutputInFloat32(Broken):
    def linear(self, x):
        return super().linear(x).to(torch.promote_types(x.dtype, torch.float32))


class FlattensBatches(Broken):
    def linear(self, x):
        return super().linear(x.reshape(-1, x.shape[-1]))


class RoundedToBfloat16(Broken):
    def linear(self, x):
        return super().linear(x) * (1 + 2**-7)


class MissesZero(Broken):
    def linear(self, x):
        return super().linear(torch.where(x == 0, torch.ones_like(x), x))


TERMS = {
    TransposedDense: "dense_has_the_shape",
    NarrowDense: "dense_has_the_shape",
    SpecWithDtype: "spec_is_json",
    SpecWithTuple: "spec_is_json",
    SpecOfAnotherKind: "spec_is_json",
    LosesAField: "round_trip_is_exact",
    RoundsOnTheWay: "round_trip_is_exact",
    LosesATensor: "round_trip_is_exact",
    CountsHalf: "storage_counts_the_tensors",
    CountsBytes: "storage_counts_the_tensors",
    Detached: "gradient_reaches_x",
    ChangesX: "use_changes_nothing",
    ChangesItself: "use_changes_nothing",
    Negated: "linear_matches_dense",
    OutputInFloat32: "linear_matches_dense",
    RoundedToBfloat16: "linear_matches_dense",
    MissesZero: "linear_is_linear",
}


@pytest.mark.parametrize("broken", TERMS, ids=lambda cls: cls.__name__)
def test_a_broken_term_is_caught_by_its_law(broken, monkeypatch):
    monkeypatch.setitem(base._KINDS, "broken", broken)
    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    term = broken(matrix, 2.0) if broken is LosesAField else broken(matrix)
    with pytest.raises(LawError, match=rf"^{TERMS[broken]}: ") as caught:
        check_term(term)
    assert "Smallest failing case" in str(caught.value) and f"{broken.__name__} (3, 5)" in str(caught.value)


@pytest.mark.parametrize("broken", (SwappedAxis, FlattensBatches))
def test_square_terms_hide_nothing(broken, monkeypatch):
    monkeypatch.setitem(base._KINDS, "broken", broken)
    with pytest.raises(LawError, match=r"^linear_matches_dense: "):
        check_term(broken(torch.tensor([[1.0, 2.0], [0.0, 1.0]])))


def test_the_failing_input_is_the_smallest(monkeypatch):
    monkeypatch.setitem(base._KINDS, "broken", Negated)
    with pytest.raises(LawError) as caught:
        check_term(Negated(torch.ones(2, 2)))
    assert "x of shape (*(), in_features) torch.float64" in str(caught.value)
    assert "manual_seed(0)" in str(caught.value)


def test_an_unregistered_kind_is_named():
    with pytest.raises(LawError, match=r"round_trip_is_exact: raised TNCError: unknown term kind 'broken'"):
        check_term(Broken(torch.ones(2, 2)))
