"""Problems for the quantizer tests: strategies draw shapes, scales and a seed, not entries."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tnc.formats import IntFormat
from tnc.stats import LayerStats

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Case:
    weight: torch.Tensor
    stats: LayerStats
    format: IntFormat

    @property
    def hessian(self):
        return self.stats.hessian

    def squared(self, term):
        """||W - Q||_H^2 in float64, straight from the definition."""
        error = self.weight.double() - term.to_dense().double()
        return float(torch.einsum("ij,jk,ik->", error, self.hessian, error))


def hessian_of(n, tokens, generator, correlation=1.0):
    mix = torch.eye(n, dtype=torch.float64) + correlation * torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mix
    return x.T @ x / tokens


def case(seed, rows, groups, group, bits, *, symmetric=False, per_row=False, scale=1.0, tokens=None,
         dtype=torch.float64, correlation=1.0):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    n = groups * group
    weight = torch.randn(rows, n, generator=generator, dtype=torch.float64) * scale
    hessian = hessian_of(n, tokens or 4 * n, generator, correlation)
    number = IntFormat(bits, None if per_row else group, symmetric)
    return Case(weight.to(dtype), LayerStats.from_hessian(hessian, tokens=tokens or 4 * n), number)


@st.composite
def cases(draw, dtypes=(torch.float64,), scales=(1.0,), max_groups=4):
    return case(
        draw(st.integers(0, 2**20)),
        draw(st.sampled_from((1, 2, 3, 7))),
        draw(st.integers(1, max_groups)),
        draw(st.sampled_from((1, 2, 5, 8, 13))),
        draw(st.sampled_from((2, 3, 4, 8))),
        symmetric=draw(st.booleans()),
        per_row=draw(st.booleans()),
        scale=draw(st.sampled_from(scales)),
        dtype=draw(st.sampled_from(dtypes)),
        tokens=draw(st.sampled_from((1, 5, 200))),
    )
