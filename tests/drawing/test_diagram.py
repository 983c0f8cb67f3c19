"""Diagrams are right as data (nodes, legs, bonds, decays) and come out as pictures."""

import builtins

import pytest
import torch
from hypothesis import given, settings
from strategies_matrices import generator

from tnc.drawing import diagram, draw
from tnc.drawing.layout import places
from tnc.errors import TNCError
from tnc.formats import IntFormat
from tnc.networks import tt_svd
from tnc.quant import rtn
from tnc.terms import Blast, Diagonal, LowRank, Monarch, Product, Sum, TensorRing, dense64
from tnc.testing import expressions


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_low_rank_decay_is_its_singular_values():
    term = LowRank(gaussian(9, 4), gaussian(4, 7, seed=1))
    (panel,) = diagram(term).panels
    (bond,) = panel.bonds
    singular = torch.linalg.svdvals(term.to_dense())[:4]
    assert bond.parts and bond.size == 4 and bond.nodes == (0, 1)
    torch.testing.assert_close(bond.values, singular / singular[0])
    assert [(leg.node, leg.size, leg.out) for leg in panel.legs] == [(0, 9, True), (1, 7, False)]


def test_mpo_decay_is_the_spectrum_of_every_unfolding():
    weight = gaussian(12, 12)
    term = tt_svd(weight, (2, 3, 2), (2, 2, 3), max_rank=3)
    (panel,) = diagram(term).panels
    sites = term.to_dense().reshape(2, 3, 2, 2, 2, 3).permute(0, 3, 1, 4, 2, 5)
    bonds = [bond for bond in panel.bonds if bond.values is not None]
    assert [bond.size for bond in bonds] == [3, 3] and len(panel.nodes) == 3 and len(panel.legs) == 6
    for cut, bond in zip((2, 4), bonds, strict=True):
        singular = torch.linalg.svdvals(sites.flatten(cut).flatten(0, cut - 1))[:3]
        torch.testing.assert_close(bond.values, singular / singular[0], rtol=1e-6, atol=1e-7)


def test_a_ring_is_not_parted_and_shows_the_norms_of_its_slices():
    ring = TensorRing((gaussian(2, 2, 3, 4), gaussian(4, 3, 2, 2, seed=1)))
    (panel,) = diagram(ring).panels
    closing = next(bond for bond in panel.bonds if bond.size == 2)
    assert not closing.parts
    norms = []
    for k in range(2):
        cores = (ring.cores[0][k : k + 1], ring.cores[1][..., k : k + 1])
        norms.append(TensorRing(cores).to_dense().norm())
    torch.testing.assert_close(closing.values, torch.stack(norms).sort(descending=True).values / max(norms))


def test_copy_dots():
    (panel,) = diagram(Diagonal(gaussian(5))).panels
    assert [node.kind for node in panel.nodes] == ["tensor", "copy"]
    assert [(leg.node, leg.out) for leg in panel.legs] == [(1, True), (1, False)]
    (panel,) = diagram(Blast(gaussian(2, 3, 4), gaussian(2, 5, 4), gaussian(5, 4, 2))).panels
    assert sum(node.kind == "copy" for node in panel.nodes) == 3  # the rank, and both block indices
    (panel,) = diagram(Monarch(gaussian(2, 3, 4, 2), gaussian(4, 2, 2, 3))).panels
    assert sum(node.kind == "copy" for node in panel.nodes) == 2


def test_sums_and_products():
    base = rtn(gaussian(6, 8), IntFormat(4, group_size=4))
    low_rank = LowRank(gaussian(6, 2), gaussian(2, 8))
    found = diagram(Product((Diagonal(gaussian(6)), Sum((base, low_rank)))))
    assert [panel.kind for panel in found.panels] == ["diagonal", "quantized", "low_rank"]
    assert (found.signs, found.closings) == (("", "· (", "+"), ("", "", ")"))
    assert found.panels[1].nodes[0].kind == "packed" and "int4" in found.panels[1].nodes[0].text
    assert found.bits_per_weight == pytest.approx(found.storage_bits / 48)


@settings(max_examples=40, deadline=None)
@given(term=expressions())
def test_every_expression_has_a_diagram_with_all_its_features(term):
    found = diagram(term)
    for panel in found.panels:
        spots = places(panel)
        assert len(set(spots)) == len(spots) == len(panel.nodes), "nodes lie apart"
        for out, size in zip((True, False), panel.shape, strict=True):
            sizes = [leg.size for leg in panel.legs if leg.out is out]
            assert torch.tensor(sizes or [1]).prod() == size
        assert all(0 <= end < len(panel.nodes) for bond in panel.bonds for end in bond.nodes)


def test_a_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    ring = TensorRing((gaussian(2, 2, 3, 4), gaussian(4, 3, 2, 5, seed=1), gaussian(5, 1, 1, 2, seed=2)))
    base = rtn(gaussian(6, 6), IntFormat(2))
    found = draw(Sum((base, ring, LowRank(gaussian(6, 0), gaussian(0, 6)))), tmp_path / "a.png", title="a layer")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and len(found.panels) == 3
    draw(base, tmp_path / "b.svg")
    assert "<svg" in (tmp_path / "b.svg").read_text() and dense64(base).shape == (6, 6)


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(TNCError, match=r'pictures need matplotlib; install it with: pip install "tnc\[plot\]"'):
        draw(Diagonal(torch.ones(2)), tmp_path / "a.png")
