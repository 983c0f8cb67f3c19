"""``qlr`` layers of a mixture's experts as one: their weights side by side, and the layers' tensors views of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tnc.kernels.experts import experts, route, weighted_sum
from tnc.kernels.experts_launch import Stacked
from tnc.kernels.grouping import GROUPINGS, Grouping, Routing
from tnc.kernels.qlr import QLR
from tnc.kernels.qlr_launch import Packed
from tnc.kernels.table import Bound, Tensors


@dataclass(frozen=True)
class ExpertGroup:
    """The ``qlr`` layers of all experts, for one launch.

    Attributes:
        stacked: their weights side by side.
        names: for each layer the names of L and R among its tensors; ``None`` without them.
        factors: L and R as the layers hold them, which may be trained.
    """

    stacked: Stacked
    names: tuple[tuple[str, str] | None, ...]
    factors: tuple[tuple[Tensor, Tensor], ...]

    def __call__(self, x: Tensor, index: Tensor, routing: Routing) -> Tensor:
        """(pairs, out_features), zero for pairs of no expert; pair p takes row ``p // n`` of x (pairs / n, in)."""
        s, left, right = self.stacked, self.stacked.left, self.stacked.right
        if torch.is_grad_enabled() and any(factor.requires_grad for pair in self.factors for factor in pair):
            left, right = (torch.cat([factor.flatten() for factor in side]) for side in zip(*self.factors, strict=True))
        y: Tensor = experts(x, index, *routing, s.low, s.high, s.groups, left, right, s.firsts, s.gain, s.ranks, s.bits,
                            s.group, s.scale, s.table)  # fmt: skip
        return y

    def views(self) -> list[dict[str, Tensor]]:
        """For each layer the parts of the group that are its tensors, by the names of the kernel."""
        found = []
        for expert, names in enumerate(self.names):
            member = self.stacked.member(expert)
            parts = {"low": member.low, "groups": member.groups}
            parts |= {"high": member.high} if member.bits == 3 else {}
            parts |= {"gain": member.gain} if member.gain is not None else {}
            found.append(parts | (dict(zip(names, (member.left, member.right), strict=True)) if names else {}))
        return found

    def describe(self) -> str:
        """What runs."""
        least, most = min(self.stacked.ranks), max(self.stacked.ranks)
        rank = f"rank {most}" if least == most else f"ranks {least} to {most}"
        return f"{len(self.names)} experts in one launch: dequant(Q_e) x + L_e (R_e x), {rank}"


def _stack(kernels: Sequence[Bound], tensors: Sequence[Tensors]) -> ExpertGroup | str:
    rows = [kernel for kernel in kernels if isinstance(kernel, QLR)]
    assert len(rows) == len(kernels), "the layers' kernel is qlr"
    members = [kernel.packed(held) for kernel, held in zip(rows, tensors, strict=True)]
    kinds = {(m.bits, m.group, m.scale, m.table, m.gain is None, m.shape[:2]) for m in members}
    if len(kinds) > 1:
        return "its layers differ in number format or shape"
    dtypes = {factor.dtype for m in members for factor in (m.left, m.right) if m.shape[2]}
    if len(dtypes) > 1:
        return "their L and R differ in dtype"
    dtype = next(iter(dtypes), torch.bfloat16)
    members = [m if m.shape[2] else _without_factors(m, dtype) for m in members]
    return ExpertGroup(Stacked.of(members), tuple(map(_factor_names, rows)), tuple((m.left, m.right) for m in members))


def _without_factors(packed: Packed, dtype: torch.dtype) -> Packed:
    """Factors of rank 0 in the dtype of the others."""
    return replace(packed, left=packed.left.to(dtype), right=packed.right.to(dtype))


def _factor_names(kernel: QLR) -> tuple[str, str] | None:
    if kernel.factors is None:
        return None
    prefix = kernel.factors if kernel.product is None else ""
    return f"{prefix}left", f"{prefix}right"


GROUPINGS["qlr"] = Grouping(_stack, route, weighted_sum)
