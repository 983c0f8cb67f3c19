"""A killed run goes on where it stopped, and ends with the same model."""

import pytest
import torch
from test_compress import batches, logits, tiny_llama

import tnc
from tnc.checkpoint import Journal
from tnc.checkpoint.journal import digest
from tnc.errors import CheckpointError
from tnc.models import compress as driver

RECIPE = tnc.recipe("eora", bits=3, group_size=16, rank=4)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the library may catch it."""


def killed_after(layers):
    def progress(stage, done, total):
        if stage == "compress" and done == layers:
            raise Killed

    return progress


@pytest.fixture
def counted(monkeypatch):
    """Names of nothing, counts of everything: how many layers were decomposed."""
    calls = []
    real = driver.decompose_by
    monkeypatch.setattr(driver, "decompose_by", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


@pytest.mark.parametrize("options", [{}, {"sequential": True}, {"sequential": True, "fisher": False}])
def test_a_killed_run_goes_on(options, counted, tmp_path):
    model, journal = tiny_llama(), Journal(tmp_path / "run")
    whole = tnc.compress(model, RECIPE, batches(), **options)
    counted.clear()
    with pytest.raises(Killed):
        tnc.compress(model, RECIPE, batches(), journal=journal, progress=killed_after(9), **options)
    assert (len(journal), len(counted)) == (9, 9)
    counted.clear()
    again = tnc.compress(model, RECIPE, batches(), journal=journal, **options)
    assert (len(journal), len(counted)) == (14, 5)
    ids = batches(seed=9, count=1)[0]
    assert torch.equal(logits(again, ids), logits(whole, ids))
    layers = tnc.ModelReport.of(again).layers
    for name, report in tnc.ModelReport.of(whole).layers.items():
        assert {**report, "seconds": 0} == {**layers[name], "seconds": 0}


@pytest.mark.parametrize("change", ["recipe", "text", "weight", "dtype"])
def test_another_run_finds_nothing(change, counted, tmp_path):
    journal, model, text, recipe, dtype = Journal(tmp_path / "run"), tiny_llama(), batches(), RECIPE, None
    tnc.compress(model, recipe, text, journal=journal)
    counted.clear()
    if change == "recipe":
        recipe = tnc.recipe("eora", bits=3, group_size=16, rank=5)
    elif change == "text":
        text = batches(seed=1)
    elif change == "weight":
        model = tiny_llama(seed=1)
    else:
        dtype = torch.float16
    tnc.compress(model, recipe, text, journal=journal, dtype=dtype)
    assert len(counted) == 14


def test_a_changed_record_is_refused(tmp_path):
    journal, term = Journal(tmp_path), tnc.LowRank(torch.ones(3, 1), torch.ones(1, 4))
    journal.add("a", term, {"rank": 1})
    found = journal.find("a")
    assert torch.equal(found.operator.to_dense(), term.to_dense())
    assert found.report == {"rank": 1}
    path = tmp_path / "a.safetensors"
    data = bytearray(path.read_bytes())
    for cut in (data[:-3], data[: len(data) // 2], b""):
        path.write_bytes(cut)
        with pytest.raises(CheckpointError, match=r"cannot be read.*Remove the file"):
            journal.find("a")
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="was changed"):
        journal.find("a")
    journal.clear()
    assert journal.find("a") is None
    assert not tmp_path.exists()


def test_a_folder_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be recorded"):
        Journal(tmp_path / "file" / "run").add("a", tnc.Dense(torch.ones(1, 1)), {})


def test_digest_tells_everything_apart():
    x = torch.arange(4.0)
    seen = [[x], [x.reshape(2, 2)], [x.double()], [x + 1], [x, None], [None, x], ["1"], [], [x[:0]], [x[::2]]]
    assert len({digest(parts) for parts in seen}) == len(seen)
    assert digest([x.reshape(2, 2).T]) == digest([x.reshape(2, 2).T.contiguous()])
