"""Property-test a decomposer of your own: the law it breaks is named, with the smallest case."""

import torch

import tnc
from tnc.errors import LawError
from tnc.testing import check_decomposer


def forgetful_svd(weight: torch.Tensor, rank: int, metric: tnc.Metric) -> tnc.LowRank:
    """A truncated SVD that ignores the metric it is given."""
    return tnc.truncated_svd(weight, rank)


try:
    check_decomposer(forgetful_svd, optimal=True, max_examples=20)
except LawError as broken:
    print(str(broken).splitlines()[0])
