"""Fingerprints: every edit changes them, and C and torch agree with plain arithmetic on the bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnc.kernels import fingerprint as module
from tnc.kernels.fingerprint import fingerprint


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(module, "library", lambda _: "no compiler")


def by_numpy(tensor):
    """The definition: words of 8 bytes in rows of 256, filled up with zeros, added modulo 2^64."""
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    table = np.frombuffer(raw + bytes(-len(raw) % 2048), dtype=np.uint64).reshape(-1, 256)
    sums = np.concatenate([table.sum(0, dtype=np.uint64), table.sum(1, dtype=np.uint64)])
    return torch.from_numpy(sums.view(np.int64).copy())


@given(
    sizes=st.lists(st.sampled_from([0, 1, 3, 255, 256, 511, 512, 513, 2048, 5000]), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int8]),
    offset=st.integers(0, 3),
    compiled=st.booleans(),
)
def test_it_is_the_sum_of_words_wherever_they_lie(sizes, dtype, offset, compiled):
    generator = torch.Generator().manual_seed(len(sizes))
    tensors = [(torch.randn(size + offset, generator=generator) * 50).to(dtype)[offset:] for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(module, "library", lambda _: "no compiler")
        found = fingerprint(tensors)
    assert torch.equal(found, torch.cat([by_numpy(tensor) for tensor in tensors]))


def test_it_sees_every_single_entry(way):
    tensor = torch.randn(3, 5, 7, 2)
    before = fingerprint([tensor])
    for place in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[place] = torch.nextafter(changed.view(-1)[place], torch.tensor(9.0))
        assert not torch.equal(fingerprint([changed]), before)


def test_it_sees_entries_that_change_places(way):
    tensor = torch.randn(4, 1024)
    before = fingerprint([tensor])
    for other in (tensor.flip(0), tensor.flip(1), tensor.roll(1, 1), tensor.roll(512, 1)):
        assert not torch.equal(fingerprint([other]), before)
    assert torch.equal(fingerprint([tensor.T.contiguous().T]), before), "strides are no matter"
