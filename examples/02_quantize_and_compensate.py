"""Quantize a layer with GPTQ, correct it with low-rank factors, run it as a drop-in module."""

import torch

import tnc

torch.manual_seed(0)
linear = torch.nn.Linear(128, 96)
mixing = torch.randn(128, 128) * torch.linspace(2, 0.05, 128)
inputs = torch.randn(2000, 128) @ mixing.T
stats = tnc.LayerStats.from_hessian(inputs.T @ inputs / len(inputs), tokens=len(inputs))
metric = tnc.Metric.full(stats)
weight = linear.weight.detach()

base = tnc.gptq(weight, stats, tnc.IntFormat(3, group_size=32))
factors = tnc.compensate(weight, base, rank=8, stats=stats)
both = tnc.Sum((base, factors))
for name, form in (("rtn", tnc.rtn(weight, tnc.IntFormat(3, group_size=32))), ("gptq", base), ("gptq + rank 8", both)):
    print(f"{name:<14} error {metric.relative(weight - form.to_dense(), weight):.4f}")

layer = tnc.FactoredLinear.from_linear(linear, both)
print(layer.explain())
print("largest difference of outputs:", float((layer(inputs) - linear(inputs)).abs().max()))
