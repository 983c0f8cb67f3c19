"""What the tests of device code share."""

import pytest
import torch


@pytest.fixture
def memory_begins_as_nan():
    """Every ``empty`` is filled with NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
