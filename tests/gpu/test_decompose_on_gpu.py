"""Decompositions run where the weight is: on a CUDA device every form comes out as on the CPU. Needs a CUDA device."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tnc.decompose import BitsPerWeight, RelativeError, decompose
from tnc.decompose.chosen_modes import ChosenModesStage
from tnc.decompose.mpo_stage import MpoStage
from tnc.forms.contenders import contenders
from tnc.networks import adapt_ranks, als, mpo_lower_bound, site_order, tt_svd
from tnc.terms import dense64
from tnc.testing import make_problem

ROWS, COLUMNS, BITS = 48, 64, 8.0
FORMS = {each.name: each.stages for each in contenders((ROWS, COLUMNS), BITS, group_size=16)}
FORMS |= {
    "three cores by error": (MpoStage(RelativeError(0.3), cores=3),),
    "padded": (MpoStage(6, out_modes=(7, 7), in_modes=(8, 9)),),
    "rank 0": (MpoStage(0),),
    "chosen modes": (ChosenModesStage(BitsPerWeight(BITS)),),
}


@pytest.fixture(scope="module", params=["full", None])
def problem(request):
    metric = "full" if request.param is None else "fisher"
    return make_problem((ROWS, COLUMNS), hessian="full", gradient=request.param, metric=metric, seed=1)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_that_of_the_cpu(problem, name):
    expected = decompose(problem.weight, FORMS[name], problem.stats)
    found = decompose(problem.weight.cuda(), FORMS[name], problem.stats)
    assert all(tensor.is_cuda for tensor in found.operator.tensors().values())
    assert found.operator.spec() == expected.operator.spec()
    # iterations that stop early end elsewhere where an eigensolver has chosen other signs
    assert found.report.relative_error == pytest.approx(expected.report.relative_error, rel=0.05, abs=1e-6)
    assert found.report.lower_bound == pytest.approx(expected.report.lower_bound, rel=0.02, abs=1e-6)


def test_networks_are_fitted_where_the_weight_is(problem):
    weight, metric = problem.weight.cuda(), problem.metric
    start = tt_svd(weight, (6, 8), (8, 8), max_rank=6, metric=metric)
    assert start.cores[0].is_cuda
    fit = als(weight, start, metric=metric)
    assert fit.errors[-1] <= fit.errors[0] and fit.mpo.cores[0].is_cuda
    assert adapt_ranks(weight, start, eps=0.6, metric=metric).cores[0].is_cuda
    bound, _ = mpo_lower_bound(weight, fit.mpo, metric)
    assert bound <= float(metric.norm(weight.double() - dense64(fit.mpo)))


def test_orders_of_sites_are_searched_where_the_weight_is(problem):
    cpu, gpu = (site_order(w, 4, metric=problem.metric) for w in (problem.weight, problem.weight.cuda()))
    assert gpu.rows.is_cuda and gpu.after == pytest.approx(cpu.after, rel=0.02)
