"""One layer as a matrix product operator: by tolerance, in the metric of its inputs, and beside the truncated SVD."""

import torch

import tnc
from tnc.networks import als

torch.manual_seed(0)
blocks = [torch.randn(12, 12) for _ in range(3)], [torch.randn(16, 10) for _ in range(3)]
weight = sum(torch.kron(a, b) for a, b in zip(*blocks, strict=True)) + 0.3 * torch.randn(192, 120)
inputs = torch.randn(4000, 120) @ torch.randn(120, 120) / 11
stats = tnc.LayerStats.from_hessian(inputs.T @ inputs / len(inputs), tokens=len(inputs))

for eps in (0.3, 0.1):
    found = tnc.tt_svd(weight, (12, 16), (12, 10), eps=eps)
    print(f"within {eps:.0%}: bonds {found.ranks}, {found.storage_bits / weight.numel():.1f} bits a weight")

start = tnc.tt_svd(weight, (12, 16), (12, 10), max_rank=6)
print("error in H, sweep by sweep:", [round(error, 4) for error in als(weight, start, stats=stats).errors])

stage = tnc.MpoStage(tnc.BitsPerWeight(3), out_modes=(12, 16), in_modes=(12, 10))
found = tnc.decompose(weight, [stage], stats)
report = found.report
print(f"at 3 bits a weight: bonds {report.bonds}, error {report.relative_error:.4f};"
      f" truncated SVD of as many bits: {report.svd_relative_error:.4f}")  # fmt: skip
print(tnc.FactoredLinear(found.operator).explain())
