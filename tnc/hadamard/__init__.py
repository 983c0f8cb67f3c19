"""Hadamard matrices of every size that models have, and their fast transform."""

from tnc.hadamard.constructions import construction, hadamard_matrix
from tnc.hadamard.orders import block_factors, hadamard_factors
from tnc.hadamard.transform import hadamard_transform, transform_flops

__all__ = [
    "block_factors",
    "construction",
    "hadamard_factors",
    "hadamard_matrix",
    "hadamard_transform",
    "transform_flops",
]
