"""`round_blocks`: never worse on held-out sequences, better than its start, exact bookkeeping."""

import copy

import pytest
import torch
from test_compress import batches, tiny_llama

import tnc
from tnc.decompose import InputRotation, LowRankStage, OutputRotation, QuantizeStage
from tnc.errors import FormatError, ModelError
from tnc.formats import IntFormat, TrellisFormat
from tnc.models.round_blocks import round_blocks

TEXT = batches(count=10)
ROTATED = tnc.Recipe(
    "rotated", (QuantizeStage(IntFormat(2, 16), method="rtn"), LowRankStage(2)),
    transforms=(InputRotation(), OutputRotation()),
)  # fmt: skip


def block_error(model, teacher, block, ids):
    """Squared output error of one block over its target, by two plain forward passes."""
    with torch.no_grad():
        outputs = []
        for each in (model, teacher):
            handle = each.model.layers[block].register_forward_hook(lambda module, args, out: outputs.append(out))
            each(ids)
            handle.remove()
    return float((outputs[0] - outputs[1]).square().sum() / outputs[1].square().sum())


@pytest.mark.parametrize("recipe", [tnc.recipe("rtn", bits=2, group_size=16), ROTATED])
def test_blocks_come_closer_to_the_dense_ones(recipe):
    dense = tiny_llama()
    stats = tnc.calibrate(dense, TEXT)
    small = tnc.compress(dense, recipe, stats=stats)
    before = copy.deepcopy(small)
    found = round_blocks(small, TEXT, teacher=dense, stats=stats, steps=40)
    assert list(found) == ["model.layers.0", "model.layers.1"]
    heldout = torch.cat([TEXT[4][1:], TEXT[9][1:]])  # every tenth sequence
    first = found["model.layers.0"]
    assert first.before == pytest.approx(block_error(before, dense, 0, heldout), rel=1e-4)
    assert first.after == pytest.approx(block_error(small, dense, 0, heldout), rel=1e-4)
    assert all(each.after < 0.95 * each.before and len(each.layers) == 7 for each in found.values())
    second = found["model.layers.1"]
    assert second.after == pytest.approx(block_error(small, dense, 1, heldout), rel=1e-4)
    for name, module in small.named_modules():
        if isinstance(module, tnc.FactoredLinear):
            old = before.get_submodule(name)
            assert module.report["storage_bits"] == old.report["storage_bits"] == module.operator.storage_bits
            assert "rounded against its block" in module.report["choices"][-1]
            weight = dense.get_submodule(name).weight
            error = (weight - module.operator.to_dense()).detach().double()
            nats = 0.5 * float(torch.trace(error.T @ stats[name].gradient.second @ error @ stats[name].heldout.second))
            assert module.report["predicted_nats"] == pytest.approx(nats, rel=1e-4)


def test_no_steps_change_nothing_and_runs_repeat():
    dense = tiny_llama()
    small = tnc.compress(dense, tnc.recipe("rtn", bits=3, group_size=16))
    twin, still = copy.deepcopy(small), copy.deepcopy(small)
    states = []
    for model, steps in ((small, 8), (twin, 8), (still, 0)):
        found = round_blocks(model, TEXT, teacher=dense, steps=steps)
        states.append((model.state_dict(), found))
    assert all(torch.equal(states[0][0][k], states[1][0][k]) for k in states[0][0])
    assert all(each.before == each.after for each in states[2][1].values())


def test_the_recipe_learns_from_batches_and_says_when_there_are_none():
    dense = tiny_llama()
    recipe = tnc.recipe("autoround_blocks", bits=2, group_size=16)
    assert recipe.block_steps == 200
    text = batches(count=20)
    stats = tnc.calibrate(dense, text)
    alone = tnc.ModelReport.of(tnc.compress(dense, recipe, stats=stats))
    assert all("no batches: codes as they are" in layer["fallbacks"][-1] for layer in alone.layers.values())
    plain = tnc.compress(dense, tnc.recipe("gptq", bits=2, group_size=16), stats=stats)
    learnt = tnc.compress(copy.deepcopy(dense), recipe, iter(text), stats=stats, inplace=True)
    ids = torch.cat([text[i][1:] for i in (4, 9, 14, 19)])  # those held out
    assert block_error(learnt, dense, 0, ids) < 0.97 * block_error(plain, dense, 0, ids)
    assert not any(layer["fallbacks"] for layer in tnc.ModelReport.of(learnt).layers.values())


def test_messages():
    dense = tiny_llama()
    with pytest.raises(ModelError, match="no layer with one quantized base of scalar codes"):
        round_blocks(dense, TEXT, teacher=dense)
    coded = tnc.Recipe("coded", (QuantizeStage(TrellisFormat(2, 4)),))
    small = tnc.compress(dense, coded, TEXT)
    with pytest.raises(ModelError, match="Trellises are coded as a whole"):
        round_blocks(small, TEXT, teacher=dense)
    small = tnc.compress(dense, tnc.recipe("rtn", bits=3), include=["*layers.1*"])
    with pytest.raises(FormatError, match=r"round_blocks\(steps=-1"):
        round_blocks(small, TEXT, teacher=dense, steps=-1)
    with pytest.raises(ModelError, match="the teacher has no layer"):
        round_blocks(small, TEXT, teacher=torch.nn.Linear(2, 2))
