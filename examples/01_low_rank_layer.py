"""Choose a rank by error: the best low-rank form of one layer, with its certificate."""

import torch

import tnc

torch.manual_seed(0)
weight = torch.randn(96, 128) @ torch.diag(torch.linspace(1, 0.01, 128))
inputs = torch.randn(1000, 128) * torch.linspace(3, 0.1, 128)
stats = tnc.LayerStats.from_hessian(inputs.T @ inputs / len(inputs), tokens=len(inputs))

for eps in (0.3, 0.1, 0.03):
    found = tnc.decompose(weight, [tnc.LowRankStage(tnc.RelativeError(eps))], stats)
    report = found.report
    print(f"error {report.relative_error:.4f} <= {eps}: rank {report.rank}, {report.bits_per_weight:.1f} bits a weight,"
          f" no rank-{report.rank} form is below {report.lower_bound:.4f}")  # fmt: skip
