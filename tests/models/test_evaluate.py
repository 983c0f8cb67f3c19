import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tnc.errors import ModelError, NonFiniteError, TextError
from tnc.models.evaluate import bits_per_weight, evaluate, evaluate_many, model_bytes
from tnc.models.text import TokenWindows
from tnc.modules import FactoredLinear
from tnc.terms import Dense, LowRank, Sum

VOCABULARY = 11


class Tiny(nn.Module):
    """Logits of a token from the mean of the tokens so far; every window length has its own answer."""

    def __init__(self, seed, scale=1.0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, 6, dtype=dtype)
        self.head = nn.Linear(6, VOCABULARY, dtype=dtype)
        self.scale = scale

    def forward(self, tokens):
        x = self.embedding(tokens).cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]
        return self.scale * self.head(x.to(self.head.weight.dtype))


def windows_of(length, context, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (length,), generator=generator)
    return TokenWindows(tokens, torch.randint(1, 5, (length,), generator=generator), context)


def brute_force(model, dense, windows):
    """Per window: scored tokens, nats, KL, agreement, paired difference; one window and one token at a time."""
    rows = []
    with torch.no_grad():
        for window in windows:
            if len(window) < 2:
                continue
            q, p = model(window[None])[0, :-1].double(), dense(window[None])[0, :-1].double()
            nats = cross_entropy(q, window[1:], reduction="sum")
            kl = kl_div(log_softmax(q, -1), log_softmax(p, -1), log_target=True, reduction="sum")
            same = sum(int(a.argmax() == b.argmax()) for a, b in zip(q, p, strict=True))
            delta = nats - cross_entropy(p, window[1:], reduction="sum")
            rows.append([len(window) - 1, float(nats), float(kl), same, float(delta)])
    return torch.tensor(rows, dtype=torch.float64)


@given(length=st.integers(3, 60), context=st.integers(2, 20), batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_scores_equal_brute_force_whatever_the_batches(length, context, batch, seed):
    windows = windows_of(length, context, seed)
    dense, model = Tiny(seed), Tiny(seed + 1, scale=3.0)
    rows = brute_force(model, dense, windows)
    count, nats, kl, same, delta = (rows.sum(0) / rows[:, 0].sum()).tolist()
    found = evaluate(model, windows, reference=dense, batch_size=batch)
    assert count == 1 and found.tokens == rows[:, 0].sum()
    expected = (nats, math.exp(nats), kl, same, delta)
    got = (found.nats, found.perplexity, found.kl, found.top1_agreement, found.delta_nats)
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-13)
    scored = sum(int(part[1:].sum()) for part in windows.byte_lengths.split(context))
    assert found.bits_per_byte == pytest.approx(nats * found.tokens / math.log(2) / scored, rel=1e-12)


@given(length=st.integers(41, 90), seed=st.integers(0, 99))
def test_standard_errors_follow_the_ratio_estimator(length, seed):
    windows, dense, model = windows_of(length, 10, seed), Tiny(seed), Tiny(seed + 1)
    rows = brute_force(model, dense, windows)
    found = evaluate(model, windows, reference=dense)
    for column, error in ((1, found.nats_error), (2, found.kl_error), (4, found.delta_nats_error)):
        residual = rows[:, column] - rows[:, column].sum() / rows[:, 0].sum() * rows[:, 0]
        # With residuals of mean zero this is W times their sample variance over the squared token count.
        expected = (len(rows) * residual.var()).sqrt() / rows[:, 0].sum()
        assert error == pytest.approx(float(expected), rel=1e-9)


def test_standard_error_of_equal_windows_is_that_of_their_means():
    windows, model = windows_of(80, 8), Tiny(0)
    means = torch.tensor([evaluate(model, [w]).nats for w in windows], dtype=torch.float64)
    assert evaluate(model, windows).nats_error == pytest.approx(float(means.std() / math.sqrt(10)), rel=1e-9)
    assert evaluate(model, [next(iter(windows))]).nats_error is None


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    found = evaluate(Tiny(0, scale=0.0), windows_of(30, 7))
    assert found.perplexity == pytest.approx(VOCABULARY) and found.nats_error == pytest.approx(0, abs=1e-12)
    assert (found.kl, found.kl_error, found.top1_agreement, found.delta_nats) == (None,) * 4


def test_a_model_against_itself_differs_in_nothing():
    found = evaluate(Tiny(0), windows_of(30, 7), reference=Tiny(0))
    assert (found.kl, found.top1_agreement, found.delta_nats, found.delta_nats_error) == (0, 1, 0, 0)


def test_small_differences_survive_in_float32():
    class Shifted(Tiny):
        def forward(self, tokens):
            return (50 * super().forward(tokens) + self.shift).to(torch.float32)

    dense, model = Shifted(0), Shifted(0)
    generator = torch.Generator().manual_seed(0)
    dense.shift = torch.zeros(VOCABULARY, dtype=torch.float64)
    model.shift = 1e-3 * torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    windows = windows_of(60, 10)
    rows = brute_force(model, dense, windows)
    found = evaluate(model, windows, reference=dense)
    assert 0 < found.kl < 1e-5
    assert found.kl == pytest.approx(float(rows[:, 2].sum() / rows[:, 0].sum()), rel=1e-9)


def test_tokens_ruled_out_by_both_models_count_nothing():
    class Masked(Tiny):
        def forward(self, tokens):
            return super().forward(tokens).index_fill(-1, torch.tensor([VOCABULARY - 1]), -math.inf)

    windows = [torch.tensor([0, 1, 2, 3, 4])]
    found = evaluate(Masked(1), windows, reference=Masked(0))
    assert math.isfinite(found.kl) and found.kl > 0 and found.bits_per_byte is None


def test_chunks_of_rows_do_not_change_the_scores(monkeypatch):
    windows = windows_of(50, 13)
    whole = evaluate(Tiny(1), windows, reference=Tiny(0))
    monkeypatch.setattr("tnc.models.scores._CHUNK", 3 * VOCABULARY)
    parts = evaluate(Tiny(1), windows, reference=Tiny(0))
    assert list(parts.to_json().values()) == pytest.approx(list(whole.to_json().values()), rel=1e-12)


def test_many_models_share_one_pass_of_the_reference():
    calls = []
    dense = Tiny(0)
    dense.register_forward_hook(lambda *_: calls.append(1))
    windows = windows_of(40, 10)
    models = {"a": Tiny(1), "b": Tiny(2), "dense": Tiny(0)}
    found = evaluate_many(models, windows, reference=dense, batch_size=2)
    assert len(calls) == 2
    for name, model in models.items():
        assert found[name] == evaluate(model, windows, reference=dense, batch_size=2)


def test_progress_and_state_of_the_model():
    model, seen = Tiny(0), []
    model.head.eval()
    evaluate(model, windows_of(40, 10), batch_size=3, progress=lambda *args: seen.append(args))
    assert seen == [("evaluate", 3, 4), ("evaluate", 4, 4)]
    assert model.training and model.embedding.training and not model.head.training


def test_to_json_is_json():
    found = evaluate(Tiny(1), windows_of(40, 10), reference=Tiny(0))
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    assert {"perplexity", "bits_per_byte", "tokens", "kl", "top1_agreement"} <= found.to_json().keys()


def test_hopeless_models_have_infinite_perplexity():
    class Wrong(nn.Module):
        def forward(self, tokens):
            return 1e6 * nn.functional.one_hot(tokens * 0, VOCABULARY).double()

    assert evaluate(Wrong(), [torch.tensor([1, 2, 3])]).perplexity == math.inf


def test_nothing_to_score():
    with pytest.raises(TextError, match="no window of at least 2 tokens to score; pass windows of token_windows"):
        evaluate(Tiny(0), [torch.tensor([1])])


def test_nan_names_the_model():
    broken = Tiny(0, scale=math.nan)
    with pytest.raises(NonFiniteError, match=r"mean loss of broken is nan; expected a finite .* load it in float32"):
        evaluate_many({"fine": Tiny(0), "broken": broken}, windows_of(20, 5))


def test_windows_that_do_not_fit_the_model():
    class Config:
        max_position_embeddings, vocab_size = 8, VOCABULARY

    model = Tiny(0)
    model.config = Config()
    assert evaluate(model, windows_of(20, 8)).tokens == 17
    with pytest.raises(ModelError, match=r"windows of 9 tokens .* model can read .*=8\); cut the text .* at most 8"):
        evaluate(model, windows_of(20, 9))
    with pytest.raises(ModelError, match=r"token id 11; model knows ids below 11. Use the tokenizer of this model"):
        evaluate(model, [torch.tensor([1, VOCABULARY])])


def factored(rows, columns, rank, dtype=torch.float16):
    return FactoredLinear(LowRank(torch.zeros(rows, rank, dtype=dtype), torch.zeros(rank, columns, dtype=dtype)))


def test_bits_per_weight_counts_all_stored_bits():
    assert bits_per_weight(Tiny(0)) is None
    first = factored(6, 4, 2)
    model = nn.Sequential(first, nn.Linear(5, 5), factored(5, 8, 1), first)
    assert bits_per_weight(model) == (2 * (6 + 4) + 1 * (5 + 8)) * 16 / (6 * 4 + 5 * 8)
    both = FactoredLinear(Sum((Dense(torch.zeros(3, 4)), LowRank(torch.zeros(3, 1), torch.zeros(1, 4)))))
    assert bits_per_weight(both) == 32 * (12 + 7) / 12


def test_model_bytes_counts_tied_tensors_once():
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False), nn.Linear(3, 2).half())
    model.register_buffer("steps", torch.zeros(5, dtype=torch.int64))
    assert model_bytes(model) == 2 * 7 * 3 * 4 + (3 * 2 + 2) * 2 + 5 * 8
    model[1].weight = model[0].weight
    assert model_bytes(model) == 7 * 3 * 4 + (3 * 2 + 2) * 2 + 5 * 8


@pytest.mark.shared_models
def test_published_figures_of_the_shared_models(shared):
    pytest.importorskip("transformers")
    from tnc.models.hf import load_model, load_tokenizer
    from tnc.models.text import read_text, token_windows

    # Prefix of the text in the models' README (all 200,000 characters: 51,507 tokens, 29.091, 1.2546).
    folder = shared / "models" / "tnc-llama-27m"
    text = read_text(shared / "data" / "validation" / "books-valid.txt.xz")[:12_000]
    model, windows = load_model(folder), token_windows(load_tokenizer(folder), text, 512)
    found = evaluate(model, windows)
    brute = torch.cat([_token_nats(model, window) for window in windows])
    assert found.tokens == len(brute)
    assert found.nats == pytest.approx(float(brute.mean()), rel=1e-5)
    scored = text.encode()
    assert int(windows.byte_lengths.sum()) == len(scored)
    assert found.perplexity == pytest.approx(27.8666, rel=1e-4)
    assert found.bits_per_byte == pytest.approx(1.26634, rel=1e-4)
    assert 0 <= model_bytes(model) - 4 * 26_747_392 < 1000  # the rest are rotary frequencies


def _token_nats(model, window):
    with torch.no_grad():
        logits = model(window[None]).logits[0, :-1].double()
    return cross_entropy(logits, window[1:], reduction="none")
