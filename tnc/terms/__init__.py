"""The operator algebra: leaf terms, and the combinators `Sum`, `Product` and `Chain`."""

from tnc.terms.base import Expression, Spec, cast, dense64, from_spec, kinds, map_tensors, register
from tnc.terms.blast import Blast
from tnc.terms.block_low_rank import BlockLowRank
from tnc.terms.chain import Chain
from tnc.terms.combine import Product, Sum
from tnc.terms.cp import Cp
from tnc.terms.dense import Dense
from tnc.terms.diagonal import Diagonal
from tnc.terms.hadamard import Hadamard
from tnc.terms.low_rank import LowRank
from tnc.terms.monarch import Monarch
from tnc.terms.mpo import Mpo
from tnc.terms.permutation import Permutation
from tnc.terms.quantized import Quantized
from tnc.terms.selection import Selection
from tnc.terms.sparse import Sparse
from tnc.terms.tensor_ring import TensorRing
from tnc.terms.tucker import Tucker

__all__ = [
    "Blast", "BlockLowRank", "Chain", "Cp", "Dense", "Diagonal", "Expression", "Hadamard", "LowRank", "Monarch", "Mpo",
    "Permutation", "Product", "Quantized", "Selection", "Sparse", "Spec", "Sum", "TensorRing", "Tucker", "cast",
    "dense64", "from_spec", "kinds", "map_tensors", "register",
]  # fmt: skip
