"""Kernels: implementations of ``y = W x`` for expressions, in one table."""

from tnc.kernels import einsum, reference
from tnc.kernels.einsum import Plan, plan
from tnc.kernels.table import Bound, Candidate, Kernel, Tensors, backends, choose, register_kernel

__all__ = [
    "Bound",
    "Candidate",
    "Kernel",
    "Plan",
    "Tensors",
    "backends",
    "choose",
    "einsum",
    "plan",
    "reference",
    "register_kernel",
]
