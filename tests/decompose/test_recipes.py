"""Every recipe runs, and does what its source says."""

import re

import pytest
import torch
from strategies_matrices import well_conditioned

from tnc.decompose import (
    RECIPES,
    BitsPerWeight,
    LowRankStage,
    QuantizeStage,
    Rank,
    RecipeEntry,
    compensate,
    recipe,
    register_recipe,
    truncated_svd,
)  # fmt: skip
from tnc.decompose.best import decompose_by
from tnc.errors import FormatError, RecipeError
from tnc.formats import IntFormat, TableFormat
from tnc.metric import Metric
from tnc.quant import gptq, rtn
from tnc.terms import Sum, dense64

PROBLEM = well_conditioned(16, 24, 0, fisher=True)
FORMAT = IntFormat(3, group_size=8)


def build(name, rank=4):
    size = BitsPerWeight(8) if name.endswith(("_pooled", "_bits", "_modes")) else rank
    options = {"bits": 3, "group_size": 8, "rank": size, "blocks": 2}
    return recipe(name, **{k: v for k, v in options.items() if k in RECIPES[name].options})


def run(name, rank=4):
    built = build(name, rank)
    return decompose_by(PROBLEM.weight, built, PROBLEM.stats())


def test_the_published_ones_are_there():
    assert {"svd", "asvd", "svd_llm", "svd_pooled", "rtn", "gptq", "lorc", "lqer", "qera", "eora"} <= RECIPES.keys()
    for entry in RECIPES.values():
        assert entry.summary
        assert re.search(r"arXiv:\d{4}\.\d{5}|MATH\.md|Eckart|Badri", entry.source)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs(name):
    result = run(name)
    assert 0 < result.report.lower_bound <= result.report.relative_error < 1
    assert build(name).describe().startswith(f"{name}(")


@pytest.mark.parametrize(("name", "metric"), [
    ("svd", Metric.identity), ("asvd", Metric.mean_abs), ("svd_llm", Metric.full), ("svd_fisher", Metric.fisher),
])  # fmt: skip
def test_low_rank_recipes(name, metric):
    expected = truncated_svd(PROBLEM.weight, 4, metric=metric(PROBLEM.stats()))
    assert torch.equal(dense64(run(name).operator), dense64(expected))


@pytest.mark.parametrize(("name", "base", "metric"), [
    ("lorc", rtn, Metric.identity), ("lqer", rtn, Metric.mean_abs), ("qera", rtn, Metric.full),
    ("eora", gptq, Metric.full), ("qlr_fisher", gptq, Metric.fisher),
])  # fmt: skip
def test_compensated_recipes(name, base, metric):
    stats = PROBLEM.stats()
    quantized = rtn(PROBLEM.weight, FORMAT, stats=stats) if base is rtn else gptq(PROBLEM.weight, stats, FORMAT)
    term = compensate(PROBLEM.weight, quantized, 4, metric=metric(stats))
    assert torch.equal(dense64(run(name).operator), dense64(Sum((quantized, term))))


def test_each_is_best_in_its_own_metric():
    stats = PROBLEM.stats()
    for metric, names in ((Metric.identity, ["lorc"]), (Metric.mean_abs, ["lqer"]), (Metric.full, ["qera"])):
        errors = {
            n: metric(stats).norm(PROBLEM.weight - dense64(run(n).operator)) for n in ("lorc", "lqer", "qera", "rtn")
        }
        assert min(errors, key=errors.get) in names
        assert max(errors, key=errors.get) == "rtn"
    assert run("qlr_fisher").report.predicted_nats < run("eora").report.predicted_nats
    assert run("svd_fisher").report.predicted_nats < run("svd_llm").report.predicted_nats


def test_rank_zero_is_the_base_and_names_are_normalised():
    assert torch.equal(dense64(run("eora", 0).operator), dense64(run("gptq").operator))
    built = recipe(" SVD-LLM ", rank=Rank(3))
    assert built.name == "svd_llm"
    assert built.stages == (LowRankStage(Rank(3), metric=Metric.full),)
    assert built.describe() == "svd_llm(rank=Rank(value=3, forced=False))"
    symmetric = recipe("rtn", bits=4, symmetric=True)
    assert symmetric.stages == (QuantizeStage(IntFormat(4, None, True), method="rtn"),)
    assert recipe("rtn", bits=4).stages[0].format == IntFormat(4)


def test_a_format_stands_in_for_bits():
    assert recipe("gptq", format="nf4", group_size=64).stages[0].format == TableFormat("nf4", 64)
    assert recipe("rtn", format="int4", symmetric=True).stages[0].format == IntFormat(4, symmetric=True)
    given = recipe("eora", format=IntFormat(3, 8), rank=2)
    assert given.stages == recipe("eora", bits=3, group_size=8, rank=2).stages
    assert recipe("gptq", format="nf4", group_size=64).describe() == "gptq(group_size=64, format=nf4)"


def test_factors_of_recipes_by_width_or_format():
    built = recipe("eora", bits=3, group_size=8, rank=4, factor_bits=4)
    assert built.stages[1].factor_format == IntFormat(4, group_size=8)
    assert recipe("caldera", bits=3, rank=4, factor_format="fp8_e4m3").stages[0].factor_format.table == "e4m3"
    assert recipe("qera", bits=3, rank=4, factor_format=IntFormat(8)).stages[1].factor_format == IntFormat(8)
    with pytest.raises(RecipeError, match=r"factor_format='nf4' already says factor_bits; leave out one of them"):
        recipe("eora", bits=3, rank=4, factor_bits=4, factor_format="nf4")


@pytest.mark.parametrize("name", ["qtip", "yaqa_trellis", "yaqa_trellis_lr"])
def test_trellises_take_more_states(name):
    rank = {"rank": 2} if "rank" in RECIPES[name].options else {}
    assert recipe(name, bits=2, **rank).stages[0].format.state_bits == 12
    assert recipe(name, bits=2, state_bits=14, **rank).stages[0].format.state_bits == 14


def test_pooled_carries_the_budget_of_the_model():
    assert recipe("svd_pooled", rank=BitsPerWeight(4)).pooled == BitsPerWeight(4)
    assert recipe("svd", rank=BitsPerWeight(4)).pooled is None
    with pytest.raises(RecipeError, match=r"svd_pooled\(rank=4\) needs BitsPerWeight\(b\)"):
        recipe("svd_pooled", rank=4)


def test_errors_of_the_registry():
    with pytest.raises(RecipeError, match=r"unknown recipe 'magic'; expected one of .*svd, asvd, svd_llm.*eora"):
        recipe("magic", rank=3)
    with pytest.raises(RecipeError, match=r"'svd' takes rank; it does not take bits, group_size. Leave those out."):
        recipe("svd", rank=3, bits=4, group_size=8)
    with pytest.raises(
        RecipeError,
        match=r"'eora' takes bits, group_size, symmetric, format, rank, factor_bits, factor_format; Missing: bits, r",
    ):
        recipe("eora")
    with pytest.raises(RecipeError, match=r"it does not take bits. Missing: rank\."):
        recipe("svd", bits=3)
    with pytest.raises(FormatError, match=r"bits=7"):
        recipe("rtn", bits=7)
    with pytest.raises(RecipeError, match=r"'svd' takes rank; it does not take format"):
        recipe("svd", rank=3, format="nf4")
    with pytest.raises(RecipeError, match=r"format='nf4' already says bits; leave out one of them"):
        recipe("rtn", format="nf4", bits=4)
    with pytest.raises(RecipeError, match=r"already says group_size, symmetric; leave out one"):
        recipe("rtn", format=IntFormat(4), group_size=4, symmetric=True)
    with pytest.raises(RecipeError, match=r"recipe 'svd_llm' is already registered .arXiv:2403.07378.; choose another"):
        register_recipe("SVD-LLM", RECIPES["svd"])


def test_a_recipe_of_ones_own(monkeypatch):
    monkeypatch.delitem(RECIPES, "lorc")
    register_recipe("LoRC", RecipeEntry("mine", "here", ("rank",), lambda rank: recipe("svd", rank=rank)))
    built = recipe("lorc", rank=2)
    assert (built.name, built.options) == ("lorc", {"rank": 2})
    monkeypatch.undo()
    assert RECIPES["lorc"].options != ("rank",)
