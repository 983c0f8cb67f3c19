"""Defects that other tensor-network libraries ship, each impossible here, over every way that makes an operator."""

import subprocess
import sys

import numpy
import pytest
import torch
from hypothesis import settings
from torch import nn

from tnc.decompose import MpoStage, Rank, decompose
from tnc.errors import LawError, RankError
from tnc.formats import IntFormat
from tnc.modules import FactoredLinear
from tnc.networks import (
    Entries,
    adapt_ranks,
    als,
    gram,
    mpo_cross,
    right_canonical,
    round_mpo,
    scale,
    truncate,
    tt_svd,
    tt_svd_batched,
)
from tnc.terms import Mpo, dense64
from tnc.testing import check_mpo_refiner, check_mpo_rounder, make_problem

FEW = max(settings.default.max_examples // 4, 10)


def by_als(weight, mpo, metric):
    return als(weight, mpo, metric=metric, sweeps=1).mpo


def test_every_law_of_a_refiner():
    assert "no_error_is_raised" in check_mpo_refiner(by_als, max_examples=FEW)


def test_every_law_of_a_rounder():
    check_mpo_rounder(lambda mpo, rank: round_mpo(mpo, max_rank=rank), max_examples=FEW)


def overwrites(weight, mpo, metric):
    mpo.cores[0].mul_(1.0 + 1e-3)
    return by_als(weight, mpo, metric)


@pytest.mark.parametrize(
    ("law", "broken"),
    [
        ("no_error_is_raised", lambda w, mpo, metric: scale(by_als(w, mpo, metric), -1.0)),
        ("no_error_is_raised|the_best_stays", lambda w, mpo, metric: scale(mpo, 0.9)),
        ("the_form_is_kept", lambda w, mpo, metric: right_canonical(mpo)),
        ("the_form_is_kept|no_error", lambda w, mpo, metric: tt_svd(w, mpo.out_modes, mpo.in_modes, max_rank=1)),
        ("inputs_are_left_alone", overwrites),
    ],
)
def test_a_broken_refiner_is_seen(law, broken):
    with pytest.raises(LawError, match=law):
        check_mpo_refiner(broken, max_examples=30)


@pytest.mark.parametrize(
    ("law", "broken"),
    [
        ("ranks_are_bounded|what_is_written_twice", lambda mpo, rank: mpo),
        ("full_rank_reconstructs|rounding_twice", lambda mpo, rank: scale(round_mpo(mpo, max_rank=rank), 1.001)),
        ("what_is_written_twice|full_rank", lambda mpo, rank: round_mpo(mpo, max_rank=max(rank - 1, 1))),
    ],
)
def test_a_broken_rounder_is_seen(law, broken):
    with pytest.raises(LawError, match=law):
        check_mpo_rounder(broken, max_examples=30)


PROBLEM = make_problem((24, 36), hessian="full", gradient="full", metric="fisher", seed=2)


def ways(weight):
    """Operators of a weight by every way there is."""
    outs, ins = (4, 6), (6, 6)
    exact = tt_svd(weight, outs, ins)
    stats = PROBLEM.stats
    yield "tt_svd", exact
    yield "batched", tt_svd_batched(weight.unsqueeze(0), outs, ins, max_rank=30)[0].mpo
    yield "als", by_als(weight, tt_svd(weight, outs, ins, max_rank=3), PROBLEM.metric)
    yield "adapt_ranks", adapt_ranks(weight, exact, eps=0.5, metric=PROBLEM.metric, sweeps=1)
    yield "round", round_mpo(exact, max_rank=3)
    yield "one core", tt_svd(weight, (24,), (36,))
    source = Entries(lambda r, c: weight[r, c], (24, 36))
    yield "cross", mpo_cross(source, outs, ins, max_rank=3, dtype=weight.dtype).mpo
    for name, stage in (
        ("stage", MpoStage(3)), ("bits", MpoStage(3, core_format=(IntFormat(8), None))),
        ("every bond", MpoStage((3, 2), cores=3)),
    ):  # fmt: skip
        yield name, decompose(weight, (stage,), stats).operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_source_is_neither_shared_nor_changed_and_its_dtype_comes_back(dtype):
    weight = PROBLEM.weight.to(dtype)
    before, home = weight.clone(), weight.untyped_storage().data_ptr()
    for name, operator in ways(weight):
        tensors = operator.tensors()
        assert all(t.untyped_storage().data_ptr() != home for t in tensors.values()), name
        if isinstance(operator, Mpo):
            assert {t.dtype for t in tensors.values()} == {dtype}, name
        before_change = operator.to_dense()
        weight.add_(1)
        assert torch.equal(operator.to_dense(), before_change), name
        weight.copy_(before)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stage", [MpoStage(3), MpoStage(3, core_format=IntFormat(8))])
def test_a_bias_is_the_one_given_or_none(bias, stage):
    layer = nn.Linear(36, 24, bias=bias)
    operator = decompose(layer.weight.detach(), (stage,)).operator
    module = FactoredLinear.from_linear(layer, operator)
    assert (module.bias is None) == (layer.bias is None)
    assert ("bias" in module.state_dict()) == bias
    zero = module(torch.zeros(2, 36))
    assert torch.equal(zero[0], layer.bias if bias else torch.zeros(24))


@pytest.mark.parametrize("shape", [(13, 7), (1, 1), (1, 23), (17, 1)])
@pytest.mark.parametrize("cores", [1, 2, 3, 4])
def test_prime_sizes_have_every_number_of_cores(shape, cores):
    problem = make_problem(shape, hessian="full", gradient="full", metric="fisher", seed=0)
    for stage in (MpoStage(50, cores=cores), MpoStage(50, cores=cores, core_format=IntFormat(8))):
        found = decompose(problem.weight, (stage,), problem.stats)
        assert found.operator.shape == shape
        assert found.report.relative_error < 0.02


def test_numpy_integers_end_as_python_ones():
    for rank in (numpy.int64(3), Rank(numpy.int64(3))):
        report = decompose(PROBLEM.weight, (MpoStage(rank, core_format=IntFormat(8)),), PROBLEM.stats).report
        assert all(type(bond) is int for bond in report.bonds)
        assert type(MpoStage(rank).bond((24, 36), torch.float32)) is int
    with pytest.raises(RankError, match="integer bond dimension"):
        MpoStage(2.5).bond((24, 36), torch.float32)
    found = mpo_cross(Entries(lambda r, c: PROBLEM.weight[r, c], (24, 36)), (4, 6), (6, 6), max_rank=numpy.int64(3))
    assert all(type(rank) is int for rank in found.mpo.ranks)


@pytest.mark.parametrize("modes", [((4, 6), (6, 6)), ((24, 1), (36, 1)), ((2, 12), (2, 18)), ((2, 3, 4), (3, 3, 4))])
def test_no_gram_matrix_is_on_the_larger_side(monkeypatch, modes):
    sides = []

    def recorded(matrix, precision):
        sides.append(matrix.shape[-2] <= matrix.shape[-1])
        return gram.row_gram(matrix, precision)

    monkeypatch.setattr(truncate, "row_gram", recorded)
    found = tt_svd(PROBLEM.weight, *modes, max_rank=2)
    assert all(sides)
    assert sides or max(found.ranks) == 1
    assert dense64(found).shape == (24, 36)


def test_no_result_depends_on_whether_opt_einsum_is_there():
    """It is required: without it nothing imports."""
    code = "import sys; sys.modules['opt_einsum'] = None; import tnc"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "opt_einsum" in done.stderr
