"""`heal` brings a compressed model back to the dense one, trains factors only, and resumes bit for bit."""

import copy

import pytest
import torch

import tnc
from tnc.errors import ModelError, NonFiniteError
from tnc.models.demo import demo_model_path, demo_text
from tnc.models.heal import _schedule, heal, trainable_factors
from tnc.models.hf import load_model, load_tokenizer
from tnc.models.text import calibration_batches, token_windows

transformers = pytest.importorskip("transformers")


def tiny(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def ids(count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, (2, 12), generator=g) for _ in range(count)]


@pytest.fixture(scope="module")
def dense():
    return tiny()


@pytest.fixture(scope="module")
def small(dense):
    return tnc.compress(dense, tnc.recipe("eora", bits=2, rank=3), ids(8), dtype=torch.float16)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_both_losses_fall_and_only_factors_move(dense, small):
    model, teacher_before = copy.deepcopy(small), state(dense)
    before = state(model)
    report = heal(model, ids(), teacher=dense, block_steps=40, logit_steps=40, learning_rate=1e-2)
    for phase in ("blocks", "logits"):
        losses = report.losses[phase]
        assert len(losses) == 40 and sum(losses[-5:]) < 0.8 * sum(losses[:5]), phase
    after, factors = state(model), set(trainable_factors(model))
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == factors and report.trained == sum(after[name].numel() for name in factors)
    assert not any("codes" in name or "scale" in name or "bias" in name for name in factors)
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
    assert all(torch.equal(a, b) for a, b in zip(state(dense).values(), teacher_before.values(), strict=True))
    assert all(p.requires_grad for p in dense.parameters()) and all(p.grad is None for p in model.parameters())
    kl = tnc.evaluate(model, torch.cat(ids()), reference=dense).kl
    assert kl < 0.8 * tnc.evaluate(small, torch.cat(ids()), reference=dense).kl


@pytest.mark.parametrize("name", ["eora", "mpo", "mpo_ordered"])
def test_mixed_precision_trains_wide_factors(dense, name):
    """The same fine-tune in bfloat16 ends at nearly the loss of float32; factors come back in their stored dtype."""
    options = {"bits": 2, "rank": 3} if name == "eora" else {"rank": tnc.BitsPerWeight(12)}
    made, losses = tnc.compress(dense, tnc.recipe(name, **options), ids(8), dtype=torch.float16), []
    for autocast in (None, torch.bfloat16):
        model = copy.deepcopy(made)
        report = heal(
            model, ids(), teacher=dense, block_steps=4, logit_steps=8, learning_rate=1e-2, autocast=autocast
        )  # fmt: skip
        losses.append(report.losses["logits"])
        assert {p.dtype for p in trainable_factors(model).values()} == {torch.float16}
    assert losses[1] != losses[0] and losses[1][-1] < 0.9 * losses[1][0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.1)


def test_a_run_cut_short_ends_like_one_that_was_not(dense, small, tmp_path):
    whole, broken = copy.deepcopy(small), copy.deepcopy(small)
    options = {"teacher": dense, "block_steps": 4, "logit_steps": 6, "seed": 3}
    expected = heal(whole, ids(), **options)

    class Stop(Exception):
        pass

    def stop(phase, done, total):
        if (phase, done) == ("logits", 3):
            raise Stop

    file = tmp_path / "heal.safetensors"
    with pytest.raises(Stop):
        heal(broken, ids(), **options, state=file, save_every=2, progress=stop)
    assert file.exists()
    again = copy.deepcopy(small)
    found = heal(again, ids(), **options, state=file, save_every=2)
    assert found.resumed_at == 6 and found.losses == expected.losses and not file.exists()
    assert all(torch.equal(a, b) for a, b in zip(state(again).values(), state(whole).values(), strict=True))


def test_seeds_and_repeats(dense, small):
    one, two, other = (copy.deepcopy(small) for _ in range(3))
    for model, seed in ((one, 0), (two, 0), (other, 1)):
        heal(model, ids(), teacher=dense, block_steps=0, logit_steps=2, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(state(one).values(), state(two).values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(state(one).values(), state(other).values(), strict=True))


def test_an_exact_model_has_no_loss(dense):
    exact = tnc.compress(dense, tnc.recipe("svd", rank=tnc.Rank(16, forced=True)), include=["*.self_attn.q_proj"])
    report = heal(exact, ids(), teacher=dense, block_steps=1, logit_steps=1, learning_rate=0.0)
    assert report.losses["blocks"][0] < 1e-9 and abs(report.losses["logits"][0]) < 1e-6


def test_the_schedule_rises_and_falls():
    shares = [_schedule(step, 100) for step in range(100)]
    assert shares[0] == 0.2 and max(shares) == shares[5] == 1.0 and 0.1 <= shares[-1] < 0.102
    assert all(0 < share <= 1 for share in shares) and _schedule(0, 1) == 1.0


def test_mistakes_are_explained(dense, small, tmp_path):
    with pytest.raises(ModelError, match=r"heal got a LlamaForCausalLM without floating factors; .* Compress it first"):
        heal(dense, ids(), teacher=dense)
    deeper = tiny()
    deeper.model.layers.append(copy.deepcopy(deeper.model.layers[0]))
    with pytest.raises(ModelError, match=r"the model has no block 'model.layers.2'"):
        heal(copy.deepcopy(small), ids(), teacher=deeper)
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ModelError, match=r"junk is no state of tnc.heal"):
        heal(copy.deepcopy(small), ids(), teacher=dense, state=tmp_path / "junk")
    file, model = tmp_path / "state", copy.deepcopy(small)
    with pytest.raises(NonFiniteError, match=r"the logits loss at step 4 \(lower the learning rate\) holds 1 NaN"):
        heal(model, ids(), teacher=dense, block_steps=2, logit_steps=4, state=file, save_every=3,
             progress=lambda phase, done, total: done == 1 and phase == "logits" and _spoil(model))  # fmt: skip
    with pytest.raises(ModelError, match=r"state of another run: plan, seed differ"):
        heal(copy.deepcopy(small), ids(), teacher=dense, block_steps=2, logit_steps=5, seed=1, state=file)


def _spoil(model):
    next(iter(trainable_factors(model).values())).data.fill_(float("nan"))


def test_the_embedded_model_is_healed_in_seconds():
    dense, tokenizer = load_model(demo_model_path()), load_tokenizer(demo_model_path())
    batches = calibration_batches(tokenizer, demo_text("calibration"), context=64, sequences=8, batch_size=4)
    small = tnc.compress(dense, tnc.recipe("svd", rank=tnc.BitsPerWeight(10)))
    windows = list(token_windows(tokenizer, demo_text("evaluation"), 64))[:8]
    before = tnc.evaluate(small, windows, reference=dense).kl
    heal(small, batches, teacher=dense, block_steps=8, logit_steps=12, learning_rate=1e-2)
    assert tnc.evaluate(small, windows, reference=dense).kl < 0.8 * before
