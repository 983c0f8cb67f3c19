"""Tensor networks: modes, algebra, canonical forms and decompositions of matrix product operators."""

from tnc.networks.algebra import add, compose, scale, transpose
from tnc.networks.als import AlsFit, als
from tnc.networks.bound import mpo_lower_bound
from tnc.networks.canonical import inner, left_canonical, mixed_canonical, norm, right_canonical
from tnc.networks.convert import from_quimb_arrays, from_tensorly, to_quimb_arrays, to_tensorly
from tnc.networks.cross import CrossFit, mpo_cross
from tnc.networks.entries import Entries, EntrySource
from tnc.networks.from_operator import LinearMap, tt_svd_of_operator
from tnc.networks.kronecker import KroneckerMetric, nearest_kronecker
from tnc.networks.modes import balanced_modes, exact_modes, factorizations, site_modes
from tnc.networks.operator_entries import OperatorEntries, TwoSidedMap
from tnc.networks.rounding import round_mpo
from tnc.networks.shared_order import Rows, SharedOrder, shared_order
from tnc.networks.site_order import SiteOrder, site_order
from tnc.networks.tt_svd import MpoFit, tt_svd, tt_svd_batched, tt_svd_with_report
from tnc.networks.two_site import adapt_ranks

__all__ = [
    "AlsFit", "CrossFit", "Entries", "EntrySource", "KroneckerMetric", "LinearMap", "MpoFit", "OperatorEntries",
    "Rows", "SharedOrder", "SiteOrder", "TwoSidedMap", "adapt_ranks", "add", "als", "balanced_modes", "compose",
    "exact_modes", "factorizations", "from_quimb_arrays", "from_tensorly", "inner", "left_canonical",
    "mixed_canonical", "mpo_cross", "mpo_lower_bound", "nearest_kronecker", "norm", "right_canonical", "round_mpo",
    "scale", "shared_order", "site_modes", "site_order", "to_quimb_arrays", "to_tensorly", "transpose", "tt_svd",
    "tt_svd_batched", "tt_svd_of_operator", "tt_svd_with_report",
]  # fmt: skip
