"""The checks at the border: what they accept, and what their messages say."""

from __future__ import annotations

import pytest
import torch

from tnc.errors import NonFiniteError, all_finite, check_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 17, 4099])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_entry_is_found_anywhere(dtype, size, bad):
    clean = torch.linspace(-3, 3, size, dtype=dtype)
    assert all_finite(clean)
    for place in {0, size // 2, size - 1}:
        broken = clean.clone()
        broken[place] = bad
        assert not all_finite(broken)
        with pytest.raises(NonFiniteError, match=rf"w holds 1 NaN or Inf of {size} entries.*\({place},\)"):
            check_finite(broken, "w")


def test_an_empty_tensor_is_finite_and_gradients_are_left_alone():
    assert all_finite(torch.empty(0, 5))
    weight = torch.ones(3, requires_grad=True)
    assert check_finite(weight, "w") is weight
