"""The operator algebra: leaf terms, `Sum` and `Product`."""

from tnc.terms.base import Expression, Spec, cast, dense64, from_spec, kinds, map_tensors, register
from tnc.terms.combine import Product, Sum
from tnc.terms.dense import Dense
from tnc.terms.diagonal import Diagonal
from tnc.terms.hadamard import Hadamard
from tnc.terms.low_rank import LowRank
from tnc.terms.mpo import Mpo
from tnc.terms.permutation import Permutation
from tnc.terms.quantized import Quantized
from tnc.terms.sparse import Sparse

__all__ = [
    "Dense", "Diagonal", "Expression", "Hadamard", "LowRank", "Mpo", "Permutation", "Product", "Quantized", "Sparse",
    "Spec", "Sum", "cast", "dense64", "from_spec", "kinds", "map_tensors", "register",
]  # fmt: skip
