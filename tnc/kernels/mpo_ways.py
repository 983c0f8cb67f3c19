"""The ways to apply a matrix product operator: sweep over the cores, path of fewest FLOPs, rebuild, keep.

Each is data with its predicted time; `tnc.kernels.mpo_prices` makes and prices them, `tnc.kernels.mpo` chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from tnc.kernels.einsum import Plan
from tnc.kernels.kept import KEPT
from tnc.kernels.table import Tensors


@dataclass(frozen=True)
class Sweep:
    """Cores, or merged groups of them, applied from the last to the first.

    Attributes:
        names: the cores' tensors.
        groups: numbers of neighbouring cores merged into one, in order.
        slice: tokens taken at a time; ``None`` takes all.
        features: (out_features, in_features) without padding.
        seconds: predicted for the tokens planned for.
        flops: operations for them.
    """

    names: tuple[str, ...]
    groups: tuple[int, ...]
    slice: int | None
    features: tuple[int, int]
    seconds: float = field(compare=False)
    flops: float = field(compare=False)

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``."""
        cores, at = [], 0
        for count in self.groups:
            cores.append(merged([tensors[name] for name in self.names[at : at + count]], x.dtype))
            at += count
        x = pad(x, (0, prod([core.shape[2] for core in cores]) - self.features[1]))
        if self.slice is None or torch.compiler.is_compiling():
            return self._swept(x, cores)
        return torch.cat([self._swept(part, cores) for part in torch.split(x, self.slice)])

    def _swept(self, x: Tensor, cores: list[Tensor]) -> Tensor:
        """State before core k: (tokens i_1 .. i_k-1, i_k r_k, o_k+1 .. o_d)."""
        tokens, outs = x.shape[0], 1
        lead, state = tokens * x.shape[1], x
        for core in reversed(cores):
            before, out, into, after = core.shape
            lead = lead // into
            matrix = core.reshape(before * out, into * after)
            if outs == 1:  # one product of two matrices, not a matrix-vector product for each row
                state = linear(state.reshape(lead, into * after), matrix)
            else:
                state = torch.matmul(matrix, state.reshape(lead, into * after, outs))
            outs *= out
        return state.reshape(tokens, outs)[:, : self.features[0]]

    def describe(self) -> str:
        """The order, the groups, the slice."""
        merged = "" if max(self.groups) == 1 else f" merged {'+'.join(map(str, self.groups))}"
        part = "" if self.slice is None else f", {self.slice} tokens at a time"
        return f"sweep over {len(self.names)} cores{merged}, no permutation{part}"


@dataclass(frozen=True)
class Rebuild:
    """Rows of the dense weight rebuilt a block at a time, used and dropped.

    The cores are merged into two, ``(1, o, i, r)`` and ``(r, O, I, 1)``. A block is ``(O I, r) x (r, i)`` for each of
    its o, whose result is rows (o O) with columns in the order (I i): x is permuted once, no block ever is.

    Attributes:
        names: the cores' tensors.
        split: cores in the first of the two.
        rows: values of o in a block.
        features: (out_features, in_features) without padding.
        seconds: predicted for the tokens planned for.
        flops: operations for them.
    """

    names: tuple[str, ...]
    split: int
    rows: int
    features: tuple[int, int]
    seconds: float = field(compare=False)
    flops: float = field(compare=False)

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``; the weight is rounded once."""
        first, rest = self._halves(tensors, x.dtype)
        into = first.shape[1], rest.shape[2]
        x = pad(x, (0, prod(into) - self.features[1]))
        x = torch.unflatten(x, -1, into).transpose(1, 2).flatten(1)
        outputs = [linear(x, block.to(x.dtype).flatten(1)) for block in _blocks(first, rest, self.rows)]
        return torch.cat(outputs, dim=-1)[:, : self.features[0]]

    def weight(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """The whole weight in ``dtype``, filled a block at a time."""
        first, rest = self._halves(tensors, dtype)
        weight = torch.empty(self.features, dtype=dtype, device=first.device)
        at = 0
        for block in _blocks(first, rest, self.rows):
            rows = block.transpose(1, 2).flatten(1)[: self.features[0] - at, : self.features[1]]
            weight[at : at + len(block)] = rows
            at += len(block)
        return weight

    def _halves(self, tensors: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(o, i, r) and (r, O, I) in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        cores = [tensors[name] for name in self.names]
        return merged(cores[: self.split], wide)[0], merged(cores[self.split :], wide)[..., 0]

    def describe(self) -> str:
        """What is rebuilt at a time."""
        return f"rebuilds the weight in blocks of {self.rows} values of {'o' + self._modes()}"

    def _modes(self) -> str:
        return "_1" if self.split == 1 else f"_1..o_{self.split}"


def _blocks(first: Tensor, rest: Tensor, rows: int) -> Iterator[Tensor]:
    """Blocks (rows O, I, i) of the weight, its columns in the order (I, i)."""
    bond, out, into = rest.shape
    columns = rest.reshape(bond, out * into).T.contiguous()  # a product with it transposed took 1.3 times as long
    for block in torch.split(first, rows):  # (rows, i, r)
        product = torch.bmm(columns.expand(len(block), -1, -1), block.mT)
        yield product.reshape(len(block) * out, into, first.shape[1])


@dataclass(frozen=True)
class Path:
    """The order of fewest FLOPs."""

    inner: Plan
    seconds: float = field(compare=False)

    @property
    def flops(self) -> float:
        """Operations for the tokens planned for."""
        return self.inner.flops

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``."""
        return self.inner(x, tensors)

    def describe(self) -> str:
        """The contractions in order."""
        return self.inner.describe()


@dataclass(frozen=True)
class Keep:
    """One multiplication by the dense weight, which stays in memory from the first call on.

    A process keeps one weight unless the user gives room for more (`tnc.kernels.kept`). For operators without room,
    where the cores are trained, and in a compiled graph, ``other`` runs.

    Attributes:
        rebuild: makes the weight.
        other: what runs where the weight cannot be kept.
        seconds: predicted for a call that finds the weight.
        flops: operations of it.
    """

    rebuild: Rebuild
    other: Sweep | Rebuild | Path
    seconds: float = field(compare=False)
    flops: float = field(compare=False)

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``."""
        cores = [tensors[name] for name in self.rebuild.names]
        if torch.compiler.is_compiling() or not all(map(_constant, cores)):
            return self.other(x, tensors)
        weight = KEPT.weight(
            cores, x.dtype, lambda: self.rebuild.weight(tensors, x.dtype),
            nbytes=prod(self.rebuild.features) * x.dtype.itemsize, gain=self.other.seconds - self.seconds,
        )  # fmt: skip
        return self.other(x, tensors) if weight is None else linear(x, weight)

    def describe(self) -> str:
        """What is kept, and what runs where it is not."""
        return f"keeps the dense weight where there is room (one a process by default), else {self.other.describe()}"


def _constant(core: Tensor) -> bool:
    """Whether a weight made of the core may outlive the call."""
    trained = core.requires_grad and torch.is_grad_enabled()
    return core.device.type == "cpu" and core.layout == torch.strided and type(core) in _PLAIN and not trained


_PLAIN = (Tensor, torch.nn.Parameter)

Planned = Sweep | Rebuild | Path | Keep


def merged(cores: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Neighbouring cores as one (r_prev, o.., i.., r_next) in ``dtype``."""
    result = cores[0].to(dtype)
    for core in cores[1:]:
        before, out, into, bond = result.shape
        _, o, i, after = core.shape
        pairs = (result.reshape(-1, bond) @ core.to(dtype).reshape(bond, -1)).reshape(before, out, into, o, i, after)
        result = pairs.transpose(2, 3).reshape(before, out * o, into * i, after)
    return result
