"""Kernels: implementations of ``y = W x`` for expressions, in one table."""

from tnc.kernels import einsum, reference
from tnc.kernels.table import Bound, Candidate, Kernel, Tensors, backends, choose, register_kernel

__all__ = [
    "Bound",
    "Candidate",
    "Kernel",
    "Tensors",
    "backends",
    "choose",
    "einsum",
    "reference",
    "register_kernel",
]
