"""Statistics of whole models against brute force: ordinary hooks and one ordinary backward pass."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tnc.errors import ModelError, NonFiniteError, ShapeError, StatsError
from tnc.experts import unfuse_experts
from tnc.models.calibrate import calibrate, iter_block_stats
from tnc.models.capture import InputCapture
from tnc.models.hidden_states import HiddenStates
from tnc.models.labels import sample_labels
from tnc.models.layers import select_layers
from tnc.models.sequences import heldout_sequences, read_sequences

# float64 models: sums over at most 60 tokens in another order differ by a few eps of the largest entry.
TIGHT = 1e-11
SMALL = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 24,
}


def llama(layers=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, initializer_range=0.3, **{**SMALL, **options})
    return LlamaForCausalLM(config).to(dtype)


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(num_hidden_layers=2, num_local_experts=3, initializer_range=0.3, **SMALL)
    config._experts_implementation = "eager"  # grouped products know no float64
    return MixtralForCausalLM(config).double()


def unfused():
    model = mixtral()
    assert unfuse_experts(model) == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    return model


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=12, n_layer=2, n_head=2, vocab_size=24, bos_token_id=0, eos_token_id=0, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).double()


class Plain(nn.Module):
    """No list of blocks, one input in two layers, a layer that runs twice, and no HF output object."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(24, 6)
        self.a, self.b, self.twice = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 24)
        self.double()

    def forward(self, ids):
        x = self.embedding(ids)
        return self.lm_head(x + self.twice(torch.tanh(self.twice(torch.tanh(self.a(x)) * self.b(x)))))


class AddsInPlace(nn.Module):
    """Blocks that add to their input in place."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, states):
            states += self.a(torch.tanh(states))
            return states

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.lm_head = nn.Embedding(24, 6), nn.Linear(6, 24)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.double()

    def forward(self, ids):
        states = self.embedding(ids).clone()
        for block in self.blocks:
            states = block(states)
        return self.lm_head(states)


BUILDERS = {
    "llama": llama,
    "mixtral": mixtral,
    "unfused": unfused,
    "gpt2": gpt2,
    "plain": Plain,
    "in place": AddsInPlace,
}


def tokens(count, length, seed=0):
    return torch.randint(0, 24, (count, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, ids):
    output = model(ids)
    return output if isinstance(output, torch.Tensor) else output.logits


def brute_force(model, sequences, seed, heldout=()):
    """H, mean |x|, held-out H and G of every layer from ordinary passes over single sequences."""
    model = copy.deepcopy(model).eval()
    layers = select_layers(model)
    rows = {name: ([], [], []) for name in layers}
    current = {}

    def forward_hook(name):
        def hook(module, args, output):
            output.retain_grad()
            current.setdefault(name, []).append((args[0].detach(), output))

        return hook

    for name, layer in layers.items():
        layer.register_forward_hook(forward_hook(name))
    for number, sequence in enumerate(sequences):
        current.clear()
        logits = logits_of(model, sequence[None])
        labels = sample_labels(logits[0].detach(), number, seed=seed)
        (-logits[0].log_softmax(-1)[torch.arange(len(labels)), labels]).sum().backward()
        for name, calls in current.items():
            for x, output in calls:
                rows[name][number in heldout].append(x.flatten(0, -2))
                if number not in heldout:
                    rows[name][2].append(output.grad.flatten(0, -2))

    total = sum(len(s) for number, s in enumerate(sequences) if number not in heldout)

    def second(parts, count=None):
        x = torch.cat(parts)
        return x.T @ x / (count or len(x))

    return {
        name: (second(x), torch.cat(x).abs().mean(0), second(held) if held else None, second(g, total))
        for name, (x, held, g) in rows.items()
    }


def assert_close(a, b, tolerance=TIGHT):
    assert a.shape == b.shape
    scale = max(float(b.abs().max()), 1e-300)
    assert float((a - b).abs().max()) <= tolerance * scale


def assert_stats(stats, expected, tolerance=TIGHT):
    assert list(stats) == list(expected)
    for name, (h, mean_abs, heldout, g) in expected.items():
        assert_close(stats[name].inputs.second, h, tolerance)
        assert_close(stats[name].inputs.mean_abs, mean_abs, tolerance)
        if heldout is None:
            assert stats[name].heldout is None
        else:
            assert_close(stats[name].heldout.second, heldout, tolerance)
        if stats[name].gradient is not None:
            assert_close(stats[name].gradient.second, g, tolerance)


def assert_same(a, b, tolerance=TIGHT):
    assert list(a) == list(b)
    for name in a:
        for part in ("inputs", "heldout", "gradient"):
            one, other = getattr(a[name], part), getattr(b[name], part)
            assert (one is None) == (other is None), (name, part)
            if one is not None:
                assert one.tokens == other.tokens
                assert_close(one.second, other.second, tolerance)
                assert_close(one.mean_abs, other.mean_abs, tolerance)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("fisher", [True, False])
def test_equals_brute_force(kind, fisher):
    model, ids = BUILDERS[kind](), tokens(6, 7)
    stats = calibrate(model, [ids[:4], ids[4:]], fisher=fisher, heldout_share=0.4, seed=3)
    heldout = heldout_sequences(6, 0.4)
    assert heldout == {2, 4}
    assert_stats(stats, brute_force(model, list(ids), 3, heldout))
    layer = next(iter(stats.values()))
    assert (layer.tokens, layer.heldout.tokens) == (4 * 7, 2 * 7)
    assert all((s.gradient is not None) == fisher for s in stats.values())
    assert not fisher or all(float(s.gradient.second.abs().max()) > 0 for s in stats.values())


@settings(deadline=None, max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=7), seed=st.integers(0, 2**33),
    share=st.sampled_from([0.0, 0.1, 0.3, 0.5]), cuts=st.lists(st.integers(1, 3), min_size=7, max_size=7),
    side=st.sampled_from(["left", "right", "hole"]),
)  # fmt: skip
def test_padding_and_grouping_do_not_matter(lengths, seed, share, cuts, side):
    model = llama(2)
    sequences = [tokens(1, length, seed=number)[0] for number, length in enumerate(lengths)]
    heldout = heldout_sequences(len(sequences), share)
    expected = brute_force(model, sequences, seed, heldout)
    assert_stats(calibrate(model, [s[None] for s in sequences], heldout_share=share, seed=seed), expected)
    batches, first = [], 0
    for cut in cuts:
        if sequences[first : first + cut]:
            batches.append(padded(sequences[first : first + cut], side))
        first += cut
    stats = calibrate(model, batches, heldout_share=share, seed=seed)
    assert_stats(stats, expected)
    kept = sum(len(s) for number, s in enumerate(sequences) if number not in heldout)
    assert all(s.tokens == kept and s.gradient.tokens == kept for s in stats.values())


def padded(sequences, side):
    width = max(len(s) for s in sequences) + 1
    ids = torch.full((len(sequences), width), 23)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        places = torch.arange(len(sequence))
        places = places + (width - len(sequence) if side == "left" else int(side == "hole") * (places > 0).long())
        ids[row, places], mask[row, places] = sequence, 1
    return {"input_ids": ids, "attention_mask": mask}


def test_merging_equals_calibrating_together():
    model, ids = llama(2), tokens(5, 6)
    together = calibrate(model, [ids], fisher=False, heldout_share=0)
    parts = [calibrate(model, [part], fisher=False, heldout_share=0) for part in (ids[3:], ids[:3])]
    assert_same({name: parts[0][name].merge(parts[1][name]) for name in together}, together)


def test_order_of_batches_does_not_matter_for_h():
    model, ids = llama(2), tokens(4, 6)
    forwards = calibrate(model, [ids[:1], ids[1:]], fisher=False, heldout_share=0)
    assert_same(calibrate(model, [ids[1:], ids[:1]], fisher=False, heldout_share=0), forwards)


def test_seed_of_labels():
    model, ids = llama(2), tokens(3, 6)
    one, again, other = (calibrate(model, [ids], seed=seed) for seed in (0, 0, 1))
    name = next(iter(one))
    assert torch.equal(one[name].gradient.second, again[name].gradient.second)
    assert not torch.allclose(one[name].gradient.second, other[name].gradient.second)
    assert torch.equal(one[name].inputs.second, other[name].inputs.second)
    calibrate(model, [ids], seed=-1)


def test_sampled_labels_follow_the_softmax():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0], dtype=torch.float64)
    labels = sample_labels(probabilities.log().expand(20000, 6), 5, seed=1)
    counts = torch.bincount(labels, minlength=6) / 20000
    assert counts[probabilities == 0].sum() == 0
    assert float((counts - probabilities).abs().max()) < 5 * (0.25 / 20000) ** 0.5  # five standard errors
    assert not torch.equal(labels, sample_labels(probabilities.log().expand(20000, 6), 6, seed=1))
    last = torch.full((200, 3), -1e4)
    last[:, 2] = 0
    assert bool((sample_labels(last, 0, seed=0) == 2).all())


@pytest.mark.parametrize(("kind", "blocks", "each"), [("llama", 3, 4), ("gpt2", 2, 4), ("mixtral", 2, 2)])
def test_one_accumulator_per_distinct_input(kind, blocks, each):
    stats = calibrate(BUILDERS[kind](), [tokens(4, 5)])
    for part in ("inputs", "heldout"):
        assert len({id(getattr(layer, part)) for layer in stats.values()}) == blocks * each
    assert len({id(layer.gradient) for layer in stats.values()}) == len(stats)
    if kind == "llama":
        q, k, v, o, gate, up, down = list(stats.values())[:7]
        assert q.inputs is k.inputs is v.inputs and gate.inputs is up.inputs and q.heldout is v.heldout
        assert len({id(x.inputs) for x in (q, o, gate, down)}) == 4


def test_inputs_changed_in_place_are_distinct():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.a(x)
            x *= 2
            return y + self.b(x) + self.c(x.view(1, -1, 3))[0]

    model, x = Changing(), torch.randn(5, 3)
    capture = InputCapture({"a": model.a, "b": model.b, "c": model.c})
    with torch.no_grad(), capture.watching():
        model(x.clone())
    found = capture.moments()
    assert_close(found["b"].second, 4 * found["a"].second, 1e-6)
    assert found["c"].tokens == 5


def test_a_transposed_view_is_distinct():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.randn(4, 4)
    capture = InputCapture({"a": a, "b": b})
    with torch.no_grad(), capture.watching():
        a(x), b(x.T)
    assert_close(capture.moments()["b"].second, (x @ x.T / 4).double(), 1e-6)


def test_heldout_sequences():
    assert heldout_sequences(20, 0.1) == {9, 19}
    assert heldout_sequences(100, 0.29) == {i for i in range(100) if (i + 1) * 29 // 100 > i * 29 // 100}
    assert len(heldout_sequences(100, 0.29)) == 29
    assert heldout_sequences(5, 0.1) == {4} and heldout_sequences(1, 0.9) == frozenset()
    assert heldout_sequences(1000, 0) == frozenset() and 0 not in heldout_sequences(50, 0.99)


def test_order_of_blocks():
    model, ids = llama(3), tokens(3, 4)
    assert [index for index, _ in iter_block_stats(model, [ids])] == [2, 1, 0]
    assert [index for index, _ in iter_block_stats(model, [ids], fisher=False)] == [0, 1, 2]
    assert [index for index, _ in iter_block_stats(model, [ids], sequential=True)] == [0, 1, 2]
    assert list(calibrate(model, [ids])) == list(select_layers(model))


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("patterns", [["*.1.mlp.*"], ["*.0.*", "*.2.*"], ["*.2.*.q_proj"]])
def test_selected_layers_have_the_same_statistics(fisher, sequential, patterns):
    model, ids = llama(4), tokens(5, 4)
    everything = calibrate(model, [ids], fisher=fisher, heldout_share=0.3)
    steps = iter_block_stats(model, [ids], fisher=fisher, heldout_share=0.3, include=patterns, sequential=sequential)
    found = {name: stats for _, group in steps for name, stats in group.items()}
    names = select_layers(model, patterns)
    assert_same({name: found[name] for name in names}, {name: everything[name] for name in names})
    assert set(found) == set(names)


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_spilled_equals_in_memory(fisher, sequential, dtype):
    model, ids = llama(3, dtype), tokens(5, 4)
    options = {"fisher": fisher, "sequential": sequential}
    in_memory = dict(iter_block_stats(model, [ids[:2], ids[2:]], **options))
    for limit in (0, 600):
        spilled = dict(iter_block_stats(model, [ids[:2], ids[2:]], memory_limit_bytes=limit, **options))
        for index, group in in_memory.items():
            assert_same(spilled[index], group, 0.0)


def test_hidden_states_file_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with HiddenStates(16) as states:
        states.put(("hidden", 0, 0), torch.ones(2))
        states.put(("hidden", 0, 1), torch.full((4,), 2.0).bfloat16()[::2])
        states.put(("hidden", 0, 2), torch.full((2,), 3.0))
        assert states.spilled == 1 and len(list(tmp_path.glob("*/*"))) == 1
        states.take(("hidden", 0, 0))
        states.put(("hidden", 1, 0), torch.full((2,), 4.0))
        assert states.spilled == 1
        assert torch.equal(states.take(("hidden", 0, 2)), torch.full((2,), 3.0))
        assert torch.equal(states.take(("hidden", 0, 1)), torch.full((2,), 2.0).bfloat16())
        assert list(tmp_path.glob("*/*")) == []
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_go_when_the_caller_stops_early(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    steps = iter_block_stats(llama(3), [tokens(4, 4)], memory_limit_bytes=0)
    next(steps)
    assert list(tmp_path.iterdir())
    steps.close()
    assert list(tmp_path.iterdir()) == []


def shrink(model, names):
    """Replace layers as a driver would: new modules with other weights."""
    for name in names:
        old = model.get_submodule(name)
        new = nn.Linear(old.in_features, old.out_features, bias=False, dtype=old.weight.dtype)
        new.weight.data = old.weight.data * 0.5
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], new)


@pytest.mark.parametrize("fisher", [True, False])
def test_sequential_sees_the_replaced_layers(fisher):
    dense, ids = llama(3), tokens(5, 4)
    model = copy.deepcopy(dense)
    before = brute_force(dense, list(ids), 0, heldout_sequences(5, 0.1))
    for index, group in iter_block_stats(model, [ids], fisher=fisher, sequential=True):
        now = brute_force(model, list(ids), 0, heldout_sequences(5, 0.1))
        assert len(group) == 7 and all(f".{index}." in name for name in group)
        for name, layer in group.items():
            assert_close(layer.inputs.second, now[name][0])
            assert_close(layer.heldout.second, now[name][2])
            assert index == 0 or not torch.allclose(layer.inputs.second, before[name][0])
            assert not fisher or layer.gradient.second.shape == before[name][3].shape
            if fisher:
                assert_close(layer.gradient.second, before[name][3])
        shrink(model, group)


def inputs_of(model, ids):
    """Inputs (tokens, n) of every linear layer of the blocks, by ordinary hooks."""
    found = {}

    def hook_of(name):
        return lambda _, args: found.update({name: args[0].reshape(-1, args[0].shape[-1])})

    handles = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in select_layers(model).items()]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_asymmetric_pairs_dense_and_compressed_inputs(build, fisher):
    dense, ids = build().eval(), tokens(5, 4)
    model = copy.deepcopy(dense)
    before = inputs_of(dense, ids)
    options = {"fisher": fisher, "heldout_share": 0.0, "sequential": True, "asymmetric": True}
    for index, group in iter_block_stats(model, [ids], **options):
        now = inputs_of(model, ids)
        for name, layer in group.items():
            assert_close(layer.inputs.cross, before[name].T @ now[name] / 20)
            if index == 0:
                assert torch.equal(layer.inputs.cross, layer.inputs.second)
            else:
                assert not torch.allclose(layer.inputs.cross, layer.inputs.cross.T)
        if build is llama:
            shrink(model, group)
        else:
            for name in group:
                model.get_submodule(name).weight.data *= 0.5
    plain = [g for _, g in iter_block_stats(dense, [ids], fisher=fisher, sequential=True)]
    assert all(layer.inputs.cross is None for group in plain for layer in group.values())


def test_experts_that_see_other_tokens_get_no_cross_moment():
    model, ids = unfused(), tokens(5, 8)
    for index, group in iter_block_stats(model, [ids], fisher=False, sequential=True, asymmetric=True, heldout_share=0):
        experts = [layer for name, layer in group.items() if "experts" in name]
        rest = [layer for name, layer in group.items() if "experts" not in name]
        assert all(layer.inputs.cross is not None for layer in rest)
        assert index == 0 or any(layer.inputs.cross is None for layer in experts)
        for name in group:
            layer = model.get_submodule(name)
            layer.weight.data = torch.randn(layer.weight.shape, dtype=layer.weight.dtype)


def test_asymmetric_needs_sequential():
    with pytest.raises(StatsError, match=r"asymmetric=True pairs inputs .* needs sequential=True; pass both"):
        next(iter_block_stats(llama(), [tokens(5, 4)], asymmetric=True))


@pytest.mark.parametrize("fisher", [True, False])
def test_parallel_sees_the_dense_model(fisher):
    dense, ids = llama(3), tokens(5, 4)
    model = copy.deepcopy(dense)
    found = {}
    for _, group in iter_block_stats(model, [ids], fisher=fisher):
        found.update(group)
        shrink(model, group)
    assert_same({name: found[name] for name in select_layers(dense)}, calibrate(dense, [ids], fisher=fisher), 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_weights(dtype):
    model, ids = llama(2, dtype), tokens(6, 8)
    expected = brute_force(model, list(ids), 0, heldout_sequences(6, 0.1))
    eps = torch.finfo(dtype).eps
    stats = calibrate(model, [ids])
    for name, layer in stats.items():
        assert layer.hessian.dtype == torch.float64
        assert_close(layer.hessian, expected[name][0].double(), 30 * eps)
        assert torch.isfinite(layer.gradient.second).all() and float(layer.gradient.second.trace()) > 0
        if dtype == torch.float32:  # in bfloat16 one rounding of the logits already moves labels
            assert_close(layer.gradient.second, expected[name][3].double(), 100 * eps)


def test_dropout_is_off():
    model = llama(2, attention_dropout=0.5).train()
    assert_same(calibrate(model, [tokens(3, 5)]), calibrate(copy.deepcopy(model).eval(), [tokens(3, 5)]), 0.0)


def snapshot(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(n, id(p), p._version, p.requires_grad, p.grad is None) for n, p in model.named_parameters()],
        [
            (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
            for n, m in model.named_modules()
        ],
        model.config.use_cache,
        torch.is_grad_enabled(),
    )


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
def test_model_is_unchanged_at_every_step(fisher, sequential):
    model, ids = llama(2).train(), tokens(4, 5)
    model.model.layers[0].mlp.eval()
    model.model.norm.weight.requires_grad_(False)
    before, kept = snapshot(model), ids.clone()
    state = torch.get_rng_state()
    for _ in iter_block_stats(model, [ids], fisher=fisher, sequential=sequential):
        assert_unchanged(model, before)
    assert_unchanged(model, before)
    assert torch.equal(ids, kept) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fisher", [True, False])
def test_model_is_unchanged_after_an_error(fisher):
    model = llama(3).train()
    norm = model.model.layers[1].post_attention_layernorm
    with torch.no_grad():
        norm.weight[3] = float("nan")
    before = snapshot(model)
    with pytest.raises(
        NonFiniteError, match=r"input of layer 'model.layers.1.mlp.gate_proj'|logits of the model hold NaN"
    ):
        calibrate(model, [tokens(3, 4)], fisher=fisher)
    after = snapshot(model)
    assert after[1:] == before[1:]


def test_non_finite_activations_name_the_layer():
    model = llama(3)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"the input of layer 'model.layers.1.mlp.gate_proj' holds NaN.*float32"):
        calibrate(model, [tokens(3, 4)], fisher=False)
    with pytest.raises(NonFiniteError, match="the logits of the model hold NaN or Inf during calibration"):
        calibrate(model, [tokens(3, 4)])


def test_non_finite_gradients_name_the_layer():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.a, self.b = nn.Embedding(24, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 24)
            with torch.no_grad():
                self.a.weight[0] = 0

        def forward(self, ids):
            return self.b(self.a(self.embedding(ids)).abs().sqrt())

    with pytest.raises(NonFiniteError, match="the output gradient of layer 'a' holds NaN or Inf"):
        calibrate(Root(), [tokens(2, 4)])


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4, dtype=torch.long)], "masked"])
def test_zero_tokens(batches):
    if batches == "masked":
        batches = [{"input_ids": tokens(2, 3), "attention_mask": torch.zeros(2, 3)}]
    with pytest.raises(StatsError, match="zero calibration tokens: the batches are empty or fully masked"):
        calibrate(llama(1), batches)


def test_fully_masked_sequences_do_not_count():
    model, ids = llama(2), tokens(4, 5)
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[[0, 2]] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    assert_same(calibrate(model, [batch]), calibrate(model, [ids[[1, 3]]]), 0.0)


def test_bad_batches():
    model, ids = llama(1), tokens(2, 3)
    with pytest.raises(ShapeError, match=r"batch 1 is torch.float32 \(2, 3\); expected integer token ids"):
        calibrate(model, [ids, ids.float()])
    with pytest.raises(ShapeError, match=r"batch 0 is torch.int64 \(3,\).*Pass a list of batches"):
        calibrate(model, ids)
    with pytest.raises(ShapeError, match="batch 0 is str; expected"):
        calibrate(model, {"input_ids": ids})
    with pytest.raises(ShapeError, match=r"attention_mask of batch 0 has shape \(3,\); expected \(2, 3\)"):
        calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones(3)}])
    with pytest.raises(StatsError, match=r"batch 0 has keys \['input_ids', 'labels'\]; expected input_ids"):
        calibrate(model, [{"input_ids": ids, "labels": ids}])
    with pytest.raises(StatsError, match=r"heldout_share=1.0 is outside 0 <= heldout_share < 1"):
        calibrate(model, [ids], heldout_share=1.0)
    with pytest.raises(StatsError, match="memory_limit_bytes=-1 is negative"):
        next(iter_block_stats(model, [ids], memory_limit_bytes=-1))


def test_ids_that_the_model_does_not_have():
    model = llama(1, max_position_embeddings=4)
    with pytest.raises(ModelError, match=r"hold token ids 24 to 24; the model knows 0 <= id < 24"):
        calibrate(model, [torch.full((1, 3), 24)])
    with pytest.raises(ModelError, match="ids -1 to"):
        calibrate(model, [torch.tensor([[-1, 2]])])
    with pytest.raises(ModelError, match=r"sequences of 5 tokens are longer.*max_position_embeddings=4"):
        calibrate(model, [tokens(1, 5)])


class Routed(nn.Module):
    """Experts as linear layers on subsets of the tokens; the last one is never asked."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.lm_head = nn.Embedding(24, 4), nn.Linear(4, 24)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.double()

    def forward(self, ids):
        x = self.embedding(ids)
        out = x.clone()
        for number, expert in enumerate(self.experts):
            chosen = (ids % 2 == number).nonzero(as_tuple=True)
            if len(chosen[0]):
                out[chosen] += expert(x[chosen])
        return self.lm_head(out)


def test_routed_tokens():
    model, ids = Routed(), tokens(4, 6)
    stats = calibrate(model, [ids], exclude=["experts.2"], heldout_share=0)
    for number in range(2):
        x = model.embedding(ids)[ids % 2 == number].detach()
        assert stats[f"experts.{number}"].tokens == len(x)
        assert_close(stats[f"experts.{number}"].hessian, x.T @ x / len(x))


def test_the_price_of_an_expert_counts_how_often_it_is_asked():
    model, ids = Routed(), tokens(4, 6)
    stats = calibrate(model, [ids], heldout_share=0)
    for number in range(2):
        layer, asked = stats[f"experts.{number}"], int((ids % 2 == number).sum())
        assert (layer.tokens, layer.gradient.tokens) == (asked, ids.numel())
    doubled = calibrate(model, [torch.cat([ids, ids - ids % 2], 1)], heldout_share=0)  # as many again, all for expert 0
    assert doubled["experts.1"].tokens == stats["experts.1"].tokens
    assert doubled["experts.1"].gradient.tokens == 2 * ids.numel()


def test_an_expert_that_no_token_reaches_takes_the_means_of_its_siblings():
    model, ids = Routed(), tokens(4, 6)
    stats = calibrate(model, [ids], heldout_share=0)
    first, second, lost = (stats[f"experts.{n}"] for n in range(3))
    assert_close(lost.hessian, first.inputs.merge(second.inputs).second)
    assert_close(lost.gradient.second * ids.numel(), first.gradient.second + second.gradient.second)
    assert (first.notes, second.notes) == ((), ())
    assert [note.split(":")[0] for note in lost.notes] == [
        "no calibration token reached this layer", "no gradient reached this layer",
    ]  # fmt: skip


def test_a_layer_that_no_token_reaches_and_that_has_no_sibling():
    model = Plain()
    model.other = nn.Linear(4, 3).double()
    with pytest.raises(StatsError, match=r"no calibration token reached layer 'other' \(1 of 4 layers.*no sibling"):
        calibrate(model, [tokens(4, 6)])


def test_wiring_that_changes_between_batches():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.a, self.b = nn.Embedding(24, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, ids):
            x = self.embedding(ids)
            return self.a(x) + self.b(x if ids[0, 0] == 0 else x + 1)

    batches = [torch.tensor([[0, 1]]), torch.tensor([[1, 1]])]
    with pytest.raises(ModelError, match="layer 'b' shares its input with 'a' in one batch and with 'b' in another"):
        calibrate(Moody(), batches, fisher=False, heldout_share=0)


def test_progress_counts_up_to_the_total():
    for options, stages in [
        ({"fisher": True}, ["forward", "backward"]),
        ({"fisher": False}, ["statistics"]),
        ({"fisher": True, "sequential": True}, ["forward", "backward", "statistics"]),
    ]:
        told = []
        batches = [tokens(2, 4), tokens(2, 4)]
        list(iter_block_stats(llama(3), batches, include=["*.1.*"], progress=lambda *a, t=told: t.append(a), **options))
        assert list(dict.fromkeys(stage for stage, _, _ in told)) == stages
        for stage in stages:
            done = [d for s, d, _ in told if s == stage]
            totals = {t for s, _, t in told if s == stage}
            assert done == list(range(1, len(done) + 1)) and totals == {len(done)}


def test_batches_are_read_once_as_an_iterator():
    model, ids = llama(1), tokens(4, 5)
    assert_same(calibrate(model, iter([ids[:2], ids[2:].int()])), calibrate(model, [ids]))
    groups = read_sequences([ids], 0.3)
    assert [(g.indices, g.heldout) for g in groups] == [((0, 1, 2), False), ((3,), True)]


def test_a_step_keeps_nothing_of_the_block_before():
    import gc
    import weakref

    steps = iter_block_stats(llama(3), [tokens(4, 5)])
    _, group = next(steps)
    alive = [weakref.ref(layer.inputs.second) for layer in group.values()]
    del group
    next(steps)
    gc.collect()
    assert all(ref() is None for ref in alive)
