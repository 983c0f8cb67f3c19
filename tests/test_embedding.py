"""`FactoredEmbedding`: the rows of the dense table, in every form, without the table, and back from disk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnc.checkpoint import load_checkpoint, load_layers, save_checkpoint
from tnc.decompose import truncated_svd
from tnc.embedding import FactoredEmbedding
from tnc.errors import BackendError, ShapeError
from tnc.formats import IntFormat
from tnc.networks import tt_svd
from tnc.quant import rtn
from tnc.terms import Dense, Hadamard, LowRank, Mpo, Product, Quantized, Sum, dense64
from tnc.terms.rows import gather_rows
from tnc.testing import expressions


@settings(max_examples=60, deadline=None)
@given(term=expressions(kinds=("dense", "low_rank", "mpo", "quantized")), data=st.data())
def test_rows_are_those_of_the_matrix(term, data):
    index = torch.tensor(data.draw(st.lists(st.integers(0, term.shape[0] - 1), max_size=5)), dtype=torch.long)
    try:
        found = gather_rows(term, index)
    except BackendError as error:
        assert "depend on other rows" in str(error)
        return
    expected = dense64(term)[index]
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * (1 + float(dense64(term).abs().max())))


WEIGHT = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
OPERATORS = {
    "mpo": tt_svd(WEIGHT, (5, 6), (3, 4), max_rank=6),
    "padded mpo": tt_svd(WEIGHT, (6, 6), (4, 4), max_rank=9),
    "low rank": truncated_svd(WEIGHT, 5, dtype=torch.float16),
    "quantized": rtn(WEIGHT, IntFormat(4, group_size=6)),
    "quantized + low rank": Sum((rtn(WEIGHT, IntFormat(2)), truncated_svd(WEIGHT, 2))),
    "rotated": Product((rtn(WEIGHT, IntFormat(8)), Hadamard.random(12, seed=0))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_it_stands_in_for_an_embedding(name):
    operator, dense = OPERATORS[name], torch.nn.Embedding(30, 12)
    module = FactoredEmbedding.from_embedding(dense, operator)
    ids = torch.tensor([[0, 29, 3], [7, 7, 1]])
    expected = torch.nn.functional.embedding(ids, operator.to_dense())
    torch.testing.assert_close(module(ids), expected.float(), rtol=1e-5, atol=1e-5)
    assert module(torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2, 12)
    assert module.half()(ids).dtype == torch.float16 and module.storage_bits == operator.storage_bits
    assert "FactoredEmbedding(12 -> 30)" in module.explain() and "kernels" not in module.explain()


def test_the_table_is_never_rebuilt(monkeypatch):
    def refuse(self):
        raise AssertionError("densified")

    modules = [FactoredEmbedding(OPERATORS[name]) for name in ("mpo", "low rank", "quantized + low rank")]
    for cls in (Mpo, LowRank, Sum):
        monkeypatch.setattr(cls, "to_dense", refuse)
    whole = Quantized.to_dense
    monkeypatch.setattr(Quantized, "to_dense", lambda self: whole(self) if self.shape[0] < 30 else refuse(self))
    for module in modules:
        assert module(torch.tensor([1, 2])).shape == (2, 12)


def test_gradients_reach_the_cores():
    module = FactoredEmbedding(OPERATORS["mpo"])
    module(torch.tensor([4, 4, 9])).square().sum().backward()
    touched = module.core0.grad.abs().sum((0, 2, 3)).nonzero().flatten().tolist()
    assert touched == [4 // 6, 9 // 6]


def test_mistakes_are_explained():
    with pytest.raises(BackendError, match=r"rows of a hadamard term cannot be gathered without its matrix"):
        FactoredEmbedding(Hadamard.random(8, seed=0))
    with pytest.raises(ShapeError, match=r"expected a plain torch.nn.Embedding without max_norm"):
        FactoredEmbedding.from_embedding(torch.nn.Embedding(30, 12, max_norm=1.0), OPERATORS["mpo"])
    with pytest.raises(ShapeError, match=r"use the operator made from its weight"):
        FactoredEmbedding.from_embedding(torch.nn.Embedding(31, 12), OPERATORS["mpo"])
    with pytest.raises(ShapeError, match=r"got ids of torch.float32; expected integers below 30"):
        FactoredEmbedding(OPERATORS["mpo"])(torch.zeros(2))
    with pytest.raises(ShapeError, match=r"an embedding has no bias"):
        FactoredEmbedding(Dense(WEIGHT), torch.zeros(30))


def test_a_model_with_one_is_saved_and_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30,
        max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(8)[None]
    model.model.embed_tokens = FactoredEmbedding.from_embedding(model.model.embed_tokens, OPERATORS["mpo"])
    with torch.no_grad():
        expected = model(ids).logits
        save_checkpoint(model, tmp_path / "saved")
        again = load_checkpoint(tmp_path / "saved")
        assert isinstance(again.model.embed_tokens, FactoredEmbedding)
        torch.testing.assert_close(again(ids).logits, expected)
    layers = load_layers(tmp_path / "saved")
    assert isinstance(layers["model.embed_tokens"], FactoredEmbedding)
