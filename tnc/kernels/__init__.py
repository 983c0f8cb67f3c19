"""Kernels: implementations of ``y = W x`` for expressions, in one table."""

from importlib.util import find_spec

from tnc.kernels import composed, einsum, mpo, qlr_cpu, reference, trellis_cpu
from tnc.kernels.einsum import Plan, plan
from tnc.kernels.table import Bound, Candidate, Kernel, Repacking, Tensors, Timed, backends, choose, register_kernel

if find_spec("triton") is not None:  # the optional rows of the table
    from tnc.kernels import chain, experts_group, hadamard, low_rank, mpo2, mpo3, qlr, trellis, tuning_problems  # noqa: F401

__all__ = [
    "Bound",
    "Candidate",
    "Kernel",
    "Plan",
    "Repacking",
    "Tensors",
    "Timed",
    "backends",
    "choose",
    "composed",
    "einsum",
    "mpo",
    "plan",
    "qlr_cpu",
    "reference",
    "register_kernel",
    "trellis_cpu",
]
