"""The diagram of an expression as data: nodes, legs and bonds of every term, in the notation of tensor networks.

A node is a stored tensor, or a matrix that is stored packed. A label that meets more than two ends becomes a copy
node, a dot: a diagonal is a vector and a dot with a leg on each side.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from math import prod

import opt_einsum
import torch
from torch import Tensor

from tnc.kernels.network import Piece, piece
from tnc.terms import Expression, Product, Quantized, Sum


@dataclass(frozen=True)
class Node:
    """A tensor.

    Attributes:
        name: of the stored tensor, ``""`` for a copy dot and for a packed matrix.
        shape: of the tensor; empty for a copy dot.
        kind: ``tensor``, ``packed`` or ``copy``.
        text: what a packed matrix is, such as ``int4 g64``.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    text: str = ""


@dataclass(frozen=True)
class Leg:
    """An open leg of node ``node``: ``size`` features of the outputs (``out``) or inputs."""

    node: int
    size: int
    out: bool


@dataclass(frozen=True, eq=False)
class Bond:
    """A line between two nodes.

    Attributes:
        nodes: the two ends.
        size: the bond dimension.
        values: what each of the ``size`` values of the index carries, descending, largest 1: the singular values
            across the bond where cutting it parts the network (``parts``), else the norms of the slices. ``None``
            on the further lines of a copy dot, and for an empty or vanishing bond.
        parts: whether cutting the bond parts the network in two.
    """

    nodes: tuple[int, int]
    size: int
    values: Tensor | None
    parts: bool


@dataclass(frozen=True)
class Panel:
    """The network of one leaf."""

    kind: str
    shape: tuple[int, int]
    nodes: tuple[Node, ...]
    legs: tuple[Leg, ...]
    bonds: tuple[Bond, ...]


@dataclass(frozen=True)
class Diagram:
    """Panels with the sign before each: ``""`` before the first, then ``+`` in a sum and ``·`` in a product.

    Attributes:
        shape: (out_features, in_features).
        panels: one a leaf.
        signs: what stands before each panel, with the opening bracket of a sum inside a product.
        closings: what stands behind each: its closing bracket, or nothing.
        storage_bits: of the expression.
    """

    shape: tuple[int, int]
    panels: tuple[Panel, ...]
    signs: tuple[str, ...]
    closings: tuple[str, ...]
    storage_bits: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over the entries of the matrix."""
        return self.storage_bits / prod(self.shape)


def diagram(expression: Expression) -> Diagram:
    """The diagram of an expression, with the decay of every bond.

    Cost: Gram matrices of both sides of each bond in float64: like a norm of the operator.
    """
    panels, signs, closings = zip(*_panels(expression), strict=True)
    return Diagram(expression.shape, panels, signs, closings, expression.storage_bits)


def _panels(expression: Expression) -> list[tuple[Panel, str, str]]:
    """Every leaf with what stands before and behind it."""
    if not isinstance(expression, (Sum, Product)):
        return [(_leaf(expression), "", "")]
    found: list[tuple[Panel, str, str]] = []
    for k, term in enumerate(expression.terms):
        (panel, sign, closing), *rest = _panels(term)
        bracket = isinstance(expression, Product) and isinstance(term, Sum) and bool(rest)
        before = "" if k == 0 else ("+" if isinstance(expression, Sum) else "·")
        inner = [(panel, before + (" (" if bracket else "") + sign, closing), *rest]
        if bracket:
            last, inside, after = inner[-1]
            inner[-1] = (last, inside, after + ")")
        found += inner
    return found


def _leaf(expression: Expression) -> Panel:
    network = piece(expression, "")
    if any(operand.spec is not None for operand in network.operands):  # stored packed, or rebuilt whole
        text = _words(expression)
        rows, columns = expression.shape
        return Panel(expression.kind, expression.shape, (Node("", expression.shape, "packed", text),),
                     (Leg(0, rows, True), Leg(0, columns, False)), ())  # fmt: skip
    names = [operand.names[0][1] for operand in network.operands]
    nodes = [Node(n, s, "tensor") for n, s in zip(names, network.shapes, strict=True)]
    legs: list[Leg] = []
    bonds: list[Bond] = []
    for label, size in network.sizes().items():
        ends = [k for k, labels in enumerate(network.labels) if label in labels]
        sides = [side for side, known in ((True, network.out), (False, network.into)) if label in known]
        if len(ends) == 1 and not sides:  # a dangling bond of an open chain
            continue
        hub = ends[0]
        if len(ends) + len(sides) > 2:
            hub = len(nodes)
            nodes.append(Node("", (), "copy"))
            lines = [(hub, end) for end in ends]
        else:
            lines = [(ends[0], ends[1])] if len(ends) == 2 else []
        legs += [Leg(hub, size, out) for out in sides]
        values, parts = _decay(network, expression.tensors(), label) if len(ends) > 1 and not sides else (None, False)
        bonds += [Bond(line, size, values if k == 0 else None, parts) for k, line in enumerate(lines)]
    return Panel(expression.kind, expression.shape, tuple(nodes), tuple(legs), tuple(bonds))


def _words(expression: Expression) -> str:
    if not isinstance(expression, Quantized):
        return expression.kind.replace("_", " ")
    return expression.format.describe()


def _decay(network: Piece, tensors: dict[str, Tensor], bond: str) -> tuple[Tensor | None, bool]:
    """Relative singular values across a bond, or norms of its slices where cutting it leaves the network whole."""
    arrays = [tensors[operand.names[0][1]].detach().double().cpu() for operand in network.operands]
    side = _reached(network.labels, bond)
    parts = len(side) < len(arrays) and sum(bond in labels for labels in network.labels) == 2
    if parts:
        inner = [_gram(network, arrays, bond, part) for part in (side, set(range(len(arrays))) - side)]
        values, vectors = torch.linalg.eigh(inner[0])
        root = vectors * values.clamp_min(0).sqrt()
        squares = torch.linalg.eigvalsh(root.T @ inner[1] @ root)
    else:
        squares = _gram(network, arrays, bond, set(range(len(arrays))), diagonal=True)
    ordered = squares.clamp_min(0).sqrt().sort(descending=True).values
    return (ordered / ordered[0] if len(ordered) and float(ordered[0]) > 0 else None), parts


def _reached(labels: tuple[str, ...], bond: str) -> set[int]:
    """Operands on the side of the first end of ``bond``, not crossing it."""
    start = next(k for k, each in enumerate(labels) if bond in each)
    found, waiting = {start}, [start]
    while waiting:
        here = set(labels[waiting.pop()]) - {bond}
        near = [k for k, each in enumerate(labels) if k not in found and here & set(each)]
        found.update(near)
        waiting += near
    return found


def _gram(network: Piece, arrays: list[Tensor], bond: str, side: set[int], *, diagonal: bool = False) -> Tensor:
    """``AᵀA`` of one side as a matrix of its legs by the bond, or the squared norm of every slice of the whole."""
    open_legs = network.out + network.into + (bond if diagonal else "")
    used = {label for k in side for label in network.labels[k]}
    spare = iter(c for c in string.ascii_letters if c not in network.sizes())
    second = {label: label if label in open_legs else next(spare) for label in sorted(used)}
    first = [network.labels[k] for k in sorted(side)]
    doubled = ["".join(second[c] for c in labels) for labels in first]
    output = bond if diagonal else bond + second[bond]
    taken = [arrays[k] for k in sorted(side)]
    result: Tensor = opt_einsum.contract(f"{','.join(first + doubled)}->{output}", *taken, *taken)
    return result
