"""Hypothesis strategies and laws for terms, decomposers and quantizers of your own.

    from tnc.testing import check_decomposer

    check_decomposer(my_svd)

A check runs every law on many small problems, from the widest domain on: 1 x n weights, rank 0 and full,
singular statistics, scales 1e-6 to 1e6, four dtypes. It raises `tnc.errors.LawError` with the name of the
first law that is broken, what was expected, and the smallest case that breaks it, as a line of code.
Needs the ``test`` extra; ``import tnc`` alone never imports Hypothesis.
"""

from tnc.testing._hypothesis import require_hypothesis

require_hypothesis()

from tnc.testing.decomposer_laws import check_decomposer  # noqa: E402
from tnc.testing.expressions import expressions  # noqa: E402
from tnc.testing.form_laws import check_form, check_order_blind  # noqa: E402
from tnc.testing.matrices import HESSIANS, SPECTRA, make_hessian, make_weight  # noqa: E402
from tnc.testing.mpo_algebra_laws import (  # noqa: E402
    check_mpo_batch,
    check_mpo_gauge,
    check_mpo_product,
    check_mpo_sum,
)
from tnc.testing.mpo_change_laws import RefineCase, check_mpo_refiner, check_mpo_rounder, refine_cases  # noqa: E402
from tnc.testing.mpo_laws import (  # noqa: E402
    MpoCase,
    check_mpo_approximation,
    check_mpo_decomposer,
    check_mpo_tolerance,
    mpo_cases,
    mpos,
)
from tnc.testing.problems import METRICS, WeightedProblem, make_problem  # noqa: E402
from tnc.testing.quantizer_laws import check_quantizer  # noqa: E402
from tnc.testing.strategies import entry_formats, formats, hessians, int_formats, weighted_problems, weights  # noqa: E402
from tnc.testing.term_laws import check_term  # noqa: E402

__all__ = [
    "HESSIANS", "METRICS", "SPECTRA", "MpoCase", "RefineCase", "WeightedProblem", "check_decomposer", "check_form",
    "check_mpo_approximation", "check_mpo_batch", "check_mpo_decomposer", "check_mpo_gauge", "check_mpo_product",
    "check_mpo_refiner", "check_mpo_rounder", "check_mpo_sum", "check_mpo_tolerance", "check_order_blind",
    "check_quantizer", "check_term", "entry_formats", "expressions", "formats", "hessians", "int_formats",
    "make_hessian", "make_problem", "make_weight", "mpo_cases", "mpos", "refine_cases", "weighted_problems",
    "weights",
]  # fmt: skip
