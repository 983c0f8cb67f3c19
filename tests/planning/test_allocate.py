"""The knapsack against every combination (small) and HiGHS (large), with its certificate."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import linprog

from tnc.errors import BudgetError
from tnc.planning.allocate import Allocation, Menu, allocate, front, lower_hulls, reverse
from tnc.planning.close_gap import close_gap, worth_looking_at
from tnc.planning.exact import Limit, allocate_exactly
from tnc.planning.fuse import fuse


def menu_of(seed: int, units: int, options: int, *, shape: str = "random") -> Menu:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, options + 1, units)
    first = np.concatenate([[0], counts.cumsum()])
    usage = rng.integers(0, 50, first[-1]).astype(float)
    cost = rng.random(first[-1]) if shape == "random" else rng.integers(0, 5, first[-1]).astype(float)
    if shape == "curve":  # falling and convex with noise, as error curves are
        cost = 2.0 ** (-usage / 8) * rng.lognormal(sigma=0.2, size=len(usage)) * 100 ** rng.random(units).repeat(counts)
    return Menu(first, cost, usage)


@st.composite
def small_menus(draw):
    shape = draw(st.sampled_from(["random", "ties", "curve"]))
    menu = menu_of(draw(st.integers(0, 2**31)), draw(st.integers(1, 4)), draw(st.integers(1, 6)), shape=shape)
    return menu, draw(st.floats(0, 1))


def combinations(menu: Menu):
    units = [range(menu.first[u], menu.first[u + 1]) for u in range(menu.units)]
    return [np.array(c) for c in itertools.product(*units)]


def best_of(menu: Menu, limit: float, allowed=lambda chosen: True) -> float:
    return min((menu.cost[c].sum() for c in combinations(menu) if menu.usage[c].sum() <= limit and allowed(c)),
               default=np.inf)  # fmt: skip


def limit_of(menu: Menu, share: float) -> float:
    least = np.minimum.reduceat(menu.usage, menu.first[:-1]).sum()
    most = np.maximum.reduceat(menu.usage, menu.first[:-1]).sum()
    return least + share * (most - least) * 1.1


def check(menu: Menu, found, limit: float) -> None:
    assert (menu.unit[found.chosen] == np.arange(menu.units)).all()
    assert found.usage == menu.usage[found.chosen].sum() <= limit
    assert found.cost == pytest.approx(menu.cost[found.chosen].sum())
    assert found.lower_bound <= found.cost


@given(case=small_menus())
def test_certificate_against_all_combinations(case):
    menu, share = case
    limit = limit_of(menu, share)
    found = allocate(menu, limit)
    check(menu, found, limit)
    best = best_of(menu, limit)
    assert found.lower_bound <= best + 1e-12 * abs(best)
    assert best <= found.cost + 1e-12 * abs(best)
    assert found.multiplier >= 0


@given(case=small_menus())
def test_bound_is_the_linear_relaxation(case):
    """An independent oracle of the bound: scipy's linear program."""
    menu, share = case
    limit = limit_of(menu, share)
    rows = (menu.unit[None] == np.arange(menu.units)[:, None]).astype(float)
    solved = linprog(menu.cost, A_ub=menu.usage[None], b_ub=[limit], A_eq=rows, b_eq=np.ones(menu.units), bounds=(0, 1))
    found = allocate(menu, limit)
    assert found.lower_bound == pytest.approx(min(solved.fun, found.cost), rel=1e-6, abs=1e-7)


@given(case=small_menus())
def test_other_direction_of_the_budget(case):
    """Least usage within a cost is the same problem read the other way."""
    menu, share = case
    limit = limit_of(menu, share)
    found = allocate(menu, limit)
    back = allocate(reverse(menu), found.cost)
    assert back.lower_bound <= found.usage + 1e-9  # the choice found is one of those it bounds
    assert back.usage <= found.cost * (1 + 1e-12) + 1e-12


@given(case=small_menus())
@example(case=(Menu(np.array([0, 3]), np.array([0.01, 0.12, 0.07]), np.array([18.0, 49.0, 0.0])), 1e-308))
def test_exact_is_the_best_combination(case):
    menu, share = case
    limit = limit_of(menu, share)
    found = allocate_exactly(menu, [Limit(menu.usage, limit)])
    check(menu, found, limit)
    best = best_of(menu, limit)
    assert found.cost == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert found.lower_bound <= best + 1e-6 * max(1.0, float(menu.cost.max()))


@given(case=small_menus(), seed=st.integers(0, 2**31))
def test_closed_gap_is_the_best_combination(case, seed):
    """With fused groups or without, against every combination; nothing that a better choice takes is left out."""
    menu, share = case
    rng = np.random.default_rng(seed)
    group = np.unique(rng.integers(0, 3, menu.units), return_inverse=True)[1].ravel()
    scheme = rng.integers(0, 2, len(menu.cost)) * rng.integers(0, 2)
    possible = [c for c in combinations(menu) if agrees(menu, group, scheme, c)]
    if not possible:
        return
    limit = max(limit_of(menu, share), min(menu.usage[c].sum() for c in possible))
    fused = fuse(menu, group, scheme)
    hull = allocate(fused.menu, limit)
    chosen = fused.layers(hull.chosen)
    cost, usage = float(menu.cost[chosen].sum()), float(menu.usage[chosen].sum())
    given_ = Allocation(chosen, cost, usage, min(hull.lower_bound, cost), hull.multiplier)
    single = np.bincount(group)[group] == 1
    schemes = np.where(single[menu.unit], 0, scheme)
    found = close_gap(menu, limit, given_, group=group, scheme=schemes)
    check(menu, found, limit)
    assert agrees(menu, group, scheme, found.chosen)
    best = best_of(menu, limit, lambda c: agrees(menu, group, scheme, c))
    assert found.cost == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert given_.lower_bound - 1e-12 <= found.lower_bound <= best + 1e-6 * max(1.0, float(menu.cost.max()))


@given(case=small_menus(), seed=st.integers(0, 2**31), multiplier=st.floats(0, 2))
def test_no_option_of_a_better_choice_is_left_out(case, seed, multiplier):
    """Whatever choice is at hand, and at any multiplier."""
    menu, share = case
    rng = np.random.default_rng(seed)
    group = np.unique(rng.integers(0, 3, menu.units), return_inverse=True)[1].ravel()
    scheme = rng.integers(0, 2, len(menu.cost))
    limit = limit_of(menu, share)
    possible = [c for c in combinations(menu) if menu.usage[c].sum() <= limit
                and all(len(set(scheme[c][group == g])) == 1 for g in set(group))]  # fmt: skip
    if not possible:
        return
    now = possible[rng.integers(len(possible))]
    found = Allocation(now, float(menu.cost[now].sum()), float(menu.usage[now].sum()), -np.inf, multiplier)
    kept = set(worth_looking_at(menu, limit, found, group, scheme).tolist())
    for each in possible:
        if menu.cost[each].sum() < found.cost:
            assert set(each.tolist()) <= kept


def test_few_options_are_left_to_close_a_gap():
    """A model of 56 layers: a few options a layer of 200, and the optimum is proven (HiGHS over all of them agrees)."""
    for seed in range(3):
        menu = menu_of(seed, 56, 200, shape="curve")
        limit = limit_of(menu, 0.2)
        greedy = allocate(menu, limit)
        found = close_gap(menu, limit, greedy)
        layers, alike = np.arange(56), np.zeros(len(menu.cost), dtype=int)
        assert len(worth_looking_at(menu, limit, greedy, layers, alike)) < 10 * 56
        assert found.gap <= 1e-6 * found.cost
        assert found.cost <= greedy.cost
        assert found.cost == pytest.approx(allocate_exactly(menu, [Limit(menu.usage, limit)]).cost, rel=1e-6)


def test_gap_that_time_runs_out_on_stays_in_the_certificate():
    menu = menu_of(1, 60, 30, shape="curve")
    limit = limit_of(menu, 0.1)
    greedy = allocate(menu, limit)
    assert greedy.gap > 0
    found = close_gap(menu, limit, greedy, seconds=0.0)
    assert found.cost <= greedy.cost
    assert greedy.lower_bound <= found.lower_bound <= found.cost


def test_nothing_is_printed(capfd):
    """HiGHS mends the solution of this one and says so, which would end up in the JSON of a command."""
    rng = np.random.default_rng(13)
    menu = menu_of(13, 100, 60, shape="curve")
    menu = Menu(menu.first, menu.cost, menu.usage * 1e4 + rng.integers(0, 9999, len(menu.usage)))
    limit = limit_of(menu, 0.3)
    close_gap(menu, limit, allocate(menu, limit))
    assert capfd.readouterr().out == ""


@given(case=small_menus(), seed=st.integers(0, 2**31))
def test_two_limits_need_the_exact_solver(case, seed):
    menu, share = case
    seconds = np.random.default_rng(seed).integers(0, 50, len(menu.cost)).astype(float)
    both = [Limit(menu.usage, limit_of(menu, share), "bits"), Limit(seconds, 100.0, "time")]
    best = best_of(menu, both[0].value, lambda c: seconds[c].sum() <= 100)
    if np.isinf(best):
        with pytest.raises(BudgetError, match=r"within bits <= .* and time <= 100"):
            allocate_exactly(menu, both)
        return
    found = allocate_exactly(menu, both)
    assert found.cost == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert seconds[found.chosen].sum() <= 100


def agrees(menu, group, scheme, chosen) -> bool:
    return all(len(set(scheme[chosen[group == g]])) == 1 for g in set(group) if (group == g).sum() > 1)


@given(case=small_menus(), seed=st.integers(0, 2**31))
def test_fused_groups_take_one_scheme(case, seed):
    menu, share = case
    rng = np.random.default_rng(seed)
    group = np.unique(rng.integers(0, 3, menu.units), return_inverse=True)[1].ravel()
    scheme = rng.integers(0, 2, len(menu.cost))
    possible = [c for c in combinations(menu) if agrees(menu, group, scheme, c)]
    if not possible:
        with pytest.raises(BudgetError, match="none in common"):
            fuse(menu, group, scheme)
        return
    least = min(menu.usage[c].sum() for c in possible)
    limit = max(limit_of(menu, share), least)
    best = best_of(menu, limit, lambda c: agrees(menu, group, scheme, c))
    fused = fuse(menu, group, scheme)
    found = allocate(fused.menu, limit)
    chosen = fused.layers(found.chosen)
    assert agrees(menu, group, scheme, chosen)
    assert (menu.unit[chosen] == np.arange(menu.units)).all()
    assert menu.usage[chosen].sum() == found.usage <= limit
    assert menu.cost[chosen].sum() == pytest.approx(found.cost)
    assert found.lower_bound <= best + 1e-12
    assert best <= found.cost + 1e-12
    exact = allocate_exactly(menu, [Limit(menu.usage, limit)], group=group, scheme=scheme)
    assert agrees(menu, group, scheme, exact.chosen)
    assert exact.cost == pytest.approx(best, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_fused_options_hold_the_best_choice_for_every_multiplier(seed):
    menu = menu_of(seed, 4, 7, shape="curve")
    group, scheme = np.array([0, 0, 1, 1]), np.arange(len(menu.cost)) % 2
    scheme[menu.first[:-1]] = 0  # one scheme at least is common
    fused = fuse(menu, group, scheme).menu
    possible = [c for c in combinations(menu) if agrees(menu, group, scheme, c)]
    for multiplier in (0.0, 0.01, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0):
        best = min(menu.cost[c].sum() + multiplier * menu.usage[c].sum() for c in possible)
        found = np.minimum.reduceat(fused.cost + multiplier * fused.usage, fused.first[:-1]).sum()
        assert found == pytest.approx(best, rel=1e-9)


def test_certificate_on_two_hundred_random_instances():
    """Within the printed gap of every combination (small) and of HiGHS (large)."""
    for seed in range(180):
        menu = menu_of(seed, 1 + seed % 4, 6, shape=("random", "ties", "curve")[seed % 3])
        limit = limit_of(menu, seed / 180)
        found = allocate(menu, limit)
        assert found.cost - best_of(menu, limit) <= found.gap + 1e-12
    for seed in range(20):
        menu = menu_of(seed, 60, 30, shape="curve")
        limit = limit_of(menu, (seed + 1) / 40)
        found, exact = allocate(menu, limit), allocate_exactly(menu, [Limit(menu.usage, limit)])
        assert found.lower_bound <= exact.cost * (1 + 1e-9)
        assert exact.cost <= found.cost * (1 + 1e-6)
        assert found.gap <= 0.02 * found.cost


@given(case=small_menus())
def test_hull_vertices_against_their_definition(case):
    """A vertex is cheaper than every point of smaller usage and not above any chord between two options."""
    menu, _ = case
    vertices = set(lower_hulls(menu).tolist())
    for u in range(menu.units):
        place = range(menu.first[u], menu.first[u + 1])
        points = {(menu.usage[i], menu.cost[i]) for i in place}
        for i in place:
            x, y = menu.usage[i], menu.cost[i]
            dominated = any((a <= x and b < y) or (a < x and b <= y) for a, b in points)
            above = any(
                a < x < c and (b - y) * (c - x) + (d - y) * (x - a) < -1e-12
                for (a, b), (c, d) in itertools.product(points, repeat=2)
            )
            if i in vertices:
                assert not dominated
                assert not above
            elif not dominated and not above:
                assert any((menu.usage[j], menu.cost[j]) == (x, y) for j in vertices & set(place)) or on_edge(
                    points, x, y
                )


def on_edge(points, x, y) -> bool:
    return any(
        a < x < c and abs((b - y) * (c - x) + (d - y) * (x - a)) <= 1e-12
        for (a, b), (c, d) in itertools.product(points, repeat=2)
    )


def test_front_costs_fall_and_are_convex():
    found = front(menu_of(3, 40, 20, shape="curve"))
    slopes = np.diff(found.cost) / np.diff(found.usage)
    assert (slopes < 0).all()
    assert (np.diff(slopes) >= -1e-9 * abs(slopes[0])).all()


def test_limit_below_the_smallest_choice():
    menu = menu_of(0, 3, 4)
    with pytest.raises(BudgetError, match="below the least usage"):
        allocate(menu, -1)
    with pytest.raises(BudgetError, match="below the least usage"):
        allocate(menu, float("nan"))


def test_menus_that_are_none():
    empty = np.zeros(0)
    with pytest.raises(BudgetError, match="needs at least one"):
        front(Menu(np.array([0]), empty, empty))
    with pytest.raises(BudgetError, match="at least one option"):
        front(Menu(np.array([0, 1, 1]), np.ones(1), np.ones(1)))
    with pytest.raises(BudgetError, match="not finite"):
        front(Menu(np.array([0, 1]), np.array([np.nan]), np.ones(1)))
