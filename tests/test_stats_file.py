"""Statistics on disk: exact, shared where shared, refused where not to be trusted."""

import json
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tnc.errors import StatsError
from tnc.stats import LayerStats, Moments
from tnc.stats_file import load_stats, save_stats, stats_metadata


def moments(n, tokens, seed, mean_abs=True, dtype=torch.float64):
    x = torch.randn(max(tokens, 1), n, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return Moments(x.T @ x / tokens, x.abs().mean(0) if mean_abs else None, tokens)


def example():
    shared, held = moments(3, 7, 0), moments(3, 2, 1)
    return {
        "b.q": LayerStats(shared, held, moments(4, 7, 2)),
        "a.k": LayerStats(shared, held, moments(2, 7, 3)),
        "c.o": LayerStats(moments(5, 7, 4, mean_abs=False)),
    }


def same(a, b):
    if a is None or b is None:
        return a is b
    abs_equal = a.mean_abs is b.mean_abs if a.mean_abs is None else torch.equal(a.mean_abs, b.mean_abs)
    return a.second.dtype == b.second.dtype and torch.equal(a.second, b.second) and abs_equal and a.tokens == b.tokens


@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(1, 5), tokens=st.integers(1, 2**40), seed=st.integers(0, 99), mean_abs=st.booleans(),
    scale=st.sampled_from([1e-300, 1e-4, 1.0, 1e300]), dtype=st.sampled_from([torch.float64, torch.float32]),
)  # fmt: skip
def test_round_trip_is_exact(tmp_path_factory, n, tokens, seed, mean_abs, scale, dtype):
    path = tmp_path_factory.mktemp("stats") / "s.safetensors"
    found = moments(n, 3, seed, mean_abs, dtype)
    given_stats = {"layer λ": LayerStats(Moments(found.second * scale, found.mean_abs, tokens))}
    save_stats(given_stats, path)
    assert same(load_stats(path)["layer λ"].inputs, given_stats["layer λ"].inputs)


def test_sharing_and_order_survive(tmp_path):
    stats = example()
    save_stats(stats, tmp_path / "s", extra={"model": "tiny"})
    loaded = load_stats(tmp_path / "s")
    assert list(loaded) == list(stats)
    for name, layer in stats.items():
        for part in ("inputs", "heldout", "gradient"):
            assert same(getattr(layer, part), getattr(loaded[name], part)), (name, part)
    assert loaded["b.q"].inputs is loaded["a.k"].inputs and loaded["b.q"].heldout is loaded["a.k"].heldout
    assert loaded["b.q"].inputs is not loaded["b.q"].heldout and loaded["c.o"].inputs.mean_abs is None
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert sum(key.endswith("second") for key in list(file.keys())) == 5
    assert stats_metadata(tmp_path / "s") == {"model": "tiny"}


def test_views_and_shared_memory_are_stored(tmp_path):
    second = torch.eye(6, dtype=torch.float64)
    view = Moments(second[::2, ::2], None, 1)
    save_stats({"a": LayerStats(Moments(second, None, 2)), "b": LayerStats(view)}, tmp_path / "s")
    assert same(load_stats(tmp_path / "s")["b"].inputs, view)


def test_no_silent_overwrite(tmp_path):
    path = tmp_path / "s"
    save_stats(example(), path)
    before = path.read_bytes()
    with pytest.raises(StatsError, match=r"s exists; expected a new file.*overwrite=True"):
        save_stats({}, path)
    assert path.read_bytes() == before
    save_stats({}, path, overwrite=True)
    assert load_stats(path) == {} and os.listdir(tmp_path) == ["s"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s"
    save_stats(example(), path)
    before = path.read_bytes()
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(tensors, name, metadata, error=error):
            with open(name, "wb") as file:
                file.write(b"half")
            raise error

        monkeypatch.setattr("tnc.stats_file.save_file", fail)
        expected = StatsError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            save_stats(example(), path, overwrite=True)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["s"]
        if expected is StatsError:
            assert "could not be written" in str(caught.value) and "No space left" in str(caught.value)


def test_file_mode_follows_the_umask(tmp_path):
    (tmp_path / "plain").touch()
    save_stats(example(), tmp_path / "s")
    assert (tmp_path / "s").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_bad_targets(tmp_path):
    with pytest.raises(StatsError, match="is a folder; expected the name of a file"):
        save_stats({}, tmp_path, overwrite=True)
    with pytest.raises(StatsError, match=r"the folder .*nowhere does not exist; create it"):
        save_stats({}, tmp_path / "nowhere" / "s")
    with pytest.raises(StatsError, match=r"reserved keys \['layers'\]"):
        save_stats({}, tmp_path / "s", extra={"layers": "x"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 5, 50, 0.5, 0.999])
def test_truncated(tmp_path, keep):
    path = tmp_path / "short"
    save_stats(example(), path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(StatsError, match="short is truncated or corrupt"):
        load_stats(path)


def test_missing(tmp_path):
    with pytest.raises(StatsError, match="gone is not a file; expected statistics written by save_stats"):
        load_stats(tmp_path / "gone")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("bomb-went-off",))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5, "torch", "torch-old"])
def test_pickles_are_refused_unread(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    else:
        torch.save({"a": Bomb()}, path, _use_new_zipfile_serialization=protocol == "torch")
    message = "truncated or corrupt" if protocol == 0 else "bad is a pickle.*refused"
    with pytest.raises(StatsError, match=message):
        load_stats(path)
    assert os.listdir(tmp_path) == ["bad"]


def rewrite(path, **changes):
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        metadata = {**file.metadata(), **changes}
    save_file(tensors, path, metadata={key: value for key, value in metadata.items() if value is not None})


def test_newer_version_and_other_files(tmp_path):
    path = tmp_path / "s"
    save_stats(example(), path)
    rewrite(path, tnc_version="2")
    with pytest.raises(StatsError, match=r"s has format version 2; this tnc reads up to 1. Update tnc"):
        load_stats(path)
    rewrite(path, tnc_version="new")
    with pytest.raises(StatsError, match="without layer statistics"):
        load_stats(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(StatsError, match="s is a safetensors file without layer statistics"):
        load_stats(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": "[7]"},
        {"tokens": None},
        {"layers": "[{}]"},
        {"layers": "{"},
        {"layers": "[3]"},
        {"tokens": "[0,0,0,0,0]"},
    ],
)
def test_tampered_metadata(tmp_path, changes):
    path = tmp_path / "s"
    save_stats(example(), path)
    rewrite(path, **changes)
    with pytest.raises(StatsError, match="s is damaged"):
        load_stats(path)


def test_negative_places_are_damage(tmp_path):
    path = tmp_path / "s"
    save_stats(example(), path)
    rewrite(path, layers=json.dumps([{"name": "a", "inputs": -1, "heldout": None, "gradient": None}]))
    with pytest.raises(StatsError, match="s is damaged"):
        load_stats(path)


@pytest.mark.parametrize(("key", "shape"), [("second", (2, 3)), ("second", (3,)), ("mean_abs", (2,))])
def test_wrong_shapes_are_damage(tmp_path, key, shape):
    path = tmp_path / "s"
    save_stats({"a": LayerStats(moments(3, 7, 0))}, path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        metadata = file.metadata()
    save_file({**tensors, f"moments.0.{key}": torch.zeros(shape)}, path, metadata=metadata)
    with pytest.raises(StatsError, match=f"s is damaged.*{key} has shape"):
        load_stats(path)


def test_cross_moments_survive(tmp_path):
    found = Moments(torch.eye(3).double(), None, 4, torch.arange(9.0).double().reshape(3, 3))
    save_stats({"a": LayerStats(found)}, tmp_path / "s")
    loaded = load_stats(tmp_path / "s")["a"].inputs
    assert torch.equal(loaded.cross, found.cross)
    assert torch.equal(loaded.second, found.second)
