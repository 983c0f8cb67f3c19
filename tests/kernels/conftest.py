"""What the tests of device code share."""

import pytest
import torch


@pytest.fixture
def memory_begins_as_nan():
    """Every ``empty`` is filled with NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class _Recorded:
    """Hands out zeroed counters and keeps them."""

    def __init__(self):
        self.taken = []

    def take(self, count):
        self.taken.append(torch.zeros(count, dtype=torch.int32, device="cuda" if torch.cuda.is_available() else "cpu"))
        return self.taken[-1]


@pytest.fixture
def counters_taken(monkeypatch):
    """A function: the counters that launches of a module took since, which a kernel must leave at zero."""

    def watch(module):
        recorded = _Recorded()
        monkeypatch.setattr(module, "counters", lambda device: recorded)
        return recorded.taken

    return watch
