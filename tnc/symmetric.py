"""Products of two matrices that are known to be symmetric, such as Gram matrices, for half the work."""

from __future__ import annotations

from torch import Tensor

_PANELS = 8  # 9/16 of the whole product, in panels still wide enough for its full speed


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.mT`` (..., n, n) of two (..., n, k), known to be symmetric; exactly symmetric.

    The lower triangle is multiplied by panels of columns, and mirrored.

    Cost: 9/16 of a product, ``9/8 n² k`` flops.
    """
    size = left.shape[-2]
    product = left.new_empty(*left.shape[:-2], size, size)
    width = max(-(-size // _PANELS), 1)
    for start in range(0, size, width):
        end = min(start + width, size)
        panel = left[..., start:, :] @ right[..., start:end, :].mT
        corner = panel[..., : end - start, :]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        product[..., start:, start:end], product[..., start:end, start:] = panel, panel.mT
    return product
