import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnc.errors import BudgetError
from tnc.planning import PooledLayer, PooledPlan, pooled_ranks


def cost(layer: PooledLayer, rank: int | None) -> tuple[int, float]:
    """(stored bits, nats) of one choice, by the definitions."""
    m, n = layer.shape
    if rank is None:
        return m * n * layer.dense_bits, 0.0
    return rank * (m + n) * layer.factor_bits, 0.5 * float((layer.sigma[rank:].double() ** 2).sum())


def total(layers, ranks):
    costs = [cost(layers[k], ranks[k]) for k in layers]
    return sum(c[0] for c in costs), sum(c[1] for c in costs)


def brute_force(layers, bits_per_weight):
    """Smallest nats of all combinations within the budget."""
    elements = sum(l.shape[0] * l.shape[1] for l in layers.values())
    options = [[cost(l, rank) for rank in (None, *range(len(l.sigma) + 1))] for l in layers.values()]
    sums = ([sum(part) for part in zip(*c, strict=True)] for c in itertools.product(*options))
    return min(nats for bits, nats in sums if bits / elements <= bits_per_weight)


@st.composite
def instances(draw):
    layers = {}
    for k in range(draw(st.integers(1, 3))):
        m, n = draw(st.integers(1, 8)), draw(st.integers(1, 8))
        power = draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
        sigma = draw(st.sampled_from([1e-3, 1.0, 10.0])) * torch.arange(1, min(m, n) + 1).double() ** -power
        sigma[draw(st.integers(0, min(m, n))) :] *= draw(st.sampled_from([0.0, 1.0]))
        factor_bits, dense_bits = draw(st.sampled_from([8, 16])), draw(st.sampled_from([16, 32]))
        layers[f"layer{k}"] = PooledLayer(sigma, (m, n), factor_bits, dense_bits)
    return layers, draw(st.floats(0.1, 34))


@given(instance=instances())
def test_against_all_combinations(instance):
    layers, budget = instance
    plan = pooled_ranks(layers, budget)
    elements = sum(l.shape[0] * l.shape[1] for l in layers.values())
    bits, nats = total(layers, plan.ranks)
    assert isinstance(plan, PooledPlan)
    assert plan.ranks.keys() == layers.keys()
    assert plan.storage_bits == bits
    assert bits / elements <= budget
    assert plan.predicted_nats == pytest.approx(nats, rel=1e-9, abs=1e-12)
    best, scale = brute_force(layers, budget), total(layers, dict.fromkeys(layers, 0))[1]
    assert plan.lower_bound_nats <= best + 1e-12 * scale
    assert best <= plan.predicted_nats + 1e-12 * scale
    # the greedy order loses at most the steepest segment that did not fit: less than one layer
    assert plan.predicted_nats - plan.lower_bound_nats <= max(cost(l, 0)[1] for l in layers.values()) + 1e-12 * scale


@given(instance=instances())
def test_nothing_that_fits_is_left_unbought(instance):
    """No single layer can be improved within what the plan leaves of the budget."""
    layers, budget = instance
    plan = pooled_ranks(layers, budget)
    rest = budget * sum(l.shape[0] * l.shape[1] for l in layers.values()) - plan.storage_bits
    for name, layer in layers.items():
        bits, nats = cost(layer, plan.ranks[name])
        for rank in (None, *range(len(layer.sigma) + 1)):
            other_bits, other_nats = cost(layer, rank)
            # a rank that takes as many bits as the dense layer is never of use
            assert other_bits - bits > rest or other_nats >= nats - 1e-9 * cost(layer, 0)[1]


@given(instance=instances())
def test_never_a_rank_at_or_above_break_even(instance):
    layers, budget = instance
    for name, rank in pooled_ranks(layers, budget).ranks.items():
        m, n = layers[name].shape
        if rank is not None:
            assert rank * (m + n) * layers[name].factor_bits < m * n * layers[name].dense_bits


@given(
    sizes=st.lists(st.integers(2, 8), min_size=2, max_size=3),
    budgets=st.lists(st.floats(0.1, 17), min_size=5, max_size=5),
)
def test_more_budget_is_never_worse_by_more_than_the_gap(sizes, budgets):
    layers = {str(k): PooledLayer(torch.arange(s, 0, -1).double() ** 2, (s, s + k)) for k, s in enumerate(sizes)}
    plans = [pooled_ranks(layers, b) for b in sorted(budgets)]
    for small, large in itertools.pairwise(plans):
        assert large.lower_bound_nats <= small.lower_bound_nats + 1e-9
        gap = large.predicted_nats - large.lower_bound_nats
        assert large.predicted_nats <= small.predicted_nats + gap + 1e-9


def test_optimum_where_the_budget_lands_on_a_hull_vertex():
    layers = {
        "a": PooledLayer(torch.tensor([8.0, 4, 2, 1, 0.5, 0.25]), (6, 6)),
        "b": PooledLayer(torch.tensor([5.0, 3, 1, 0.1, 0.01, 0.001]), (6, 6)),
    }
    per_rank = 12 * 16
    for components in range(5):  # equal steps: vertices are the first components of both, by sigma
        budget = components * per_rank / 72
        if components == 0:
            budget = 1e-9
        plan = pooled_ranks(layers, budget)
        assert plan.predicted_nats == pytest.approx(brute_force(layers, budget), rel=1e-12)
        assert plan.lower_bound_nats == pytest.approx(plan.predicted_nats, rel=1e-6)
    assert plan.ranks == {"a": 2, "b": 2}


def test_all_dense_where_the_budget_allows_it():
    layers = {k: PooledLayer(torch.ones(8), (8, 8)) for k in "ab"}
    plan = pooled_ranks(layers, 16)
    assert plan.ranks == {"a": None, "b": None}
    assert (plan.storage_bits, plan.predicted_nats, plan.lower_bound_nats) == (2 * 64 * 16, 0, 0)


def test_flat_spectrum_just_below_dense():
    """The hull of a flat spectrum is only (nothing, dense); the budget still buys ranks."""
    plan = pooled_ranks({"a": PooledLayer(torch.ones(64), (64, 64))}, 15)
    assert plan.ranks == {"a": 30}
    assert plan.predicted_nats == 17
    assert plan.lower_bound_nats == pytest.approx(2)  # a sixteenth of the 32 nats is not paid for


def test_exact_budget_of_a_rank_is_enough():
    for m, n in itertools.product(range(3, 40, 4), repeat=2):
        layer = PooledLayer(torch.arange(min(m, n), 0, -1) ** 8.0, (m, n))
        if 2 * (m + n) < m * n:
            assert pooled_ranks({"a": layer}, 2 * (m + n) * 16 / (m * n)).ranks["a"] == 2


@pytest.mark.parametrize("budget", [0, -1, float("nan")])
def test_budget_must_be_positive(budget):
    with pytest.raises(BudgetError, match=f"needs layers and a positive budget; got 1 and {budget}"):
        pooled_ranks({"a": PooledLayer(torch.ones(2), (2, 2))}, budget)


def test_needs_layers():
    with pytest.raises(BudgetError, match="got 0 and 4"):
        pooled_ranks({}, 4)
